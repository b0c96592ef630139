"""Attention, forward and backward, repeatable: causal, sliding window, sinks, documents, shared keys, two head sizes.

    out_i = sum_j p_ij v_j,   p_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink_h)),   s_ij = scale <q_i, k_j>

over first(i) <= j <= i, where first(i) is 0, the start of i's document, i - window + 1, or the largest of
them (GPT-OSS's sink is one logit a head that takes part in the denominator alone, arXiv 2508.10925).
Query head h reads key head h // (H / G). This file is the meaning and the host side; the kernels are in
attention_forward.py, attention_backward.py and attention_queries.py. Nothing here waits for the device.

Heads: Q of 64, 96, 128 or 192, V of 64, 96 or 128; 96 is computed as 128 with zeros. Operands bf16,
accumulation and lse float32, the gradients of q, k, v bf16, of the sink float32.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.launch import QUERY_WIDTHS, VALUE_WIDTHS, AttentionLaunch, attention_launch


class Documents(NamedTuple):
    """int32 (B, S): each token's document's first token, and the one past its last."""

    start_BS: Tensor
    end_BS: Tensor


class AttentionGradients(NamedTuple):
    """q_BHSQ, k_BGSQ, v_BGSV in bf16; sink_H in float32, or None without one."""

    q_BHSQ: Tensor
    k_BGSQ: Tensor
    v_BGSV: Tensor
    sink_H: Tensor | None


def documents(start_BS: Tensor) -> Documents:
    """The ends that belong to starts; starts do not fall along a row. Once a batch serves every layer."""
    index_BS = torch.arange(start_BS.shape[1], device=start_BS.device).expand(start_BS.shape).contiguous()
    end_BS = torch.searchsorted(start_BS.contiguous(), index_BS.to(start_BS.dtype), right=True)
    return Documents(start_BS.int().contiguous(), end_BS.int())


def attention_reference(
    q_BHSQ: Tensor, k_BGSQ: Tensor, v_BGSV: Tensor, *, scale: float | None = None, window: int | None = None,
    start_BS: Tensor | None = None, sink_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The meaning: out (B, H, S, V) and lse (B, H, S), sink included; differentiable, any dtype."""
    B, H, S, Q = q_BHSQ.shape
    shared = H // k_BGSQ.shape[1]
    k_BHSQ, v_BHSV = k_BGSQ.repeat_interleave(shared, 1), v_BGSV.repeat_interleave(shared, 1)
    i_S1 = torch.arange(S, device=q_BHSQ.device)[:, None]
    j_S = torch.arange(S, device=q_BHSQ.device)
    seen_BSS = (j_S <= i_S1).expand(B, S, S)
    if window is not None:
        seen_BSS = seen_BSS & (j_S > i_S1 - window)
    if start_BS is not None:
        seen_BSS = seen_BSS & (j_S >= start_BS[:, :, None])
    score_BHSS = (q_BHSQ @ k_BHSQ.transpose(2, 3)) * (Q**-0.5 if scale is None else scale)
    score_BHSS = score_BHSS.masked_fill(~seen_BSS[:, None], -torch.inf)
    lse_BHS = torch.logsumexp(score_BHSS, dim=3)
    if sink_H is not None:
        lse_BHS = torch.logaddexp(lse_BHS, sink_H.to(lse_BHS.dtype)[None, :, None])
    return torch.exp(score_BHSS - lse_BHS[..., None]) @ v_BHSV, lse_BHS


def _require(q_BHSQ: Tensor, k_BGSQ: Tensor, v_BGSV: Tensor, window: int | None) -> None:
    """The kernels' demands, by name, before anything is launched."""
    place = "attention kernels"
    for name, t in (("q_BHSQ", q_BHSQ), ("k_BGSQ", k_BGSQ), ("v_BGSV", v_BGSV)):
        aligned = t.stride(3) == 1 and not any(t.stride(a) % 8 for a in range(3)) and t.data_ptr() % 16 == 0
        if t.dtype != torch.bfloat16 or not aligned:
            raise fail("N0712", f"`{name}` must be bf16 with a contiguous last axis, other strides in multiples of 8 "
                       f"and a 16-byte address, found {t.dtype} with strides {t.stride()}", place=place)  # fmt: skip
    Q, V = q_BHSQ.shape[3], v_BGSV.shape[3]
    if Q not in QUERY_WIDTHS or V not in VALUE_WIDTHS:
        raise fail("N0713", f"head sizes {Q} and {V} have no kernel", place=place,
                   help="use 64, 96, 128 or 192 for queries and keys, and 64, 96 or 128 for values")  # fmt: skip
    if q_BHSQ.shape[1] % k_BGSQ.shape[1]:
        raise fail("N0713", f"{q_BHSQ.shape[1]} query heads do not share {k_BGSQ.shape[1]} key heads evenly",
                   place=place)  # fmt: skip
    if window is not None and window < 1:
        raise fail("N0713", f"a window of {window} tokens shows a query nothing", place=place)


