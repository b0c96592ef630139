"""Where two runs part: faults of arithmetic at known places, and runs that differ in nothing that counts."""

import json

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.checkpoint.format import manifest_path, object_path
from nmoe.data.loader import Loader
from nmoe.errors import RunError
from nmoe.model import microbatch
from nmoe.plan.fingerprint import digest
from nmoe.report import compare as report
from nmoe.report.run import read_run
from nmoe.train import attempt
from tests.train.launches import FOUR

LAST, AT = 4, 3


KEYS = (
    f"output.stop_after_step={LAST}", "output.checkpoint_every=1", "output.keep_checkpoints=9",
    "eval.bpb.every_tokens=64", "eval.bpb.max_tokens=32",
)  # fmt: skip


def compared(runs, a: str, b: str) -> report.Comparison:
    return report.compare(*(read_run(runs.path(name)) for name in (a, b)))


@pytest.fixture(scope="module")
def straight(module_runs):
    module_runs.train("straight", *KEYS)
    return module_runs


@pytest.fixture
def with_fault(straight, monkeypatch, request):
    """Trains a run in which `act(graph)` is called as a phase of step AT begins; how it compares with `straight`."""

    def train(phase: str, act) -> report.Comparison:
        build, graphs = attempt.build, []
        monkeypatch.setattr(attempt, "build", lambda *given: graphs.append(build(*given)) or graphs[0])

        def observe(number: int, now: str) -> None:
            if (number, now) == (AT, phase):
                with torch.no_grad():
                    act(graphs[0])

        name = request.node.name
        straight.train(name, *KEYS, observe=observe)
        return compared(straight, "straight", name)

    return train


def parted(found: report.Comparison) -> tuple[int | None, str, str, int | None]:
    assert not found.identical
    stage, first = found.first
    return found.step, stage.name, first.what, first.layer


def test_another_batch(with_fault, monkeypatch):
    made = Loader.batch
    monkeypatch.setattr(
        Loader, "batch", lambda self, number: attrs.evolve(made(self, number + 7 * (number == AT)), step=number)
    )
    found = with_fault("batch", lambda graph: None)
    assert parted(found) == (AT, "batch", "data/batch_digest", None)
    assert found.rows == found.checkpoints == (1, 2)
    assert [bool(stage.differences) for stage in found.stages] == [True, True, True, True, False, True, True]


def test_a_bias(with_fault):
    def act(graph):
        dict(graph.routers())[2].bias_E[1] += 1.0

    assert parted(with_fault("batch", act)) == (AT, "router", "router/bias_max", 2)


def test_a_routers_choice(with_fault):
    """Of the second layer with experts; the first one's loads are the same."""

    def act(graph):
        router = dict(graph.routers())[2]
        forward = router.forward
        router.forward = lambda x_TD: forward(-x_TD)

    found = with_fault("batch", act)
    number, stage, what, layer = parted(found)
    assert (number, stage, layer) == (AT, "router", 2)
    assert what.startswith(("router/entropy", "router/load_"))


def test_the_loss(with_fault, monkeypatch):
    """By its last bit, and nothing before it."""
    loss, faulty = microbatch.linear_cross_entropy, []
    monkeypatch.setattr(
        microbatch, "linear_cross_entropy", lambda *given, **more: loss(*given, **more) * (1 + 2**-20 * bool(faulty))
    )
    found = with_fault("forward", lambda graph: faulty.append(True))
    assert parted(found) == (AT, "loss", "train/loss", None)
    (difference, *_) = found.stages[2].differences
    assert 0 < difference.relative < 1e-5


def test_a_gradient(with_fault):
    """Of one group: its norm stands before the norm of all, which follows from it."""

    def act(graph):
        squared, owned = graph.norms.squared, dict(graph.norms.own)

        def other():
            owned["layers.3.moe.router.weight_ED"].grad[0, 0] *= 1.5
            return squared()

        graph.norms.squared = other

    assert parted(with_fault("forward", act)) == (AT, "gradients", "grad/group_norm `router`", None)


def test_the_schedule(with_fault):
    def act(graph):
        scale = graph.schedule.scale
        graph.schedule.scale = lambda tokens: scale(tokens) / 2

    assert parted(with_fault("optimizer", act)) == (AT, "rates", "optimizer/scale", None)


def test_one_element_of_one_experts_matrix(with_fault):
    name = "layers.2.moe.experts.w_down_EDF"

    def act(graph):
        graph.state()[f"master/{name}"].tensor[5, 3, 1] = 7.0

    found = with_fault("router", act)
    assert parted(found) == (AT, "weights", f"master/{name}", None)
    weights = found.stages[5]
    assert len(weights.differences) == 1
    assert weights.differences[0].b == 7.0
    assert "1 of 8 slices, first expert 5: 1 of its " in weights.differences[0].where
    assert weights.differences[0].where.endswith(" elements, first [5, 3, 1]")


