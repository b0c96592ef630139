"""Is everything that is saved needed, and everything that is needed saved?

A run is stopped half-way. One saved item after the other is replaced by the value it had before the
first step, hashes resealed as if it had been saved so, and the run continued. What the gate
compares must then differ from the run that went straight through: an item whose loss nobody
notices would be one that is saved for nothing, or worse, is not read back.
"""

import hashlib
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.checkpoint import format as layout
from nmoe.checkpoint import reader
from nmoe.checkpoint.manifest import Head, Manifest
from nmoe.checkpoint.objects import store
from nmoe.checkpoint.parts import join
from nmoe.checkpoint.verify import read_manifest
from nmoe.errors import RunError
from nmoe.graph import TrainingGraph, build
from nmoe.part import Part
from nmoe.train.gate import compare
from nmoe.train.state import TrainState
from nmoe.train.step import run_step

SAVED, LAST = 3, 5
CLASSES = ("master", "adamw.exp_avg", "adamw.exp_avg_sq", "muon.momentum", "router.bias")
COUNTERS = ("schedule.tokens_seen", "loader.next_batch", "rng.rounding")
STATE_DTYPES = ("bf16", "fp32")


def reseal(run: Path, manifest: Manifest) -> None:
    """Makes `manifest` the run's HEAD as if it had been saved."""
    directory = run / "checkpoints"
    content = manifest.encode()
    layout.manifest_path(directory, manifest.step).write_bytes(content)
    head = Head(step=manifest.step, manifest=hashlib.sha256(content).hexdigest())
    layout.head_path(directory).write_bytes(head.encode())


