"""The first weights depend on (seed, name, expert) and nothing else."""

import pytest
import torch

from nmoe.errors import RunError
from nmoe.model.init import initialize

SHAPES = [
    ("embedding.weight_VD", (300, 32), "normal"),
    ("layers.0.moe.experts.w_gate_up_E2FD", (6, 2, 40, 32), "normal"),
    ("layers.0.moe.experts.w_down_EDF", (6, 32, 40), "residual"),
    ("layers.0.moe.router.weight_ED", (6, 32), "normal"),
    ("layers.1.moe.router.weight_ED", (6, 32), "normal"),
    ("norm.weight_D", (32,), "ones"),
]


class Bag(torch.nn.Module):
    """Parameters under dotted names."""

    def __init__(self, shapes, dtype=torch.float32):
        super().__init__()
        self.weights = {name: torch.nn.Parameter(torch.full(shape, 9.0, dtype=dtype)) for name, shape, _ in shapes}

    def named_parameters(self):
        return iter(self.weights.items())


def draw(shapes=SHAPES, dtype=torch.float32, seed=3, scale=0.5):
    model = Bag(shapes, dtype)
    initialize(model, shapes, seed=seed, init_std=0.02, residual_init_scale=scale)
    return model.weights


def test_the_order_of_calls_and_the_other_tensors_do_not_matter():
    whole, reversed_, alone = draw(), draw(SHAPES[::-1]), draw(SHAPES[2:3])
    for name, weight in whole.items():
        assert torch.equal(weight, reversed_[name])
    assert torch.equal(whole[SHAPES[2][0]], alone[SHAPES[2][0]])


def test_nobody_shares_values():
    weights = draw()
    flat = torch.cat([w.flatten() for name, w in weights.items() if name != "norm.weight_D"])
    assert flat.unique().numel() > 0.99 * flat.numel()
    gate_up = weights["layers.0.moe.experts.w_gate_up_E2FD"]
    heads = {tuple(gate_up[e].flatten()[:4].tolist()) for e in range(6)}
    assert len(heads) == 6
    assert not torch.equal(weights["layers.0.moe.router.weight_ED"], weights["layers.1.moe.router.weight_ED"])


def test_a_part_of_the_experts_is_the_same_part():
    """Experts are drawn one by one, so a rank that holds the first three holds the same three."""
    fewer = [(SHAPES[1][0], (3, 2, 40, 32), "normal")]
    assert torch.equal(draw(fewer)[SHAPES[1][0]], draw()[SHAPES[1][0]][:3])


def test_the_seed_matters():
    assert not torch.equal(draw(seed=3)["embedding.weight_VD"], draw(seed=4)["embedding.weight_VD"])


def test_the_spread_is_what_was_asked_for():
    weights = draw(scale=0.5)
    for name, std in (("w_gate_up_E2FD", 0.02), ("w_down_EDF", 0.01)):
        weight = weights[f"layers.0.moe.experts.{name}"]
        count = weight.numel()
        assert abs(weight.mean().item()) < 4 * std / count**0.5
        assert abs(weight.std().item() / std - 1) < 4 / (2 * count) ** 0.5
    assert torch.equal(weights["norm.weight_D"], torch.ones(32))
    assert bool((draw(scale=0.0)["layers.0.moe.experts.w_down_EDF"] == 0).all())


def test_bfloat16_weights_are_the_float32_ones_rounded():
    full, rounded = draw(), draw(dtype=torch.bfloat16)
    for name, weight in full.items():
        assert torch.equal(weight.bfloat16(), rounded[name])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([*SHAPES, ("head.weight_VD", (3, 4), "normal")], "`head.weight_VD` of shape (3, 4) is missing"),
        (SHAPES[1:], "`embedding.weight_VD` of the model has no initialisation"),
        ([("embedding.weight_VD", (300, 31), "normal"), *SHAPES[1:]], "is of shape (300, 32)"),
    ],
)
def test_names_and_shapes_are_strict(shapes, message):
    with pytest.raises(RunError) as caught:
        initialize(Bag(SHAPES), shapes, seed=0, init_std=0.02, residual_init_scale=1.0)
    assert message in str(caught.value)
