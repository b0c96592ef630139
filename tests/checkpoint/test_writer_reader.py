"""A state goes to the disk and comes back bit for bit; what is not whole never reaches a tensor."""

import errno
import itertools
import os
import random
import re
import threading

import pytest
import torch

from nmoe.checkpoint import format as layout
from nmoe.checkpoint import reader
from nmoe.checkpoint.verify import read_head, read_manifest, verify
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.errors import RunError
from nmoe.rdep.control import Control


def objects_of(directory):
    return sorted(path for path in layout.objects_directory(directory).glob("*/*"))


def test_a_state_comes_back_bit_for_bit(directory, tool):
    special = torch.tensor([-0.0, 1e-45, torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny])
    tensors = {**tool.state(3), "special": special, "strided": torch.arange(12.0).reshape(3, 4).T}
    writer = CheckpointWriter(directory, keep=1, control=Control.alone())
    writer.save(step=3, tensors=tool.whole(tensors), state=tool.counters(3), identity=tool.identity())
    saved = writer.wait()
    targets = {**tool.empty_like(tensors), "strided": torch.zeros(3, 4).T}
    places = {name: tensor.data_ptr() for name, tensor in targets.items()}
    manifest = reader.require_head(directory)
    reader.read_into(directory, manifest, tool.whole(targets), Control.alone())
    assert all(tool.same_bytes(targets[name], tensors[name]) for name in tensors)
    assert places == {name: tensor.data_ptr() for name, tensor in targets.items()}, "not in place"
    assert manifest.state_digest == saved.state_digest
    assert manifest.identity == tool.identity()
    assert not verify(directory).faults


def test_a_parameter_is_overwritten_without_entering_autograd(directory, tool):
    weight = torch.nn.Parameter(torch.randn(3, 3))
    writer = CheckpointWriter(directory, keep=1, control=Control.alone())
    writer.save(step=1, tensors=tool.whole({"w": weight}), state={}, identity=tool.identity())
    writer.wait()
    other = torch.nn.Parameter(torch.zeros(3, 3))
    reader.read_into(directory, reader.require_head(directory), tool.whole({"w": other}), Control.alone())
    assert torch.equal(weight, other)
    assert other.grad_fn is None


def test_the_copy_is_taken_before_save_returns(directory, tool, monkeypatch):
    go_on = threading.Event()
    real = os.fsync
    tensors, counters = tool.state(2), tool.counters(2)
    writer = CheckpointWriter(directory, keep=1, control=Control.alone())
    monkeypatch.setattr(os, "fsync", lambda descriptor: (go_on.wait(), real(descriptor))[1])
    writer.save(step=2, tensors=tool.whole(tensors), state=counters, identity=tool.identity())
    for tensor in tensors.values():
        tensor.zero_()
    counters["rng"]["rounding"] = 99
    go_on.set()
    writer.wait()
    assert tool.holds(directory, 2)


def test_equal_states_have_equal_digests_whatever_their_history(tmp_path, tool):
    often = tool.save(tmp_path / "a", 1, 2, 3, 4, 5, 6, keep=1)
    once = tool.save(tmp_path / "b", 6, keep=3, attempt=4)
    again = tool.save(tmp_path / "c", 2, 4, keep=2) + tool.save(tmp_path / "c", 6, keep=2, attempt=2)
    assert often[-1].state_digest == once[-1].state_digest == again[-1].state_digest
    assert len({saved.state_digest for saved in often}) == 6
    assert often[-1].manifest_sha256 != once[-1].manifest_sha256
    assert {p.name for p in objects_of(tmp_path / "a")} == {p.name for p in objects_of(tmp_path / "b")}


@pytest.mark.parametrize("name", ["model.frozen", "a.mask", "a.scalar", "an.empty.tensor"])
def test_each_tensor_is_in_the_digest(tmp_path, tool, name):
    digests = set()
    for variant in ("as it is", "renamed", "other dtype", "other shape"):
        tensors = tool.state(1)
        tensor = tensors.pop(name)
        if variant == "other dtype":
            tensor = tensor.to(torch.uint8) if tensor.dtype != torch.uint8 else tensor.to(torch.int8)
        if variant == "other shape":
            tensor = tensor.unsqueeze(0)
        tensors[name + "x" if variant == "renamed" else name] = tensor
        writer = CheckpointWriter(tmp_path / variant, keep=1, threads=1, control=Control.alone())
        writer.save(step=1, tensors=tool.whole(tensors), state={}, identity=tool.identity())
        digests.add(writer.wait().state_digest)
    assert len(digests) == 4


