"""nmoe verify at the command line: what it prints, and what it exits with."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nmoe.checkpoint import format as layout
from nmoe.checkpoint.manifest import Head, Identity
from nmoe.checkpoint.reader import head_step
from nmoe.checkpoint.verify import read_manifest
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.cli.main import run as nmoe
from nmoe.part import Part
from nmoe.plan.resolve import resolve
from nmoe.rdep.control import Control
from nmoe.train import events
from nmoe.train.run_dir import RunDir

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of the steps 1, 2 and 3."""
    plan = resolve(CONFIG, [f"output.run_dir={json.dumps(str(tmp_path / 'run'))}"])
    with RunDir.open(plan, config_text="") as directory:
        writer = CheckpointWriter(directory.checkpoints, keep=3, threads=1, control=Control.alone())
        identity = Identity(
            run=directory.name, lineage=directory.lineage, attempt=directory.attempt, fingerprint=plan.fingerprint,
            sections=plan.sections, tree_digest=plan.tree_digest, data={}, environment={"exact": {}, "recorded": {}},
        )  # fmt: skip
        for step in (1, 2, 3):
            weight = Part.whole(torch.full((4,), float(step)))
            writer.save(step=step, tensors={"w": weight}, state={}, identity=identity)
            writer.wait()
        return directory.path


def object_of(run, step):
    return layout.object_path(run / "checkpoints", read_manifest(run / "checkpoints", step)[0].tensors["w"].slices[0])


