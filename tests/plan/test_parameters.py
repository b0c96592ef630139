"""What a plan counts is what the model has: names, shapes and numbers, against the built model on the meta device."""

from fractions import Fraction
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.plan.cost import visible_pairs
from nmoe.plan.resolve import resolve, resolve_text
from nmoe.registry.experts import Bf16Experts, Fp32Experts

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_built_model_has_these_parameters(config):
    plan = resolve(config)
    spec = plan.config.model
    if spec.moe is not None and not isinstance(spec.moe.experts, Bf16Experts | Fp32Experts):
        # A precision without kernels stores the same tensors: weights are of [model] dtype in all of them.
        experts = Bf16Experts(intermediate_size=spec.moe.experts.intermediate_size)
        spec = attrs.evolve(spec, moe=attrs.evolve(spec.moe, experts=experts))
    with torch.device("meta"):
        model = spec.build(transport=plan.config.transport.build())
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert built == {p.name: p.shape for p in plan.config.model.parameters()}
    assert sum(p.numel() for p in model.parameters()) == plan.parameters_total
    assert plan.parameters_total == sum(row.count * row.parameters for row in plan.groups)


@pytest.mark.parametrize("length", [1, 2, 7, 16])
@pytest.mark.parametrize("window", [None, 1, 3, 16, 40])
def test_visible_pairs_are_the_mask(length, window):
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    mask = (j <= i) & (i - j < (window or length))
    assert visible_pairs(length, window) == int(mask.sum())


def test_flops_by_counting_multiply_adds():
    """A plan small enough to count by hand from the model's shapes."""
    plan = resolve_text((Path(__file__).parent / "base.toml").read_text(), "base.toml")
    hidden, vocab, length = 32, 257, 64
    mla = hidden * 24 + 24 * 2 * 16 + hidden * (16 + 4) + 16 * 2 * (12 + 16) + 2 * 16 * hidden
    gqa = hidden * 32 + 2 * hidden * 16 + 32 * hidden
    dense = 3 * hidden * 64
    moe = 8 * hidden + 2 * 3 * hidden * 16 + 3 * hidden * 16  # router, two experts, one shared
    layers = [gqa + dense, mla + moe, gqa + moe, mla + moe]
    causal = Fraction(length + 1, 2)
    windowed = Fraction(16 * 17 // 2 + (length - 16) * 16, length)
    pairs = 2 * 2 * (16 + 16) * causal + 2 * 4 * 2 * 8 * windowed
    exact = 6 * (sum(layers) + vocab * hidden + pairs)
    assert abs(plan.flops_per_token - exact) <= Fraction(1, 2)


def test_a_tied_table_is_counted_once_and_multiplied_as_the_head():
    """The FLOPs are those of two tables; parameters, weights, gradients and moments those of one."""
    text = (Path(__file__).parent / "base.toml").read_text()
    apart, tied = (resolve_text(text, "base.toml", [f"model.tie_embeddings={v}"]) for v in ("false", "true"))
    table = 257 * 32
    assert apart.parameters_total - tied.parameters_total == table
    assert apart.parameters_active - tied.parameters_active == table
    assert apart.flops_per_token == tied.flops_per_token
    for kind, width in (("weights", 4), ("gradients", 4), ("optimizer", 8), ("activations", 0)):
        assert apart.memory_bytes_per_rank[kind] - tied.memory_bytes_per_rank[kind] == width * table
    rows = {row.pattern: row for row in tied.groups}
    assert "head.weight_VD" not in rows
    assert (rows["embedding.weight_VD"].group, rows["embedding.weight_VD"].decay) == ("dense", 0.1)


def test_active_is_what_a_token_uses():
    plan = resolve_text((Path(__file__).parent / "base.toml").read_text(), "base.toml")
    experts = 3 * 8 * 3 * 32 * 16
    assert plan.parameters_total - plan.parameters_active == experts - experts * 2 // 8


def test_optimizer_memory_is_moments_and_masters():
    """fp32 weights and states need no master; bf16 weights with fp32 states do."""
    moonlet = resolve(ROOT / "configs" / "moonlet.toml")
    assert moonlet.memory_bytes_per_rank["optimizer"] == 12 * moonlet.parameters_total
    assert moonlet.memory_bytes_per_rank["weights"] == 2 * moonlet.parameters_total
    assert moonlet.memory["none"].whole["gradients"] == 4 * moonlet.parameters_total
    base = resolve_text((Path(__file__).parent / "base.toml").read_text(), "base.toml")
    muon = sum(row.count * row.parameters for row in base.groups if row.kind == "muon")
    assert base.memory_bytes_per_rank["optimizer"] == 4 * (2 * base.parameters_total - muon)


def test_the_last_step_is_the_first_that_reaches_the_total():
    text = (Path(__file__).parent / "base.toml").read_text()
    for decay, steps in ((4096, 20), (4097, 21), (4095, 20), (3585, 20), (3584, 19)):
        plan = resolve_text(text, "base.toml", [f"schedule.decay_tokens={decay}"])
        assert plan.total_steps == steps
        assert plan.schedule[-1].step == steps
        assert (steps - 1) * plan.tokens_per_step < plan.total_tokens <= steps * plan.tokens_per_step
