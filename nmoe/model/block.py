"""One layer: x + attention(norm(x)), then x + ffn(norm(x)), the ffn dense or MoE."""

import torch
from torch import Tensor

from nmoe.model.mlp import DenseMlp
from nmoe.model.moe import MoE
from nmoe.model.norm import RmsNorm


class Block(torch.nn.Module):
    """Exactly one of mlp and moe is given."""

    def __init__(
        self,
        *,
        attention: torch.nn.Module,
        mlp: DenseMlp | None = None,
        moe: MoE | None = None,
        hidden_size: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(hidden_size, norm_eps)
        self.attention = attention
        self.ffn_norm = RmsNorm(hidden_size, norm_eps)
        self.mlp, self.moe = mlp, moe

    def forward(self, x_BSD: Tensor, first_BS: Tensor | None = None) -> Tensor:
        """x_BSD: (B, S, D), the residual stream; the same shape and dtype. first_BS: each query's first key."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), first_BS)
        ffn = self.mlp if self.mlp is not None else self.moe
        assert ffn is not None
        return x_BSD + ffn(self.ffn_norm(x_BSD).flatten(0, 1)).view(x_BSD.shape)
