"""Norms against float64 and torch, and their order of addition."""

import math

import pytest
import torch

from nmoe.errors import RunError
from nmoe.optim.norm import clip_coefficient, gradient, norms_of, not_finite, ordered_sum, row_sums


def model(scale=1.0):
    torch.manual_seed(0)
    shapes = {"embed": (300, 24), "norm": (24,), "experts": (4, 2, 40, 24), "router": (4, 24)}
    parameters = [(n, torch.nn.Parameter(torch.zeros(s))) for n, s in shapes.items()]
    for _, parameter in parameters:
        parameter.grad = torch.randn(parameter.shape) * scale
    return {"dense": parameters[:2], "experts": parameters[2:3], "router": parameters[3:], "none": []}


def squared_norms(groups):
    """Of all gradients of one rank."""
    return norms_of({group: {n: row_sums(gradient(n, p)) for n, p in members} for group, members in groups.items()})


def test_against_float64_and_torch():
    groups = model()
    norms = squared_norms(groups)
    everything = [p for members in groups.values() for _, p in members]
    for name, members in groups.items():
        expected = sum(float(p.grad.double().square().sum()) for _, p in members)
        assert float(norms.groups[name]) == pytest.approx(expected, rel=3e-7)
        for parameter_name, parameter in members:
            expected = float(parameter.grad.double().square().sum())
            assert float(norms.parameters[parameter_name]) == pytest.approx(expected, rel=3e-7)
    total = sum(float(p.grad.double().square().sum()) for p in everything)
    assert float(norms.total) == pytest.approx(total, rel=3e-7)
    assert norms.total.dtype == torch.float64 and norms.total.ndim == 0

    for clip in (0.5, 1e9):
        before = [p.grad.clone() for p in everything]
        torch.nn.utils.clip_grad_norm_(everything, clip)
        coefficient = clip_coefficient(norms.total, clip)
        assert coefficient.dtype == torch.float32 and coefficient.ndim == 0
        for grad, parameter in zip(before, everything, strict=True):
            torch.testing.assert_close(grad * coefficient, parameter.grad, rtol=1e-6, atol=0)
            parameter.grad = grad
    assert float(clip_coefficient(norms.total, 1e9)) == 1.0


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_may_be_dealt_out(threads):
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    for columns in (1, 3, 16, 24, 129, 2048):
        values = torch.randn(4001, columns) * torch.logspace(-6, 6, 4001)[:, None]
        rows = row_sums(values)
        for cut in (1, 7, 1000):
            assert torch.equal(rows, torch.cat([row_sums(part) for part in values.split(cut)])), (columns, cut)
    torch.set_num_threads(1)


def test_the_order_is_that_of_fixed_blocks():
    torch.manual_seed(2)
    values = torch.randn(100_003).square() * torch.logspace(-9, 9, 100_003)
    results = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.add(float(ordered_sum(values)))
    torch.set_num_threads(1)
    assert len(results) == 1
    blocks = [float(part.double().sum()) for part in values.split(1024)]
    assert results.pop() == pytest.approx(math.fsum(blocks), rel=1e-15)
    assert float(ordered_sum(torch.ones(1025))) == 1025.0
    assert float(ordered_sum(torch.ones(1))) == 1.0


def test_the_parameter_at_fault_is_named():
    groups = model()
    bad = groups["experts"][0][1].grad
    bad[2, 1, 3, 5] = float("nan")
    bad[3, 0, 0, 0] = float("inf")
    assert not math.isfinite(float(squared_norms(groups).total))
    text = not_finite(groups, step=12, notes=["batch 3fa9"]).render()
    assert "N0522" in text and "`experts` is not finite: nan at [2, 1, 3, 5], 2 of 7680" in text
    assert "step 12, group `experts`" in text and "batch 3fa9" in text

    groups = model()
    groups["router"][0][1].grad[1, 1] = 1e25
    assert "`router` is too large for a norm: 1e+25" in not_finite(groups, step=1).render()


def test_a_missing_gradient_is_an_error():
    groups = model()
    groups["dense"][1][1].grad = None
    with pytest.raises(RunError, match=r"N0521.*`norm` has no gradient"):
        squared_norms(groups)
