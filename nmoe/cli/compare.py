"""nmoe compare: the first step and the first thing at which two runs part, and what could explain it."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nmoe.report.compare import Comparison, Difference, Stage
    from nmoe.report.run import Run

SHOWN = 12
"""Causes of a kind in the text; --json has all."""

CELL = 36
DIGEST = re.compile(r"[0-9a-f]{64}")

PLACES = {
    "batch": "the batch", "router": "a router", "loss": "the loss", "gradients": "the gradients", "rates": "the rates",
    "weights": "the state after it", "evaluation": "the evaluation after it",
}  # fmt: skip


@click.command(
    "compare",
    epilog="Exit status: 0 identical in everything that both have, 1 they differ or have nothing in common, "
    "2 the arguments are not valid.",
)
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything that was found, as JSON.")
def command(run_a: Path, run_b: Path, as_json: bool) -> None:
    """Find where RUN_A and RUN_B part.

    Compared are, bit for bit, the rows of the steps that both ledgers have and the checkpoints that
    both keep of one step: batch, router loads layer by layer, loss, gradient norms, rates, weights,
    evaluation, causes before what follows from them. The first step that differs is shown, with the
    keys of the plans, the data and the environments that differ: what counts can change a bit of
    training, what does not is shown because a machine may be broken.

    Rows of steps that were repeated after a kill are not taken: a run that was stopped and continued
    is the one that it is now. What could not be compared is listed. Either run may be training.

    \b
      nmoe compare runs/monday runs/tuesday
      nmoe compare runs/monday runs/tuesday --json | jq .step
    """
    from nmoe.report.compare import compare
    from nmoe.report.run import read_run

    a, b = read_run(run_a), read_run(run_b)
    found = compare(a, b)
    if as_json:
        click.echo(json.dumps(_json(a, b, found), indent=2))
    else:
        click.echo("\n".join(line.rstrip() for line in _lines(a, b, found)))
    raise SystemExit(0 if found.identical else 1)


def _json(a: "Run", b: "Run", found: "Comparison") -> dict[str, Any]:
    import attrs

    runs = {name: {"run": str(run.path), "fingerprint": run.plan["fingerprint"]} for name, run in (("a", a), ("b", b))}

    def finite(_: Any, __: Any, value: Any) -> Any:
        return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

    whole = attrs.asdict(found, value_serializer=finite)
    return {"identical": found.identical, "headline": headline(found), **runs, **whole}


def headline(found: "Comparison") -> str:
    """The finding in a line."""
    from nmoe.report.compare import steps_text

    if found.first is not None:
        stage, first = found.first
        return f"they part at step {found.step}, in {PLACES[stage.name]}: {_name(first)}"
    if not found.identical:
        return "nothing to compare: there is no step that both have"
    compared = [
        f"{kind} of {steps_text(steps)}"
        for kind, steps in (("rows", found.rows), ("state", found.checkpoints))
        if steps
    ]
    limits = " in what both have" if found.not_compared else ""
    return f"identical{limits}: {', '.join(compared)}"


def _name(one: "Difference") -> str:
    return one.what + (f" of layer {one.layer}" if one.layer is not None else "")


def _lines(a: "Run", b: "Run", found: "Comparison") -> Iterator[str]:
    from nmoe.plan.render import rows

    yield headline(found)
    if found.first is not None:
        stage, first = found.first
        yield f"  A {_value(first.a)}, B {_value(first.b)}" + (f"; {first.where}" if first.where else "")
        equal = [f"{kind} up to step {steps[-1]}" for kind, steps in (
            ("rows", found.rows), ("checkpoints", found.checkpoints),
        ) if steps]  # fmt: skip
        yield f"  equal before: {', '.join(equal) or 'nothing'}"
        before = found.step - 1 if found.step is not None else 0
        if before and stage.name in ("router", "loss", "gradients") and before not in found.checkpoints:
            yield f"  not both have a checkpoint of step {before}: its update may be what parts them"
    yield ""
    yield from rows([["", "run", "steps", "kept", "plan", "attempts"], *_runs(a, b, found)], "<<<<<<")
    if found.first is not None:
        yield ""
        yield from rows([[f"step {found.step}", "same", "differ", "first", "A", "B", "relative"],
                         *map(_stage, found.stages)], "<>><>>>")  # fmt: skip
    yield from _causes(found)
    if found.not_compared:
        yield ""
        yield "  not compared"
        yield from (f"    {line}" for line in found.not_compared)


def _runs(a: "Run", b: "Run", found: "Comparison") -> Iterator[list[str]]:
    from nmoe.report.compare import steps_text

    for name, run, history in zip("AB", (a, b), found.history, strict=True):
        attempts = [
            f"{one.attempt} from step {one.step}" + (f" on {one.ranks} ranks" if one.ranks > 1 else "")
            + (", a new line" if before is not None and before.lineage != one.lineage else "")
            for before, one in zip((None, *history), history, strict=False)
        ]  # fmt: skip
        yield [
            name, str(run.path), steps_text(run.steps) if run.steps else "none",
            ", ".join(map(str, run.manifests)) or "none", run.plan["fingerprint"][:12],
            "; ".join(attempts[:3]) + ("; ..." if attempts[3:] else ""),
        ]  # fmt: skip


def _stage(stage: "Stage") -> list[str]:
    if not stage.compared:
        return [stage.name, "-", "-", stage.note, "", "", ""]
    same = str(stage.compared - len(stage.differences))
    if not stage.differences:
        return [stage.name, same, "0", "", "", "", ""]
    first = stage.differences[0]
    relative = "" if first.relative is None else f"{first.relative:.1e}"
    return [stage.name, same, str(len(stage.differences)), _name(first), _value(first.a), _value(first.b), relative]


def _causes(found: "Comparison") -> Iterator[str]:
    from nmoe.plan.render import rows

    counting = [cause for cause in found.causes if cause.counts]
    if found.first is not None and not counting:
        yield ""
        yield "  plan, data, code and machine are alike on record: look for a machine that errs, and for code that does"
        yield "  not give the same bits each time (nmoe gate CONFIG)"
    for title, causes in (
        ("what differs and can change bits", counting),
        ("what differs and cannot", [cause for cause in found.causes if not cause.counts]),
    ):
        if causes:
            yield ""
            yield f"  {title}"
            cells = [["", "", "A", "B"], *([f"  {one.kind}", *map(_cell, (one.what, one.a, one.b))] for one in causes)]
            yield from rows(cells[: SHOWN + 1], "<<<<")
            if causes[SHOWN:]:
                yield f"    and {len(causes) - SHOWN} more, which --json has"


def _value(value: float | int | str | None) -> str:
    return "absent" if value is None else _cell(value) if isinstance(value, str) else repr(value)


def _cell(text: str) -> str:
    """The start of a digest; both ends of what else is long."""
    if DIGEST.fullmatch(text):
        return f"{text[:12]}..."
    return text if len(text) <= CELL else f"{text[: CELL - 14]}...{text[-11:]}"
