"""A judge of what a plan may hold, which shares no line with the resolver: it reads the golden list of keys.

It knows the keys of each section and kind, their types and bounds, which are required, what no value of any key may be
(nan, an integer beyond 2^53 - 1, a control character), and some of what sections say about each other, by hand.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import attrs

from tests.golden.keys import KEYS

LINE = re.compile(r"(\S+) \((\w*)\) (\w+): (.*)")
TYPES = {"int": int, "float": float, "bool": bool, "str": str}
MOST = 2**53 - 1


@attrs.frozen
class Key:
    """One line of the list. type: a scalar's name, "section", "sections" or "kind". count: of an array; -1 is any."""

    name: str
    type: str
    count: int | None
    limits: tuple[tuple[str, float], ...]
    choices: tuple[str, ...]
    required: bool


Spec = dict[str, Key]


def listed() -> dict[str, dict[str, Spec]]:
    """Section -> kind ("" where it has none) -> key's name -> what may stand there."""
    found: dict[str, dict[str, Spec]] = {}
    for line in KEYS.read_text(encoding="ascii").splitlines():
        matched = LINE.fullmatch(line)
        assert matched, line
        section, kind, name, said = matched.groups()
        first, *rest = said.split("; ")
        array = re.fullmatch(r"(\w+)\[(\d*)\]", first)
        limits = tuple((one.split()[0], float(one.split()[1])) for one in rest if one[0] in "<>")
        choices = next((tuple(one.split()[2:]) for one in rest if one.startswith("one of ")), ())
        count = None if array is None else int(array[2] or -1)
        spec = found.setdefault(section.replace("-", ""), {}).setdefault(kind, {})
        spec[name] = Key(name, array[1] if array else first, count, limits, choices, "required" in rest)
    for section, kind in (("transport", "rdep"), ("data.tokenizer", "bytes")):
        assert kind in found[section]
    return found


SECTIONS = listed()


def faults(tree: Any, section: str = "") -> Iterator[str]:
    """What may not be in a plan's tree that is there, and what must be and is not."""
    where = section or "the file"
    if not isinstance(tree, dict):
        yield f"{where} is a {type(tree).__name__}"
        return
    kinds = SECTIONS[section]
    kind = tree.get("kind", "" if "" in kinds else next(iter(kinds)) if len(kinds) == 1 else None)
    if kind not in kinds:
        yield f"{where} is of kind {kind!r}"
        return
    for name, value in tree.items():
        if name not in kinds[kind]:
            yield f"{where} has the key {name!r}"
            continue
        key, below = kinds[kind][name], f"{section}.{name}".lstrip(".")
        if key.type == "section":
            yield from faults(value, below)
        elif key.type == "sections":
            items = value if isinstance(value, list) else [value]
            yield from (fault for item in items for fault in faults(item, below))
        elif key.type != "kind":
            yield from (f"{below} = {value!r:.100}: {fault}" for fault in _value(key, value))
    yield from (f"{where} lacks {name}" for name, key in kinds[kind].items() if key.required and name not in tree)


def _value(key: Key, value: Any) -> Iterator[str]:
    if key.count is not None:
        if not isinstance(value, list):
            yield "not an array"
        elif key.count >= 0 and len(value) != key.count:
            yield f"not {key.count} elements"
        else:
            yield from (fault for item in value for fault in _value(attrs.evolve(key, count=None), item))
        return
    if type(value) is not TYPES[key.type] and not (key.type == "float" and type(value) is int):
        yield f"no {key.type}"
        return
    if isinstance(value, str):
        if key.choices and value not in key.choices:
            yield "none of the choices"
        if not value.strip() or any(ord(c) < 32 or ord(c) == 127 for c in value):
            yield "blank, or with a control character"
    elif not isinstance(value, bool):
        if not math.isfinite(value) or (isinstance(value, int) and abs(value) > MOST):
            yield "not a number that every reader keeps"
        holds = {">=": value.__ge__, ">": value.__gt__, "<=": value.__le__, "<": value.__lt__}
        for sign, limit in key.limits:
            held = holds[sign](type(value)(limit))
            if held is NotImplemented or not held:
                yield f"not {sign} {limit}"


def contradictions(tree: dict[str, Any]) -> Iterator[str]:
    """Some of what sections of a whole tree may not say about each other."""
    model, batch, optimizer, schedule = (tree[name] for name in ("model", "batch", "optimizer", "schedule"))
    moe, local, bpb = model.get("moe"), model["attention"].get("local", {}), tree["eval"].get("bpb", {})
    total = sum(schedule[f"{part}_tokens"] for part in ("warmup", "stable", "decay"))
    on_cpu = tree["platform"]["target"] == "cpu"
    wrong = {
        "a step is no whole number of microbatches": batch["sequences"] % batch["microbatch"] != 0,
        "a schedule of no tokens, or of too many": not 0 < total <= MOST,
        "threads": on_cpu != ("threads" in tree["platform"]),
        "fp32 off the cpu": model["dtype"] == "fp32" and not on_cpu,
        "experts' groups without experts, or the other way": (moe is None) != ("experts" not in optimizer),
        "the router's group without a router, or the other way": (moe is None) != ("router" not in optimizer),
        "dense layers of no width": (moe is None or moe["num_dense_layers"] > 0) and "mlp" not in model,
        "more experts used than there are": moe is not None and moe["router"]["top_k"] > moe["router"]["num_experts"],
        "more context than a sequence": bpb.get("context", 0) >= batch["sequence_length"],
        "a mixture without sources": tree["data"].get("sources") == [] or tree["data"].get("stages") == [],
    }
    yield from (name for name, is_so in wrong.items() if is_so)
    for attention in (model["attention"], local):
        if attention.get("kind") == "gqa" and attention["num_heads"] % attention["num_kv_heads"]:
            yield "query heads that are no multiple of the key heads"
    for name, group in optimizer.items():
        if isinstance(group, dict) and group["lr_floor"] > group["lr"]:
            yield f"the floor of {name} is above its peak"
    stages = tree["data"].get("stages", [])
    for number, stage in enumerate(stages):
        if len(stage["weights"]) != len(tree["data"]["sources"]) or not any(stage["weights"]):
            yield "weights that are not those of the sources"
        if ("until_tokens" in stage) == (number == len(stages) - 1):
            yield "a stage without an end, or a last one with one"


def kept(written: Any, tree: Any, path: str = "") -> Iterator[str]:
    """What a text says and the plan does not have, or has otherwise."""
    if isinstance(written, dict) and isinstance(tree, dict):
        for name, value in written.items():
            if name not in tree:
                yield f"{path}{name} was written, and the plan has none"
            else:
                yield from kept(value, tree[name], f"{path}{name}.")
    elif isinstance(written, list) and isinstance(tree, list) and len(written) == len(tree):
        for number, pair in enumerate(zip(written, tree, strict=True)):
            yield from kept(*pair, f"{path}{number}.")
    elif isinstance(written, bool) != isinstance(tree, bool) or written != tree:
        yield f"{path[:-1]} is {tree!r:.80} in the plan, and {written!r:.80} was written"