def test_a_healthy_run(run, capsys):
    assert nmoe(["verify", str(run)]) == 0
    out = capsys.readouterr().out
    assert "3 checkpoints, every byte verified" in out
    assert "<- HEAD" in out.splitlines()[2]
    assert nmoe(["verify", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    manifest, sha256 = read_manifest(run / "checkpoints", 3)
    assert result["ok"] is True
    assert result["faults"] == []
    assert (result["step"], result["state_digest"]) == (3, manifest.state_digest)
    assert result["fingerprint"] == manifest.identity.fingerprint
    assert [checked["step"] for checked in result["checkpoints"]] == [1, 2, 3]
    assert result["checkpoints"][-1]["manifest_sha256"] == sha256


def test_every_fault_is_named_and_the_status_is_1(run, capsys):
    object_of(run, 2).write_bytes(b"x" * 16)
    object_of(run, 3).unlink()
    assert nmoe(["verify", str(run)]) == 1
    printed = capsys.readouterr()
    assert "DAMAGED step         2" in printed.out
    assert "is missing; tensor `w`" in printed.err
    assert "which is not its name; tensor `w`" in printed.err
    assert f"nmoe verify {run} --rewind" in printed.err
    assert nmoe(["verify", str(run), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False
    assert sorted(fault["step"] for fault in result["faults"]) == [2, 3]


def test_a_damaged_head_alone_has_its_way_out(run, capsys):
    (run / "checkpoints" / "HEAD").write_bytes(b"")
    assert nmoe(["verify", str(run)]) == 1
    assert f"1 fault; nmoe verify {run} --rewind goes back" in capsys.readouterr().err
    assert nmoe(["verify", str(run), "--rewind"]) == 0


def test_where_nothing_is_whole_rewind_is_not_proposed(run, capsys):
    for step in (1, 2, 3):
        object_of(run, step).unlink()
    assert nmoe(["verify", str(run)]) == 1
    assert "--rewind" not in capsys.readouterr().err


def test_rewind_moves_head_and_says_so(run, capsys):
    object_of(run, 3).unlink()
    assert nmoe(["verify", str(run), "--rewind"]) == 0
    assert "HEAD was at step 3 and is now at step 2" in capsys.readouterr().out
    assert head_step(run / "checkpoints") == 2
    event = events.read(run).events[-1]
    assert (event["event"], event["before"], event["step"], event["attempt"]) == ("rewind", 3, 2, 1)
    assert "is missing" in event["faults"][0]
    assert nmoe(["verify", str(run)]) == 0
    assert "note: step 3 lies ahead of HEAD" in capsys.readouterr().out
    assert nmoe(["verify", str(run), "--rewind", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewound"] == "HEAD stays at step 2: it verifies"
    assert len(events.read(run).events) == 2


def test_rewind_exits_0_though_an_older_checkpoint_stays_damaged(run):
    object_of(run, 1).unlink()
    object_of(run, 3).unlink()
    assert nmoe(["verify", str(run), "--rewind"]) == 0
    assert head_step(run / "checkpoints") == 2
    assert nmoe(["verify", str(run)]) == 1


def test_rewind_without_a_checkpoint_that_verifies(run, capsys):
    for step in (1, 2, 3):
        object_of(run, step).unlink()
    assert nmoe(["verify", str(run), "--rewind"]) == 1
    assert "N0302" in capsys.readouterr().err
    assert head_step(run / "checkpoints") == 3


def test_rewind_where_head_is_a_directory(run, capsys):
    """Nothing is taken away that a person may have put there; the message says what to do."""
    head = run / "checkpoints" / "HEAD"
    head.unlink()
    head.mkdir()
    (head / "note").write_text("mine")
    assert nmoe(["verify", str(run), "--rewind"]) == 1
    error = capsys.readouterr().err
    assert "error[N0301]: cannot rename a temporary file to `HEAD`" in error
    assert "help: a directory stands where a file has to be: move it away" in error
    head.rename(run.parent / "aside")
    assert nmoe(["verify", str(run), "--rewind"]) == 0


def test_rewind_needs_the_run_to_itself(run, capsys):
    object_of(run, 3).unlink()
    plan = resolve(CONFIG, [f"output.run_dir={json.dumps(str(run))}"])
    with RunDir.open(plan, config_text=""):
        assert nmoe(["verify", str(run), "--rewind"]) == 1
        assert "N0311" in capsys.readouterr().err
        assert nmoe(["verify", str(run)]) == 1, "to look needs no lock"
    assert head_step(run / "checkpoints") == 3


def told_of_a_stop(run):
    """As the loop tells it, once its last save is whole."""
    past = events.read(run)
    events.append(run, "stop", lineage=past.lineage, attempt=past.attempt, step=3, signal=None)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_head_that_has_gone_back_unseen(run, capsys, step):
    """An older HEAD, or the first of all, which names nothing: whole in itself, and not where the run has come to."""
    told_of_a_stop(run)
    head = layout.head_path(run / "checkpoints")
    manifest = read_manifest(run / "checkpoints", step)[1] if step else None
    head.write_bytes(Head(step=step, manifest=manifest).encode())
    assert nmoe(["verify", str(run)]) == 1
    error = capsys.readouterr().err
    named = f"names step {step}" if step else "names no checkpoint"
    assert f"checkpoints/HEAD {named}, and the run's events tell that step 3 has been saved" in error
    assert f"nmoe verify {run} --rewind" in error
    assert nmoe(["verify", str(run), "--rewind"]) == 0
    assert head_step(run / "checkpoints") == 3, "the newest that verifies lies ahead"
    assert nmoe(["verify", str(run)]) == 0


def test_a_head_stays_back_openly_where_what_is_ahead_is_damaged(run, capsys):
    told_of_a_stop(run)
    layout.head_path(run / "checkpoints").write_bytes(
        Head(step=2, manifest=read_manifest(run / "checkpoints", 2)[1]).encode()
    )
    object_of(run, 3).unlink()
    assert nmoe(["verify", str(run), "--rewind"]) == 0
    assert "HEAD stays at step 2, the newest that verifies, and the run's events tell so now" in capsys.readouterr().out
    assert events.read(run).saved == 2
    assert nmoe(["verify", str(run)]) == 0
    assert nmoe(["verify", str(run), "--rewind"]) == 0
    assert "HEAD stays at step 2: it verifies" in capsys.readouterr().out


def test_checkpoints_that_are_gone_are_a_fault_where_the_events_tell_of_them(run, capsys):
    told_of_a_stop(run)
    shutil.rmtree(run / "checkpoints")
    assert nmoe(["verify", str(run)]) == 1
    error = capsys.readouterr().err
    assert "checkpoints/HEAD is missing, and the run's events tell that step 3 has been saved" in error
    assert nmoe(["verify", str(run), "--rewind"]) == 1
    assert "N0302" in capsys.readouterr().err


def test_lost_events_are_begun_anew_from_the_checkpoints(run, capsys):
    before = events.read(run)
    (run / "events.jsonl").unlink()
    assert nmoe(["verify", str(run)]) == 1
    assert f"events.jsonl is missing\n1 fault; nmoe verify {run} --rewind" in capsys.readouterr().err
    assert nmoe(["verify", str(run), "--rewind"]) == 0
    now = events.read(run)
    assert (now.lineage, now.attempt, now.saved) == (before.lineage, before.attempt, 3)
    assert [event["event"] for event in now.events] == ["rewind"]
    assert nmoe(["verify", str(run)]) == 0


def test_events_that_cannot_be_read_or_are_another_runs_are_a_fault(run, capsys):
    path = run / "events.jsonl"
    good = path.read_text()
    path.write_text("{}\n" + good)
    assert nmoe(["verify", str(run)]) == 1
    assert "fault: events.jsonl line 1 of the run's events cannot be read" in capsys.readouterr().err
    path.write_text(json.dumps({**json.loads(good), "lineage": "0" * 32}) + "\n")
    assert nmoe(["verify", str(run)]) == 1
    assert "fault: events.jsonl never tells of the line of states" in capsys.readouterr().err


def test_a_plan_of_another_run_is_a_fault(run, capsys):
    plan = json.loads((run / "plan.json").read_text())
    other = resolve(CONFIG, ["random.seed=1"])
    (run / "plan.json").write_text(json.dumps(other.to_json()))
    assert nmoe(["verify", str(run), "--json"]) == 1
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    saved = plan["fingerprint"][:16]
    assert fault["path"] == "plan.json"
    assert fault["message"] == f"is the plan {other.fingerprint[:16]}..., and HEAD was saved by {saved}..."
    for key, value in (("fingerprint", "0" * 64), ("tree_digest", "0" * 64), ("sections", {}), ("resolved", {})):
        (run / "plan.json").write_text(json.dumps({**plan, key: value}))
        assert nmoe(["verify", str(run), "--json"]) == 1
        (fault,) = json.loads(capsys.readouterr().out)["faults"]
        assert "cannot be read: its " in fault["message"]
    (run / "plan.json").unlink()
    assert nmoe(["verify", str(run), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"][0]["message"] == "is missing"


def test_a_run_without_checkpoints(tmp_path, capsys):
    plan = resolve(CONFIG, [f"output.run_dir={json.dumps(str(tmp_path / 'run'))}"])
    RunDir.open(plan, config_text="").close()
    assert nmoe(["verify", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["step"], result["state_digest"], result["checkpoints"]) == (True, None, None, [])


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_what_is_no_run_is_refused_with_2(tmp_path, capsys, name):
    assert nmoe(["verify", str(tmp_path / name)]) == 2
    assert "is not a run's directory" in capsys.readouterr().err


def test_help_teaches(capsys):
    assert nmoe(["verify", "--help"]) == 0
    text = capsys.readouterr().out
    for words in ("--rewind", "--read-data", "--json", "state digest", "nmoe verify runs/quickstart", "Exit status"):
        assert words in text
