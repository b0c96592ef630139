"""The first step and the first thing at which two runs part.

The steps are gone through in order, and in a step what causes stands before what follows from it:

    batch        the tokens
    router       layer after layer: selection biases, loads, balance losses
    loss         of the step's batch, before its update
    gradients    the norm of each optimizer group, of all, clipping
    rates        of each group
    weights      the checkpoint after the step: counters, then tensor after tensor, slice after slice
    evaluation   of held-out text, after the step

Figures are equal if their bits are, tensors if the hashes of their slices are. Only what both runs have of a step is
compared, and what that leaves out is said. Files that are read are checked; whether the objects of a checkpoint are
whole is the business of `nmoe verify`.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import attrs

from nmoe.checkpoint import environment
from nmoe.metrics.schema import METRICS
from nmoe.plan.diff import differing, flat
from nmoe.plan.fingerprint import is_outside
from nmoe.report import tensors
from nmoe.report.run import Key, Rows, Run

STAGES = ("batch", "router", "loss", "gradients", "rates", "weights", "evaluation")
STAGE_OF = {
    "tokens_seen": "batch", "data": "batch", "router": "router", "quant": "router", "train": "loss",
    "grad": "gradients", "optimizer": "rates", "eval": "evaluation",
}  # fmt: skip
"""By a metric's group. The metrics of the other groups are of a run's time and place."""

CAUSES = ("router/bias_min", "router/bias_max", "router/bias_range", "grad/group_norm")
"""They stand before the other metrics of their stage, from which they do not follow."""

PLACES = {name: place for place, name in enumerate(METRICS)}

SELF = ("output.run_dir", "output.metrics_dir")


@attrs.frozen(kw_only=True)
class Difference:
    """One thing that is not the same in both. a, b: as each has it, None where one does not have it.

    where: of a tensor, the slices and elements that differ. layer: None where there is none.
    """

    what: str
    layer: int | None = None
    where: str = ""
    a: float | int | str | None
    b: float | int | str | None

    @property
    def relative(self) -> float | None:
        """|a - b| over the larger of the two, where they are floats that have one."""
        if not isinstance(self.a, float) or not isinstance(self.b, float):
            return None
        most = max(abs(self.a), abs(self.b))
        return abs(self.a - self.b) / most if math.isfinite(most) and most else None


@attrs.frozen(kw_only=True)
class Stage:
    """One stage of a step. compared: how many things. note: why none, where there are none."""

    name: str
    compared: int = 0
    differences: tuple[Difference, ...] = ()
    note: str = ""


@attrs.frozen(kw_only=True)
class Cause:
    """Something beside the training that differs and could explain it. counts: whether it can change a bit."""

    kind: str
    what: str
    a: str
    b: str
    counts: bool


@attrs.frozen(kw_only=True)
class Since:
    """From this step on a run's rows are of that lineage and attempt, on so many ranks."""

    step: int
    lineage: str
    attempt: int
    ranks: int


