"""Many tensors, one launch: their addresses in a table on the device, and which program works on which of them.

A kernel over a list of tensors is given one program for each fixed piece of each tensor. `owner[p]` is the
tensor of program p and `first[n]` the first program of tensor n, so p - first[owner[p]] is the piece. Sizes
are known when the list is made; addresses may move (a gradient is a fresh tensor every step), and are then
sent again, through pinned memory, without a wait.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def pieces(counts: Sequence[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """owner_P (int32, on the device) and first of each tensor, for tensors of so many pieces each."""
    owner_P = torch.tensor([n for n, count in enumerate(counts) for _ in range(count)], dtype=torch.int32)
    return owner_P.to(device), [0, *accumulate(counts)][:-1]


def rows(values: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table of int64 numbers on the device, one row a tensor or block."""
    return torch.tensor(list(values), dtype=torch.int64).to(device)


class Addresses:
    """The addresses of a list of tensors on their device: (N,) int64."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sent: list[int] = []
        self.address_N = torch.zeros(0, dtype=torch.int64, device=device)

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The table of these tensors; the last one where none of them has moved."""
        now = [tensor.data_ptr() for tensor in tensors]
        if now != self.sent:
            host_N = torch.tensor(now, dtype=torch.int64)
            if self.device.type != "cpu":
                host_N = host_N.pin_memory()
            self.address_N = host_N.to(self.device, non_blocking=True)
            self.sent = now
        return self.address_N
