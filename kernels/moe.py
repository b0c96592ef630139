"""The routed experts of one layer, forward and backward, from a layout to float32 weight gradients.

Mathematics: out[t] = sum_k weight[t, k] W_down[e] (silu(W_gate[e] x[t]) * (W_up[e] x[t])), e = expert[t, k],
the sum over k in order. Backward needs x, the weights, the pre-activations h and the routing, and
nothing else: the gated product recomputes a from h, and the router's gradient is <dout W_down, a>,
so that the experts' outputs are not kept.

    forward:  UP gathers x, writes h and a; DOWN; sum over k
    backward: rows of dout; DGATE (dh, weighted a, <d, a>); dW_down; rows of x; dW_gate_up; DX; sum over k

Between ranks DX comes before the rows of x, so that its rows are on their way while dW_gate_up is computed.

Kept for backward: 2 * T K F bf16 and the routing (0.75 GiB for T 32768, F 768, K 8). The largest
temporary is one (T K, D) bf16 buffer of rows beside dh.

The experts' part, from rows to rows, is the same whether the tokens are one rank's own or what an owner has
received from N (nmoe.kernels.exchange); the sum over k is the tokens' owner's.

Every part is bitwise repeatable (see each module). Weight gradients of each microbatch are added to `grads` in
place, or lie there apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.arena import Kept
from nmoe.kernels.combine import combine, gather_rows, sum_dots
from nmoe.kernels.launch import Table, launches
from nmoe.kernels.layout import Rows
from nmoe.kernels.products import dgate_product, down_product, dx_product, up_product, weight_gradient


class Saved(NamedTuple):
    """What backward needs beside x and the weights: the pre-activations and the routing."""

    h_2RF: Tensor
    weight_TK: Tensor
    layout: Rows


class Gradients(NamedTuple):
    """x_TD in bf16; the pairs' weights and the expert matrices in float32."""

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


def require(x_TD: Tensor, weight_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor) -> None:
    """The kernels' demands, by name, before anything is launched."""
    wide = {"x_TD": x_TD, "w_gate_up_E2FD": w_gate_up_E2FD, "w_down_EDF": w_down_EDF}
    for name, t in wide.items():
        if t.dtype != torch.bfloat16 or not t.is_contiguous():
            raise fail("N0710", f"`{name}` must be contiguous bf16, found {t.dtype}", place="grouped experts")
    if weight_TK.dtype != torch.float32 or not weight_TK.is_contiguous():
        raise fail("N0710", f"`weight_TK` must be contiguous float32, found {weight_TK.dtype}", place="grouped experts")
    for name, size in (("hidden_size", x_TD.shape[1]), ("intermediate_size", w_down_EDF.shape[2])):
        if size % 8:
            raise fail(
                "N0711", f"{name} = {size} is not a multiple of 8, which 16-byte copies need", place="grouped experts",
                help=f"set {name} to a multiple of 8",
            )  # fmt: skip


def experts_forward(
    x_TD: Tensor, layout: Rows, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, kept: Kept, table: Table | None = None
) -> Tensor:
    """Each pair's output row y_RD, before its weight, in bf16.

    x_TD, w_gate_up_E2FD, w_down_EDF: bf16, contiguous. layout: of the tokens' pairs. kept: where the pre-activations
    go, bf16.
    """
    table = table or launches(x_TD.shape[1])
    x = x_TD if table["up"].gather else gather_rows(x_TD, layout)
    a_RF = up_product(x, w_gate_up_E2FD, layout, kept, table["up"])
    return down_product(a_RF, w_down_EDF, layout, table["down"])


