"""The norms of one step's gradients, wherever the ranks keep them: the same numbers, added in the same order.

A row never lies on two ranks (`nmoe.sharding`), so its sum of squares is made by one. Several ranks give each other
the sums of their rows and put them in the order that they have on one rank; everybody then adds them alike, on the
CPU as `nmoe.optim.norm`, on a GPU with `nmoe.kernels.grad_norm`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmoe.optim.norm import Norms, gradient, norms_of, row_sums
from nmoe.optim.reduction import Alone, Reduction
from nmoe.sharding import Share

if TYPE_CHECKING:
    from nmoe.kernels.grad_norm import GradNorm


class GradientNorms:
    """groups: the names of all parameters, by group, in the order of addition.

    shares: every rank's of every parameter; one rank has one of each. owned: this rank's, as parameters with a `grad`.
    ranks: those that have the others.
    """

    def __init__(
        self,
        *,
        groups: Mapping[str, Sequence[str]],
        shares: Sequence[Share],
        owned: Mapping[str, torch.nn.Parameter],
        ranks: Alone | Reduction,
        device: torch.device,
    ) -> None:
        self.groups, self.ranks = groups, ranks
        by_name: dict[str, list[Share]] = {}
        for share in shares:
            by_name.setdefault(share.name, []).append(share)
        in_order = [share for names in groups.values() for name in names for share in by_name[name]]
        self.own = [(share.name, owned[share.name]) for share in in_order if share.rank == ranks.rank]
        self.rows = [sum(share.rows for share in by_name[name]) for names in groups.values() for name in names]
        counts = [sum(share.rows for share in in_order if share.rank == rank) for rank in range(ranks.ranks)]
        self.most = max(counts)
        # Where each row of the whole lies among those that the ranks bring, `most` of each.
        begins, places = [rank * self.most for rank in range(ranks.ranks)], []
        for share in in_order:
            places.append(torch.arange(begins[share.rank], begins[share.rank] + share.rows))
            begins[share.rank] += share.rows
        self.place_R = None if ranks.ranks == 1 else torch.cat(places).to(device)
        whole = [[by_name[name][0].shape for name in names] for names in groups.values()]
        self.kernels = None if device.type == "cpu" else _kernels([p.shape for _, p in self.own], whole, device)

    def squared(self) -> Norms:
        """As `nmoe.optim.norm.squared_norms`, of all parameters; the same on all ranks, which call it together."""
        gradients = [gradient(name, parameter) for name, parameter in self.own]
        if self.kernels is None:
            sums_R = torch.cat([row_sums(one) for one in gradients]) if gradients else torch.empty(0)
        else:
            sums_R = self.kernels[0].sums(gradients)
        if self.place_R is not None:
            padded_X = torch.nn.functional.pad(sums_R, (0, self.most - sums_R.numel()))
            sums_R = self.ranks.gather_rows(padded_X).view(-1).index_select(0, self.place_R)
        return self._added(sums_R)

    def _added(self, sums_R: Tensor) -> Norms:
        """The norms from the sums of all rows."""
        names = [name for members in self.groups.values() for name in members]
        if self.kernels is None:
            rows = dict(zip(names, sums_R.split(self.rows), strict=True))
            return norms_of({group: {name: rows[name] for name in members} for group, members in self.groups.items()})
        found = self.kernels[1].norms(sums_R)
        return Norms(
            parameters=dict(zip(names, found.tensor_N.unbind(), strict=True)),
            groups=dict(zip(self.groups, found.group_G.unbind(), strict=True)),
            total=found.total,
        )


def _kernels(
    own: Sequence[tuple[int, ...]], whole: Sequence[Sequence[tuple[int, ...]]], device: torch.device
) -> "tuple[GradNorm, GradNorm]":
    """For the rows of this rank's gradients, and for the sums of all."""
    from nmoe.kernels.grad_norm import GradNorm

    return GradNorm([own], device), GradNorm(whole, device)
