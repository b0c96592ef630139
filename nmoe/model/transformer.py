"""The transformer: embedding, blocks, final norm. The head's weight belongs to the loss."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from nmoe.model.attention import document_starts
from nmoe.model.block import Block
from nmoe.model.linear import Embedding, Head
from nmoe.model.norm import RmsNorm
from nmoe.model.router import Router


class Transformer(torch.nn.Module):
    """Weights are empty until `nmoe.model.init.initialize` draws them.

    dtype: of all parameters; their gradients are float32. Buffers (router biases and loads) keep
    their own.
    tie_embeddings: the head's weight is the embedding's (Press and Wolf, arXiv 1608.05859), one
    parameter under the embedding's name. Its gradient of a microbatch is the head's part plus the
    lookup's, a float32 sum of two, which autograd makes before it adds the microbatch to the others.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        blocks: Iterable[Block],
        norm_eps: float,
        tie_embeddings: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(vocab_size, hidden_size)
        self.layers = torch.nn.ModuleList(blocks)
        self.norm = RmsNorm(hidden_size, norm_eps)
        self.head = Head(vocab_size, hidden_size, self.embedding.weight_VD if tie_embeddings else None)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
            parameter.grad_dtype = torch.float32

    def forward(self, input_ids_BS: Tensor, document_ids_BS: Tensor | None = None) -> Tensor:
        """input_ids_BS: (B, S) int64, 0 <= id < vocab_size. Returns h_TD: (B*S, D) after the final norm.

        document_ids_BS: (B, S) int64 that never falls along a row: attention then stays within tokens of equal
        id. Positions go on counting through the row; rotary attention sees only their differences.
        """
        first_BS = None if document_ids_BS is None else document_starts(document_ids_BS)
        x_BSD = self.embedding(input_ids_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, first_BS)
        h_BSD: Tensor = self.norm(x_BSD)
        return h_BSD.flatten(0, 1)


def routers_of(model: Transformer) -> Iterator[tuple[int, Router]]:
    """(layer, router) of every MoE layer, first layer first."""
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        if block.moe is not None:
            yield index, block.moe.router