def down_backward(
    dout_TD: Tensor, weight_TK: Tensor, kept: Kept, w_down_EDF: Tensor, layout: Rows, grad_EDF: Tensor,
    continues: bool, table: Table | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The pre-activations' gradient dh_2RF in bf16, and <dout W_down, a> in parts, float32 (N, R). And dW_down.

    dout_TD: unweighted; read by nothing that comes later. kept: where forward has put the pre-activations. grad_EDF,
    continues: as `nmoe.kernels.products.weight_gradient`.
    """
    table = table or launches(dout_TD.shape[1])
    weight_R = weight_TK.view(-1).index_select(0, layout.pair_R)
    dout_RD = None if table["dgate"].gather and table["dw_down"].gather else gather_rows(dout_TD, layout)
    dout = dout_TD if dout_RD is None or table["dgate"].gather else dout_RD
    dh_2RF, aw_RF, dot_NR = dgate_product(dout, w_down_EDF, kept, weight_R, layout, table["dgate"])
    dout = dout_TD if dout_RD is None or table["dw_down"].gather else dout_RD
    weight_gradient(dout, aw_RF[None], layout, grad_EDF, continues, True, table["dw_down"])
    return dh_2RF, dot_NR


def gate_up_gradient(
    x_TD: Tensor, dh_2RF: Tensor, layout: Rows, grad_E2FD: Tensor, continues: bool, table: Table | None = None,
    spared: int = 0,
) -> None:  # fmt: skip
    """dW_gate and dW_up, of `down_backward`'s dh_2RF. grad_E2FD, continues, spared: as `weight_gradient`."""
    table = table or launches(x_TD.shape[1])
    x = x_TD if table["dw_up"].gather else gather_rows(x_TD, layout)
    weight_gradient(x, dh_2RF, layout, grad_E2FD, continues, False, table["dw_up"], spared)


def input_gradient(dh_2RF: Tensor, w_gate_up_E2FD: Tensor, layout: Rows, table: Table | None = None) -> Tensor:
    """Each pair's gradient of x, dx_RD in bf16, of `down_backward`'s dh_2RF."""
    return dx_product(dh_2RF, w_gate_up_E2FD, layout, (table or launches(w_gate_up_E2FD.shape[3]))["dx"])


def moe_forward(
    x_TD: Tensor, layout: Rows, weight_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor,
    table: Table | None = None, base_TD: Tensor | None = None, more_TD: Tensor | None = None,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """The layer's output (T, D) in bf16, with the two others of `combine` added, and what backward needs.

    x_TD, w_gate_up_E2FD, w_down_EDF: bf16; weight_TK: float32; all contiguous. layout: of the T K pairs.
    Raises N0710 for another dtype or layout, N0711 for D or F not a multiple of 8.
    """
    require(x_TD, weight_TK, w_gate_up_E2FD, w_down_EDF)
    kept = fresh_rows(layout, w_down_EDF)
    y_RD = experts_forward(x_TD, layout, w_gate_up_E2FD, w_down_EDF, kept, table)
    return combine(y_RD, layout.row_TK, weight_TK, base_TD, more_TD), Saved(kept.h_2AF, weight_TK, layout)


def moe_backward(
    dout_TD: Tensor, x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, saved: Saved,
    router: Callable[[Tensor], Tensor] | None = None, grads: tuple[Tensor, Tensor] | None = None,
    continues: bool = True, table: Table | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of x, of each pair's weight (float32) and of the expert matrices (float32).

    router: given the weights' gradient, returns the router's part of x's gradient (T, D), which starts the sum.
    grads, continues: float32 gradients of the matrices, as `weight_gradient`; None for fresh ones.
    """
    layout, written = saved.layout, grads or fresh_gradients(w_gate_up_E2FD, w_down_EDF)
    kept, continues = Kept(saved.h_2RF, None), continues and grads is not None
    dh_2RF, dot_NR = down_backward(dout_TD, saved.weight_TK, kept, w_down_EDF, layout, written[1], continues, table)
    gate_up_gradient(x_TD, dh_2RF, layout, written[0], continues, table)
    dx_RD = input_gradient(dh_2RF, w_gate_up_E2FD, layout, table)
    dweight_TK = sum_dots(dot_NR, layout.row_TK)
    dx_TD = combine(dx_RD, layout.row_TK, None, router(dweight_TK) if router else None)
    return Gradients(dx_TD, dweight_TK, *written)


def fresh_rows(layout: Rows, w_down_EDF: Tensor) -> Kept:
    """Room for the pre-activations of one layer by itself."""
    shape = 2, len(layout.token_R), w_down_EDF.shape[2]
    return Kept(torch.empty(shape, dtype=w_down_EDF.dtype, device=w_down_EDF.device), None)


def fresh_gradients(w_gate_up_E2FD: Tensor, w_down_EDF: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the matrices' float32 gradients."""
    return (
        torch.empty(w_gate_up_E2FD.shape, dtype=torch.float32, device=w_gate_up_E2FD.device),
        torch.empty(w_down_EDF.shape, dtype=torch.float32, device=w_down_EDF.device),
    )
