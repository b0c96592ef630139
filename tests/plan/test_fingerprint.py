"""One tree has one fingerprint however it is written; each key inside changes it and no key outside does."""

import json
import re
import tomllib
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.errors import ConfigError
from nmoe.plan.fingerprint import is_outside
from nmoe.plan.resolve import resolve, resolve_text
from nmoe.plan.structure import components, dotted, fields_of, is_section, type_of
from nmoe.plan.toml import toml_of

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BASES = {name: (HERE / f"{name}.toml").read_text() for name in ("base", "mixture")}
SOFTMAX = 'kind = "softmax"\nnum_experts = 8\ntop_k = 2\nrenormalize = true\nbalance_loss = 1e-3\nz_loss = 1e-3\n'
BASES["softmax"] = re.sub(r"(?<=\[model.moe.router\]\n)(.+\n)+", SOFTMAX, BASES["base"])
PLANS = {name: resolve_text(text, f"{name}.toml") for name, text in BASES.items()}


def spelled(draw, value) -> str:
    """One of the ways to write a value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        hexes = [f"0x{value:x}", f"0o{value:o}", f"0b{value:b}"] if value >= 0 else []
        return draw(st.sampled_from([str(value), f"{value:_}", f"+{value}" if value >= 0 else str(value), *hexes]))
    if isinstance(value, float):
        forms = [repr(value), f"{value:.17e}", f"{value!r}".replace("e", "E")]
        if value.is_integer():
            forms += [str(int(value)), f"{int(value)}.0"] + (["-0.0", "-0"] if value == 0 else [])
        return draw(st.sampled_from(forms))
    if isinstance(value, str):
        plain = [json.dumps(value), f'"""{value}"""', "".join(f"\\u{ord(c):04x}" for c in value).join('""')]
        return draw(st.sampled_from([*plain, f"'{value}'", f"'''{value}'''"]))
    inner = ", ".join(spelled(draw, item) for item in value)
    return draw(st.sampled_from([f"[{inner}]", f"[\n  {inner},\n]" if inner else "[ ]"]))


def inline(draw, table) -> str:
    keys = draw(st.permutations(sorted(table)))
    return "{ " + ", ".join(f"{k} = {written(draw, table[k])}" for k in keys) + " }"


def written(draw, value) -> str:
    if isinstance(value, dict):
        return inline(draw, value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + ", ".join(inline(draw, item) for item in value) + "]"
    return spelled(draw, value)


@st.composite
def texts(draw, tree):
    """A TOML text of the tree: random order, spelling, and form of its tables."""
    top, sections = [], []

    def section(table, name):
        lines = []
        for key in draw(st.permutations(sorted(table))):
            value = table[key]
            path = f"{name}.{key}" if name else key
            style = draw(st.sampled_from(["header", "inline", "dotted"]))
            if isinstance(value, dict) and style == "header":
                sections.append((path, section(value, path)))
            elif isinstance(value, dict) and style == "dotted" and all(not isinstance(v, dict) for v in value.values()):
                lines += [f"{key}.{k} = {written(draw, v)}" for k, v in value.items()]
            else:
                lines.append(f"{draw(st.sampled_from([key, json.dumps(key)]))} = {written(draw, value)}")
        return lines

    top = section(tree, "")
    blocks = [f"[{name}]\n" + "\n".join(lines) for name, lines in draw(st.permutations(sections))]
    comment = draw(st.sampled_from(["", "# a comment\n", "\n\n"]))
    return "\n".join(top) + "\n" + comment + "\n".join(blocks) + "\n"


@pytest.mark.parametrize("name", sorted(BASES))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_spelling_does_not_matter(name, data):
    text = data.draw(texts(tomllib.loads(BASES[name])))
    plan = resolve_text(text, "spelled.toml")
    assert (plan.fingerprint, plan.tree_digest) == (PLANS[name].fingerprint, PLANS[name].tree_digest), text


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_who_says_it_does_not_matter(data, tmp_path_factory):
    """Parent, child and --set share the values in any way, and the parent may say others that are overridden."""
    directory = tmp_path_factory.mktemp("extends")
    tree = PLANS["base"].tree
    parent, child, sets = {}, {}, []
    for section in tree:
        if section in ("model", "optimizer"):  # a table of tables, shared key by key
            for key, value in tree[section].items():
                data.draw(st.sampled_from([parent, child])).setdefault(section, {})[key] = value
            continue
        for key, value in tree[section].items():
            home = data.draw(st.sampled_from(["parent", "child", "set"]))
            # A table's kind (the platform's target) stands with its keys, or a change would start the table afresh.
            fresh = {"kind", "target"} & tree[section].keys()
            if home == "set" and not isinstance(value, dict) and not fresh:
                sets.append(f"{section}.{key} = {json.dumps(value)}")
                parent.setdefault(section, {})[key] = 1
            else:
                (child if home == "child" and not fresh else parent).setdefault(section, {})[key] = value
    (directory / "parent.toml").write_text(toml_of(parent))
    (directory / "child.toml").write_text('extends = "parent.toml"\n' + toml_of(child))
    plan = resolve(directory / "child.toml", sets)
    assert (plan.fingerprint, plan.tree_digest) == (PLANS["base"].fingerprint, PLANS["base"].tree_digest)


# What another valid value of a key is, where a neighbouring number or choice would contradict another section.
OTHERS = {
    "base": {
        "platform.target": [], "model.dtype": [], "transport.kind": [], "optimizer.grad_dtype": [],
        "data.kind": [], "data.name": [], "data.tokenizer.kind": [], "model.attention.local.kind": [],
        "model.moe.experts.kind": [], "model.moe.router.kind": [], "schedule.kind": [], "optimizer.dense.kind": [],
        "optimizer.matrices.kind": [], "optimizer.router.kind": [], "optimizer.experts.kind": [],
        "model.attention.kind": [], "eval.bpb.heldout": [],
        "model.vocab_size": [512], "model.attention.qk_rope_head_dim": [6], "model.attention.local.head_dim": [16],
        "model.attention.local.num_kv_heads": [4], "model.attention.local.num_heads": [8],
        "batch.sequences": [16], "batch.microbatch": [4], "model.moe.router.num_groups": [4],
        "model.moe.router.num_experts": [10], "model.attention.rope_scaling.kind": [],
        "model.attention.rope_scaling.attention_factor": [], "output.activation_rows": [],
    },
    "mixture": {
        "platform.target": ["sm_90a"], "platform.threads": [], "model.dtype": [], "transport.kind": [],
        "optimizer.grad_dtype": [], "data.kind": [], "model.attention.kind": [], "model.attention.local.kind": [],
        "model.moe.router.kind": [], "model.moe.experts.kind": ["bf16"], "schedule.kind": [],
        "optimizer.dense.kind": [], "optimizer.router.kind": [], "optimizer.experts.kind": [],
        "model.hidden_size": [384], "model.moe.num_dense_layers": [], "model.moe.experts.intermediate_size": [256],
        "model.attention.num_heads": [8], "model.attention.num_kv_heads": [4], "model.attention.head_dim": [66],
        "batch.sequences": [16], "batch.microbatch": [2], "batch.sequence_length": [2048],
        "model.attention.rope_scaling.kind": [], "model.attention.rope_scaling.mscale": [],
        "model.attention.rope_scaling.mscale_all_dim": [], "model.moe.router.num_groups": [2],
        "model.moe.router.top_groups": [], "data.sources": [["data/x", "data/y"]],
        "data.stages.0.weights": [[3, 2]], "data.stages.1.weights": [[0, 5]],
        "data.stages.0.until_tokens": [262144], "data.stages.1.until_tokens": [], "eval.bpb.heldout": ["elsewhere"],
        "model.moe.router.bias_limit": [0.5], "output.activation_rows": [1 << 20],
    },
    "softmax": {"model.moe.router.kind": []},
}  # fmt: skip


def others(name, path, field, value):
    """Other valid values of a key, from its bounds and choices."""
    if path in OTHERS[name]:
        return OTHERS[name][path]
    limits, wanted = field.metadata, type_of(field)
    if limits["choices"]:
        return [c for c in limits["choices"] if c != value]
    if wanted is bool:
        return [not value]
    if wanted is str:
        return ["something/else"]
    if wanted is int:
        return [1 if value is None else value + 1]
    if wanted is float:
        return [value * 0.5 if value else 1e-5]
    return [[1, 2]] if value is None else [[item * 0.5 for item in value]]


def changes():
    for name, plan in PLANS.items():
        for path, spec in components(plan.config):
            if name == "softmax" and path != ("model", "moe", "router"):
                continue  # the rest of it is base.toml
            for field in fields_of(type(spec)).values():
                if is_section(field):
                    continue
                here = dotted((*path, field.name))
                value = getattr(spec, field.name)
                for other in others(name, here, field, value):
                    outside = is_outside(here) or field.metadata["outside"]
                    yield pytest.param(name, (*path, field.name), other, outside, id=f"{name}-{here}")


@pytest.mark.parametrize(("name", "path", "other", "outside"), list(changes()))
def test_each_key(name, path, other, outside):
    tree = json.loads(json.dumps(PLANS[name].tree))
    table = tree
    for part in path[:-1]:
        table = table[part]
    table[path[-1]] = other
    plan = resolve_text(toml_of(tree), "changed.toml")
    assert plan.tree_digest != PLANS[name].tree_digest
    assert (plan.fingerprint == PLANS[name].fingerprint) == outside
    section = dotted(path[:-1])
    assert (plan.sections[section] == PLANS[name].sections[section]) == (outside and not is_outside(section))
    assert all(plan.sections[s] == d for s, d in PLANS[name].sections.items() if s != section)


def test_most_keys_are_tried():
    """Every key without an entry in OTHERS is tried; the empty entries are kinds and keys with one value."""
    keys = {
        dotted((*path, field.name))
        for path, spec in components(PLANS["base"].config)
        for field in fields_of(type(spec)).values()
        if not is_section(field)
    }
    tried = {dotted(c.values[1]) for c in changes() if c.values[0] == "base"}
    assert keys - tried <= {k for k, v in OTHERS["base"].items() if not v}


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ('kind = "muon"\nlr = 1e-2\n\n[schedule]', 'kind = "adamw"\nlr = 1e-2\n\n[schedule]', False),
        ("[optimizer.router]", "[optimizer.router] # a comment\n", True),
    ],
)
def test_a_kind_is_in_the_fingerprint_and_a_comment_is_not(before, after, same):
    assert before in BASES["base"]
    plan = resolve_text(BASES["base"].replace(before, after), "changed.toml")
    assert (plan.fingerprint == PLANS["base"].fingerprint) == same


def test_the_number_of_ranks_is_outside():
    plans = [resolve_text(BASES["base"], "base.toml", ranks=n, ranks_per_node=n) for n in (1, 2, 4)]
    assert len({p.fingerprint for p in plans}) == len({p.tree_digest for p in plans}) == 1
    assert len({p.memory_bytes_per_rank["total"] for p in plans}) == 3


@pytest.mark.parametrize(("ranks", "per_node"), [(3, 1), (8, 1), (4, 3), (4, 8), (2, 4)])
def test_ranks_that_do_not_divide_are_refused(ranks, per_node):
    with pytest.raises(ConfigError) as caught:
        resolve_text(BASES["base"], "base.toml", ranks=ranks, ranks_per_node=per_node)
    assert {d.code for d in caught.value.diagnostics} == {"N0119"}


def test_a_plan_is_frozen():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        PLANS["base"].fingerprint = "0"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        PLANS["base"].config.model.num_layers = 5


def test_the_fingerprint_is_what_the_page_says():
    """Computed here from the definition, with the standard library's JSON where it is canonical already."""
    import hashlib

    def sha(value):
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    plan = PLANS["base"]
    assert plan.sections["model.mlp"] == sha({"intermediate_size": 64})
    assert plan.sections["transport"] == sha({"kind": "rdep"})
    assert plan.sections["data"] == sha({"kind": "corpus", "name": "shakespeare"})
    inside = {n: d for n, d in plan.sections.items() if n.split(".")[0] not in ("eval", "output")}
    assert plan.fingerprint == sha(inside)
    assert PLANS["mixture"].sections["data"] == sha({"kind": "mixture"})
