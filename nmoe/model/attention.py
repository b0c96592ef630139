"""softmax(q k^T / sqrt(d)) v, causal, over the whole sequence or a sliding window.

Global attention is torch's fused kernel. A window of w tokens (itself included) is computed in
O(S w): the sequence is cut into blocks of w, and a block's queries meet the keys of their own block
and of the one before it, where the mask leaves exactly the w last ones.
"""

import torch
from torch import Tensor


def attend(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, window: int | None) -> Tensor:
    """Causal attention; query s meets keys s - window < j <= s (all j <= s for None).

    q_BSHQ, k_BSHQ: (B, S, H, Q); v_BSHV: (B, S, H, V). k and v may have fewer heads G, H = n G: query head h then
    reads head h // n. Returns (B, S, H, V) in q's dtype.
    """
    if window is None or window >= q_BSHQ.shape[1]:
        return _attend(q_BSHQ, k_BSHQ, v_BSHV, None)
    return _windowed(q_BSHQ, k_BSHQ, v_BSHV, window)


def _attend(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, mask: Tensor | None) -> Tensor:
    y_BHSV = torch.nn.functional.scaled_dot_product_attention(
        q_BSHQ.transpose(1, 2),
        k_BSHQ.transpose(1, 2),
        v_BSHV.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BSHQ.shape[2] != k_BSHQ.shape[2],
    )
    return y_BHSV.transpose(1, 2)


def _windowed(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, window: int) -> Tensor:
    batch, length, heads, _ = q_BSHQ.shape
    blocks = -(-length // window)
    tail = blocks * window - length

    def pad(x: Tensor, before: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, 0, before, tail))

    def pairs(x_BSHQ: Tensor) -> Tensor:
        x = pad(x_BSHQ, window).unflatten(1, (blocks + 1, window))
        return torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1)

    q = pad(q_BSHQ, 0).unflatten(1, (blocks, window)).flatten(0, 1)
    query, key = torch.arange(window)[:, None], torch.arange(2 * window)[None]
    inside = (key > query) & (key <= query + window)
    mask = inside.repeat(blocks, 1, 1)
    mask[0] &= key >= window
    mask = mask.repeat(batch, 1, 1)[:, None].to(q.device)
    y = _attend(q, pairs(k_BSHQ), pairs(v_BSHV), mask)
    return y.reshape(batch, blocks * window, heads, -1)[:, :length]
