"""What verify says of a healthy, a damaged and a rewound run, and that it reads nothing but bytes."""

import subprocess
import sys

import pytest

from nmoe.checkpoint import format as layout
from nmoe.checkpoint import reader
from nmoe.checkpoint.verify import read_head, read_manifest, rewind, verify
from nmoe.errors import RunError
from nmoe.rdep.control import Control


def flip(path, position=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def only_of(directory, step):
    """An object that only that step's checkpoint needs."""
    others = set()
    for other in layout.steps_on_disk(directory):
        if other != step:
            others |= set(read_manifest(directory, other)[0].objects)
    return layout.object_path(directory, min(set(read_manifest(directory, step)[0].objects) - others))


def test_a_healthy_run_has_no_faults_and_no_notes(directory, tool):
    saved = tool.save(directory, 1, 2, 3, keep=3)
    report = verify(directory)
    assert report.faults == ()
    assert report.notes == ()
    assert [(c.step, c.ok, c.manifest_sha256, c.state_digest) for c in report.checkpoints] == [
        (s.step, True, s.manifest_sha256, s.state_digest) for s in saved
    ]
    assert report.head.step == 3


def test_a_run_without_checkpoints_has_no_faults(directory):
    assert verify(directory).checkpoints == ()
    assert verify(directory).faults == ()


def test_every_fault_is_named_and_belongs_to_its_step(directory, tool):
    tool.save(directory, 1, 2, 3, keep=3)
    flipped, gone = only_of(directory, 1), only_of(directory, 3)
    flip(flipped)
    gone.unlink()
    flip(layout.manifest_path(directory, 2), 40)
    report = verify(directory)
    assert {c.step: c.ok for c in report.checkpoints} == {1: False, 2: False, 3: False}
    texts = {str(fault) for fault in report.faults}
    assert any(flipped.name in text and "which is not its name" in text and "(step 1)" in text for text in texts)
    assert any(gone.name in text and "is missing; tensor `" in text and "(step 3)" in text for text in texts)
    assert any("step_00000002/manifest.json" in text for text in texts)
    assert len(texts) == 3


def test_an_object_that_two_checkpoints_share_is_a_fault_of_both(directory, tool):
    tool.save(directory, 1, 2, keep=2)
    shared = read_manifest(directory, 2)[0].tensors["model.frozen"].slices[0]
    flip(layout.object_path(directory, shared))
    assert {fault.step for fault in verify(directory).faults} == {1, 2}
    with pytest.raises(RunError, match="N0302"):
        rewind(directory)


def test_a_whole_manifest_in_the_wrong_place_breaks_the_chain(tmp_path, tool):
    tool.save(tmp_path / "a", 1, 2, keep=2)
    tool.save(tmp_path / "b", 1, keep=2, attempt=5)
    other = layout.manifest_path(tmp_path / "b", 1).read_bytes()
    layout.manifest_path(tmp_path / "a", 1).write_bytes(other)
    faults = verify(tmp_path / "a").faults
    assert [str(fault) for fault in faults] == [
        "`step_00000001/manifest.json` is not the manifest that step 2 names (step 1)"
    ]


def test_a_manifest_in_the_place_of_another_is_no_witness_of_the_one_before(tmp_path, tool):
    """What it says of its own parent is of another run: the older checkpoint stays whole, and is gone back to."""
    for name, attempt in (("a", 1), ("b", 5)):
        tool.save(tmp_path / name, 1, 2, 3, keep=3, attempt=attempt)
    foreign = layout.manifest_path(tmp_path / "b", 3).read_bytes()
    layout.manifest_path(tmp_path / "a", 3).write_bytes(foreign)
    report = verify(tmp_path / "a")
    assert [(checked.step, checked.ok) for checked in report.checkpoints] == [(1, True), (2, True), (3, False)]
    assert rewind(tmp_path / "a")[1].step == 2


def test_rewind_goes_to_the_newest_that_verifies_and_training_goes_on_from_there(directory, tool):
    tool.save(directory, 1, 2, 3, keep=3)
    flip(only_of(directory, 3))
    before, now, faults = rewind(directory)
    assert (before.step, now.step, len(faults)) == (3, 2, 1)
    assert tool.holds(directory, 2)
    report = verify(directory)
    assert report.faults == ()
    assert any("step 3 lies ahead of HEAD" in note for note in report.notes)
    tool.save(directory, 3, 4, keep=3)
    assert verify(directory).notes == ()
    assert tool.holds(directory, 4)


def test_rewind_with_a_lost_or_broken_head(directory, tool):
    tool.save(directory, 1, 2, keep=2)
    for damage in (lambda path: path.unlink(), flip):
        damage(layout.head_path(directory))
        with pytest.raises(RunError, match="N0303"):
            reader.open_head(directory, Control.alone())
        before, now, _ = rewind(directory)
        assert before is None
        assert now.step == 2
        assert tool.holds(directory, 2)


def test_rewind_leaves_a_good_head_alone(directory, tool):
    tool.save(directory, 1, 2, keep=2)
    flip(only_of(directory, 1))
    status = layout.head_path(directory).stat()
    before, now, _ = rewind(directory)
    assert before == now == read_head(directory)
    assert layout.head_path(directory).stat().st_mtime_ns == status.st_mtime_ns


def test_what_belongs_to_no_checkpoint_is_noted(directory, tool):
    tool.save(directory, 1, keep=2)
    (directory / "notes.txt").write_text("x")
    (directory / "objects" / "zz").mkdir()
    (directory / "objects" / "zz" / "odd").write_text("x")
    (directory / "objects" / "00").mkdir(exist_ok=True)
    (directory / "objects" / "00" / ("00" + "a" * 62)).write_text("x")
    (directory / "step_00000001" / "extra").write_text("x")
    (directory / "tmp" / "half").write_text("x")
    report = verify(directory)
    assert report.faults == ()
    assert set(report.notes) == {
        "`notes.txt` is no file of a checkpoint",
        "`objects/zz/odd` is no file of a checkpoint",
        "`step_00000001/extra` is no file of a checkpoint",
        "1 objects belong to no kept checkpoint; the next attempt or save removes them",
        "1 temporary files of an unfinished save; the next attempt removes them",
    }


def test_verifying_does_not_import_torch():
    code = (
        "import sys, nmoe.checkpoint.verify, nmoe.checkpoint.reader, nmoe.cli.verify, nmoe.train.run_dir; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
