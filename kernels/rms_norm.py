"""RMSNorm, forward and backward, alone or behind a residual sum, in one pass each.

    s = x + y (rounded to their dtype; x alone without y)     r = 1 / sqrt(mean(s^2) + eps)     n = s r w
    ds = ds' + r (w dn) - s r^3 / D <dn s, w>                 dw = sum over rows of r dn s

(Zhang and Sennrich, arXiv 1910.07467.) ds' is the gradient that reaches s past the norm; ds is x's
gradient and y's. Kept for backward: s, which the residual stream keeps anyway, and r, 4 bytes a row.

Layout: rows of D elements, D contiguous; x's rows may lie apart (a slice of a wider row). bf16 (float32
in tests) in and out; squares, dots, r and the weight's gradient are float32.

Repeatable: a row is reduced inside one program by the tree of its tile, whose shape follows from D alone,
so a row's bits do not depend on the other rows. dw: each program adds a fixed chunk of rows, counted from
row 0, tile by tile; partial sums are added 1024 at a time, level by level. No atomics.

Floor: 2 D bytes a row are read and written forward, 6 D bytes backward; with the sum 8 D and 8 D, where
the separate passes take 10 D and 12 D. Prediction for T 16384, D 2048 at 3 TB/s: 0.045 and 0.067 ms, with
the sum 0.09 and 0.09. Partials are 1 to 4% more, in the L2. Measured: see NOTES.md.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.launch import norm_launch

WIDEST = 16384
"""Elements of a row that one program holds."""

GROUP = 1024
"""Partial sums added in one go: a launch more costs more than that so few programs add so many."""


def rms_norm_reference(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """The meaning: x / sqrt(mean(x^2) + eps) * w; differentiable, any dtype."""
    return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps) * w_D


@triton.jit
def forward_kernel(x_ptr, y_ptr, w_ptr, sum_ptr, out_ptr, r_ptr, tokens, stride, D, eps, ADDED: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    mask = (t < tokens)[:, None] & (d < D)[None, :]
    at = t[:, None] * D + d[None, :]
    s = tl.load(x_ptr + t[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        s += tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=mask)
        s = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, axis=1) / D + eps)
    tl.store(r_ptr + t, r, mask=t < tokens)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (s * r[:, None] * w[None, :]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(s_ptr, dn_ptr, past_ptr, w_ptr, r_ptr, ds_ptr, part_ptr, tokens, stride, D, PAST: tl.constexpr,
                    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, CHUNK, ROWS):
        t = chunk * CHUNK + first + tl.arange(0, ROWS)
        mask = (t < tokens)[:, None] & (d < D)[None, :]
        at = t[:, None] * D + d[None, :]
        s = tl.load(s_ptr + t[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        dn = tl.load(dn_ptr + at, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + t, mask=t < tokens, other=0.0)
        dns = dn * s
        acc += dns * r[:, None]
        dot = tl.sum(dns * w[None, :], axis=1)
        ds = dn * w[None, :] * r[:, None] - s * (r * r * r / D * dot)[:, None]
        if PAST:
            ds += tl.load(past_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(ds_ptr + at, ds.to(ds_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + chunk * D + d, tl.sum(acc, axis=0), mask=d < D)


@triton.jit
def sum_kernel(part_ptr, out_ptr, parts, D, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, GROUP, ROWS):
        p = group * GROUP + first + tl.arange(0, ROWS)
        mask = (p < parts)[:, None] & (d < D)[None, :]
        acc += tl.load(part_ptr + p[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + group * D + d, tl.sum(acc, axis=0), mask=d < D)


def _require(x_TD: Tensor, w_D: Tensor) -> None:
    if x_TD.dtype not in (torch.bfloat16, torch.float32) or x_TD.stride(-1) != 1 or not w_D.is_contiguous():
        raise fail(
            "N0714", f"`x_TD` must be bf16 or float32 with a contiguous last axis and `w_D` contiguous, found "
            f"{x_TD.dtype} with strides {x_TD.stride()} and {w_D.stride()}", place="rms_norm kernels",
        )  # fmt: skip
    if x_TD.shape[-1] > WIDEST:
        raise fail(
            "N0715", f"a norm over {x_TD.shape[-1]} elements has no kernel", place="rms_norm kernels",
            help=f"use a width of at most {WIDEST}",
        )  # fmt: skip


def rms_norm_forward(
    x_TD: Tensor, w_D: Tensor, eps: float, added_TD: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(s_TD, n_TD, r_T): the residual sum (x itself without added_TD), its norm in x's dtype, r in float32.

    x_TD: bf16 or float32, the last axis contiguous; added_TD: contiguous, x's dtype. Raises N0714 for
    another dtype or layout, N0715 for a row of more than 16384.
    """
    _require(x_TD, w_D)
    tokens, width = x_TD.shape
    p = norm_launch(width)
    n_TD = torch.empty(tokens, width, dtype=x_TD.dtype, device=x_TD.device)
    s_TD = x_TD if added_TD is None else torch.empty_like(n_TD)
    r_T = torch.empty(tokens, dtype=torch.float32, device=x_TD.device)
    if tokens:
        forward_kernel[(triton.cdiv(tokens, p.rows),)](
            x_TD, added_TD, w_D, s_TD, n_TD, r_T, tokens, x_TD.stride(0), width, eps, added_TD is not None,
            p.rows, p.block, num_warps=p.warps,
        )  # fmt: skip
    return s_TD, n_TD, r_T


