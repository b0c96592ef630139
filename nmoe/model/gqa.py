"""Grouped-query attention (Ainslie et al., arXiv 2305.13245): query heads share keys and values.

With qk_norm each head's query and key is normed before it turns (Qwen3, arXiv 2505.09388, section 2):

    q_h = rope(norm(W_q x)_h)     k_g = rope(norm(W_k x)_g)     v_g = (W_v x)_g

Rotary positions on the whole head, pairs by halves, as in Llama, Qwen and Mixtral. num_kv_heads =
num_heads is full multi-head attention.
"""

import torch
from torch import Tensor

from nmoe.model.attention import attend
from nmoe.model.linear import Linear, linears
from nmoe.model.norm import RmsNorm
from nmoe.model.rope import Yarn, rotate_halves


class Gqa(torch.nn.Module):
    """window: tokens that a query meets, itself included; None is all before it. sinks: a learnt one for each head."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: bool,
        rope_theta: float,
        rope_scaling: Yarn | None,
        norm_eps: float,
        window: int | None,
        sinks: bool,
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta, self.rope_scaling, self.window = head_dim, rope_theta, rope_scaling, window
        self.q_proj = Linear(hidden_size, num_heads * head_dim)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim)
        self.q_norm = RmsNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RmsNorm(head_dim, norm_eps) if qk_norm else None
        self.o_proj = Linear(num_heads * head_dim, hidden_size)
        self.sink_H = torch.nn.Parameter(torch.empty(num_heads)) if sinks else None

    def forward(self, x_BSD: Tensor, first_BS: Tensor | None = None) -> Tensor:
        """x_BSD: (B, S, D); the same shape and dtype. first_BS: as in `attend`."""
        heads = (-1, self.head_dim)
        projected = linears(x_BSD, self.v_proj, self.k_proj, self.q_proj)
        v_BSGQ, k_BSGQ, q_BSHQ = (y_BSX.unflatten(-1, heads) for y_BSX in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHQ, k_BSGQ = self.q_norm(q_BSHQ), self.k_norm(k_BSGQ)
        q_BSHQ, k_BSGQ = (rotate_halves(x, self.rope_theta, self.rope_scaling) for x in (q_BSHQ, k_BSGQ))
        q_BHSQ, k_BGSQ, v_BGSQ = (x.transpose(1, 2) for x in (q_BSHQ, k_BSGQ, v_BSGQ))
        y_BHSQ = attend(q_BHSQ, k_BGSQ, v_BGSQ, self.window, first_BS, self.sink_H)
        y: Tensor = self.o_proj(y_BHSQ.transpose(1, 2).flatten(2))
        return y