def with_tensors(run: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replaces tensors in the run's HEAD."""
    manifest, _ = read_manifest(run / "checkpoints", SAVED)
    assert tensors
    assert tensors.keys() <= manifest.tensors.keys()
    (run / "checkpoints" / "tmp").mkdir(exist_ok=True)
    (run / "checkpoints" / "objects").mkdir(exist_ok=True)
    stored = store(run / "checkpoints", {n: Part.whole(t.detach()) for n, t in tensors.items()}, threads=1)
    records = join([stored.spans], step=SAVED)
    for name, record in records.items():
        assert record != manifest.tensors[name], f"{name} is at its initial value, so the mutation is none"
    reseal(run, attrs.evolve(manifest, tensors={**manifest.tensors, **records}))


def with_counter(run: Path, path: str, value: int) -> None:
    """Replaces a counter in the run's HEAD."""
    manifest, _ = read_manifest(run / "checkpoints", SAVED)
    section, _, name = path.rpartition(".")
    state = {key: dict(item) if isinstance(item, dict) else item for key, item in manifest.state.items()}
    place = state[section] if section else state
    assert place[name] != value
    place[name] = value
    reseal(run, attrs.evolve(manifest, state=state))


@pytest.fixture(scope="module", params=STATE_DTYPES)
def halfway(request, module_runs, tmp_path_factory):
    """(runs, sets, copy): `straight` after LAST steps, and `cut` stopped after SAVED, with a copy to begin from."""
    sets = (f'optimizer.state_dtype="{request.param}"',)
    aside = tmp_path_factory.mktemp("aside")
    straight, cut = f"straight-{request.param}", f"cut-{request.param}"
    module_runs.train(straight, *sets, f"output.stop_after_step={LAST}")
    module_runs.train(cut, *sets, f"output.stop_after_step={SAVED}")
    module_runs.copy(cut, aside)
    return module_runs, sets, aside, straight, cut


def initial(plan) -> dict[str, torch.Tensor]:
    """Every tensor of the state before the first step."""
    return {name: part.tensor.clone() for name, part in build(plan).state().items()}


def go_on(halfway) -> str:
    """Continues `cut` and returns the first difference from `straight`, '' if there is none."""
    runs, sets, _, straight, cut = halfway
    runs.train(cut, *sets, f"output.stop_after_step={LAST}")
    difference, _, _ = compare(runs.directory, straight, cut, LAST)
    return difference


def test_untouched_it_is_identical(halfway):
    runs, _, aside, _, cut = halfway
    runs.bring_back(cut, aside)
    assert go_on(halfway) == ""


@pytest.mark.parametrize("kind", CLASSES)
def test_a_lost_class_of_tensors_is_found(halfway, kind):
    runs, sets, aside, _, cut = halfway
    runs.bring_back(cut, aside)
    before = initial(runs.plan(cut, *sets))
    with_tensors(runs.path(cut), {name: tensor for name, tensor in before.items() if name.startswith(f"{kind}/")})
    assert go_on(halfway)


@pytest.mark.parametrize("counter", COUNTERS)
def test_a_lost_counter_is_found(halfway, counter):
    runs, sets, aside, _, cut = halfway
    if counter == "rng.rounding" and "fp32" in sets[0]:
        assert runs.head(cut).state["rng"]["rounding"] == 0, "nothing is rounded, so nothing may have been drawn"
        return
    runs.bring_back(cut, aside)
    with_counter(runs.path(cut), counter, 1 if counter == "loader.next_batch" else 0)
    assert go_on(halfway)


def test_a_lost_step_is_refused(halfway):
    runs, sets, aside, _, cut = halfway
    runs.bring_back(cut, aside)
    with_counter(runs.path(cut), "step", 0)
    before = sorted(path.name for path in (runs.metrics / cut).iterdir())
    with pytest.raises(RunError, match=f"step {SAVED} says that 0 steps are finished"):
        runs.train(cut, *sets, f"output.stop_after_step={LAST}")
    assert sorted(path.name for path in (runs.metrics / cut).iterdir()) == before, "a refused start removes nothing"


@pytest.mark.parametrize("counter", ["step", *COUNTERS])
@pytest.mark.parametrize("value", [None, True, "3", -1])
def test_a_counter_that_is_no_count_is_refused(runs, counter, value):
    scalars = {"step": 3, "schedule": {"tokens_seen": 192}, "loader": {"next_batch": 4}, "rng": {"rounding": 12}}
    section, _, name = counter.rpartition(".")
    (scalars[section] if section else scalars)[name] = value
    graph = build(runs.plan("any"))
    with pytest.raises(RunError) as caught:
        TrainState.restore(scalars, graph, step=3)
    assert caught.value.diagnostics[0].code == "N0503"


@pytest.mark.parametrize("section", ["", "schedule", "loader", "rng"])
def test_a_counter_that_this_program_does_not_have_is_refused(runs, section):
    scalars = {"step": 3, "schedule": {"tokens_seen": 192}, "loader": {"next_batch": 4}, "rng": {"rounding": 12}}
    (scalars[section] if section else scalars)["offset"] = 1
    with pytest.raises(RunError, match=r"N0503.*`offset`"):
        TrainState.restore(scalars, build(runs.plan("any")), step=3)


def one_step(graph: TrainingGraph, state: TrainState) -> dict[str, torch.Tensor]:
    """The tensors after the step that follows `state`, and the counter of the rounding among them."""
    batch = graph.loader.batch(state.next_batch)
    tokens = state.tokens_seen + graph.tokens_per_step
    run_step(graph, batch, step=state.step + 1, tokens_seen=tokens, observe=lambda step, phase: None)
    for _, router in graph.routers():
        router.end_step(tokens)
    return {name: part.tensor.clone() for name, part in graph.state().items()}


@pytest.mark.parametrize("halfway", ["bf16"], indirect=True)
def test_each_single_lost_tensor_is_found(halfway):
    """Every tensor of every class by itself, after one step: too many for a whole continuation each."""
    runs, sets, aside, _, cut = halfway
    runs.bring_back(cut, aside)
    plan = runs.plan(cut, *sets, "batch.microbatch=4")
    manifest = runs.head(cut)
    graph = build(plan)
    before = {name: part.tensor.clone() for name, part in graph.state().items()}
    saved = {name: torch.empty_like(tensor) for name, tensor in before.items()}
    reader.read_some(runs.path(cut) / "checkpoints", manifest, saved)

    def after(lost: str | None) -> dict[str, torch.Tensor]:
        for name, part in graph.state().items():
            part.tensor.copy_(before[name] if name == lost else saved[name])
        graph.refresh()
        return one_step(graph, TrainState.restore(dict(manifest.state), graph, step=SAVED))

    expected = after(None)
    assert {name.split("/")[0] for name in expected} == set(CLASSES)
    again = after(None)
    assert all(torch.equal(again[name], expected[name]) for name in expected), "the harness itself is not exact"
    unnoticed = []
    for lost in expected:
        found = after(lost)
        if all(torch.equal(found[name], expected[name]) for name in expected):
            unnoticed.append(lost)
    assert not unnoticed
