"""A run of three sources, two stages and three epochs goes on from every one of its steps, with any prefetch."""

import json

import pytest

from nmoe.checkpoint.format import manifest_path
from nmoe.data import corpus
from nmoe.data.loader import Prefetcher
from nmoe.data.prepare import Request, prepare
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.errors import RunError
from nmoe.metrics.reader import read_rows
from nmoe.train import events
from tests.train.launches import GROUPS, first_difference

STEPS = 12
DEPTHS = (0, 1, 4, 16)
STAGES = "[{until_tokens=320, weights=[2, 1, 0]}, {weights=[1, 3, 2]}]"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The run's keys."""
    directory = tmp_path_factory.mktemp("toy")
    text = corpus.documents("shakespeare", "train")[0]
    for name, first, size in (("a", 0, 96), ("b", 1_000, 200), ("c", 2_000, 120), ("held", 3_000, 300)):
        (directory / f"{name}.txt").write_text(text[first : first + size])
        prepare([directory / f"{name}.txt"], directory / name, BytesTokenizer(), Request(shard_tokens=8192), workers=1)
    sources = json.dumps([str(directory / name / "train") for name in "abc"])
    return (
        "schedule.warmup_tokens=128", "schedule.stable_tokens=320", "schedule.decay_tokens=320",
        "model.moe.router.bias_until_tokens=512",
        'data.kind="mixture"', f"data.sources={sources}", f"data.stages={STAGES}",
        f'eval.bpb.heldout="{directory}/held/train"', "eval.bpb.every_tokens=256",
    )  # fmt: skip


def left(runs, name):
    """Every metric of the training, at full digits, and the state with its counters."""
    rows = [
        (row.step, row.tokens_seen, row.name, row.layer, row.expert, row.label, row.value and row.value.hex())
        for row in read_rows(runs.metrics / name)
        if row.name.startswith(GROUPS)
    ]
    head = runs.head(name)
    return [*rows, (head.step, json.dumps(dict(head.state), sort_keys=True), head.state_digest)]


@pytest.fixture(scope="module")
def straight(module_runs, toy):
    config = module_runs.plan("straight", *toy).config
    epochs = config.data.build(seed=0, sequence_length=config.batch.sequence_length).epochs(STEPS * 4)
    assert len(epochs) == 3 and max(epochs) >= 3
    module_runs.train("straight", *toy, "output.prefetch=0")
    return left(module_runs, "straight")


@pytest.mark.parametrize("depth", DEPTHS[1:])
def test_prefetching_changes_no_bit(runs, toy, straight, depth):
    runs.train("run", *toy, f"output.prefetch={depth}")
    assert first_difference(straight, left(runs, "run")) == ""


def test_every_step_can_be_gone_on_from(runs, toy, straight, tmp_path):
    """A chain that stops after each step is the straight run; and so is what goes on from any link of it."""
    for step in range(1, STEPS + 1):
        runs.train("chain", *toy, f"output.stop_after_step={step}", f"output.prefetch={DEPTHS[step % 4]}")
        runs.copy("chain", tmp_path / f"after {step}")
    assert first_difference(straight, left(runs, "chain")) == ""
    for step in range(1, STEPS):
        runs.bring_back("chain", tmp_path / f"after {step}")
        assert runs.head("chain").step == step
        runs.train("chain", *toy, "output.checkpoint_every=2", f"output.prefetch={DEPTHS[step // 4]}")
        assert first_difference(straight, left(runs, "chain")) == "", f"continued after step {step}"


@pytest.mark.parametrize("depth", DEPTHS[1:])
def test_a_loader_thread_that_dies_without_a_word_stops_the_run(runs, toy, monkeypatch, depth):
    """At once, and the run goes on from what it had saved."""

    class Mute(Prefetcher):
        def _work(self, step):
            for _ in range(3):
                self._queue.put(self._loader.batch(step))
                step += 1

    keys = (*toy, "output.checkpoint_every=2", f"output.prefetch={depth}", "output.stop_after_step=5")
    with monkeypatch.context() as patch:
        patch.setattr("nmoe.train.attempt.Prefetcher", Mute)
        with pytest.raises(RunError, match=r"N0220.*dead and left no cause\n.*step 4"):
            runs.train("run", *keys)
    assert runs.head("run").step == 2
    runs.train("run", *keys)
    assert runs.head("run").step == 5


def test_a_damaged_older_checkpoint_goes_and_it_is_said(runs, toy, straight, capfd):
    """It is nothing that the run needs; the disk that has damaged it is news all the same."""
    runs.train("run", *toy, "output.stop_after_step=4", "output.checkpoint_every=1", "output.keep_checkpoints=3")
    manifest_path(runs.path("run") / "checkpoints", 3).write_bytes(b"{}")
    runs.train("run", *toy, "output.keep_checkpoints=3")
    assert first_difference(straight, left(runs, "run")) == ""
    told = [event for event in events.read(runs.path("run")).events if event["event"] == "removed"]
    assert [(event["attempt"], event["step"]) for event in told] == [(2, 3)]
    assert told[0]["reason"].startswith("not intact: has in the manifest unknown or missing keys")
    assert "the checkpoint of step 3 is removed: not intact: " in capfd.readouterr().err