def test_a_counter(with_fault):
    def act(graph):
        graph.rounding.counter += 1

    found = with_fault("router", act)
    assert parted(found) == (AT, "weights", "counter rng.rounding", None)
    (difference,) = found.stages[5].differences
    assert difference.b == difference.a + 1


def test_an_evaluation(with_fault, monkeypatch):
    evaluate, faulty = attempt.bpb.evaluate, []

    def other(*given, **more):
        found = evaluate(*given, **more)
        return attrs.evolve(found, loss=found.loss + 1.0) if faulty else found

    monkeypatch.setattr(attempt.bpb, "evaluate", other)
    found = with_fault("router", lambda graph: faulty.append(True))
    assert parted(found)[:2] == (AT, "evaluation")
    assert found.checkpoints == (1, 2)


def test_nothing_explains_a_broken_machine(with_fault):
    def act(graph):
        graph.model.layers[0].ffn_norm.weight_D[3] *= 2

    found = with_fault("batch", act)
    assert found.step == AT
    assert not [cause for cause in found.causes if cause.counts]


def test_a_key_inside_explains_and_one_outside_cannot(straight):
    straight.train("seed", *KEYS, "random.seed=7", "output.prefetch=0")
    found = compared(straight, "straight", "seed")
    assert found.step == 1
    causes = {cause.what: cause.counts for cause in found.causes}
    assert causes == {"random.seed": True, "output.prefetch": False}


def test_another_environment_explains(straight, monkeypatch):
    record = attempt.environment.record

    def other(target):
        found = record(target)
        found["exact"]["libc"], found["recorded"]["host"] = "musl 1.2", "elsewhere"
        return found

    monkeypatch.setattr(attempt.environment, "record", other)
    straight.train("elsewhere", *KEYS)
    found = compared(straight, "straight", "elsewhere")
    assert found.identical
    assert {(cause.what, cause.b, cause.counts) for cause in found.causes} == {
        ("libc", "musl 1.2", True), ("host", "elsewhere", False)
    }  # fmt: skip


def test_a_run_that_was_killed_is_the_one_that_it_is_now(straight, monkeypatch):
    """The killed attempt had a fault in a step that was repeated: its row has been set aside."""

    class Killed(BaseException):
        pass

    build, graphs = attempt.build, []
    monkeypatch.setattr(attempt, "build", lambda *given: graphs.append(build(*given)) or graphs[-1])

    def observe(number: int, phase: str) -> None:
        if (number, phase) == (AT, "batch"):
            with torch.no_grad():
                graphs[0].model.layers[0].ffn_norm.weight_D[3] *= 2
        if (number, phase) == (AT, "save"):
            raise Killed

    with pytest.raises(Killed):
        straight.train("killed", *KEYS, observe=observe)
    assert compared(straight, "straight", "killed").step == AT
    straight.train("killed", *KEYS)
    found = compared(straight, "straight", "killed")
    assert found.identical
    assert found.rows == found.checkpoints == (1, 2, 3, 4)
    assert not found.not_compared
    assert [(since.step, since.attempt) for since in found.history[1]] == [(1, 1), (3, 2)]


def test_any_number_of_ranks_is_identical(module_launches):
    keys = (*FOUR, "output.checkpoint_every=2", "eval.bpb.max_tokens=32")
    for name, ranks in (("one", 1), ("two", 2)):
        module_launches.finished(name, ranks, *keys, "output.stop_after_step=3")
    for number, ranks in ((2, 4), (3, 1)):
        module_launches.finished("relay", ranks, *keys, f"output.stop_after_step={number}")
    for other in ("two", "relay"):
        found = compared(module_launches, "one", other)
        assert found.identical, found.first
        assert (found.rows, found.checkpoints) == ((1, 2, 3), (2, 3))
        assert not found.not_compared
    assert [(since.step, since.ranks) for since in found.history[1]] == [(1, 4), (3, 1)]


def test_what_only_one_has_is_said(straight):
    keys = ("output.stop_after_step=3", "output.checkpoint_every=2", "output.metrics_every=3", *KEYS[3:])
    straight.train("rare", *keys[:3], 'eval.bpb.every_tokens=4096', "eval.bpb.max_tokens=33")
    found = compared(straight, "straight", "rare")
    assert found.identical
    assert (found.rows, found.checkpoints) == ((3,), (2, 3))
    assert "rows of steps 1, 2, 4: only A has them" in found.not_compared
    assert "checkpoints of steps 1, 4: only A keeps them" in found.not_compared
    assert found.stages[-1].note == "not of the same text"


