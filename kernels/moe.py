"""The routed experts of one layer, forward and backward (draft docstring)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nmoe.kernels.combine import combine, gather_rows, sum_dots
from nmoe.kernels.launch import Launch, Table, launches
from nmoe.kernels.layout import Layout, make_layout


class Saved(NamedTuple):
    """What backward needs beside x and the weights: the pre-activations and the routing."""

    h_2RF: Tensor
    weight_TK: Tensor
    layout: Layout


class Gradients(NamedTuple):
    x_TD: Tensor
    weight_TK: Tensor
    w_gate_up_E2FD: Tensor
    w_down_EDF: Tensor


def moe_reference(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
) -> Tensor:
    """The meaning of the layer, token by token and expert by expert; differentiable, any dtype.

    out[t] = sum_k weight[t, k] * W_down[e] (silu(W_gate[e] x[t]) * (W_up[e] x[t])), e = expert[t, k]
    """
    out_TD = torch.zeros_like(x_TD)
    for e in range(w_down_EDF.shape[0]):
        token_R, k_R = torch.nonzero(expert_TK == e, as_tuple=True)
        x_RD = x_TD[token_R]
        a_RF = torch.nn.functional.silu(x_RD @ w_gate_up_E2FD[e, 0].T) * (x_RD @ w_gate_up_E2FD[e, 1].T)
        y_RD = a_RF @ w_down_EDF[e].T
        out_TD = out_TD.index_add(0, token_R, weight_TK[token_R, k_R, None] * y_RD)
    return out_TD


def _blocks() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def _ragged(x_RD: Tensor, rows: int, cols: int):
    """A TMA descriptor that clips at any row: coordinates (2^30, end + plane, 2^30 - rows left, col).

    The first two axes' strides wrap around 2^64, so that the address is that of row
    end - rows_left while the third coordinate leaves its axis exactly at `end`: loads beyond give
    zeros and stores beyond vanish, for every expert, with one descriptor.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = [1, 1, rows, cols]
    width = x_RD.shape[-1]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    shape = [0x7FFF0000, 0x7FFF0000, 1 << 30, width]
    return TensorDescriptor(x_RD, shape, [2**34 - width, width, width, 1], box, layout)


