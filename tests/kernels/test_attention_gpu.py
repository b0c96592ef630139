"""Attention on a Hopper GPU: against float64, bit for bit against itself, and through autograd."""

import pytest
import torch

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="NO HOPPER GPU: the attention kernels are not tested on this machine",
)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("case", ["causal64", "causal96", "mla", "mladocuments", "window", "sink", "all", "short"])
def test_kernels_agree_with_float64(case: str) -> None:
    from nmoe.bench.attention import check

    assert [row["bad"] for row in check([case])] == [[]]


@pytest.mark.gpu
@hopper
def test_kernels_give_the_same_bits_twenty_times() -> None:
    from nmoe.bench.attention import repeat

    assert [row["differ"] for row in repeat(["mla", "gptoss", "documents"])] == [[], [], []]


@pytest.mark.gpu
@hopper
def test_gradients_arrive_through_autograd() -> None:
    from nmoe.bench.attention import ODD, make_inputs, ours
    from nmoe.kernels.attention import attention

    x = make_inputs(ODD["all"])
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.sink) if t is not None]
    out = attention(*leaves[:3], window=ODD["all"].window, docs=x.docs, sink_H=leaves[3])
    got = torch.autograd.grad(out, leaves, x.dout)
    forward, backward = ours(x, ODD["all"].window)
    for a, b in zip(got, backward(*forward()), strict=True):
        assert torch.equal(a, b)
