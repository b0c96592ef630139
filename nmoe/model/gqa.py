"""Grouped-query attention (Ainslie et al., arXiv 2305.13245): query heads share keys and values.

Rotary positions on the whole head, pairs by halves, as in Llama, Qwen and Mixtral. num_kv_heads =
num_heads is full multi-head attention.
"""

import torch
from torch import Tensor

from nmoe.model.attention import attend
from nmoe.model.linear import Linear
from nmoe.model.rope import rotate_halves


class Gqa(torch.nn.Module):
    """window: tokens that a query meets, itself included; None is all before it. sinks: a learnt one for each head."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_theta: float,
        window: int | None,
        sinks: bool,
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta, self.window = head_dim, rope_theta, window
        self.q_proj = Linear(hidden_size, num_heads * head_dim)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim)
        self.o_proj = Linear(num_heads * head_dim, hidden_size)
        self.sink_H = torch.nn.Parameter(torch.empty(num_heads)) if sinks else None

    def forward(self, x_BSD: Tensor, first_BS: Tensor | None = None) -> Tensor:
        """x_BSD: (B, S, D); the same shape and dtype. first_BS: as in `attend`."""
        heads = (-1, self.head_dim)
        q_BSHQ = rotate_halves(self.q_proj(x_BSD).unflatten(-1, heads), self.rope_theta)
        k_BSGQ = rotate_halves(self.k_proj(x_BSD).unflatten(-1, heads), self.rope_theta)
        v_BSGQ = self.v_proj(x_BSD).unflatten(-1, heads)
        shared = q_BSHQ.shape[2] // k_BSGQ.shape[2]
        k_BHSQ, v_BHSQ = (x.transpose(1, 2).repeat_interleave(shared, dim=1) for x in (k_BSGQ, v_BSGQ))
        y_BHSQ = attend(q_BSHQ.transpose(1, 2).contiguous(), k_BHSQ, v_BHSQ, self.window, first_BS, self.sink_H)
        y: Tensor = self.o_proj(y_BHSQ.transpose(1, 2).flatten(2))
        return y
