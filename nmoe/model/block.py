"""One layer: x + attention(norm(x)), then x + ffn(norm(x)), the ffn dense or MoE.

What backward computes again instead of keeping it (`recompute`), with x the layer's input and h what
attention leaves:

    none        nothing
    attention   attention(norm(x)), from x
    layer       everything but the routing: a dense layer from x; of a MoE layer h and norm(h) from x,
                and experts and shared experts from norm(h), the router's weights and the layout
"""

import torch
from torch import Tensor

from nmoe.model.mlp import DenseMlp
from nmoe.model.moe import MoE
from nmoe.model.norm import RmsNorm
from nmoe.model.recompute import again


class Block(torch.nn.Module):
    """Exactly one of mlp and moe is given. recompute: none | attention | layer."""

    def __init__(
        self,
        *,
        attention: torch.nn.Module,
        mlp: DenseMlp | None = None,
        moe: MoE | None = None,
        hidden_size: int,
        norm_eps: float,
        recompute: str,
    ) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(hidden_size, norm_eps)
        self.attention = attention
        self.ffn_norm = RmsNorm(hidden_size, norm_eps)
        self.mlp, self.moe = mlp, moe
        self.recompute = recompute

    def forward(self, x_BSD: Tensor, first_BS: Tensor | None = None) -> Tensor:
        """x_BSD: (B, S, D), the residual stream; the same shape and dtype. first_BS: each query's first key."""
        if self.recompute == "attention":
            x_BSD, normed_BSD = self.ffn_norm.after(x_BSD, again(self.attended, x_BSD, first_BS))
            return self.ffn(x_BSD, normed_BSD)
        if self.recompute == "layer" and self.mlp is not None:
            return again(self.whole, x_BSD, first_BS)
        if self.recompute == "layer":
            x_BSD, normed_BSD = again(self.first_half, x_BSD, first_BS)
            return self.ffn(x_BSD, normed_BSD)
        return self.whole(x_BSD, first_BS)

    def attended(self, x_BSD: Tensor, first_BS: Tensor | None) -> Tensor:
        """attention(norm(x))."""
        y_BSD: Tensor = self.attention(self.attention_norm(x_BSD), first_BS)
        return y_BSD

    def first_half(self, x_BSD: Tensor, first_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """h = x + attention(norm(x)), and norm(h)."""
        x_BSD, normed_BSD = self.attention_norm.beside(x_BSD)
        return self.ffn_norm.after(x_BSD, self.attention(normed_BSD, first_BS))

    def whole(self, x_BSD: Tensor, first_BS: Tensor | None) -> Tensor:
        """The layer, keeping what backward needs."""
        x_BSD, normed_BSD = self.first_half(x_BSD, first_BS)
        return self.ffn(x_BSD, normed_BSD)

    def ffn(self, h_BSD: Tensor, normed_BSD: Tensor) -> Tensor:
        """h + ffn(norm(h)), with the dense SwiGLU or the MoE layer."""
        h_TD, x_TD = h_BSD.flatten(0, 1), normed_BSD.flatten(0, 1)
        if self.moe is not None:
            return self.moe(x_TD, h_TD, recompute=self.recompute == "layer").view(h_BSD.shape)
        assert self.mlp is not None
        return (h_TD + self.mlp(x_TD)).view(h_BSD.shape)