def test_unchanged_slices_are_stored_once_and_a_damaged_one_is_replaced(directory, tool):
    first, second = tool.save(directory, 1, 2, keep=2)
    assert first.objects == len(layout_objects(directory, 1))
    frozen = read_manifest(directory, 2)[0].tensors["model.frozen"].slices[0]
    assert read_manifest(directory, 1)[0].tensors["model.frozen"].slices == (frozen,)
    assert second.objects < first.objects
    path = layout.object_path(directory, frozen)
    content = bytearray(path.read_bytes())
    content[3] ^= 4
    path.write_bytes(content)
    tool.save(directory, 3, keep=2)
    assert tool.holds(directory, 3)


def layout_objects(directory, step):
    return read_manifest(directory, step)[0].objects


def test_retention_keeps_the_newest_and_what_they_need(directory, tool):
    tool.save(directory, *range(1, 8), keep=3)
    assert layout.steps_on_disk(directory) == [5, 6, 7]
    needed = set().union(*(layout_objects(directory, step) for step in (5, 6, 7)))
    assert {path.name for path in objects_of(directory)} == needed
    report = verify(directory)
    assert not report.faults
    assert not report.notes
    assert [checked.step for checked in report.checkpoints if checked.ok] == [5, 6, 7]


def test_a_damaged_old_checkpoint_does_not_count_among_the_kept(directory, tool):
    tool.save(directory, 1, 2, 3, keep=3)
    layout.manifest_path(directory, 2).write_bytes(b"{}")
    saved = tool.save(directory, 4, keep=3)[0]
    assert layout.steps_on_disk(directory) == [1, 3, 4]
    assert saved.removed == ()  # a new writer had cleared it away already
    writer = CheckpointWriter(directory, keep=3, control=Control.alone())
    only_in_3 = set(layout_objects(directory, 3)) - set(layout_objects(directory, 4))
    layout.object_path(directory, min(only_in_3)).unlink()
    writer.save(step=5, tensors=tool.whole(tool.state(5)), state=tool.counters(5), identity=tool.identity())
    removed = writer.wait().removed
    assert [item.step for item in removed] == [3]
    assert re.search("not intact: is missing", removed[0].reason)
    assert tool.holds(directory, 5)


def test_what_lies_ahead_of_head_goes_when_a_new_attempt_begins(directory, tool):
    tool.save(directory, 1, keep=2)
    head = layout.head_path(directory).read_bytes()
    tool.save(directory, 2, keep=2)
    layout.head_path(directory).write_bytes(head)
    writer = CheckpointWriter(directory, keep=2, control=Control.alone())
    assert [item.step for item in writer.removed] == [2]
    assert {path.name for path in objects_of(directory)} == set(layout_objects(directory, 1))
    assert tool.holds(directory, 1)


def test_no_step_is_saved_twice_or_backwards(directory, tool):
    tool.save(directory, 4)
    for step in (4, 3):
        with pytest.raises(RunError, match=r"N0307.*HEAD names step 4"):
            tool.save(directory, step)


def test_before_head_runs_when_all_but_head_is_there(directory, tool):
    tool.save(directory, 1)
    seen = []

    def look():
        seen.append((read_head(directory).step, read_manifest(directory, 2)[0].state_digest))

    writer = CheckpointWriter(directory, keep=2, control=Control.alone())
    writer.save(
        step=2, tensors=tool.whole(tool.state(2)), state=tool.counters(2), identity=tool.identity(), before_head=look
    )
    assert seen == [] or seen[0][0] == 1
    saved = writer.wait()
    assert seen == [(1, saved.state_digest)]