def _weights(w_PND: Tensor, box: list[int]):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(w_PND, box, gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def up_product(x: Tensor, w_gate_up_E2FD: Tensor, layout: Layout, p: Launch) -> tuple[Tensor, Tensor]:
    """h_2RF = X[token] @ W_gate^T and X[token] @ W_up^T, and a_RF = silu(h_0) * h_1 of the rounded h."""
    from nmoe.kernels.grouped import rows_kernel

    experts, _, F, D = w_gate_up_E2FD.shape
    R = len(layout.token_R)
    h_2RF = torch.empty(2, R, F, dtype=x.dtype, device=x.device)
    a_RF = torch.empty(R, F, dtype=x.dtype, device=x.device)
    box = (128 // p.share, 64 * p.share)
    h_desc = _ragged(h_2RF, *box)
    rows_kernel[(_blocks(),)](
        _ragged(x, 128, 64), x, layout.token_R, _weights(w_gate_up_E2FD.view(2 * experts, F, D), [2, 64 * p.share, 64]),
        h_desc, h_desc, _ragged(a_RF, *box), layout.token_R, layout.token_R,
        layout.offsets_E1, layout.tile_expert, layout.tile_row, layout.num_tiles, D // 8, R,
        _cdiv(F, 64 * p.share), _cdiv(D, 64), 0, p.gather, 128, 128 * p.share, 64, p.stages, p.share, p.sets, *p.registers, num_warps=4,
    )  # fmt: skip
    return h_2RF, a_RF


def down_product(a_RF: Tensor, w_down_EDF: Tensor, layout: Layout, p: Launch) -> Tensor:
    """y_RD = a @ W_down^T, the experts' rows before the router's weight."""
    from nmoe.kernels.grouped import rows_kernel

    _, D, F = w_down_EDF.shape
    R = len(layout.token_R)
    y_RD = torch.empty(R, D, dtype=a_RF.dtype, device=a_RF.device)
    y_desc = _ragged(y_RD, 128 // p.share, 64 * p.share)
    rows_kernel[(_blocks(),)](
        _ragged(a_RF, 128, 64), a_RF, layout.token_R, _weights(w_down_EDF, [1, 128 * p.share, 64]),
        y_desc, y_desc, y_desc, layout.token_R, layout.token_R,
        layout.offsets_E1, layout.tile_expert, layout.tile_row, layout.num_tiles, D // 8, R,
        _cdiv(D, 128 * p.share), _cdiv(F, 64), 1, False, 128, 128 * p.share, 64, p.stages, p.share, p.sets, *p.registers, num_warps=4,
    )  # fmt: skip
    return y_RD


def dgate_product(
    dout: Tensor, w_down_EDF: Tensor, h_2RF: Tensor, weight_R: Tensor, layout: Layout, p: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """dA' = dO[token] @ W_down; returns dh_2RF, the weighted a_RF, and <dA', A> in parts (N, R)."""
    from nmoe.kernels.grouped import rows_kernel

    _, D, F = w_down_EDF.shape
    R = len(layout.token_R)
    dh_2RF = torch.empty_like(h_2RF)
    aw_RF = torch.empty(R, F, dtype=h_2RF.dtype, device=h_2RF.device)
    tiles = _cdiv(F, 128 * p.share)
    dot_NR = torch.empty(tiles, R, dtype=torch.float32, device=h_2RF.device)
    rows_kernel[(_blocks(),)](
        _ragged(dout, 128, 64), dout, layout.token_R, _weights(w_down_EDF, [1, 64, 128 * p.share]),
        _ragged(dh_2RF, 128 // p.share, 32), _ragged(h_2RF, 128 // p.share, 32), _ragged(aw_RF, 128 // p.share, 32), weight_R, dot_NR,
        layout.offsets_E1, layout.tile_expert, layout.tile_row, layout.num_tiles, D // 8, R,
        tiles, _cdiv(D, 64), 2, p.gather, 128, 128 * p.share, 64, p.stages, p.share, p.sets, *p.registers, num_warps=4,
    )  # fmt: skip
    return dh_2RF, aw_RF, dot_NR


def dx_product(dh_2RF: Tensor, w_gate_up_E2FD: Tensor, layout: Layout, p: Launch) -> Tensor:
    """dx_RD = dh_0 @ W_gate + dh_1 @ W_up."""
    from nmoe.kernels.grouped import rows_kernel

    experts, _, F, D = w_gate_up_E2FD.shape
    R = dh_2RF.shape[1]
    dx_RD = torch.empty(R, D, dtype=dh_2RF.dtype, device=dh_2RF.device)
    dx_desc = _ragged(dx_RD, 128 // p.share, 64 * p.share)
    rows_kernel[(_blocks(),)](
        _ragged(dh_2RF, 128, 64), dh_2RF, layout.token_R, _weights(w_gate_up_E2FD.view(2 * experts, F, D), [1, 64, 128 * p.share]),
        dx_desc, dx_desc, dx_desc, layout.token_R, layout.token_R,
        layout.offsets_E1, layout.tile_expert, layout.tile_row, layout.num_tiles, D // 8, R,
        _cdiv(D, 128 * p.share), 2 * _cdiv(F, 64), 3, False, 128, 128 * p.share, 64, p.stages, p.share, p.sets, *p.registers, num_warps=4,
    )  # fmt: skip
    return dx_RD


def weight_gradient(
    tokens: Tensor, rows_PRF: Tensor, layout: Layout, out: Tensor, accumulate: bool, tokens_first: bool, p: Launch
) -> None:
    """out[e] (+)= sum over e's rows r, in order, of rows[r] x tokens[token(r)] (outer products), float32.

    tokens_first False: rows are dh_2RF, out is (E, 2, F, D). True: rows are the weighted a as (1, R, F),
    out is (E, D, F).
    """
    from nmoe.kernels.wgrad import wgrad_kernel

    planes, R, F = rows_PRF.shape
    D = tokens.shape[1]
    experts = len(layout.offsets_E1) - 1
    bg, br = (128, 256) if F % 256 == 0 else (256, 128)  # the wide side lies along F unless that would waste it
    g_tiles, r_tiles = _cdiv(D, bg), _cdiv(F, br)
    wgrad_kernel[(_blocks(),)](
        _ragged(tokens, 64, bg), tokens, layout.token_R, _ragged(rows_PRF, 64, br), out, layout.offsets_E1,
        D // 8, F // 8, R, g_tiles, r_tiles, experts * planes * g_tiles * r_tiles,
        planes, tokens_first, p.gather, accumulate, D % bg == 0 and F % br == 0, bg, br, 64, p.stages, *p.registers, num_warps=4,
    )  # fmt: skip


def moe_forward(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor,
    table: Table | None = None,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """The layer's output (T, D) in bf16 and what backward needs."""
    table = table or launches(x_TD.shape[1])
    layout = make_layout(expert_TK, w_down_EDF.shape[0])
    x = x_TD if table["up"].gather else gather_rows(x_TD, layout)
    h_2RF, a_RF = up_product(x, w_gate_up_E2FD, layout, table["up"])
    y_RD = down_product(a_RF, w_down_EDF, layout, table["down"])
    return combine(y_RD, layout.row_TK, weight_TK), Saved(h_2RF, weight_TK, layout)


def moe_backward(
    dout_TD: Tensor, x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, saved: Saved,
    router: Callable[[Tensor], Tensor] | None = None, grads: tuple[Tensor, Tensor] | None = None, table: Table | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of x, of each pair's weight (float32) and of the expert matrices (float32).

    router: given the weights' gradient, returns the router's part of x's gradient (T, D), which starts the sum.
    grads: float32 matrices' gradients to continue (in place), or None for fresh ones.
    """
    table = table or launches(x_TD.shape[1])
    layout = saved.layout
    accumulate = grads is not None
    if grads is None:
        grads = (
            torch.empty(w_gate_up_E2FD.shape, dtype=torch.float32, device=x_TD.device),
            torch.empty(w_down_EDF.shape, dtype=torch.float32, device=x_TD.device),
        )
    weight_R = saved.weight_TK.view(-1)[layout.pair_R]
    dout_RD = None if table["dgate"].gather and table["dw_down"].gather else gather_rows(dout_TD, layout)
    dout = dout_TD if dout_RD is None or table["dgate"].gather else dout_RD
    dh_2RF, aw_RF, dot_NR = dgate_product(dout, w_down_EDF, saved.h_2RF, weight_R, layout, table["dgate"])
    dout = dout_TD if dout_RD is None or table["dw_down"].gather else dout_RD
    dweight_TK = sum_dots(dot_NR, layout.row_TK)
    weight_gradient(dout, aw_RF[None], layout, grads[1], accumulate, True, table["dw_down"])
    del aw_RF, dout, dout_RD
    x = x_TD if table["dw_up"].gather else gather_rows(x_TD, layout)
    weight_gradient(x, dh_2RF, layout, grads[0], accumulate, False, table["dw_up"])
    del x
    dx_RD = dx_product(dh_2RF, w_gate_up_E2FD, layout, table["dx"])
    dx_TD = combine(dx_RD, layout.row_TK, None, router(dweight_TK) if router else None)
    return Gradients(dx_TD, dweight_TK, *grads)
