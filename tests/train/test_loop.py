"""A run as its owner sees it: starting, stopping, continuing, ending; and every refusal with its way out."""

import json
import os
import signal

import pytest
import torch

from nmoe.checkpoint import environment
from nmoe.checkpoint.format import object_path
from nmoe.checkpoint.verify import read_manifest, verify
from nmoe.cli.main import run as nmoe
from nmoe.data import corpus
from nmoe.data.loader import Loader
from nmoe.errors import ConfigError, RunError, fail
from nmoe.metrics.reader import read_rows
from nmoe.train import attempt

LAST = 20
STOP = 4


@pytest.fixture(scope="module")
def straight(module_runs):
    """A run of four steps that nothing has disturbed."""
    module_runs.train("straight", f"output.stop_after_step={STOP}")
    return module_runs


def events(runs, name: str) -> list[dict]:
    return [json.loads(line) for line in (runs.path(name) / "events.jsonl").read_text().splitlines()]


def test_a_whole_run_and_again(runs):
    """To the end of the schedule; started again it says that it is complete, and does nothing."""
    outcome = runs.train("run", "output.metrics_every=7")
    assert outcome.exit_code == 0
    first, bits, where = outcome.summary.splitlines()
    assert first == f"complete: {LAST} steps"
    assert bits.startswith("held-out bits per byte: ")
    assert where == f"run: {runs.path('run')}"
    files = {path: path.stat().st_mtime_ns for path in runs.path("run").rglob("checkpoints/**/*")}

    again = runs.train("run", "output.metrics_every=7")
    assert again.exit_code == 0
    assert again.summary.splitlines() == [f"complete: {LAST} steps, nothing left to do", bits, where]
    assert {path: path.stat().st_mtime_ns for path in runs.path("run").rglob("checkpoints/**/*")} == files
    # Rows at the cadence, at evaluations and at the last step; nothing in between.
    steps = sorted({row.step for row in read_rows(runs.metrics / "run")})
    assert steps == [7, 8, 14, 16, 20]


def test_what_a_kill_in_the_last_retention_left_goes_when_the_complete_run_is_started_again(runs):
    few = ("schedule.warmup_tokens=64", "schedule.stable_tokens=64", "schedule.decay_tokens=64",
           "model.moe.router.bias_until_tokens=64", "output.checkpoint_every=1")  # fmt: skip
    runs.train("run", *few, "output.keep_checkpoints=3")
    checkpoints = runs.path("run") / "checkpoints"
    (checkpoints / "tmp" / "step_00000000.1").mkdir()
    (checkpoints / "objects" / "ab").mkdir(exist_ok=True)
    (checkpoints / "objects" / "ab" / ("ab" * 32)).write_bytes(b"nobody's")
    again = runs.train("run", *few, "output.keep_checkpoints=1")
    assert (again.exit_code, again.summary.splitlines()[0]) == (0, "complete: 3 steps, nothing left to do")
    report = verify(checkpoints)
    assert ([one.step for one in report.checkpoints], report.notes, report.faults) == ([3], (), ())
    # Where HEAD is damaged nothing is taken away: what lies about may be the way back.
    (checkpoints / "tmp" / "left").write_bytes(b"")
    sha256 = next(iter(runs.head("run").objects))
    object_path(checkpoints, sha256).write_bytes(b"")
    with pytest.raises(RunError, match="N0303"):
        runs.train("run", *few, "output.keep_checkpoints=1")
    assert (checkpoints / "tmp" / "left").exists()


def test_stop_after_step_then_further_is_the_straight_run(runs, straight):
    outcome = runs.train("run", "output.stop_after_step=1")
    assert outcome.exit_code == 0
    assert outcome.summary.startswith(f"stopped after step 1 of {LAST}, as [output] stop_after_step says; raise it")
    same = runs.train("run", "output.stop_after_step=1")
    assert same.exit_code == 0
    assert runs.head("run").step == 1
    runs.train("run", f"output.stop_after_step={STOP}")
    assert runs.digest("run") == straight.digest("straight")
    assert runs.losses("run") == straight.losses("straight")
    assert runs.head("run").identity.attempt == 3


def test_a_lower_stop_than_the_checkpoint_changes_nothing(runs, straight, tmp_path):
    straight.copy("straight", tmp_path)
    outcome = runs.train("straight", "output.stop_after_step=2")
    assert outcome.exit_code == 0
    assert outcome.summary.startswith(f"stopped after step {STOP} of {LAST}")
    assert runs.digest("straight") == straight.digest("straight")
    assert runs.losses("straight") == straight.losses("straight")


