"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads come from one narrow vector c = norm(W_a x) of kv_lora_rank; a rotary
key of qk_rope_head_dim, shared by all heads, comes beside it straight from x. A head's query and
key are [without position | rotary], pairs interleaved as in DeepSeek's code:

    q_h = [q_nope | rope(q_rope)]     k_h = [k_nope_h(c) | rope(k_rope)]     v_h = v_h(c)

Queries come from x, or through a norm from a compression of q_lora_rank. Scores are scaled by
(qk_nope_head_dim + qk_rope_head_dim)^(-1/2), and by `score_factor` where positions are stretched.

On a GPU a pass of `nmoe.kernels.rope` each makes queries and keys out of the projections, head by head within a
token; the attention kernels read them, and the values where the projection left them, as they lie.
"""

import torch
from torch import Tensor

from nmoe.model.attention import attend
from nmoe.model.linear import Linear, linears
from nmoe.model.norm import RmsNorm
from nmoe.model.rope import Yarn, rotate_interleaved, table


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
        q_BSX, kv_BSC = linears(x_BSD, self.q_a_proj if self.compressed_queries else self.q_proj, self.kv_a_proj)
        if self.compressed_queries:
            q_BSX = self.q_b_proj(self.q_a_norm(q_BSX))
        q_BSHX = q_BSX.unflatten(-1, heads)
        latent_BSC, k_rope_BSR = kv_BSC.split(self.latent_sizes, dim=-1)
        kv_BSHX = self.kv_b_proj(self.kv_a_norm(latent_BSC)).unflatten(-1, heads)
        if x_BSD.device.type == "cpu":
            q_BHSQ, k_BHSQ, v_BHSV = self.turned(q_BSHX, kv_BSHX, k_rope_BSR)
        else:
            q_BHSQ, k_BHSQ, v_BHSV = self.turned_on_gpu(q_BSHX, kv_BSHX, k_rope_BSR)
        y_BHSV = attend(q_BHSQ, k_BHSQ, v_BHSV, self.window, first_BS, self.sink_H, self.score_scale)
        y: Tensor = self.o_proj(y_BHSV.transpose(1, 2).flatten(2))
        return y

    def turned(self, q_BSHX: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, (B, H, S, _), out of the projections."""
        q_nope_BSHQ, q_rope_BSHR = q_BSHX.split(self.query_sizes, dim=-1)
        k_nope_BSHQ, v_BSHV = kv_BSHX.split(self.key_value_sizes, dim=-1)
        q_rope_BSHR = rotate_interleaved(q_rope_BSHR, self.rope_theta, self.rope_scaling)
        k_rope_BS1R = rotate_interleaved(k_rope_BSR[:, :, None], self.rope_theta, self.rope_scaling)
        q_BHSQ = by_head(q_nope_BSHQ, q_rope_BSHR)
        return q_BHSQ, by_head(k_nope_BSHQ, k_rope_BS1R.expand(q_rope_BSHR.shape)), by_head(v_BSHV)

    def turned_on_gpu(self, q_BSHX: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`turned`, as views of (B, S, H, _)."""
        from nmoe.kernels.rope import mla_keys, rope

        table_SJ = table(q_BSHX.shape[1], self.query_sizes[1], self.rope_theta, self.rope_scaling, q_BSHX.device)
        k_BSHQ, v_BSHV = mla_keys(kv_BSHX, k_rope_BSR, table_SJ, self.key_value_sizes[1])
        q_BSHQ = rope(q_BSHX, table_SJ, interleaved=True)
        return q_BSHQ.transpose(1, 2), k_BSHQ.transpose(1, 2), v_BSHV.transpose(1, 2)


def by_head(*parts_BSHX: Tensor) -> Tensor:
    """The parts of (B, S, H, _) side by side, as (B, H, S, _) in that order of memory."""
    return torch.cat([part.transpose(1, 2) for part in parts_BSHX], dim=-1).contiguous()
