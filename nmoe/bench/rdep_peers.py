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


class Nccl:
    """A row for each (token, owner), with the list of its pairs; back a row for each pair."""

    def __init__(self, indices_TK: Tensor, experts: int, ranks: int) -> None:
        self.indices_TK, self.experts, self.ranks = indices_TK, experts, ranks

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """Rows by (expert, source, token), which is what the grouped products read."""
        local, rank = self.experts // self.ranks, dist.get_rank()
        owner_TK = self.indices_TK // local
        sent_TN = torch.zeros(len(x_TD), self.ranks, dtype=torch.bool, device=x_TD.device).scatter_(1, owner_TK, True)
        self.there, self.back = splits_of(sent_TN.sum(0))
        token_S = sent_TN.t().nonzero()[:, 1]
        x_UD = exchanged(x_TD[token_S], self.there, self.back)
        expert_UK = exchanged(self.indices_TK[token_S], self.there, self.back)
        weight_UK = exchanged(weights_TK[token_S], self.there, self.back)
        here_UK = expert_UK // local == rank
        pair_R = here_UK.view(-1).nonzero().view(-1)
        self.order_R = torch.sort(expert_UK.view(-1)[pair_R], stable=True).indices
        self.pair_R = pair_R[self.order_R]
        self.weight_R = weight_UK.view(-1)[self.pair_R]
        # the way back: this rank's pairs by the owner they are at, and how many each rank has of the others'
        self.slot_P = torch.sort(owner_TK.reshape(-1), stable=True).indices
        self.pairs_there, self.pairs_back = splits_of(torch.bincount(owner_TK.reshape(-1), minlength=self.ranks))
        return x_UD[self.pair_R // self.indices_TK.shape[1]]

    def give_back(self, y_RD: Tensor) -> Tensor:
        """Each pair's row in its slot [token, k]."""
        rows_RD = torch.empty_like(y_RD)
        rows_RD[self.order_R] = y_RD
        came_PD = exchanged(rows_RD, self.pairs_back, self.pairs_there)
        out_PD = torch.empty_like(came_PD)
        out_PD[self.slot_P] = came_PD
        return out_PD


class NcclPairs:
    """A row for each pair, there and back."""

    def __init__(self, indices_TK: Tensor, experts: int, ranks: int) -> None:
        self.indices_TK, self.experts, self.ranks = indices_TK, experts, ranks

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """Rows by (expert, source, token)."""
        expert_P = self.indices_TK.reshape(-1)
        sorted_P, self.pair_P = torch.sort(expert_P, stable=True)
        pairs_N = torch.bincount(expert_P // (self.experts // self.ranks), minlength=self.ranks)
        self.there, self.back = splits_of(pairs_N)
        rows = exchanged(x_TD[self.pair_P // self.indices_TK.shape[1]], self.there, self.back)
        expert_R = exchanged(sorted_P, self.there, self.back)
        weight_R = exchanged(weights_TK.reshape(-1)[self.pair_P], self.there, self.back)
        self.order_R = torch.sort(expert_R, stable=True).indices
        self.weight_R = weight_R[self.order_R]
        return rows[self.order_R]

    def give_back(self, y_RD: Tensor) -> Tensor:
        """Each pair's row in its slot [token, k]."""
        rows_RD = torch.empty_like(y_RD)
        rows_RD[self.order_R] = y_RD
        came_PD = exchanged(rows_RD, self.back, self.there)
        out_PD = torch.empty_like(came_PD)
        out_PD[self.pair_P] = came_PD
        return out_PD


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
