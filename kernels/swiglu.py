"""SwiGLU and its gradient, one pass each; the pre-activations are all that is kept.

    a = silu(g) u,   silu(g) = g s,  s = sigmoid(g)       (Shazeer, arXiv 2002.05202)
    du = d silu(g)   dg = d u (s + silu(g) (1 - s))       with d the gradient of a

Layout: rows [g | u] of 2F, gate first, as the product of both writes them. float32 inside; a, du and dg
are rounded once, to the dtype of the pre-activations (bf16; float32 in tests). Backward gives a again for
the product that makes W_down's gradient. d may be bf16 or float32: as a product's float32 output it costs
2 F bytes a row more to read here and as much to write there.

Repeatable: elementwise; nothing is added across elements. Floor: 6 F bytes a row forward, 12 F backward
(14 F with d in float32). Prediction for T 16384, F 2816 at 3 TB/s: 0.092 and 0.185 ms. Measured: see NOTES.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.launch import swiglu_launch


def swiglu_reference(pre_T2F: Tensor) -> Tensor:
    """The meaning: silu(g) * u for pre_T2F = [g | u]; differentiable, any dtype."""
    gate_TF, up_TF = pre_T2F.chunk(2, dim=1)
    return gate_TF * torch.sigmoid(gate_TF) * up_TF


@triton.jit
def forward_kernel(pre_ptr, out_ptr, tokens, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (t < tokens)[:, None] & (f < F)[None, :]
    at = t[:, None] * F * 2 + f[None, :]
    gate = tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    act = gate * s * up
    tl.store(out_ptr + t[:, None] * F + f[None, :], act.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(pre_ptr, d_ptr, act_ptr, d_pre_ptr, tokens, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (t < tokens)[:, None] & (f < F)[None, :]
    at = t[:, None] * F * 2 + f[None, :]
    gate = tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + t[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * s
    d_gate = d * up * (s + silu * (1.0 - s))
    tl.store(act_ptr + t[:, None] * F + f[None, :], (silu * up).to(act_ptr.dtype.element_ty), mask=mask)
    tl.store(d_pre_ptr + at, d_gate.to(d_pre_ptr.dtype.element_ty), mask=mask)
    tl.store(d_pre_ptr + at + F, (d * silu).to(d_pre_ptr.dtype.element_ty), mask=mask)


def _grid(tokens: int, width: int) -> tuple[tuple[int, int], int, int, int]:
    p = swiglu_launch(width)
    return (triton.cdiv(tokens, p.rows), triton.cdiv(width, p.block)), p.rows, p.block, p.warps


def _require(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dtype not in (torch.bfloat16, torch.float32) or not t.is_contiguous():
            raise fail(
                "N0716", f"`{name}` must be contiguous bf16 or float32, found {t.dtype} with strides {t.stride()}",
                place="swiglu kernels",
            )  # fmt: skip


def swiglu(pre_T2F: Tensor) -> Tensor:
    """silu(g) * u for pre_T2F = [g | u], (T, 2F) contiguous; (T, F) in its dtype. Raises N0716 for another layout."""
    _require(pre_T2F=pre_T2F)
    tokens, width = pre_T2F.shape[0], pre_T2F.shape[1] // 2
    act_TF = torch.empty(tokens, width, dtype=pre_T2F.dtype, device=pre_T2F.device)
    if tokens:
        grid, rows, block, warps = _grid(tokens, width)
        forward_kernel[grid](pre_T2F, act_TF, tokens, width, rows, block, num_warps=warps)
    return act_TF


def swiglu_backward(pre_T2F: Tensor, d_act_TF: Tensor) -> tuple[Tensor, Tensor]:
    """(act_TF, d_pre_T2F) in pre's dtype: what `swiglu` gave, and the gradient of what it read.

    pre_T2F: as `swiglu` read it. d_act_TF: (T, F) contiguous, bf16 or float32.
    """
    _require(pre_T2F=pre_T2F, d_act_TF=d_act_TF)
    tokens, width = d_act_TF.shape
    act_TF = torch.empty(tokens, width, dtype=pre_T2F.dtype, device=pre_T2F.device)
    d_pre_T2F = torch.empty_like(pre_T2F)
    if tokens:
        grid, rows, block, warps = _grid(tokens, width)
        backward_kernel[grid](pre_T2F, d_act_TF, act_TF, d_pre_T2F, tokens, width, rows, block, num_warps=warps)
    return act_TF, d_pre_T2F