@pytest.mark.parametrize("phase", ["batch", "backward", "metrics", "save"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_continues_exactly(runs, straight, number, phase):
    """Whenever it comes, also while a checkpoint is saved: then the step after it is the last."""

    def observe(step: int, now: str) -> None:
        if (step, now) == (2, phase):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    sets = (f"output.stop_after_step={STOP}", "output.checkpoint_every=2", "output.metrics_every=9")
    outcome = runs.train("run", *sets, observe=observe)
    step = 3 if phase == "save" else 2
    assert outcome.exit_code == 130
    assert outcome.summary.startswith(f"stopped by {number.name} after step {step} of {LAST}, saved; run again")
    assert runs.head("run").step == step
    assert [row.step for row in read_rows(runs.metrics / "run", names=["train/loss"])] == [step]
    assert events(runs, "run")[-1]["signal"] == number.name
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert runs.train("run", *sets).exit_code == 0
    assert runs.digest("run") == straight.digest("straight")


def test_a_kill_between_saves_repeats_the_steps_and_sets_their_rows_aside(runs, straight):
    class Killed(BaseException):
        pass

    def observe(step: int, now: str) -> None:
        if (step, now) == (4, "optimizer"):
            raise Killed

    sets = (f"output.stop_after_step={STOP}", "output.checkpoint_every=2")
    with pytest.raises(Killed):
        runs.train("run", *sets, observe=observe)
    assert [row.step for row in read_rows(runs.metrics / "run", names=["train/loss"])] == [1, 2, 3]
    runs.train("run", *sets)
    assert runs.digest("run") == straight.digest("straight")
    assert runs.losses("run") == straight.losses("straight")
    assert (runs.metrics / "run" / "superseded" / "attempt_1" / "step_00000003.parquet").is_file()
    attempts = [row.attempt for row in read_rows(runs.metrics / "run", names=["train/loss"])]
    assert attempts == [1, 1, 2, 2]


def finding(caught):
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


class Watch:
    """Calls `act(graph)` before step 2's forward pass, and knows the state before it."""

    def __init__(self, monkeypatch, act):
        build = attempt.build
        self.act = act

        def kept(plan, node):
            self.graph = build(plan, node)
            return self.graph

        monkeypatch.setattr(attempt, "build", kept)

    def __call__(self, step: int, phase: str) -> None:
        if (step, phase) == (2, "batch"):
            self.act(self.graph)
            self.before = {name: part.tensor.clone() for name, part in self.graph.state().items()}
            self.counter = self.graph.rounding.counter

    def unchanged(self) -> bool:
        now = self.graph.state()
        return self.graph.rounding.counter == self.counter and all(
            torch.equal(now[name].tensor.nan_to_num(), tensor.nan_to_num()) for name, tensor in self.before.items()
        )


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(runs, monkeypatch):
    def poison(graph) -> None:
        with torch.no_grad():
            graph.model.layers[2].ffn_norm.weight_D[3] = float("nan")

    watch = Watch(monkeypatch, poison)
    with pytest.raises(RunError) as caught:
        runs.train("run", "output.checkpoint_every=1", observe=watch)
    found = finding(caught)
    assert found.code == "N0501"
    assert found.message == "the loss of microbatch 0 is nan"
    digest = watch.graph.loader.batch(2).digest
    assert found.place == f"step 2, batch {digest[:16]}"
    assert watch.unchanged()
    assert runs.head("run").step == 1, "the bad step is not saved"
    assert runs.train("run", "output.stop_after_step=2").exit_code == 0, "and the run goes on from before it"


def test_a_gradient_that_is_not_finite_names_its_parameter(runs, monkeypatch):
    name = "layers.1.moe.experts.w_down_EDF"

    def poison(graph) -> None:
        parameters = dict(graph.model.named_parameters())

        def spoil(_):
            parameters[name].grad[5, 2, 1] = float("inf")

        # Experts add to `grad` themselves, out of sight of hooks; backward comes to the embedding after them.
        parameters["embedding.weight_VD"].register_hook(spoil)

    watch = Watch(monkeypatch, poison)
    with pytest.raises(RunError) as caught:
        runs.train("run", observe=watch)
    found = finding(caught)
    assert found.code == "N0522"
    assert f"`{name}` is not finite: inf at [5, 2, 1], 1 of" in found.message
    assert found.place == "step 2, group `experts`"
    assert found.notes == (f"batch {watch.graph.loader.batch(2).digest}",)
    assert watch.unchanged()


def test_a_state_that_is_not_finite_is_never_saved(runs, monkeypatch):
    """An update of the last step that overflows: no gradient after it would tell."""
    build = attempt.build
    graphs = []
    monkeypatch.setattr(attempt, "build", lambda plan, node: graphs.append(build(plan, node)) or graphs[-1])

    def overflow(step: int, phase: str) -> None:
        if (step, phase) == (2, "save"):
            graphs[0].state()["adamw.exp_avg_sq/embedding.weight_VD"].tensor[1, 3] = float("inf")

    with pytest.raises(RunError) as caught:
        runs.train("run", "output.checkpoint_every=1", "output.stop_after_step=2", observe=overflow)
    found = finding(caught)
    assert found.code == "N0317"
    width = graphs[0].model.embedding.weight_VD.shape[1]
    assert found.message == f"`adamw.exp_avg_sq/embedding.weight_VD` is not finite: inf at element {width + 3}"
    assert runs.head("run").step == 1
    runs.train("run", "output.stop_after_step=2")
    assert runs.head("run").step == 2, "and the run goes on from before it"


def test_a_loss_that_is_not_finite_is_exit_1_without_a_traceback(runs, monkeypatch, capfd):
    """Through the command line."""
    build = attempt.build

    def poisoned(plan, node):
        graph = build(plan, node)
        with torch.no_grad():
            graph.model.head.weight_VD[7, 7] = float("inf")
        return graph

    monkeypatch.setattr(attempt, "build", poisoned)
    assert nmoe(["train", str(runs.config), "--set", f'output.run_dir="{runs.path("run")}"']) == 1
    error = capfd.readouterr().err
    assert "error[N0501]: the loss of microbatch 0 is " in error
    assert "--> step 1, batch " in error
    assert "weights are as they were before the step" in error
    assert "Traceback" not in error


def test_a_save_under_way_ends_before_the_run_is_given_back(runs, monkeypatch):
    """A failure while the checkpoint thread is still writing: HEAD stands when the lock is free."""
    writing = []
    save = attempt.CheckpointWriter._write

    def slow(self, *work):
        writing.append("begun")
        while not failed:
            pass
        result = save(self, *work)
        writing.append("ended")
        return result

    failed = []

    def observe(step: int, phase: str) -> None:
        if (step, phase) == (2, "forward"):
            failed.append(True)
            raise RuntimeError("something broke")

    monkeypatch.setattr(attempt.CheckpointWriter, "_write", slow)
    with pytest.raises(RuntimeError, match="something broke"):
        runs.train("run", "output.checkpoint_every=1", observe=observe)
    assert writing == ["begun", "ended"]
    assert runs.head("run").step == 1


def test_a_save_that_fails_stops_the_run(runs, monkeypatch):
    def full(self, *work):
        raise fail("N0301", "cannot write `manifest.json`: no space left on device")

    monkeypatch.setattr(attempt.CheckpointWriter, "_write", full)
    with pytest.raises(RunError, match="no space left"):
        runs.train("run", "output.checkpoint_every=1", "output.stop_after_step=3")
    assert not (runs.path("run") / "checkpoints" / "step_00000002").exists()


def test_another_fingerprint_is_refused_with_the_key(runs, straight, tmp_path):
    straight.copy("straight", tmp_path)
    with pytest.raises(RunError) as caught:
        runs.train("straight", "optimizer.dense.lr=2e-3", f"output.stop_after_step={STOP + 1}")
    found = finding(caught)
    assert found.code == "N0315"
    assert "[optimizer.dense]" in found.message
    assert any("optimizer.dense.lr: 0.003 there, 0.002 here" in note for note in found.notes)
    assert runs.digest("straight") == straight.digest("straight")


def test_a_damaged_checkpoint_is_refused_and_rewound_and_goes_on(runs, capfd):
    """The way out that the message names works: rewind, train, the bits of the run without damage."""
    sets = ("output.checkpoint_every=2", "output.stop_after_step=4")
    runs.train("run", *sets)
    digest, losses = runs.digest("run"), runs.losses("run")
    directory = runs.path("run") / "checkpoints"
    older, newer = (set(read_manifest(directory, step)[0].objects) for step in (2, 4))
    victim = object_path(directory, min(newer - older))
    content = bytearray(victim.read_bytes())
    content[0] ^= 1
    victim.write_bytes(content)

    with pytest.raises(RunError) as caught:
        runs.train("run", *sets)
    found = finding(caught)
    assert found.code == "N0303"
    assert victim.name in found.message
    command = found.help.partition(" moves HEAD")[0].split()
    assert command == ["nmoe", "verify", str(runs.path("run")), "--rewind"]
    assert nmoe(command[1:3]) == 1
    assert nmoe(command[1:]) == 0
    assert "now at step 2" in capfd.readouterr().out
    assert runs.train("run", *sets).exit_code == 0
    assert (runs.digest("run"), runs.losses("run")) == (digest, losses)
    assert nmoe(command[1:3]) == 0
    assert "rewind" in [event["event"] for event in events(runs, "run")]


def test_other_data_is_refused(runs, straight, tmp_path, monkeypatch):
    straight.copy("straight", tmp_path)
    documents = corpus.documents
    changed = lambda name, part: [*documents(name, part)[1:], "a new end"]  # noqa: E731
    monkeypatch.setattr(corpus, "documents", changed)
    with pytest.raises(RunError) as caught:
        runs.train("straight", f"output.stop_after_step={STOP + 1}")
    found = finding(caught)
    assert found.code == "N0504"
    assert found.notes[0] == f"then {straight.head('straight').identity.data['train']}"
    assert "restore the data" in found.help
    assert runs.digest("straight") == straight.digest("straight")


def test_another_environment_is_refused_or_a_new_line(runs, straight, tmp_path, monkeypatch):
    straight.copy("straight", tmp_path)
    further = f"output.stop_after_step={STOP + 1}"
    with pytest.raises(ConfigError, match="nothing has changed"):
        runs.train("straight", further, new_lineage=True)
    hashes = environment.source_hashes()
    monkeypatch.setattr(environment, "source_hashes", lambda: {**hashes, "model/moe.py": "0" * 64})
    with pytest.raises(RunError, match="--new-lineage") as caught:
        runs.train("straight", further)
    assert any("source.model/moe.py" in note for note in finding(caught).notes)
    assert runs.train("straight", further, new_lineage=True).exit_code == 0
    was, now = straight.head("straight").identity.lineage, runs.head("straight").identity.lineage
    assert was != now
    (line,) = [event for event in events(runs, "straight") if event["event"] == "lineage"]
    assert line["parent"] == was
    assert any("model/moe.py" in change for change in line["changes"])
    assert runs.train("straight", f"output.stop_after_step={STOP + 2}").exit_code == 0, "and then goes on without it"


def test_a_new_line_that_is_refused_later_has_not_begun(runs, straight, tmp_path, monkeypatch):
    straight.copy("straight", tmp_path)
    hashes = environment.source_hashes()
    monkeypatch.setattr(environment, "source_hashes", lambda: {**hashes, "model/moe.py": "0" * 64})
    documents = corpus.documents
    changed = lambda name, part: [*documents(name, part)[1:], "a new end"]  # noqa: E731
    monkeypatch.setattr(corpus, "documents", changed)
    with pytest.raises(RunError, match="training data"):
        runs.train("straight", f"output.stop_after_step={STOP + 1}", new_lineage=True)
    assert "lineage" not in [event["event"] for event in events(runs, "straight")]


def test_a_failing_thread_of_the_loader_stops_the_run(runs, monkeypatch):
    made = Loader.batch

    def broken(self, step):
        if step == 3:
            raise OSError(5, "Input/output error")
        return made(self, step)

    monkeypatch.setattr(Loader, "batch", broken)
    with pytest.raises(RunError, match="making the batch failed: OSError") as caught:
        runs.train("run", "output.checkpoint_every=2")
    assert finding(caught).place == "step 3, prefetch thread"
    assert runs.head("run").step == 2


def test_heldout_text_that_cannot_be_scored_is_refused_before_training(runs, monkeypatch):
    documents = corpus.documents
    monkeypatch.setattr(corpus, "documents", lambda name, part: [""] if part == "heldout" else documents(name, part))
    with pytest.raises(RunError, match="no byte to score"):
        runs.train("run", "output.stop_after_step=1")
    assert "saving" not in [event["event"] for event in events(runs, "run")]