class _Sizes(NamedTuple):
    """Heads cut into what the kernels take: a first part of Q, 64 more or none, and V."""

    qa: int
    qb: int
    v: int

    @classmethod
    def of(cls, Q: int, V: int) -> "_Sizes":
        return cls(64 if Q == 64 else 128, 64 if Q == 192 else 0, 64 if V == 64 else 128)


@functools.cache
def _tile_layout(rows: int, cols: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, cols], gl.bfloat16)


def _tiles(x_BHSX: Tensor, rows: int, cols: int) -> Any:
    """A TMA descriptor of (1, 1, rows, cols) tiles of one head."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = [1, 1, rows, cols]
    return TensorDescriptor(x_BHSX, list(x_BHSX.shape), list(x_BHSX.stride()), box, _tile_layout(rows, cols))


def _head_tiles(x_BHSX: Tensor, rows: int, sizes: "_Sizes") -> tuple[Any, Any]:
    """Of a query's or key's first columns, and of its last 64, or of the first again where there are no more."""
    first = _tiles(x_BHSX, rows, sizes.qa)
    return first, _tiles(x_BHSX, rows, 64) if sizes.qb else first


def _work(heads: int, S: int) -> tuple[int, int, int, int]:
    """(thread blocks, items, pairs of sequence blocks a head, sequence blocks)."""
    blocks = -(-S // 128)
    pairs = (blocks + 1) // 2
    sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return min(sms, heads * pairs), heads * pairs, pairs, blocks


def attention_forward(
    q_BHSQ: Tensor, k_BGSQ: Tensor, v_BGSV: Tensor, *, scale: float | None = None, window: int | None = None,
    docs: Documents | None = None, sink_H: Tensor | None = None, launch: AttentionLaunch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, S, V) bf16, and lse (B, H, S) float32, natural logarithm, sink included.

    out lies token by token, heads within, as the projection behind it reads: a view of (B, S, H, V).

    q_BHSQ, k_BGSQ, v_BGSV: bf16, any strides that are multiples of 8 with the last axis contiguous.
    scale: Q^-0.5 if None. window: tokens a query meets, itself included. sink_H: float32 (H,).
    Raises N0712 for another dtype or layout, N0713 for sizes without a kernel.
    """
    from nmoe.kernels.attention_forward import forward_kernel

    _require(q_BHSQ, k_BGSQ, v_BGSV, window)
    B, H, S, Q = q_BHSQ.shape
    G, V = k_BGSQ.shape[1], v_BGSV.shape[3]
    sizes = _Sizes.of(Q, V)
    p = launch or attention_launch(Q, V)
    out_BHSV = torch.empty(B, S, H, V, dtype=q_BHSQ.dtype, device=q_BHSQ.device).transpose(1, 2)
    lse_BHS = torch.empty(B, H, S, dtype=torch.float32, device=q_BHSQ.device)
    grid, *work = _work(B * H, S)
    forward_kernel[(grid,)](
        *_head_tiles(q_BHSQ, 64, sizes), *_head_tiles(k_BGSQ, 128, sizes), _tiles(v_BGSV, 128, sizes.v),
        out_BHSV, lse_BHS, sink_H, docs.start_BS if docs else None,
        *work, H, H // G, S, (Q**-0.5 if scale is None else scale) * 1.4426950408889634, V,
        sizes.qa, sizes.qb, sizes.v, 128, p.forward_stages, window or 0, docs is not None, sink_H is not None,
        num_warps=4,
    )  # fmt: skip
    return out_BHSV, lse_BHS


