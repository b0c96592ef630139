"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads come from one narrow vector c = norm(W_a x) of kv_lora_rank; a rotary
key of qk_rope_head_dim, shared by all heads, comes beside it straight from x. A head's query and
key are [without position | rotary], pairs interleaved as in DeepSeek's code:

    q_h = [q_nope | rope(q_rope)]     k_h = [k_nope_h(c) | rope(k_rope)]     v_h = v_h(c)

Queries come from x, or through a norm from a compression of q_lora_rank. Scores are scaled by
(qk_nope_head_dim + qk_rope_head_dim)^(-1/2), and by `score_factor` where positions are stretched.
"""

import torch
from torch import Tensor

from nmoe.model.attention import attend
from nmoe.model.linear import Linear
from nmoe.model.norm import RmsNorm
from nmoe.model.rope import Yarn, rotate_interleaved


class Mla(torch.nn.Module):
    """window: tokens that a query meets, itself included; None is all before it. sinks: a learnt one for each head."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope_theta: float,
        rope_scaling: Yarn | None,
        score_factor: float,
        norm_eps: float,
        window: int | None,
        sinks: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.rope_theta, self.rope_scaling, self.window = num_heads, rope_theta, rope_scaling, window
        self.score_scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 * score_factor
        self.query_sizes = [qk_nope_head_dim, qk_rope_head_dim]
        self.key_value_sizes = [qk_nope_head_dim, v_head_dim]
        self.latent_sizes = [kv_lora_rank, qk_rope_head_dim]
        queries = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        self.compressed_queries = q_lora_rank is not None
        if q_lora_rank is None:
            self.q_proj = Linear(hidden_size, queries)
        else:
            self.q_a_proj = Linear(hidden_size, q_lora_rank)
            self.q_a_norm = RmsNorm(q_lora_rank, norm_eps)
            self.q_b_proj = Linear(q_lora_rank, queries)
        self.kv_a_proj = Linear(hidden_size, kv_lora_rank + qk_rope_head_dim)
        self.kv_a_norm = RmsNorm(kv_lora_rank, norm_eps)
        self.kv_b_proj = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim))
        self.o_proj = Linear(num_heads * v_head_dim, hidden_size)
        self.sink_H = torch.nn.Parameter(torch.empty(num_heads)) if sinks else None

    def forward(self, x_BSD: Tensor, first_BS: Tensor | None = None) -> Tensor:
        """x_BSD: (B, S, D); the same shape and dtype. first_BS: as in `attend`."""
        heads = (self.num_heads, -1)
        if self.compressed_queries:
            q_BSX = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
        else:
            q_BSX = self.q_proj(x_BSD)
        q_nope_BSHQ, q_rope_BSHR = q_BSX.unflatten(-1, heads).split(self.query_sizes, dim=-1)
        latent_BSC, k_rope_BSR = self.kv_a_proj(x_BSD).split(self.latent_sizes, dim=-1)
        kv_BSHX = self.kv_b_proj(self.kv_a_norm(latent_BSC)).unflatten(-1, heads)
        k_nope_BSHQ, v_BSHV = kv_BSHX.split(self.key_value_sizes, dim=-1)
        q_rope_BSHR = rotate_interleaved(q_rope_BSHR, self.rope_theta, self.rope_scaling)
        k_rope_BS1R = rotate_interleaved(k_rope_BSR[:, :, None], self.rope_theta, self.rope_scaling)
        q_BHSQ = by_head(q_nope_BSHQ, q_rope_BSHR)
        k_BHSQ = by_head(k_nope_BSHQ, k_rope_BS1R.expand(q_rope_BSHR.shape))
        y_BHSV = attend(q_BHSQ, k_BHSQ, by_head(v_BSHV), self.window, first_BS, self.sink_H, self.score_scale)
        y: Tensor = self.o_proj(y_BHSV.transpose(1, 2).flatten(2))
        return y


def by_head(*parts_BSHX: Tensor) -> Tensor:
    """The parts of (B, S, H, _) side by side, as (B, H, S, _) in that order of memory."""
    return torch.cat([part.transpose(1, 2) for part in parts_BSHX], dim=-1).contiguous()