def test_if_before_head_fails_head_stays(directory, tool):
    tool.save(directory, 1)

    def cannot():
        raise RuntimeError("the ledger is full")

    writer = CheckpointWriter(directory, keep=2, control=Control.alone())
    writer.save(
        step=2, tensors=tool.whole(tool.state(2)), state=tool.counters(2), identity=tool.identity(), before_head=cannot
    )
    with pytest.raises(RuntimeError, match="the ledger is full"):
        writer.wait()
    assert tool.holds(directory, 1)


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left on device"), (errno.EIO, "input/output error")]
)
def test_a_failing_disk_is_raised_by_the_next_call_and_named(directory, tool, monkeypatch, call, number, words):
    tool.save(directory, 1)
    writer = CheckpointWriter(directory, keep=2, control=Control.alone())
    real = getattr(os, call)
    count = iter(range(10**6))

    def failing(*arguments, **named):
        if next(count) == 3:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        writer.save(step=2, tensors=tool.whole(tool.state(2)), state=tool.counters(2), identity=tool.identity())
        with pytest.raises(RunError, match=rf"N0301.*{words} \({errno.errorcode[number]}\)") as caught:
            writer.wait()
    assert str(directory) in caught.value.diagnostics[0].place
    assert tool.holds(directory, 1)
    writer.save(step=3, tensors=tool.whole(tool.state(3)), state=tool.counters(3), identity=tool.identity())
    writer.wait()
    assert tool.holds(directory, 3)


def test_a_failure_is_raised_by_check_and_by_save_too(directory, tool, monkeypatch):
    writer = CheckpointWriter(directory, keep=2, control=Control.alone())
    writer.check()
    for raising in (writer.check, lambda: writer.save(step=9, tensors={}, state={}, identity=tool.identity())):
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
            writer.save(step=2, tensors=tool.whole(tool.state(2)), state={}, identity=tool.identity())
            writer._thread.join()
        with pytest.raises(RunError, match=r"N0301.*broken"):
            raising()


def test_a_full_disk_is_refused_before_anything_is_written(directory, tool, monkeypatch):
    tool.save(directory, 1)
    writer = CheckpointWriter(directory, keep=2, control=Control.alone())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 300_000})())
    before = objects_of(directory)
    with pytest.raises(RunError, match=r"N0308.* 0\.3 MB free"):
        writer.save(step=2, tensors=tool.whole(tool.state(2)), state={}, identity=tool.identity())
        writer.wait()
    assert objects_of(directory) == before
    assert tool.holds(directory, 1)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"rate": 0.1}, "float"), ({"n": 2**53}, "2\\^53"), ({"s": {1}}, "set"), ({"step": 4}, "says step 4"),
        ({1: 2}, "key"),
    ],
)
def test_counters_that_json_would_bend_are_refused(directory, tool, state, word):
    writer = CheckpointWriter(directory, keep=1, control=Control.alone())
    with pytest.raises(ValueError, match=word):
        writer.save(step=1, tensors={}, state=state, identity=tool.identity())


def test_tensors_that_no_manifest_can_name_are_refused(directory, tool):
    writer = CheckpointWriter(directory, keep=1, control=Control.alone())
    for tensors in ({"a b": torch.ones(1)}, {"a": torch.ones(1, dtype=torch.complex64)}):
        with pytest.raises(ValueError, match="cannot save"):
            writer.save(step=1, tensors=tool.whole(tensors), state={}, identity=tool.identity())


def test_names_shapes_and_dtypes_are_strict_and_all_reported(directory, tool):
    tool.save(directory, 1)
    tensors = tool.empty_like(tool.state(1))
    tensors["more"] = tensors.pop("a.mask")
    tensors["a.scalar"] = torch.zeros(1, dtype=torch.int64)
    tensors["model.frozen"] = torch.zeros(6, 6, dtype=torch.float64)
    with pytest.raises(RunError, match="N0305") as caught:
        reader.read_into(directory, reader.require_head(directory), tool.whole(tensors), Control.alone())
    text = caught.value.render()
    assert "`a.mask` is in the checkpoint and not in" in text
    assert "`more` is in this program" in text
    assert "`a.scalar` is int64 [] in the checkpoint" in text
    assert "`model.frozen` is float32 [6, 6] in the checkpoint, float64 [6, 6] here" in text
    assert not any(tensor.any() for tensor in tensors.values()), "a tensor was touched"


