"""Rotary positions, and the queries and keys that attention reads, in one pass over a projection's output.

    rope: a head [n | r] -> [n | turn_p(r)]             pair j of position p times table[p, j]
    MLA's keys: k_h = [n_h | turn_p(k_rope)]            one rotary key for all heads; v_h stays where it is

(Su et al., arXiv 2104.09864; DeepSeek-V2, arXiv 2405.04434, section 2.1.) Pairs are elements (2j, 2j + 1)
("interleaved") or (j, j + J). Backward multiplies by the conjugate; the rotary key's gradient is the sum over heads,

    dk_rope = turn_-p(sum over h = 0 .. H-1, in that order, of the last 2J of dk_h)

Layout: token by token and head by head, (B, S, H, _), as projections write and the attention kernels read
through a transposed view (strides in multiples of 8): no copy on the way. Gradients may come in any order of
axes with the last contiguous (attention writes (B, H, S, _)) and leave as projections read them. bf16
(float32 in tests) in and out, the turn and the sum over heads in float32, rounded once; the table is float32.

Repeatable: each output is one thread's; the sum over heads runs in one thread, in their order.

Floor for T tokens: rope 4 T H (N + 2J) bytes and 8 J a token of table, read once for all heads; MLA's keys
forward T (4 H N + 4 H J + 4 J), backward T (4 H (N + V) + 4 H J + 4 J). Prediction for T 16384, H 16, 128 + 64,
V 128 at 3 TB/s: queries 0.067 ms, keys 0.056 and 0.101 ms (the composite of cat, expand and copies moves
2.5 to 4 times as much). Measured: see NOTES.md.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.launch import ROPE_LAUNCH


def rope_reference(x_BSHX: Tensor, table_SJ: Tensor, *, interleaved: bool) -> Tensor:
    """The meaning of `rope`: the last 2J of X, as complex pairs, times table_SJ; differentiable, any dtype."""
    pairs = table_SJ.shape[1]
    kept, turned = x_BSHX.split([x_BSHX.shape[3] - 2 * pairs, 2 * pairs], dim=3)
    pair_axis = -1 if interleaved else -2
    first, second = turned.unflatten(-1, (pairs, 2) if interleaved else (2, pairs)).unbind(pair_axis)
    cos_S1J, sin_S1J = (part[:, None].to(x_BSHX.dtype) for part in (table_SJ.real, table_SJ.imag))
    out = torch.stack([first * cos_S1J - second * sin_S1J, second * cos_S1J + first * sin_S1J], dim=pair_axis)
    return torch.cat([kept, out.flatten(-2)], dim=3)


def mla_keys_reference(kv_BSHX: Tensor, k_rope_BSR: Tensor, table_SJ: Tensor, value_size: int) -> tuple[Tensor, Tensor]:
    """The meaning of `mla_keys`; differentiable, any dtype."""
    own_BSHN, v_BSHV = kv_BSHX.split([kv_BSHX.shape[3] - value_size, value_size], dim=3)
    shared_BSHR = rope_reference(k_rope_BSR[:, :, None], table_SJ, interleaved=True).expand(*kv_BSHX.shape[:3], -1)
    return torch.cat([own_BSHN, shared_BSHR], dim=3), v_BSHV


@triton.jit
def _turned(x, cos, sin, ROWS: tl.constexpr, BLOCK_J: tl.constexpr):
    """A tile of neighbouring pairs, (ROWS, 2 BLOCK_J), turned; float32."""
    first, second = tl.split(tl.reshape(x.to(tl.float32), [ROWS, BLOCK_J, 2]))
    return tl.reshape(tl.join(first * cos - second * sin, second * cos + first * sin), [ROWS, 2 * BLOCK_J])


@triton.jit
def _angles(table_ptr, s, S, J, BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr):
    """Cosines and sines of a block of positions, (ROWS, BLOCK_J); of the turn back where BACK."""
    c = tl.arange(0, 2 * BLOCK_J)
    mask = (s < S)[:, None] & (c < 2 * J)[None, :]
    both = tl.load(table_ptr + s[:, None] * 2 * J + c[None, :], mask=mask, other=0.0)
    cos, sin = tl.split(tl.reshape(both, [ROWS, BLOCK_J, 2]))
    if BACK:
        sin = -sin
    return cos, sin


@triton.jit
def rope_kernel(x_ptr, table_ptr, out_ptr, S, H, N, J, x_b, x_s, x_h, BACK: tl.constexpr, INTERLEAVED: tl.constexpr,
                KEPT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):  # fmt: skip
    s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    real = (s < S)[:, None]
    cos, sin = _angles(table_ptr, s, S, J, BACK, ROWS, BLOCK_J)
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, 2 * BLOCK_J)
    j = tl.arange(0, BLOCK_J)
    x_at = x_ptr + b * x_b + s.to(tl.int64)[:, None] * x_s
    out_at = out_ptr + (b * S + s)[:, None] * H * (N + 2 * J)
    dtype = out_ptr.dtype.element_ty
    for _ in range(H):
        if KEPT:
            kept = tl.load(x_at + n[None, :], mask=real & (n < N)[None, :])
            tl.store(out_at + n[None, :], kept, mask=real & (n < N)[None, :])
        if INTERLEAVED:
            mask = real & (c < 2 * J)[None, :]
            y = _turned(tl.load(x_at + N + c[None, :], mask=mask, other=0.0), cos, sin, ROWS, BLOCK_J)
            tl.store(out_at + N + c[None, :], y.to(dtype), mask=mask)
        else:
            mask = real & (j < J)[None, :]
            first = tl.load(x_at + N + j[None, :], mask=mask, other=0.0).to(tl.float32)
            second = tl.load(x_at + N + J + j[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(out_at + N + j[None, :], (first * cos - second * sin).to(dtype), mask=mask)
            tl.store(out_at + N + J + j[None, :], (second * cos + first * sin).to(dtype), mask=mask)
        x_at += x_h
        out_at += N + 2 * J


@triton.jit
def keys_kernel(kv_ptr, rope_ptr, table_ptr, k_ptr, S, H, N, V, J, rope_b, rope_s, ROWS: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):  # fmt: skip
    s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    real = (s < S)[:, None]
    cos, sin = _angles(table_ptr, s, S, J, False, ROWS, BLOCK_J)
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, 2 * BLOCK_J)
    mask = real & (c < 2 * J)[None, :]
    shared = tl.load(rope_ptr + b * rope_b + s.to(tl.int64)[:, None] * rope_s + c[None, :], mask=mask, other=0.0)
    shared = _turned(shared, cos, sin, ROWS, BLOCK_J).to(k_ptr.dtype.element_ty)
    kv_at = kv_ptr + (b * S + s)[:, None] * H * (N + V)
    k_at = k_ptr + (b * S + s)[:, None] * H * (N + 2 * J)
    for _ in range(H):
        own = tl.load(kv_at + n[None, :], mask=real & (n < N)[None, :])
        tl.store(k_at + n[None, :], own, mask=real & (n < N)[None, :])
        tl.store(k_at + N + c[None, :], shared, mask=mask)
        kv_at += N + V
        k_at += N + 2 * J


@triton.jit
def keys_backward_kernel(dk_ptr, dv_ptr, table_ptr, dkv_ptr, d_rope_ptr, S, H, N, V, J, k_b, k_s, k_h, v_b, v_s, v_h,
                         ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                         BLOCK_J: tl.constexpr):  # fmt: skip
    s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    real = (s < S)[:, None]
    n = tl.arange(0, BLOCK_N)
    v = tl.arange(0, BLOCK_V)
    c = tl.arange(0, 2 * BLOCK_J)
    mask = real & (c < 2 * J)[None, :]
    dk_at = dk_ptr + b * k_b + s.to(tl.int64)[:, None] * k_s
    dv_at = dv_ptr + b * v_b + s.to(tl.int64)[:, None] * v_s
    dkv_at = dkv_ptr + (b * S + s)[:, None] * H * (N + V)
    total = tl.zeros([ROWS, 2 * BLOCK_J], tl.float32)
    for _ in range(H):
        own = tl.load(dk_at + n[None, :], mask=real & (n < N)[None, :])
        value = tl.load(dv_at + v[None, :], mask=real & (v < V)[None, :])
        total += tl.load(dk_at + N + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dkv_at + n[None, :], own, mask=real & (n < N)[None, :])
        tl.store(dkv_at + N + v[None, :], value, mask=real & (v < V)[None, :])
        dk_at += k_h
        dv_at += v_h
        dkv_at += N + V
    cos, sin = _angles(table_ptr, s, S, J, True, ROWS, BLOCK_J)
    turned = _turned(total, cos, sin, ROWS, BLOCK_J).to(d_rope_ptr.dtype.element_ty)
    tl.store(d_rope_ptr + (b * S + s)[:, None] * 2 * J + c[None, :], turned, mask=mask)


def _require(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dtype not in (torch.bfloat16, torch.float32) or t.stride(-1) != 1:
            raise fail(
                "N0717", f"`{name}` must be bf16 or float32 with a contiguous last axis, found {t.dtype} with strides "
                f"{t.stride()}", place="rope kernels",
            )  # fmt: skip


def _block(width: int) -> int:
    return triton.next_power_of_2(max(1, width))


def _rope(x_BSHX: Tensor, table_SJ: Tensor, interleaved: bool, back: bool) -> Tensor:
    _require(x_BSHX=x_BSHX)
    B, S, H, X = x_BSHX.shape
    pairs = table_SJ.shape[1]
    p = ROPE_LAUNCH
    out_BSHX = torch.empty(B, S, H, X, dtype=x_BSHX.dtype, device=x_BSHX.device)
    if out_BSHX.numel():
        rope_kernel[(triton.cdiv(S, p.tokens), B)](
            x_BSHX, torch.view_as_real(table_SJ), out_BSHX, S, H, X - 2 * pairs, pairs, *x_BSHX.stride()[:3], back,
            interleaved, 2 * pairs < X, p.tokens, _block(X - 2 * pairs), _block(pairs), num_warps=p.warps,
        )  # fmt: skip
    return out_BSHX


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHX: Tensor, table_SJ: Tensor, interleaved: bool) -> Tensor:
        ctx.table_SJ, ctx.interleaved = table_SJ, interleaved
        return _rope(x_BSHX, table_SJ, interleaved, False)

    @staticmethod
    def backward(ctx: Any, dy_BSHX: Tensor) -> tuple[Tensor, None, None]:
        return _rope(_last_contiguous(dy_BSHX), ctx.table_SJ, ctx.interleaved, True), None, None


class _MlaKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kv_BSHX: Tensor, k_rope_BSR: Tensor, table_SJ: Tensor, value_size: int
    ) -> tuple[Tensor, Tensor]:
        _require(kv_BSHX=kv_BSHX, k_rope_BSR=k_rope_BSR)
        B, S, H, X = kv_BSHX.shape
        own, pairs = X - value_size, table_SJ.shape[1]
        p = ROPE_LAUNCH
        k_BSHQ = torch.empty(B, S, H, own + 2 * pairs, dtype=kv_BSHX.dtype, device=kv_BSHX.device)
        if k_BSHQ.numel():
            keys_kernel[(triton.cdiv(S, p.tokens), B)](
                kv_BSHX, k_rope_BSR, torch.view_as_real(table_SJ), k_BSHQ, S, H, own, value_size, pairs,
                *k_rope_BSR.stride()[:2], p.tokens, _block(own), _block(pairs), num_warps=p.warps,
            )  # fmt: skip
        ctx.table_SJ = table_SJ
        return k_BSHQ, kv_BSHX[..., own:]

    @staticmethod
    def backward(ctx: Any, dk_BSHQ: Tensor, dv_BSHV: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dk_BSHQ, dv_BSHV = _last_contiguous(dk_BSHQ), _last_contiguous(dv_BSHV)
        B, S, H, V = dv_BSHV.shape
        pairs = ctx.table_SJ.shape[1]
        own = dk_BSHQ.shape[3] - 2 * pairs
        p = ROPE_LAUNCH
        dkv_BSHX = torch.empty(B, S, H, own + V, dtype=dk_BSHQ.dtype, device=dk_BSHQ.device)
        d_rope_BSR = torch.empty(B, S, 2 * pairs, dtype=dk_BSHQ.dtype, device=dk_BSHQ.device)
        if dkv_BSHX.numel():
            keys_backward_kernel[(triton.cdiv(S, p.tokens), B)](
                dk_BSHQ, dv_BSHV, torch.view_as_real(ctx.table_SJ), dkv_BSHX, d_rope_BSR, S, H, own, V, pairs,
                *dk_BSHQ.stride()[:3], *dv_BSHV.stride()[:3], p.tokens, _block(own), _block(V), _block(pairs),
                num_warps=p.warps,
            )  # fmt: skip
        return dkv_BSHX, d_rope_BSR, None, None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rope(x_BSHX: Tensor, table_SJ: Tensor, *, interleaved: bool) -> Tensor:
    """The last 2J of each head turned, the first X - 2J as they are; differentiable.

    x_BSHX: (B, S, H, X), bf16 or float32, any strides with the last axis contiguous. table_SJ: (S, J)
    complex64 on x's device, exp(i angle), times a factor where positions are stretched. Returns
    (B, S, H, X) contiguous, x's dtype. Raises N0717 for another dtype or layout.
    """
    y_BSHX: Tensor = _Rope.apply(x_BSHX, table_SJ, interleaved)
    return y_BSHX


def mla_keys(kv_BSHX: Tensor, k_rope_BSR: Tensor, table_SJ: Tensor, value_size: int) -> tuple[Tensor, Tensor]:
    """(k_BSHQ, v_BSHV) of latent attention from one projection and the rotary key; differentiable.

    kv_BSHX: (B, S, H, N + V) contiguous, each head's [own key | value]. k_rope_BSR: (B, S, 2J), any strides with
    the last axis contiguous, pairs interleaved. table_SJ: as in `rope`. k_BSHQ: contiguous, [own key | turned
    rotary key]; v_BSHV: a view of kv_BSHX. Raises N0717 for another dtype or layout.
    """
    k_BSHQ, v_BSHV = _MlaKeys.apply(kv_BSHX.contiguous(), k_rope_BSR, table_SJ, value_size)
    return k_BSHQ, v_BSHV
