"""What the transport between GPUs is measured against: the same rows by library collectives.

`Nccl` sends a token's row once to each rank that needs it, as ours; `NcclPairs` once for each pair, as most trainers
do. Both have what such an exchange takes: indices sorted, split sizes exchanged and read by the host, rows permuted
before and after. `Vdev` is torch's all_to_all_vdev over NVSHMEM, whose split sizes stay on the device.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def splits_of(sent_N: Tensor) -> tuple[list[int], list[int]]:
    """Rows to and from every rank, on the host: it waits here."""
    received_N = torch.empty_like(sent_N)
    dist.all_to_all_single(received_N, sent_N)
    return sent_N.tolist(), received_N.tolist()


def exchanged(rows: Tensor, there: list[int], back: list[int]) -> Tensor:
    """rows, grouped by the rank they go to; what came, grouped by the rank it came from."""
    out = rows.new_empty(sum(back), *rows.shape[1:])
    dist.all_to_all_single(out, rows, back, there)
    return out


def inverse(order_R: Tensor) -> Tensor:
    """Where each element of a permutation is found in it."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


class Nccl:
    """A row for each (token, owner), with the list of its pairs, and back a row for each pair.

    As lean as ours: products gather their rows from what came through an index, and so does the sum over k.
    """

    def __init__(self, indices_TK: Tensor, experts: int, ranks: int) -> None:
        self.indices_TK, self.experts, self.ranks = indices_TK, experts, ranks

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """x_UD, by (source, token); pair_R is then each expert row's pair of them, by (expert, source, token)."""
        local, rank = self.experts // self.ranks, dist.get_rank()
        owner_TK = self.indices_TK // local
        sent_TN = torch.zeros(len(x_TD), self.ranks, dtype=torch.bool, device=x_TD.device).scatter_(1, owner_TK, True)
        owner_P = owner_TK.reshape(-1)
        self.rows_there, self.rows_back = splits_of(sent_TN.sum(0))
        self.pairs_there, self.pairs_back = splits_of(torch.bincount(owner_P, minlength=self.ranks))
        token_S = sent_TN.t().nonzero()[:, 1]
        x_UD = exchanged(x_TD.index_select(0, token_S), self.rows_there, self.rows_back)
        expert_UK = exchanged(self.indices_TK.index_select(0, token_S), self.rows_there, self.rows_back)
        self.weight_UK = exchanged(weights_TK.index_select(0, token_S), self.rows_there, self.rows_back)
        pair_R = (expert_UK // local == rank).view(-1).nonzero().view(-1)
        order_R = torch.sort(expert_UK.view(-1)[pair_R], stable=True).indices
        self.pair_R, self.row_R = pair_R[order_R], inverse(order_R)
        # a source gets its pairs' rows by (owner, token, k)
        self.place_P = inverse(torch.sort(owner_P, stable=True).indices)
        return x_UD

    def give_back(self, y_RD: Tensor) -> Tensor:
        """Each pair's row; that of pair t * K + k lies at place_P."""
        return exchanged(y_RD.index_select(0, self.row_R), self.pairs_back, self.pairs_there)

    def slots(self, y_RD: Tensor) -> Tensor:
        """The same in the slots [token, k], for comparison."""
        return self.give_back(y_RD).index_select(0, self.place_P)


class NcclPairs:
    """A row for each pair, there and back; rows in the order in which products without an index read them."""

    def __init__(self, indices_TK: Tensor, experts: int, ranks: int) -> None:
        self.indices_TK, self.experts, self.ranks = indices_TK, experts, ranks

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """Rows by (expert, source, token)."""
        expert_P = self.indices_TK.reshape(-1)
        sorted_P, pair_P = torch.sort(expert_P, stable=True)
        pairs_N = torch.bincount(expert_P // (self.experts // self.ranks), minlength=self.ranks)
        self.there, self.back = splits_of(pairs_N)
        rows = exchanged(x_TD.index_select(0, pair_P // self.indices_TK.shape[1]), self.there, self.back)
        expert_R = exchanged(sorted_P, self.there, self.back)
        weight_R = exchanged(weights_TK.reshape(-1)[pair_P], self.there, self.back)
        order_R = torch.sort(expert_R, stable=True).indices
        self.weight_R, self.row_R, self.place_P = weight_R[order_R], inverse(order_R), inverse(pair_P)
        return rows.index_select(0, order_R)

    def give_back(self, y_RD: Tensor) -> Tensor:
        """Each pair's row in its slot [token, k]."""
        came_PD = exchanged(y_RD.index_select(0, self.row_R), self.back, self.there)
        return came_PD.index_select(0, self.place_P)


class Vdev:
    """all_to_all_vdev of rows already grouped by the rank they go to. Made after set_backend("NVSHMEM")."""

    def __init__(self, rows: int, width: int, ranks: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        world = dist.group.WORLD
        assert world is not None
        self.group = world.group_name
        self.rows = symm_mem.empty(rows, width, dtype=torch.bfloat16, device=device)
        self.out = symm_mem.empty(rows * ranks, width, dtype=torch.bfloat16, device=device)
        self.sent_N = symm_mem.empty(ranks, dtype=torch.int64, device=device)
        self.came_2N = symm_mem.empty(2, ranks, dtype=torch.int64, device=device)
        for tensor in (self.rows, self.out, self.sent_N, self.came_2N):
            symm_mem.rendezvous(tensor, self.group)

    def run(self) -> None:
        torch.ops.symm_mem.all_to_all_vdev(self.rows, self.out, self.sent_N, self.came_2N, self.group)
