"""The MoE layer on a Hopper GPU: against float64, and bit for bit against itself."""

import pytest
import torch

from nmoe.errors import RunError
from nmoe.kernels.moe import moe_forward

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


@pytest.mark.parametrize(("width", "code"), [(20, "N0711"), (16, "N0710")])
def test_what_the_kernels_cannot_take_is_refused_by_name(width: int, code: str) -> None:
    x_TD = torch.zeros(4, width, dtype=torch.bfloat16)
    w_gate_up = torch.zeros(2, 2, 8, width, dtype=torch.bfloat16 if code == "N0711" else torch.float32)
    w_down = torch.zeros(2, width, 8, dtype=torch.bfloat16)
    expert_TK = torch.zeros(4, 1, dtype=torch.int32)
    with pytest.raises(RunError, match=code):
        moe_forward(x_TD, expert_TK, torch.ones(4, 1), w_gate_up, w_down)
