"""The plan for people: what `nmoe build --print` shows, and the golden file of every config.

ASCII, one line for each value, no time, host or absolute path. Beside a value stands where it came
from: `default` when nobody wrote it, the file and line or `--set` when more than one file had a say.
The dashes of a missing value say that the key is optional and absent.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from nmoe.plan.fingerprint import is_outside
from nmoe.plan.groups import GroupRow
from nmoe.plan.plan import Plan
from nmoe.plan.structure import fields_of, is_section
from nmoe.plan.toml import is_tables
from nmoe.registry.table import TABLE

WIDTH = 100
NAME_WIDTH = 22
BESIDE = 60
SHORT = 12


def render(plan: Plan) -> str:
    """The whole page, with a newline at its end."""
    lines = [
        *_head(plan),
        *_sections(plan, plan.tree, "", ""),
        *_schedule(plan),
        *_cost(plan),
        *_memory(plan),
        *_ranks(plan),
        *_groups(plan),
        *_platform(plan),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _head(plan: Plan) -> Iterator[str]:
    yield f"plan of {ascii_text(plan.name)}"
    yield ""
    yield f"  fingerprint  {plan.fingerprint}"
    yield f"  tree digest  {plan.tree_digest}"
    yield ""
    yield "  Beside a section its digest; beside a value where it comes from, when not from this file."


def ascii_text(text: str) -> str:
    """Text without the characters that a terminal or another encoding would change."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def value_text(value: Any) -> str:
    """One value as TOML would write it, integers grouped by thousands, in ASCII."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:_}"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    return "[" + ", ".join(value_text(item) for item in value) + "]"


def _sections(plan: Plan, table: dict[str, Any], name: str, place: str) -> Iterator[str]:
    """A section and those below it. name: dotted, with indexes; place: the closed table's name, without."""
    cls = TABLE[place][table.get("kind")]
    fields = fields_of(cls)
    if name:
        yield ""
        outside = "   outside the fingerprint" if is_outside(name) else ""
        yield f"[{name}]".ljust(BESIDE) + plan.sections[name][:SHORT] + outside
        keys = {"kind": None} if "kind" in table else {}
        for key in [*keys, *(n for n, f in fields.items() if not is_section(f))]:
            beside = _origin(plan, f"{name}.{key}" if name else key, key in table)
            if key != "kind" and fields[key].metadata["outside"] and not is_outside(name):
                beside = ", ".join(filter(None, (beside, "outside the fingerprint")))
            text = value_text(table[key]) if key in table else "-"
            left = f"  {key.ljust(NAME_WIDTH)} {text}"
            yield f"{left.ljust(BESIDE - 2)}  {beside}"
    for field in fields.values():
        if not is_section(field) or field.name not in table:
            continue
        below = table[field.name]
        path, inner = f"{name}.{field.name}".lstrip("."), f"{place}.{field.name}".lstrip(".")
        if isinstance(below, dict):
            yield from _sections(plan, below, path, inner)
        elif is_tables(below):
            for index, item in enumerate(below):
                yield from _sections(plan, item, f"{path}.{index}", inner)


def _origin(plan: Plan, key: str, present: bool) -> str:
    origin = plan.origins.get(key, "default") if present else "default"
    return origin if origin in ("default", "--set") or plan.extended else ""


def _title(text: str) -> Iterator[str]:
    yield ""
    yield f"-- {text} ".ljust(WIDTH, "-")


def rows(cells: Sequence[Sequence[str]], align: str) -> Iterator[str]:
    """Columns as wide as their widest cell; align has `<` or `>` for each."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(align))]
    for row in cells:
        yield "  " + "  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=True))


def _schedule(plan: Plan) -> Iterator[str]:
    yield from _title("schedule")
    shape = plan.config.schedule.decay_shape
    factor = {"warmup ends": "rises 0 to 1", "decay begins": "stays at 1", "end": f"falls to 0, {shape}"}
    cells = [["until", "tokens", "step", "factor on the rates"]]
    cells += [[m.name, f"{m.tokens:_}", f"{m.step:_}", factor[m.name]] for m in plan.schedule]
    yield from rows(cells, "<>><")
    batch = plan.config.batch
    yield ""
    yield (
        f"  {plan.total_steps:_} steps of {plan.tokens_per_step:_} tokens: {batch.sequences} sequences in "
        f"{batch.microbatches} microbatch{'es' if batch.microbatches > 1 else ''} of {batch.microbatch}"
    )


def _cost(plan: Plan) -> Iterator[str]:
    yield from _title("model")
    share = plan.parameters_active / plan.parameters_total
    whole = plan.flops_per_token * plan.total_tokens
    yield from rows(
        [
            ["parameters", f"{plan.parameters_total:_}", human(plan.parameters_total)],
            ["active for a token", f"{plan.parameters_active:_}", f"{human(plan.parameters_active)}, {share:.1%}"],
            ["FLOPs for a token", f"{plan.flops_per_token:_}", "training: forward and backward"],
            ["FLOPs of the run", f"{float(whole):.3e}", ""],
        ],
        "<><",
    )


def human(count: int) -> str:
    """A count in thousands, millions or billions, three digits."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 1000 else f"{count / size:.0f} {unit}"
    return str(count)