def test_a_part_comes_back_alone_and_as_strictly(directory, tool):
    tool.save(directory, 1)
    saved, manifest = tool.state(1), reader.require_head(directory)
    tensors = {"a.mask": torch.zeros_like(saved["a.mask"])}
    reader.read_some(directory, manifest, tensors)
    assert tool.same_bytes(tensors["a.mask"], saved["a.mask"])
    wrong = {"model.frozen": torch.zeros(6, 6, dtype=torch.float64), "more": torch.zeros(3)}
    with pytest.raises(RunError, match="N0305") as caught:
        reader.read_some(directory, manifest, wrong)
    text = caught.value.render()
    assert "`more` is in this program" in text
    assert "`model.frozen` is float32 [6, 6] in the checkpoint, float64 [6, 6] here" in text
    assert "a.scalar" not in text
    assert not any(tensor.any() for tensor in wrong.values()), "a tensor was touched"


def test_no_checkpoint_yet(directory, tool):
    assert reader.open_head(directory, Control.alone()) is None
    assert reader.head_step(directory) == 0
    CheckpointWriter(directory, keep=1, control=Control.alone())
    assert reader.open_head(directory, Control.alone()) is None
    with pytest.raises(RunError, match="N0304"):
        reader.require_head(directory)


def damages(directory):
    """(what, path, action) for every file that HEAD's checkpoint is made of."""
    pick = random.Random(5)
    objects = [layout.object_path(directory, sha256) for sha256 in layout_objects(directory, 3)]
    files = [layout.head_path(directory), layout.manifest_path(directory, 3), *objects]

    def edited(change):
        return lambda path: path.write_bytes(change(path.read_bytes()))

    def flipped(bit):
        return edited(lambda c: c[: bit // 8] + bytes([c[bit // 8] ^ 1 << bit % 8]) + c[bit // 8 + 1 :])

    def replaced(make):
        return lambda path: (path.unlink(), make(path))

    for path in files:
        bits = path.stat().st_size * 8
        each_byte = [byte * 8 + pick.randrange(8) for byte in range(bits // 8)]
        chosen = each_byte if path.name == "HEAD" else pick.sample(range(bits), min(bits, 12))
        yield from ((f"bit {bit}", path, flipped(bit)) for bit in chosen)
        yield "truncated", path, edited(lambda c: c[:-1])
        yield "emptied", path, edited(lambda c: b"")
        yield "extended", path, edited(lambda c: c + b"\0")
        yield "missing", path, lambda p: p.unlink()
        yield "a link", path, replaced(lambda p: p.symlink_to("/dev/zero"))
        yield "a directory", path, replaced(lambda p: p.mkdir())
        yield "a pipe", path, replaced(os.mkfifo)
    for one, other in itertools.pairwise(objects):
        yield "another object's content", one, lambda p, other=other: p.write_bytes(other.read_bytes())
    yield "the manifest before", files[1], lambda p: p.write_bytes(layout.manifest_path(directory, 2).read_bytes())
    yield "far too large", files[0], lambda p: os.truncate(p, 1 << 40)
    yield "far too large", files[1], lambda p: os.truncate(p, 1 << 40)


def test_every_damage_is_found_before_a_tensor_is_touched(directory, tool):
    tool.save(directory, 2, 3, keep=2)
    count = 0
    for what, path, damage in list(damages(directory)):
        content = path.read_bytes()
        damage(path)
        with pytest.raises(RunError, match="N0303") as caught:
            pytest.fail(f"{what} of {path} was not seen: {reader.open_head(directory, Control.alone(), threads=1)}")
        text = caught.value.render()
        assert path.name in text, (what, text)
        assert f"nmoe verify {directory.parent} --rewind" in text
        assert path.name == "HEAD" or "step 3" in text
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(content)
        count += 1
    assert count > 250
    assert tool.holds(directory, 3)


def test_an_object_that_changes_after_it_was_verified_is_not_read(directory, tool):
    tool.save(directory, 1)
    manifest = reader.require_head(directory)
    sha256 = manifest.tensors["model.frozen"].slices[0]
    path = layout.object_path(directory, sha256)
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(RunError, match=f"N0303.*{sha256} has other content.*model.frozen"):
        reader.read_into(directory, manifest, tool.whole(tool.empty_like(tool.state(1))), Control.alone())
