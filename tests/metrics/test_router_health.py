"""Router health against numpy in float64, at its extremes, and in its rows."""

import math

import pytest
import torch

from nmoe.errors import RunError
from nmoe.metrics import schema
from nmoe.metrics.router_health import expert_rows, health, rows


def test_against_numpy():
    import numpy

    generator = torch.Generator().manual_seed(0)
    load = torch.randint(0, 1000, (64,), generator=generator)
    load[[3, 9]] = 0
    bias = torch.randn(64, generator=generator)
    one = health(load, bias, {})
    n = load.numpy().astype(float)
    p = n[n > 0] / n.sum()
    assert one.entropy == pytest.approx(-(p * numpy.log(p)).sum() / math.log(64), rel=1e-14)
    assert one.load_cv == pytest.approx(n.std() / n.mean(), rel=1e-14)
    assert (one.load_max, one.load_min) == (pytest.approx(n.max() / n.mean()), 0.0)
    assert one.dead_experts == int((n == 0).sum()) >= 2
    assert one.bias == (float(bias.min()), float(bias.max()))
    assert one.bias_range == pytest.approx(float(bias.max()) - float(bias.min()))


def test_extremes():
    zero = torch.zeros(8)
    even = health(torch.full((8,), 5), zero, {})
    assert (even.entropy, even.load_cv, even.load_max, even.load_min, even.dead_experts) == (
        pytest.approx(1.0, abs=1e-15), 0.0, 1.0, 1.0, 0,
    )  # fmt: skip
    all_on_one = health(torch.tensor([0, 0, 7, 0, 0, 0, 0, 0]), zero, {})
    assert (all_on_one.entropy, all_on_one.load_max, all_on_one.dead_experts) == (0.0, 8.0, 7)
    assert all_on_one.load_cv == pytest.approx(math.sqrt(7))
    assert health(torch.tensor([3]), zero[:1], {}).entropy == 1.0
    huge = torch.tensor([2**60, 2**60])
    assert health(huge, zero[:2], {}).entropy == pytest.approx(1.0)
    with pytest.raises(RunError, match="N0406"):
        health(torch.zeros(8, dtype=torch.int64), zero, {})


def test_it_is_of_the_mean_load_not_a_mean_of_entropies():
    a, b = torch.tensor([4, 0]), torch.tensor([0, 4])
    zero = torch.zeros(2)
    assert health(a, zero, {}).entropy == health(b, zero, {}).entropy == 0.0
    assert health(a + b, zero, {}).entropy == 1.0


def test_rows_and_aggregates_are_in_the_list():
    zero = torch.zeros(4)
    layers = {
        1: health(torch.tensor([4, 4, 4, 4]), zero, {}),
        2: health(torch.tensor([8, 8, 0, 0]), torch.tensor([-0.5, 0.0, 0.25, 0.5]), {"sequence_balance_loss": 1.5}),
        3: health(torch.tensor([4, 4, 4, 4]), None, {"balance_loss": 2.5, "z_loss": 0.5}),
    }
    got = list(rows(layers))
    for name, layer, expert, value in [*got, *expert_rows(2, torch.tensor([8, 8, 0, 0]))]:
        given = dict.fromkeys(schema.COLUMNS) | {"layer": layer, "expert": expert}
        schema.check(schema.lookup(name), given, value)
    named = {(name, layer): value for name, layer, _, value in got}
    assert len(named) == len(got) == (8 + 0) + (8 + 1) + (5 + 2) + 7
    assert named["router/entropy", 2] == pytest.approx(0.5)
    assert named["router/sequence_balance_loss", 2] == 1.5
    assert (named["router/balance_loss", 3], named["router/z_loss", 3]) == (2.5, 0.5)
    assert named["router/mean_entropy", None] == pytest.approx(2.5 / 3)
    assert named["router/min_entropy", None] == pytest.approx(0.5)
    assert named["router/mean_load_cv", None] == pytest.approx(1 / 3)
    assert named["router/max_load", None] == 2.0
    assert named["router/min_load", None] == 0.0
    assert named["router/total_dead_experts", None] == 2.0
    assert named["router/max_bias_range", None] == 1.0
    assert list(rows({})) == []
    assert [v for *_, v in expert_rows(2, torch.tensor([8, 8, 0, 0]))] == [2.0, 2.0, 0.0, 0.0]
