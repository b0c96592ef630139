"""Stochastic rounding: neighbours only, unbiased, named bits."""

import pytest
import torch

from nmoe.optim.rounding import BLOCK, Rounding


def rounded(value, *, update=1, tensor="w", start=0, seed=0):
    out = torch.empty(value.shape, dtype=torch.bfloat16)
    Rounding(seed).write(out, value, update=update, tensor=tensor, start=start)
    return out


def test_goes_to_a_neighbour_and_leaves_bfloat16_values_alone():
    torch.manual_seed(0)
    value = torch.randn(200_000) * 10.0 ** torch.randint(-38, 38, (200_000,))
    bits = value.view(torch.int32)
    down = (bits & -65536).view(torch.float32)
    up = ((bits & -65536) + 65536).view(torch.float32)
    out = rounded(value).float()
    assert bool(((out == down) | (out == up)).all())
    assert bool((out == down).any()) and bool((out == up).any())
    exact = torch.cat([down, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40 * 0])])
    assert torch.equal(rounded(exact).float(), exact)


@pytest.mark.parametrize("value", [1.0 + 2**-9, 1.0 + 2**-12, -3.7e-5, 255.3, 1.9999, -1e-39])
def test_is_unbiased(value):
    n = 1 << 20
    x = torch.full((n,), value)
    exact = float(x[0].double())
    out = rounded(x).double()
    low, high = float(out.min()), float(out.max())
    probability = (exact - low) / (high - low)
    # The count of the upper neighbour is binomial: 5 standard deviations.
    spread = 5 * (probability * (1 - probability) / n) ** 0.5
    assert float((out == high).double().mean()) == pytest.approx(probability, abs=spread)
    assert high - low <= abs(exact) * 2**-7 or abs(exact) < 2.0**-126


def test_bits_are_uniform():
    noise = Rounding(7).noise(3, "w", 0, BLOCK)
    assert int(noise.min()) >= 0 and int(noise.max()) < 1 << 16
    for bit in range(16):
        ones = int(((noise >> bit) & 1).sum())
        assert abs(ones - BLOCK / 2) < 5 * (BLOCK / 4) ** 0.5, bit


def test_bits_are_named():
    torch.manual_seed(0)
    value = torch.randn(3 * BLOCK + 77)
    whole = rounded(value)
    assert torch.equal(whole, rounded(value))
    # Any block alone gives what it gives in the whole.
    assert torch.equal(whole[2 * BLOCK :], rounded(value[2 * BLOCK :].clone(), start=2 * BLOCK))
    for other in ({"update": 2}, {"tensor": "v"}, {"seed": 1}, {"start": BLOCK}):
        assert not torch.equal(whole, rounded(value, **other)), other


@pytest.mark.parametrize("cut", [1000, BLOCK - 1, BLOCK, BLOCK + 5])
def test_bits_do_not_depend_on_where_a_tensor_is_cut(cut):
    torch.manual_seed(0)
    value = torch.randn(2 * BLOCK + 77)
    parts = [rounded(part.clone(), start=i * cut) for i, part in enumerate(value.split(cut))]
    assert torch.equal(torch.cat(parts), rounded(value))


def test_the_counter_is_the_whole_state():
    first = Rounding(5)
    assert [first.advance() for _ in range(3)] == [1, 2, 3]
    second = Rounding(5)
    second.counter = first.counter
    a, b = torch.empty(2, 100, dtype=torch.bfloat16)
    value = torch.linspace(-1, 1, 100)
    first.write(a, value, update=first.advance(), tensor="w")
    second.write(b, value, update=second.advance(), tensor="w")
    assert torch.equal(a, b)