def rms_norm_backward(
    dn_TD: Tensor, s_TD: Tensor, w_D: Tensor, r_T: Tensor, past_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(ds_TD in s's dtype, dw_D float32); past_TD: the gradient that reaches s past the norm."""
    tokens, width = s_TD.shape
    p = norm_launch(width)
    dn_TD = dn_TD.contiguous()
    past_TD = None if past_TD is None else past_TD.contiguous()
    ds_TD = torch.empty(tokens, width, dtype=s_TD.dtype, device=s_TD.device)
    if not tokens:
        return ds_TD, torch.zeros(width, dtype=torch.float32, device=s_TD.device)
    part_PD = torch.empty(triton.cdiv(tokens, p.chunk), width, dtype=torch.float32, device=s_TD.device)
    backward_kernel[(len(part_PD),)](
        s_TD, dn_TD, past_TD, w_D, r_T, ds_TD, part_PD, tokens, s_TD.stride(0), width, past_TD is not None,
        p.chunk, p.rows, p.block, num_warps=p.warps,
    )  # fmt: skip
    while len(part_PD) > 1:
        sum_PD = part_PD.new_empty(triton.cdiv(len(part_PD), GROUP), width)
        grid = (len(sum_PD), triton.cdiv(width, 64))
        sum_kernel[grid](part_PD, sum_PD, len(part_PD), width, GROUP, 32, 64, num_warps=4)
        part_PD = sum_PD
    return ds_TD, part_PD[0]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_D: Tensor, eps: float) -> Tensor:
        _, n_TD, r_T = rms_norm_forward(_rows(x), w_D, eps)
        ctx.save_for_backward(x, w_D, r_T)
        return n_TD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w_D, r_T = ctx.saved_tensors
        dx_TD, dw_D = rms_norm_backward(_rows(dn), _rows(x), w_D, r_T)
        return dx_TD.view(x.shape), dw_D, None


class _PassRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        _, n_TD, r_T = rms_norm_forward(_rows(x), w_D, eps)
        ctx.save_for_backward(x, w_D, r_T)
        ctx.set_materialize_grads(False)
        return x.view_as(x), n_TD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, past: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        if dn is None:
            return past, None, None
        return (*_behind_sum(ctx.saved_tensors, past, dn), None)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        s_TD, n_TD, r_T = rms_norm_forward(_rows(x), w_D, eps, _rows(y).contiguous())
        s = s_TD.view(x.shape)
        ctx.save_for_backward(s, w_D, r_T)
        ctx.set_materialize_grads(False)
        return s, n_TD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, past: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        if dn is None:
            return past, past, None, None
        ds, dw_D = _behind_sum(ctx.saved_tensors, past, dn)
        return ds, ds, dw_D, None


def _behind_sum(saved: tuple[Tensor, ...], past: Tensor | None, dn: Tensor) -> tuple[Tensor, Tensor]:
    """(ds, dw_D) from the norm's gradient dn and what reaches s past the norm."""
    s, w_D, r_T = saved
    ds_TD, dw_D = rms_norm_backward(_rows(dn), _rows(s), w_D, r_T, None if past is None else _rows(past))
    return ds_TD.view(s.shape), dw_D


def _rows(x: Tensor) -> Tensor:
    """(T, D). Made inside a function of autograd: a node for each view would cost the host a launch."""
    return x.reshape(-1, x.shape[-1])


def rms_norm(x: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last axis, differentiable; x: (..., D), the same shape and dtype.

    The gradient of w is float32.
    """
    n: Tensor = _RmsNorm.apply(x, w_D, eps)
    return n


def pass_rms_norm(x: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x, rms_norm(x)): who goes on with this x has its gradient added where the norm's is made, and rounded once."""
    x, n = _PassRmsNorm.apply(x, w_D, eps)
    return x, n


def add_rms_norm(x: Tensor, y: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y, rms_norm(x + y)), differentiable; x, y: (..., D), one shape and dtype."""
    s, n = _AddRmsNorm.apply(x, y, w_D, eps)
    return s, n
