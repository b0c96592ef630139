"""The MoE layer on a Hopper GPU: against float64, and bit for bit against itself."""

import pytest
import torch

from nmoe.errors import RunError
from nmoe.kernels.launch import launches
from nmoe.kernels.layout import OwnerLayout
from nmoe.kernels.moe import moe_forward
from nmoe.kernels.products import weight_gradient

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="NO HOPPER GPU: the grouped products are not tested on this machine",
)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("shape", ["odd", "narrow", "block", "many", "one", "deep"])
def test_layer_agrees_with_float64(shape: str) -> None:
    from nmoe.bench.moe import check

    assert [row["bad"] for row in check("pinned", [shape])] == [[], [], []]


@pytest.mark.gpu
@hopper
def test_layer_gives_the_same_bits_twenty_times() -> None:
    from nmoe.bench.moe import repeat

    assert [row["differ"] for row in repeat("pinned")] == [[], []]


def rows_of(sizes_EM: torch.Tensor) -> OwnerLayout:
    """Rows by (expert, microbatch), each its own token."""
    segments_S1 = torch.cat([torch.zeros(1, dtype=torch.int64), sizes_EM.flatten().cumsum(0)]).int().cuda()
    row_R = torch.arange(int(sizes_EM.sum()), dtype=torch.int32, device="cuda")
    none = row_R[:0]
    return OwnerLayout(
        segments_S1[:: sizes_EM.shape[1]].contiguous(), row_R, row_R, row_R, none, none, none, segments_S1, none
    )


def bits(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.view(torch.int32)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize(("D", "F"), [(512, 256), (264, 136), (768, 384)])
def test_weight_gradients_of_microbatches_are_added_in_order(D: int, F: int, tokens_first: bool) -> None:
    """Bit for bit as torch adds what each microbatch alone gives; apart they are these, -0 where there are no rows."""
    sizes_EM = torch.tensor([[70, 129, 3], [0, 64, 200], [5, 0, 0], [0, 0, 0], [0, 0, 9]])
    experts, microbatches = sizes_EM.shape
    generator = torch.Generator("cuda").manual_seed(D)
    R, planes = int(sizes_EM.sum()), 1 if tokens_first else 2
    # Of different sizes, so that another order gives other digits.
    x_RD, dh_PRF = (
        (torch.randn(*s, generator=generator, device="cuda") * 4).bfloat16() for s in ((R, D), (planes, R, F))
    )
    owner_R = torch.repeat_interleave(torch.arange(experts * microbatches), sizes_EM.flatten()).cuda()
    p = launches(D)["dw_down" if tokens_first else "dw_up"]
    shape = (experts, D, F) if tokens_first else (experts, 2, F, D)

    def gradient(x, dh, layout, out, continues, spared=0):
        weight_gradient(x, dh, layout, out, continues, tokens_first, p, spared)
        return out

    def new(*size):
        return torch.full(size, float("nan"), device="cuda")

    alone_M = []
    for m in range(microbatches):
        mine = owner_R % microbatches == m
        x, dh = x_RD[mine].contiguous(), dh_PRF[:, mine].contiguous()
        alone_M.append(gradient(x, dh, rows_of(sizes_EM[:, m : m + 1]), new(*shape), False))
    layout = rows_of(sizes_EM)
    before = torch.randn(shape, generator=generator, device="cuda")
    for continues in (False, True):
        wanted = before.clone() if continues else alone_M[0].clone()
        parts_M = new(microbatches, *shape)
        gradient(x_RD, dh_PRF, layout, parts_M, continues)
        for m in range(microbatches):
            empty_E = (sizes_EM[:, m] == 0).cuda()
            part = alone_M[m].clone()
            if continues or m:
                part[empty_E] = -0.0
                wanted[~empty_E] += alone_M[m][~empty_E]
            assert torch.equal(bits(parts_M[m]), bits(part)), (continues, m)
        for spared in (0, 24, 131):
            out = before.clone() if continues else new(*shape)
            found = gradient(x_RD, dh_PRF, layout, out, continues, spared)
            assert torch.equal(bits(found), bits(wanted)), (continues, spared)
    one = dh_PRF[0, :70].double().T @ x_RD[:70].double()
    got = alone_M[0][0].double().T if tokens_first else alone_M[0][0, 0].double()
    assert float((got - one).abs().max()) < 1e-5 * float(one.abs().max())


@pytest.mark.parametrize(("width", "code"), [(20, "N0711"), (16, "N0710")])
def test_what_the_kernels_cannot_take_is_refused_by_name(width: int, code: str) -> None:
    x_TD = torch.zeros(4, width, dtype=torch.bfloat16)
    w_gate_up = torch.zeros(2, 2, 8, width, dtype=torch.bfloat16 if code == "N0711" else torch.float32)
    w_down = torch.zeros(2, width, 8, dtype=torch.bfloat16)
    expert_TK = torch.zeros(4, 1, dtype=torch.int32)
    with pytest.raises(RunError, match=code):
        moe_forward(x_TD, expert_TK, torch.ones(4, 1), w_gate_up, w_down)