def bytes_text(count: int) -> str:
    """Bytes in GiB, MiB, KiB, or B."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _memory(plan: Plan) -> Iterator[str]:
    where = "1 rank" if plan.ranks == 1 else f"each of {plan.ranks} ranks, {plan.ranks_per_node} on a node"
    yield from _title(f"memory of {where}")
    memory = plan.memory[plan.config.output.recompute]
    cells = [["", "at the peak", "at its most"]]
    for kind, count in memory.at_peak.items():
        most = bytes_text(memory.whole[kind]) if kind in memory.whole else ""
        cells.append([kind.replace("_", " "), bytes_text(count), most])
    yield from rows(cells, "<>>")
    yield ""
    yield f"  The peak is in this moment of a step: {memory.moment}"
    yield ""
    cells = [["recompute", "activations", "peak", "moment"]]
    for recompute, other in plan.memory.items():
        name = f"{recompute} (this plan)" if other is memory else recompute
        sizes = [bytes_text(other.whole["activations"]), bytes_text(other.at_peak["total"])]
        cells.append([name, *sizes, other.moment])
    yield from rows(cells, "<>><")


def _ranks(plan: Plan) -> Iterator[str]:
    """Nothing for one rank, which keeps everything and sends nothing."""
    if plan.ranks == 1:
        return
    yield from _title("what each rank keeps of the optimizer's state, in elements")
    most = max(one.rows + one.matrices + one.experts for one in plan.balance)
    cells = [["rank", "rows", "matrices", "experts", "of the most"]]
    for one in plan.balance:
        share = (one.rows + one.matrices + one.experts) / most
        cells.append([str(one.rank), f"{one.rows:_}", f"{one.matrices:_}", f"{one.experts:_}", f"{share:.1%}"])
    yield from rows(cells, ">>>>>")
    yield ""
    yield from _arena(plan)
    nodes = plan.ranks // plan.ranks_per_node
    where = f"the {plan.ranks_per_node} ranks of a node" if nodes > 1 else f"{plan.ranks} ranks"
    if plan.config.model.moe is not None and plan.ranks_per_node > 1:
        yield f"  Tokens travel to their experts between {where} by `{plan.transport}`."
    if nodes > 1:
        yield f"  Each of the {nodes} nodes has all experts. A rank sends its counterparts on the others, at most,"
        parts, weights = bytes_text(plan.traffic.parts), bytes_text(plan.traffic.weights)
        yield f"  {parts} of gradients in each of a step's {plan.traffic.passes} passes, and {weights} of weights."
    yield "  Sums over ranks are in the order of the microbatches: the bits are those of one rank."


def _arena(plan: Plan) -> Iterator[str]:
    """Nothing where each layer keeps its own rows."""
    arena = plan.memory[plan.config.output.recompute].arena
    if arena is None:
        return
    yield "  rows of the arena of the experts' pre-activations, for all layers of a microbatch:"
    yield ""
    told = plan.config.output.activation_rows is not None
    kept = "activation_rows" if told else "one layer's" if arena.rows == arena.layer else "what fits"
    cells = [["", "rows", "of the average"]]
    for name, count in ((f"this plan, {kept}", arena.rows), ("one layer at most", arena.layer),
                        ("all layers on the average", arena.average), ("all layers at most", arena.worst)):  # fmt: skip
        cells.append([name, f"{count:_}", f"{count / arena.average:.2f}"])
    yield from rows(cells, "<>>")
    yield ""
    yield "  A step of which a microbatch brings more is repeated, its experts computed again, with the same bits."
    yield ""


def _groups(plan: Plan) -> Iterator[str]:
    yield from _title("parameter groups")
    cells = [["parameters", "shape", "count", "group", "kind", "rate", "decay"]]
    cells += [_group_row(row) for row in plan.groups]
    yield from rows(cells, "<>><<>>")


def _group_row(row: GroupRow) -> list[str]:
    rate = f"{row.rate:g}" if row.floor == 0 else f"{row.rate:g}..{row.floor:g}"
    return [row.pattern, "x".join(map(str, row.shape)), str(row.count), row.group, row.kind, rate, f"{row.decay:g}"]


def _platform(plan: Plan) -> Iterator[str]:
    platform = plan.config.platform
    hardware = {"sm_100a": "a B200 GPU (sm_100a)", "sm_90a": "an H100 or H200 GPU (sm_90a)"}
    threads = f"{platform.threads} CPU thread{'s' if platform.threads != 1 else ''}"
    yield from _title("platform")
    yield f"  needs     {hardware.get(platform.target, threads)}"
    yield f"  runnable  {'yes' if plan.runnable else 'no'}"
    yield from (f"            {ascii_text(reason)}" for reason in plan.reasons)
    stock = plan.stock_class
    yield f"  export    {f'as {stock.name}' if stock.name else f'no: {stock.nearest} is the nearest'}"
    yield from (f"            {reason}" for reason in stock.reasons)