def attention_backward(
    dout_BHSV: Tensor, q_BHSQ: Tensor, k_BGSQ: Tensor, v_BGSV: Tensor, out_BHSV: Tensor, lse_BHS: Tensor, *,
    scale: float | None = None, window: int | None = None, docs: Documents | None = None,
    sink_H: Tensor | None = None, launch: AttentionLaunch | None = None,
) -> AttentionGradients:  # fmt: skip
    """Gradients of q, k, v (bf16, contiguous, summed over a group's query heads in order) and of the sinks.

    out_BHSV and lse_BHS may come from another forward that means the same; lse_BHS contiguous float32, the last axis
    of out_BHSV contiguous.
    """
    from nmoe.kernels.attention_backward import keys_kernel
    from nmoe.kernels.attention_queries import queries_kernel

    _require(q_BHSQ, k_BGSQ, v_BGSV, window)
    B, H, S, Q = q_BHSQ.shape
    G, V = k_BGSQ.shape[1], v_BGSV.shape[3]
    sizes = _Sizes.of(Q, V)
    p = launch or attention_launch(Q, V)
    if dout_BHSV.stride(3) != 1 or any(dout_BHSV.stride(a) % 8 for a in range(3)):
        dout_BHSV = dout_BHSV.contiguous()
    factor = Q**-0.5 if scale is None else scale
    scale2 = factor * 1.4426950408889634
    blocks = -(-S // 64)
    stats = torch.empty(B * H, blocks, 2, 64, dtype=torch.float32, device=q_BHSQ.device)
    dsink = torch.empty(B, H, blocks, dtype=torch.float32, device=q_BHSQ.device) if sink_H is not None else None
    masks = (window or 0, docs is not None)
    q, dout = _head_tiles(q_BHSQ, 64, sizes), _tiles(dout_BHSV, 64, sizes.v)
    k, v = _head_tiles(k_BGSQ, 64, sizes), _tiles(v_BGSV, 64, sizes.v)

    dq_BHSQ = q_BHSQ.new_empty(B, H, S, Q)
    grid, *work = _work(B * H, S)
    queries_kernel[(grid,)](
        *q, *k, v, dout,
        *_head_tiles(dq_BHSQ, 64, sizes), dq_BHSQ, out_BHSV, lse_BHS, sink_H, stats, dsink,
        docs.start_BS if docs else None, *work, H, H // G, S, scale2, factor, Q, V, *out_BHSV.stride()[:3],
        sizes.qa, sizes.qb, sizes.v, 64, p.queries_stages, *masks, sink_H is not None, p.buffers, num_warps=4,
    )  # fmt: skip

    dk_BGSQ, dv_BGSV = q_BHSQ.new_empty(B, G, S, Q), q_BHSQ.new_empty(B, G, S, V)
    grid, *work = _work(B * G, S)
    keys_kernel[(grid,)](
        *q, *k, v, dout, stats, docs.end_BS if docs else None,
        *_head_tiles(dk_BGSQ, 64, sizes), _tiles(dv_BGSV, 64, sizes.v), dk_BGSQ, dv_BGSV,
        *work, G, H // G, S, scale2, factor, Q, V,
        sizes.qa, sizes.qb, sizes.v, p.keys_stages, *masks, p.buffers, num_warps=4,
    )  # fmt: skip
    return AttentionGradients(dq_BHSQ, dk_BGSQ, dv_BGSV, None if dsink is None else dsink.sum((0, 2)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_H: Tensor | None, scale: float | None, window: int | None,
        docs: Documents | None,
    ) -> Tensor:  # fmt: skip
        sink_H = None if sink_H is None else sink_H.float()
        out, lse = attention_forward(q, k, v, scale=scale, window=window, docs=docs, sink_H=sink_H)
        ctx.save_for_backward(q, k, v, out, lse, sink_H)
        ctx.masks = {"scale": scale, "window": window, "docs": docs}
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sink_H = ctx.saved_tensors
        grads = attention_backward(dout, q, k, v, out, lse, sink_H=sink_H, **ctx.masks)
        return (*grads, None, None, None)


def attention(
    q_BHSQ: Tensor, k_BGSQ: Tensor, v_BGSV: Tensor, *, scale: float | None = None, window: int | None = None,
    docs: Documents | None = None, sink_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`attention_forward`'s out, differentiable in q, k, v and the sinks through `attention_backward`.

    sink_H: float32 or bf16; its gradient is float32.
    """
    out_BHSV: Tensor = _Attention.apply(q_BHSQ, k_BGSQ, v_BGSV, sink_H, scale, window, docs)
    return out_BHSV