def test_no_checkpoint_of_one_step(straight, runs):
    runs.train("odd", "output.stop_after_step=3", "output.checkpoint_every=3")
    runs.train("even", "output.stop_after_step=2")
    found = compared(runs, "odd", "even")
    assert found.identical
    assert found.checkpoints == ()
    assert "weights: there is no step of which both keep a checkpoint" in found.not_compared
    assert found.stages[5].note == "no checkpoint of step 2 in both"


def test_damaged_checkpoints_are_not_compared_and_said(straight, tmp_path):
    for name in ("straight", "seed"):
        if not straight.path(name).exists():
            straight.train(name, *KEYS, "random.seed=7")
    straight.copy("straight", tmp_path)
    path = manifest_path(tmp_path / "straight" / "checkpoints", 2)
    path.write_bytes(path.read_bytes()[:-1])
    copy = read_run(tmp_path / "straight", metrics=tmp_path / "metrics")
    found = report.compare(read_run(straight.path("straight")), copy)
    assert found.identical
    assert found.checkpoints == (1, 3, 4)
    assert any("checkpoints of B: `step_00000002/manifest.json`" in line for line in found.not_compared)


def test_a_damaged_object_is_not_shown(with_fault, straight):
    """The hashes have parted already; elements are read only to be shown."""

    def act(graph):
        graph.state()["master/norm.weight_D"].tensor[2] = 3.0

    found = with_fault("router", act)
    manifest = read_run(straight.path("straight")).manifests[AT]
    (sha256,) = manifest.tensors["master/norm.weight_D"].slices
    victim = object_path(straight.path("straight") / "checkpoints", sha256)
    content = victim.read_bytes()
    victim.write_bytes(bytes(len(content)))
    try:
        again = compared(straight, "straight", "test_a_damaged_object_is_not_shown")
    finally:
        victim.write_bytes(content)
    assert parted(again) == parted(found) == (AT, "weights", "master/norm.weight_D", None)
    assert "is damaged" in again.stages[5].differences[0].where


def test_a_damaged_ledger_is_an_error(straight, tmp_path):
    straight.copy("straight", tmp_path)
    path = tmp_path / "metrics" / "straight" / "step_00000002.parquet"
    path.write_bytes(path.read_bytes()[:-1])  # a single bit may be one of those that say nothing
    with pytest.raises(RunError, match="N0403"):
        report.compare(
            read_run(straight.path("straight")), read_run(tmp_path / "straight", metrics=tmp_path / "metrics")
        )


def test_a_plan_that_names_directories_that_cannot_be_has_no_metrics_there(straight, tmp_path):
    straight.copy("straight", tmp_path)
    path = tmp_path / "straight" / "plan.json"
    stored = json.loads(path.read_text())
    stored["resolved"]["output"]["metrics_dir"] = "a" * 5000
    path.write_text(json.dumps({**stored, "tree_digest": digest(stored["resolved"])}))
    assert read_run(tmp_path / "straight").ledger == tmp_path / "metrics" / "straight"
    stored["resolved"]["output"]["run_dir"] = "b" * 5000
    path.write_text(json.dumps({**stored, "tree_digest": digest(stored["resolved"])}))
    assert read_run(tmp_path / "straight").steps == {}


def test_a_run_that_was_moved_has_its_metrics_beside_it(straight, tmp_path):
    """Also one whose directory has another name now: its metrics go by the old one."""
    straight.copy("straight", tmp_path)
    assert read_run(tmp_path / "straight").ledger == straight.metrics / "straight", "they are where the plan says"
    renamed = (tmp_path / "straight").rename(tmp_path / "renamed")
    plan = json.loads((renamed / "plan.json").read_text())
    plan["resolved"]["output"]["metrics_dir"] = str(tmp_path / "gone")
    (renamed / "plan.json").write_text(json.dumps({**plan, "tree_digest": digest(plan["resolved"])}))
    moved = read_run(renamed)
    assert moved.ledger == tmp_path / "metrics" / "straight"
    assert report.compare(read_run(straight.path("straight")), moved).identical


def test_every_metric_has_a_stage_or_is_of_time_and_place():
    groups = {name.partition("/")[0] for name in report.METRICS}
    assert groups - set(report.STAGE_OF) == {"throughput", "time", "memory"}
    assert set(report.STAGE_OF.values()) | {"weights"} == set(report.STAGES)


@given(st.sets(st.integers(1, 12), min_size=1))
def test_steps_in_words_are_those_steps(steps):
    text = report.steps_text(steps)
    if " from " in text:
        count, first, last = (int(word) for word in text.split() if word.isdigit())
        assert (count, first, last) == (len(steps), min(steps), max(steps))
        return
    named = set()
    for part in text.removeprefix("steps ").removeprefix("step ").split(", "):
        first, _, last = part.partition(" to ")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == steps
