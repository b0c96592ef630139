"""softmax(q k^T / sqrt(Q)) v, causal, over the whole sequence or a sliding window, or a document's part of it.

Queries are taken in blocks of `BLOCK`, and a block meets only the keys that one of its queries may
see: those up to its end, and for a window of w tokens those after its start less w. So global
attention costs half of the square and a window O(S w). Scores of one block and `GROUP` heads exist
at a time; only q, k and v are saved, and backward computes the probabilities again:

    P = softmax(q K^T / sqrt(Q) + mask)     dP = dy V^T     dS = P * (dP - sum(dP * P))
    dq = dS K / sqrt(Q)     dK = sum over blocks of dS^T q / sqrt(Q)     dV = sum over blocks of P^T dy

Documents: each query may be given the first key that it may see, the first token of its own document.
Sinks: each head may have one learnt score s_h that takes part in the softmax's sum and has no value,
so that a query need not look anywhere (GPT-OSS, arXiv 2508.10925, section 2.2):

    P_ij = exp(S_ij) / (exp(s_h) + sum over j of exp(S_ij))       ds_h = sum over queries i of -P_is sum(dP * P)

On a GPU all this is `nmoe.kernels.attention`'s; what follows is the CPU's way, and the meaning.

Every sum has one order: products at shapes fixed by (S, w), blocks in their order. Everything is
float32 whatever the dtype of q; keys and values may have different widths. Measured 2026-11-22 on
one core, forward and backward at B 4, H 4, S 512, Q = V = 48: 97 ms, torch's fused kernel 117 ms;
with a window of 128, 60 ms.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nmoe.kernels.attention import attention, documents

BLOCK = 64  # queries of a product
GROUP = 16  # heads, of one sequence after the other, of a product


def attend(
    q_BHSQ: Tensor,
    k_BGSQ: Tensor,
    v_BGSV: Tensor,
    window: int | None,
    first_BS: Tensor | None = None,
    sink_H: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention: query i meets keys i - window < j <= i (all j <= i for None) from first_i on.

    q_BHSQ: (B, H, S, Q); k_BGSQ: (B, G, S, Q); v_BGSV: (B, G, S, V); one dtype, the last axis contiguous.
    Query head h reads key head h // (H / G). Returns (B, H, S, V) in their dtype.
    first_BS: (B, S) int64, each query's first key, at most its own position; None is 0.
    sink_H: (H,), each head's score without a value; its gradient is float32. None is no sink.
    scale: what q k^T is multiplied by; None is Q^(-1/2).
    """
    if q_BHSQ.device.type != "cpu":
        docs = None if first_BS is None else documents(first_BS)
        return attention(q_BHSQ, k_BGSQ, v_BGSV, scale=scale, window=window, docs=docs, sink_H=sink_H)
    scale = q_BHSQ.shape[3] ** -0.5 if scale is None else scale
    shared = q_BHSQ.shape[1] // k_BGSQ.shape[1]
    k_BHSQ, v_BHSV = (x if shared == 1 else x.repeat_interleave(shared, dim=1) for x in (k_BGSQ, v_BGSV))
    tensors_BHSX = (x.contiguous() for x in (q_BHSQ, k_BHSQ, v_BHSV))
    y_BHSV: Tensor = _Attention.apply(*tensors_BHSX, window, first_BS, sink_H, scale)
    return y_BHSV


def document_starts(document_ids_BS: Tensor) -> Tensor:
    """The position at which each token's document begins in its row: (B, S) int64, for ids that never fall."""
    return torch.searchsorted(document_ids_BS, document_ids_BS)


