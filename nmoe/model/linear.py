"""Linear maps and the embedding, with float32 gradients for their weights.

Torch's own layers give a weight's gradient the weight's dtype. Here a bfloat16 weight gets a
float32 gradient (`Parameter.grad_dtype` lets it accumulate so), because microbatches are added
in `p.grad` and a bfloat16 sum would lose them. Sums over tokens have one fixed order: that of the
product at the microbatch's shape.
"""

from typing import Any

import torch
from torch import Tensor

from nmoe.experts.product import add_product, product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_OI: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, w_OI)
        return product(x.reshape(-1, x.shape[-1]), w_OI.t(), dtype).view(*x.shape[:-1], len(w_OI))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        # Rows are made in here, out of autograd's sight: a node for each view would cost the host a product's launch.
        x, w_OI = ctx.saved_tensors
        x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return product(dy_TO, w_OI, x.dtype).view(x.shape), product(dy_TO.t(), x_TI, torch.float32), None


def linear(x: Tensor, w_OI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y = x W^T over the last axis.

    x: (..., I); w_OI: (O, I), the same dtype. Returns (..., O) in `dtype` (x's if None), summed in
    float32. The gradient of x has x's dtype, that of W is float32.
    """
    y: Tensor = _Linear.apply(x, w_OI, dtype or x.dtype)
    return y


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights_OI: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights_OI)
        x_TI = x.reshape(-1, x.shape[-1])
        return tuple(product(x_TI, w_OI.t(), x.dtype).view(*x.shape[:-1], len(w_OI)) for w_OI in weights_OI)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, ...]:
        x, *weights_OI = ctx.saved_tensors
        x_TI, dys_TO = x.reshape(-1, x.shape[-1]), [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx_TI = product(dys_TO[0], weights_OI[0], x.dtype)
        for dy_TO, w_OI in zip(dys_TO[1:], weights_OI[1:], strict=True):
            add_product(dx_TI, dy_TO, w_OI)
        return dx_TI.view(x.shape), *(product(dy_TO.t(), x_TI, torch.float32) for dy_TO in dys_TO)


def linears(x: Tensor, *layers: "Linear") -> tuple[Tensor, ...]:
    """Each layer's x W^T; the gradient of x is one sum, of which a GPU's products add their parts themselves."""
    ys: tuple[Tensor, ...] = _Linears.apply(x, *(layer.weight for layer in layers))
    return ys


class Linear(torch.nn.Module):
    """y = x W^T; weight: (out, in). No bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, w_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = w_VD.shape[0]
        return w_VD.index_select(0, ids.reshape(-1)).view(*ids.shape, w_VD.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        # One thread owns a row of the table and adds its tokens in order: no atomics.
        return None, torch.ops.aten.embedding_dense_backward(dy.float(), ids, ctx.rows, -1, False)


class Embedding(torch.nn.Module):
    """Row id of weight_VD for each id; the gradient adds tokens in their order, in float32."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_VD = torch.nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...,) int64; (..., D) in the weight's dtype."""
        y: Tensor = _Embedding.apply(ids, self.weight_VD)
        return y


class Head(torch.nn.Module):
    """logits = h W^T. Training never calls it: the loss takes weight_VD and makes logits chunk by chunk.

    table_VD: the embedding's, to be the head's too; None is a weight of its own.
    """

    def __init__(self, vocab_size: int, hidden_size: int, table_VD: torch.nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight_VD = torch.nn.Parameter(torch.empty(vocab_size, hidden_size)) if table_VD is None else table_VD

    def forward(self, h: Tensor) -> Tensor:
        """h: (..., D); (..., V) float32."""
        return linear(h, self.weight_VD, torch.float32)