@attrs.frozen(kw_only=True)
class Comparison:
    """step: the first at which the runs part, None if there is none; stages: of that step, or of the last.

    rows, checkpoints: steps before it, or all, of which both runs have them and they are equal. lonely: metrics that
    only one of them has, and which. history: of a's and b's compared rows. causes: what else differs. not_compared:
    what all that leaves out, in words.
    """

    step: int | None
    stages: tuple[Stage, ...]
    rows: tuple[int, ...]
    checkpoints: tuple[int, ...]
    lonely: dict[str, str]
    history: tuple[tuple[Since, ...], tuple[Since, ...]]
    causes: tuple[Cause, ...]
    not_compared: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Something was compared, and nothing differs."""
        return self.step is None and bool(self.rows or self.checkpoints)

    @property
    def first(self) -> tuple[Stage, Difference] | None:
        """The first thing that differs, and its stage."""
        return next(((stage, stage.differences[0]) for stage in self.stages if stage.differences), None)


def compare(a: Run, b: Run) -> Comparison:
    """Both from their first steps on, up to the first difference. RunError N0403 if a file of a ledger is damaged."""
    rows, saved = a.steps.keys() & b.steps.keys(), a.manifests.keys() & b.manifests.keys()
    evaluates = _evaluate_alike(a, b)
    history: tuple[list[Since], list[Since]] = ([], [])
    lonely: dict[str, str] = {}
    stages: list[Stage] = []
    parted = None
    for step in sorted(rows | saved):
        figures: dict[str, Stage] = {}
        if step in rows:
            left, right = a.rows(step), b.rows(step)
            for since, one in zip(history, (left, right), strict=True):
                _note(since, step, one)
            figures = _figures(left, right, lonely)
        stages = [figures.get(name, Stage(name=name, note=f"no rows of step {step} in both")) for name in STAGES]
        stages[STAGES.index("weights")] = (
            _weights(step, a, b) if step in saved
            else Stage(name="weights", note=f"no checkpoint of step {step} in both")
        )  # fmt: skip
        if not evaluates or not stages[-1].compared:
            stages[-1] = Stage(name="evaluation", note="not of the same text" if not evaluates else "none at this step")
        if any(stage.differences for stage in stages):
            parted = step
            break
    passed = math.inf if parted is None else parted
    last = max(rows | saved, default=0) if parted is None else parted
    return Comparison(
        step=parted,
        stages=tuple(stages),
        rows=tuple(step for step in sorted(rows) if step < passed),
        checkpoints=tuple(step for step in sorted(saved) if step < passed),
        lonely=lonely,
        history=(tuple(history[0]), tuple(history[1])),
        causes=(*_plan_keys(a, b), *_data(a, b), *_environments(a, b, last)),
        not_compared=tuple(_left_out(a, b, passed, lonely)),
    )


def _note(history: list[Since], step: int, rows: Rows) -> None:
    now = Since(step=step, lineage=rows.lineage, attempt=rows.attempt, ranks=rows.ranks)
    if not history or attrs.evolve(history[-1], step=step) != now:
        history.append(now)


def _figures(a: Rows, b: Rows, lonely: dict[str, str]) -> dict[str, Stage]:
    """The stages of one step's rows. lonely: gets the metrics that only one of them has, and which."""
    compared = dict.fromkeys(STAGES, 0)
    unlike: dict[str, list[Key]] = {name: [] for name in STAGES}
    for key in a.values | b.values:
        stage = STAGE_OF.get(key[0].partition("/")[0])
        if stage is None:
            continue
        if key not in a.values or key not in b.values:
            lonely.setdefault(key[0], "A" if key in a.values else "B")
            continue
        compared[stage] += 1
        if not _same(a.values[key], b.values[key]):
            unlike[stage].append(key)
    return {
        name: Stage(
            name=name,
            compared=compared[name],
            differences=tuple(
                Difference(what=_words(key), layer=key[1], a=a.values[key], b=b.values[key])
                for key in sorted(unlike[name], key=_cause_first)
            ),
        )
        for name in STAGES
    }


def _words(key: Key) -> str:
    name, _, expert, label = key
    return name + ("" if expert is None else f" of expert {expert}") + ("" if label is None else f" `{label}`")


def _cause_first(key: Key) -> tuple[float, bool, int]:
    """Within a stage. Groups of parameters stay in the order of the ledger, which is the plan's."""
    name, layer, _, _ = key
    return math.inf if layer is None else layer, name not in CAUSES, PLACES.get(name, -1)


def _same(a: object, b: object) -> bool:
    """Bit for bit, but that one NaN is as good as another."""
    return a.hex() == b.hex() if isinstance(a, float) and isinstance(b, float) else a == b


def _weights(step: int, a: Run, b: Run) -> Stage:
    one, other = a.manifests[step], b.manifests[step]
    counters = differing(flat(dict(one.state)), flat(dict(other.state)))
    found = [Difference(what=f"counter {key}", a=left, b=right) for key, left, right in counters]
    names = tensors.by_cause(one.tensors.keys() | other.tensors.keys())
    unlike = [name for name in names if one.tensors.get(name) != other.tensors.get(name)]
    for index, name in enumerate(unlike):
        left, right = one.tensors.get(name), other.tensors.get(name)
        told = tensors.difference(name, left, right, (a.checkpoints, b.checkpoints) if index == 0 else None)
        found.append(Difference(what=name, where=told.where, a=told.a, b=told.b))
    return Stage(name="weights", compared=len(flat(dict(one.state))) + len(names), differences=tuple(found))