@functools.lru_cache(maxsize=64)
def mask(rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
    """0 where a query may see a key, -inf elsewhere: (rows, columns) float32.

    The last query and the last key are the same token, so query r stands at column columns - rows + r.
    """
    ahead_CM = torch.arange(columns)[None] - torch.arange(columns - rows, columns)[:, None]
    hidden_CM = ahead_CM > 0
    if window is not None:
        hidden_CM |= ahead_CM <= -window
    return torch.zeros(rows, columns).masked_fill_(hidden_CM, -torch.inf).to(device)


def blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """The blocks of queries, in order, each with the keys that it meets.

    A window's first key is moved down to a multiple of 16, whose extra keys the mask hides: whole vector registers
    are worth more than the few products.
    """
    for start in range(0, length, BLOCK):
        first = 0 if window is None else max(0, start - window + 1) & ~15
        stop = min(start + BLOCK, length)
        yield slice(start, stop), slice(first, stop)


def groups(x_BHSX: Tensor) -> tuple[Tensor, ...]:
    """The sequences and heads as one axis, `GROUP` of them at a time."""
    return x_BHSX.flatten(0, 1).split(GROUP)


def by_group(x: Tensor | None, shape: tuple[int, ...], count: int) -> Iterator[Tensor | None]:
    """x spread over (B, H), then as `groups`; None for each of `count` groups where there is none."""
    if x is None:
        return iter([None] * count)
    return iter(x.expand(shape).flatten(0, 1).split(GROUP))


def probabilities(
    q_NCQ: Tensor,
    k_NMQ: Tensor,
    window: int | None,
    first_NC: Tensor | None,
    sink_N: Tensor | None,
    first_key: int,
) -> Tensor:
    """softmax(q k^T + mask), for scaled queries that stand at the last C of the M keys: (N, C, M).

    first_NC: the first key of each query as a position of the row, in which these keys begin at
    first_key. With a sink there is one more column, its probability.
    """
    score_NCM = torch.bmm(q_NCQ, k_NMQ.transpose(1, 2))
    rows, keys = score_NCM.shape[1:]
    columns = rows if window is None else keys
    score_NCM[:, :, keys - columns :].add_(mask(rows, columns, window, q_NCQ.device))
    if first_NC is not None:
        position_M = torch.arange(first_key, first_key + keys, device=q_NCQ.device)
        score_NCM.masked_fill_(position_M < first_NC[:, :, None], -torch.inf)
    if sink_N is not None:
        score_NCM = torch.cat([score_NCM, sink_N.float()[:, None, None].expand(-1, rows, 1)], dim=2)
    return torch.softmax(score_NCM, dim=2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHSQ: Tensor,
        k_BHSQ: Tensor,
        v_BHSV: Tensor,
        window: int | None,
        first_BS: Tensor | None,
        sink_H: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q_BHSQ, k_BHSQ, v_BHSV, first_BS, sink_H)
        ctx.window, ctx.scale = window, scale
        y_BHSV = torch.empty_like(v_BHSV)
        tensors = list(zip(*map(groups, (q_BHSQ, k_BHSQ, v_BHSV, y_BHSV)), strict=True))
        extras = zip(*masks(first_BS, sink_H, q_BHSQ, len(tensors)), strict=True)
        for (q_NSQ, k_NSQ, v_NSV, y_NSV), (first_NS, sink_N) in zip(tensors, extras, strict=True):
            for rows, keys in blocks(q_BHSQ.shape[2], window):
                first_NC = None if first_NS is None else first_NS[:, rows]
                q_NCQ, k_NMQ = q_NSQ[:, rows].float() * scale, k_NSQ[:, keys].float()
                p_NCM = probabilities(q_NCQ, k_NMQ, window, first_NC, sink_N, keys.start)
                y_NSV[:, rows] = torch.bmm(p_NCM[:, :, : k_NMQ.shape[1]], v_NSV[:, keys].float())
        return y_BHSV

    @staticmethod
    def backward(ctx: Any, dy_BHSV: Tensor) -> tuple[Tensor | None, ...]:
        q_BHSQ, k_BHSQ, v_BHSV, first_BS, sink_H = ctx.saved_tensors
        scale = ctx.scale
        dq_BHSQ = torch.empty_like(q_BHSQ)
        dk_BHSQ = torch.zeros(k_BHSQ.shape, dtype=torch.float32, device=k_BHSQ.device)
        dv_BHSV = torch.zeros(v_BHSV.shape, dtype=torch.float32, device=v_BHSV.device)
        d_sink_BH = torch.zeros(q_BHSQ.shape[:2], dtype=torch.float32, device=q_BHSQ.device)
        tensors = list(
            zip(*map(groups, (q_BHSQ, k_BHSQ, v_BHSV, dy_BHSV, dq_BHSQ, dk_BHSQ, dv_BHSV, d_sink_BH)), strict=True)
        )
        extras = zip(*masks(first_BS, sink_H, q_BHSQ, len(tensors)), strict=True)
        for (q_NSQ, k_NSQ, v_NSV, dy_NSV, dq_NSQ, dk_NSQ, dv_NSV, d_sink_N), (first_NS, sink_N) in zip(
            tensors, extras, strict=True
        ):
            for rows, keys in blocks(q_BHSQ.shape[2], ctx.window):
                first_NC = None if first_NS is None else first_NS[:, rows]
                q_NCQ, k_NMQ, dy_NCV = q_NSQ[:, rows].float() * scale, k_NSQ[:, keys].float(), dy_NSV[:, rows].float()
                p_NCM = probabilities(q_NCQ, k_NMQ, ctx.window, first_NC, sink_N, keys.start)
                num_keys = k_NMQ.shape[1]
                dv_NSV[:, keys] += torch.bmm(p_NCM[:, :, :num_keys].transpose(1, 2), dy_NCV)
                dp_NCM = torch.bmm(dy_NCV, v_NSV[:, keys].float().transpose(1, 2))
                if sink_N is not None:
                    dp_NCM = torch.nn.functional.pad(dp_NCM, (0, 1))
                ds_NCM = torch._softmax_backward_data(dp_NCM, p_NCM, 2, torch.float32)
                if sink_N is not None:
                    d_sink_N += ds_NCM[:, :, num_keys].sum(dim=1)
                    ds_NCM = ds_NCM[:, :, :num_keys]
                dk_NSQ[:, keys] += torch.bmm(ds_NCM.transpose(1, 2), q_NCQ)
                dq_NSQ[:, rows] = torch.bmm(ds_NCM, k_NMQ).mul_(scale)
        d_sink_H = None if sink_H is None else d_sink_BH.sum(dim=0)
        return dq_BHSQ, dk_BHSQ.to(k_BHSQ.dtype), dv_BHSV.to(v_BHSV.dtype), None, None, d_sink_H, None


def masks(
    first_BS: Tensor | None, sink_H: Tensor | None, q_BHSQ: Tensor, count: int
) -> tuple[Iterator[Tensor | None], Iterator[Tensor | None]]:
    """Each group's first keys (N, S) and sinks (N,)."""
    shape = tuple(q_BHSQ.shape[:3])
    first_B1S = None if first_BS is None else first_BS[:, None]
    return by_group(first_B1S, shape, count), by_group(sink_H, shape[:2], count)
