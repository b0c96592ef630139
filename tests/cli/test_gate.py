"""`nmoe gate` as a user runs it: the verdict, its form, its exit status."""

import hashlib
import json
import signal
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.checkpoint import format as layout
from nmoe.checkpoint.manifest import Head
from nmoe.checkpoint.objects import store
from nmoe.checkpoint.parts import join
from nmoe.checkpoint.verify import read_manifest
from nmoe.cli.main import run as nmoe
from nmoe.part import Part
from nmoe.train import gate
from nmoe.train.drill import main as drill

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "train" / "tiny.toml")


def test_a_killed_run_is_identical(tmp_path, capfd):
    """The real thing: three fresh processes, one of them killed by SIGKILL."""
    arguments = ["gate", TINY, "--steps", "4", "--kill", "3", "--json", "--directory", str(tmp_path / "gate")]
    assert nmoe(arguments) == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert result["identical"] is True
    assert result["first_difference"] == ""
    assert result["steps"] == 4
    assert result["kills"] == ["3:forward"]
    assert result["compared"]["tensors"] > 100
    assert len(result["state_digest"]) == len(result["fingerprint"]) == 64
    assert "SIGKILL at step 3, forward" in captured.err
    events = [json.loads(line) for line in (tmp_path / "gate" / "killed" / "events.jsonl").read_text().splitlines()]
    assert [event["attempt"] for event in events if event["event"] == "start"] == [1, 2]
    assert sum(event["event"] == "takeover" for event in events) == 1, "a killed owner leaves its record"
    assert 3 not in [event["step"] for event in events if event["event"] == "saving"]


def test_a_killed_rank_ends_the_others_and_all_are_the_run_of_one(tmp_path, capfd):
    """Two ranks, of which rank 0 is killed; then two new ones continue, to what one rank has computed."""
    arguments = ["gate", TINY, "--steps", "3", "--kill", "3", "--ranks", "2", "--directory", str(tmp_path / "gate")]
    assert nmoe(arguments) == 0
    captured = capfd.readouterr()
    assert "identical: 3 steps, 1 kills of one of 2 ranks, " in captured.out
    assert "SIGKILL at step 3, forward in rank 0 of 2" in captured.err
    events = [json.loads(line) for line in (tmp_path / "gate" / "killed" / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert [kind for kind in kinds if kind in ("start", "takeover")] == ["start", "start", "takeover"]


def test_ranks_that_do_not_fit_the_plan_are_refused(capfd):
    assert nmoe(["gate", TINY, "--steps", "3", "--kill", "3", "--ranks", "3"]) == 2
    assert "3 ranks do not divide the step's 2 microbatches" in capfd.readouterr().err


class Killed(BaseException):
    """Stands for the kill where an attempt runs in this process."""


@pytest.fixture
def in_this_process(monkeypatch):
    """Attempts run here, one after the other; returns a list of functions to call after each kill."""
    after_kill = []

    def kill(pid: int, number: int) -> None:
        raise Killed

    def attempt(command: list[str], directory: Path, *, expect: int) -> None:
        if "nmoe.train.drill" in command:
            assert expect == -signal.SIGKILL
            with pytest.raises(Killed):
                drill(command[3:])
            for act in after_kill:
                act(directory / "killed" / "checkpoints")
        else:
            assert nmoe(command[3:]) == expect == 0

    monkeypatch.setattr("nmoe.train.drill.os.kill", kill)
    monkeypatch.setattr(gate, "_attempt", attempt)
    return after_kill


def forget(prefix: str):
    """What loses the tensors of one class from HEAD, as a writer that did not save them would."""

    def act(directory: Path) -> None:
        step = max(layout.steps_on_disk(directory))
        manifest, _ = read_manifest(directory, step)
        zeros = {
            name: Part.whole(torch.zeros(record.shape, dtype=getattr(torch, record.dtype)))
            for name, record in manifest.tensors.items()
            if name.startswith(prefix)
        }
        (directory / "tmp").mkdir(exist_ok=True)
        records = join([store(directory, zeros, threads=1).spans], step=step)
        content = attrs.evolve(manifest, tensors={**manifest.tensors, **records}).encode()
        layout.manifest_path(directory, step).write_bytes(content)
        head = Head(step=step, manifest=hashlib.sha256(content).hexdigest())
        layout.head_path(directory).write_bytes(head.encode())

    return act


def test_without_a_fault_the_same_way_is_identical(tmp_path, capfd, in_this_process):
    assert nmoe(["gate", TINY, "--steps", "4", "--kill", "3"]) == 0
    assert "identical: 4 steps, 1 kills, " in capfd.readouterr().out


@pytest.mark.parametrize("lost", ["adamw.exp_avg_sq/", "router.bias/"])
def test_a_planted_fault_is_found_and_named(tmp_path, capfd, in_this_process, lost):
    """Saved after step 2, where the straight run has a checkpoint too."""
    in_this_process.append(forget(lost))
    arguments = ["gate", TINY, "--steps", "4", "--kill", "3", "--directory", str(tmp_path / "gate")]
    assert nmoe([*arguments, "--json"]) == 1
    result = json.loads(capfd.readouterr().out[-4000:].partition("\n{")[2].join(["{", ""]))
    assert result["identical"] is False
    assert result["first_difference"].startswith(f"step 2, weights: {lost}")
    assert result["state_digest"] == ""


def test_a_kill_takes_numbers(capfd):
    assert nmoe(["gate", TINY, "--steps", "4", "--kill", "3,x"]) == 2
    assert "7,13,22" in capfd.readouterr().err


def test_a_plan_that_does_not_run_is_refused(capfd):
    assert nmoe(["gate", str(ROOT / "configs" / "moonlet.toml"), "--steps", "4", "--kill", "3"]) == 2
    assert "error[N0602]" in capfd.readouterr().err
