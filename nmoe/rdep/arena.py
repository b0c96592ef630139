"""The arena of a rank that shares its node's experts: what all layers' experts keep of a microbatch until its backward.

How many rows an owner gets is a fact of the routing: N T K at most, T K on the average. So layers do not each keep a
buffer for the most there can be; they take rows of one that has a fixed place, one after the other
(`nmoe.kernels.arena`), and the host never asks how many. A microbatch whose layers do not fit together is a step whose
gradients are worth nothing. Every rank hears of it with the step's one wait; the step is then done again from the
unchanged state with every layer alone: its backward computes its experts again and needs the arena for itself only.
Nothing is dropped, and the bits are the same (`nmoe.model.recompute`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.arena import MOST, reserve
from nmoe.kernels.layout_ranks import most_rows
from nmoe.rdep.memory import Sizes


class Arena:
    """The pre-activations of gate and up, h_2AF, of at most A rows of all layers together.

    rows: A, at least what one layer can have, so that every layer lies within (RunError N0809). width: F. sizes: of the
    transport whose rank this is. alone: whether each layer's backward computes its experts again anyway; it stays so.
    """

    def __init__(
        self, *, rows: int, width: int, sizes: Sizes, rank: int, device: torch.device, alone: bool = False
    ) -> None:
        least = most_rows(
            ranks=sizes.ranks, tokens=sizes.tokens, num_experts=sizes.num_experts, top_k=sizes.top_k
        )
        if rows < least:
            raise fail(
                "N0809",
                f"an arena of {rows} rows is too small for one layer, which can have {least}",
                place="activation_rows in [output]",
                help=f"set activation_rows to at least {least}, or remove it",
            )
        self.rows, self.rank, self.alone = rows, rank, alone
        self.h_2AF = torch.empty(2, rows, width, dtype=sizes.dtype, device=device)
        self.state_3N = torch.zeros(3, sizes.ranks, dtype=torch.int64, device=device)
        self.layer = -1

    def reserve(self, counts_NC: Tensor, layer: int) -> Tensor:
        """int32 (1), on the device: the first row of a layer, of the counts of all ranks.

        Layers rise within a microbatch: one that does not is the first of the next.
        """
        begins, self.layer = layer <= self.layer, layer
        first_N = reserve(counts_NC, self.state_3N, rows=self.rows, begins=begins, alone=self.alone)
        return first_N[self.rank : self.rank + 1]

    def clear(self) -> None:
        """A step begins: nothing has been needed, and the next layer is a microbatch's first."""
        self.state_3N.zero_()
        self.layer = -1

    def needed(self) -> int:
        """The most rows that any microbatch's layers have brought to this rank since `clear`. Waits for the device."""
        return int(self.state_3N[MOST, self.rank])

    @contextmanager
    def each_layer_alone(self) -> Iterator[None]:
        """Within it every layer's backward computes its experts again."""
        before, self.alone = self.alone, True
        try:
            yield
        finally:
            self.alone = before