def _evaluate_alike(a: Run, b: Run) -> bool:
    """Whether both score the same held-out text in the same way."""
    sections = [{name: one for name, one in run.plan["sections"].items() if name.startswith("eval")} for run in (a, b)]
    texts = [{manifest.identity.data.get("heldout") for manifest in run.manifests.values()} for run in (a, b)]
    return sections[0] == sections[1] and len(texts[0] | texts[1]) <= 1


def _plan_keys(a: Run, b: Run) -> Iterator[Cause]:
    """Keys as `nmoe build --diff` shows them, those first that can change a bit of training."""
    found = []
    for key, left, right in differing(flat(a.plan["resolved"]), flat(b.plan["resolved"])):
        if key in SELF:
            continue
        holders = [name for run in (a, b) for name in run.plan["sections"] if key.startswith(f"{name}.")]
        section = max(holders, key=len, default="")
        counts = not is_outside(section) and a.plan["sections"].get(section) != b.plan["sections"].get(section)
        found.append(Cause(kind="plan", what=key, a=_text(left), b=_text(right), counts=counts))
    yield from sorted(found, key=lambda cause: not cause.counts)


def _data(a: Run, b: Run) -> Iterator[Cause]:
    """Content digests of the data, as the newest checkpoints of both have them."""
    newest = [list(run.manifests.values())[-1:] for run in (a, b)]
    if all(newest):
        (one,), (other,) = newest
        for name, left, right in differing(dict(one.identity.data), dict(other.identity.data)):
            yield Cause(kind="data", what=name, a=_text(left), b=_text(right), counts=name == "train")


def _environments(a: Run, b: Run, step: int) -> Iterator[Cause]:
    records = a.environment_at(step), b.environment_at(step)
    if not all(records):
        return
    for part, counts in (("exact", True), ("recorded", False)):
        for one in environment.compare(*records, part=part):
            if one.what not in environment.PASSING:
                yield Cause(kind="environment", what=one.what, a=one.then, b=one.now, counts=counts)


def _text(value: Any) -> str:
    return "absent" if value is None else str(value)


def _left_out(a: Run, b: Run, before: float, lonely: dict[str, str]) -> Iterator[str]:
    """What could not be compared, of the steps up to the one at which the runs part."""
    named = (("A", a, b), ("B", b, a))
    for name, run, other in named:
        if not run.steps:
            yield f"{name} has no metrics in {run.ledger}"
        if not run.environment:
            yield f"{name} has no record of its environment that can be read"
        yield from (f"checkpoints of {name}: {fault}" for fault in run.faults)
        only = [step for step in run.steps if step not in other.steps and step <= before]
        if only:
            yield f"rows of {steps_text(only)}: only {name} has them"
    for name, run, other in named:
        only = [step for step in run.manifests if step not in other.manifests and step <= before]
        if only:
            yield f"checkpoint{'s' if only[1:] else ''} of {steps_text(only)}: only {name} keeps {_them(only)}"
    if not a.manifests.keys() & b.manifests.keys():
        yield "weights: there is no step of which both keep a checkpoint"
    for name, who in lonely.items():
        yield f"`{name}`: only {who} has it"


def _them(several: Collection[object]) -> str:
    return "them" if len(several) > 1 else "it"


def steps_text(steps: Iterable[int]) -> str:
    """Steps in words, runs of neighbours as one: `step 3`, `steps 1 to 6, 8`, and how many where they are scattered."""
    rising = sorted(steps)
    runs: list[list[int]] = []
    for step in rising:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    if len(runs) > 4:
        return f"{len(rising)} steps from {rising[0]} to {rising[-1]}"
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"step{'s' if len(rising) > 1 else ''} {', '.join(words)}"
