"""Digests of what several ranks hold alike, by which one that has other bits is found.

Every rank has a copy of the weights that are not experts', and the routers' biases. On several nodes a rank has the
same experts as its counterparts (`nmoe.rdep.nodes`). A tensor's digest is over its bytes, read as integers x_i of 32
bits (of 16 where they do not divide into those):

    digest(x) = sum over i of (2 i + 1) x_i   modulo 2^64

Integers are added exactly, so no order of addition can change it. The factors are odd and differ: another value of one
element is another digest, always; so are two flipped bits, as (2 i + 1) 2^a = +-(2 j + 1) 2^b only for i = j and a = b,
and two elements that have changed places, in a tensor of fewer than 2^31.
"""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}
"""Integers widened to 64 bits at a time: on a CPU what stays in its cache, on a GPU 32 MiB."""


@attrs.frozen
class Odd:
    """A tensor that is not the same everywhere. holders: ranks by what they have, the most of them first."""

    name: str
    holders: tuple[tuple[int, ...], ...]

    @property
    def minority(self) -> tuple[int, ...]:
        """The ranks that have another than the most have; none where there is no such majority."""
        most, second = (len(ranks) for ranks in self.holders[:2])
        return tuple(sorted(rank for ranks in self.holders[1:] for rank in ranks)) if most > second else ()


class Replicas:
    """What this rank holds as others do.

    alike: by name, the same on all ranks. experts: the same on this rank's counterparts. ranks_per_node: M; rank r's
    counterparts are the ranks of r % M. every: steps between two comparisons.
    """

    def __init__(
        self, *, alike: Mapping[str, Tensor], experts: Mapping[str, Tensor], ranks_per_node: int, every: int
    ) -> None:
        self.tensors = {**alike, **experts}
        self.experts, self.ranks_per_node, self.every = frozenset(experts), ranks_per_node, every

    def due(self, step: int) -> bool:
        """Whether step `step` compares."""
        return step % self.every == 0

    @torch.no_grad()
    def halves(self) -> Tensor:
        """The digest of each tensor as its upper and its lower 32 bits, float64, which holds them: (2 T).

        On the tensors' device, whose work the host does not wait for.
        """
        digests_T = torch.stack([digest(tensor.detach()) for tensor in self.tensors.values()])
        return torch.stack([digests_T >> 32, digests_T & 0xFFFFFFFF], dim=1).view(-1).to(torch.float64)

    def odd(self, halves_N: Sequence[Tensor]) -> list[Odd]:
        """The tensors that are not alike, from all ranks' `halves` in the order of the ranks."""
        told = [halves.view(-1, 2).tolist() for halves in halves_N]
        found = []
        for index, name in enumerate(self.tensors):
            places = range(self.ranks_per_node) if name in self.experts else (None,)
            for place in places:
                holders: dict[tuple[float, ...], list[int]] = {}
                for rank, theirs in enumerate(told):
                    if place is None or rank % self.ranks_per_node == place:
                        holders.setdefault(tuple(theirs[index]), []).append(rank)
                if len(holders) > 1:
                    in_order = sorted(holders.values(), key=lambda ranks: (-len(ranks), ranks))
                    found.append(Odd(name, tuple(map(tuple, in_order))))
        return found


def digest(x: Tensor) -> Tensor:
    """The digest of a contiguous tensor of elements of 2, 4 or 8 bytes: int64, 0-dimensional, on its device."""
    flat = x.reshape(-1)
    flat = flat.view(torch.int32 if flat.numel() * flat.element_size() % 4 == 0 else torch.int16)
    size = CHUNK[x.device.type]
    odd = torch.arange(1, 2 * min(size, flat.numel()) + 1, 2, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for number, part in enumerate(flat.split(size)):
        wide = part.long()
        total += (wide * odd[: wide.numel()]).sum() + 2 * number * size * wide.sum()
    return total
