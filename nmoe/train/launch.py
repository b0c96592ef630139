"""The ranks of a launch, brought together before anything else is done with them.

One process alone is rank 0 of 1 and needs no sockets. Under torchrun the ranks meet at the launch's store,
which then carries the talk of starts, saves and ends (`nmoe.rdep.control`), and those of a node share memory
and signals (`nmoe.rdep.node`), by which they exchange tokens and gradients and learn of each other's end.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import attrs

from nmoe import platform
from nmoe.errors import ConfigError, Diagnostic
from nmoe.graph import regions_of, transport_sizes
from nmoe.plan.plan import Plan
from nmoe.plan.ranks import shares_of
from nmoe.plan.resolve import rank_problems
from nmoe.rdep.control import Control
from nmoe.rdep.node import Node
from nmoe.rdep.peers import Peers
from nmoe.train.tally import most_values

if TYPE_CHECKING:
    import torch

    from nmoe.rdep.cuda_node import CudaNode
    from nmoe.rdep.memory import Regions


@attrs.frozen(kw_only=True, eq=False)
class Launch:
    """This process among the launch's. peers: None for one alone."""

    control: Control
    peers: Peers | None

    @property
    def leads(self) -> bool:
        """Rank 0 speaks, and writes what there is one of: the run's directory, metrics, manifests."""
        return self.control.rank == 0

    def check(self) -> None:
        """RunError if a peer has failed, died or hung; for a rank that waits for something else than its peers."""
        if self.peers is not None:
            self.peers.check()

    def give_up(self, error: BaseException) -> None:
        """This rank has failed: the others hear of it now, and none of its threads waits for them any more."""
        if self.peers is not None:
            self.peers.host.signals.tell(error)
            self.control.abort(error)


def require_ranks(plan: Plan, ranks: int, per_node: int) -> None:
    """ConfigError N0601 or N0119 if the plan cannot be trained by these ranks."""
    if ranks != per_node:
        raise ConfigError(
            Diagnostic(
                code="N0601",
                message=f"{ranks} ranks were launched, {per_node} on this node, and this version trains on one node",
                help="launch as many ranks as one node has",
            )
        )
    found = rank_problems(plan.config, ranks, per_node)
    if found:
        raise ConfigError([attrs.evolve(one, place=f"{ranks} ranks launched") for one in found])


@contextmanager
def launched(plan: Plan, process: platform.Process) -> Iterator[Launch]:
    """Meet the other ranks; leaving tells them whether this one is done or has failed."""
    ranks, timeout_s = process.world_size, plan.config.output.rank_timeout
    if ranks == 1:
        yield Launch(control=Control.alone(), peers=None)
        return
    from nmoe.rdep.rendezvous import launch_store

    store = launch_store(timeout_s)
    shares = shares_of(plan.config, ranks, ranks)
    values = most_values(plan, shares, ranks)
    of_hosts, of_gpus = regions_of(plan, ranks, values=values)
    with ExitStack() as stack:
        host = Node(
            store=store, rank=process.rank, ranks=ranks, regions=of_hosts,
            sizes=f"plan {plan.fingerprint[:16]}, {transport_sizes(plan, ranks)}", timeout_s=timeout_s,
        )  # fmt: skip
        control = Control(
            store, rank=process.rank, ranks=ranks, timeout_s=timeout_s, look=host.signals.check
        )
        # To leave takes a while, and comes after the peers have been told why.
        stack.callback(control.leave)
        stack.enter_context(host)
        device = stack.enter_context(gpus(store, process, of_gpus, values, timeout_s)) if of_gpus else host
        yield Launch(control=control, peers=Peers(host, device))


@contextmanager
def gpus(
    store: "torch.distributed.Store", process: platform.Process, regions: "Regions", values: int, timeout_s: float
) -> "Iterator[CudaNode]":
    """The node's GPUs, one for each rank; values: rows' sums that a rank brings to a norm, at most."""
    import torch

    from nmoe.rdep.cuda_node import CudaNode

    device = torch.device("cuda", process.local_rank)
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.PrefixStore("gpus", store), rank=process.rank, world_size=process.world_size,
        timeout=timedelta(seconds=timeout_s), device_id=device,
    )  # fmt: skip
    try:
        group = torch.distributed.group.WORLD
        assert group is not None
        with CudaNode(
            group=group, regions=regions, values=4 * values, device=device, timeout_s=timeout_s
        ) as node:  # fmt: skip
            yield node
    finally:
        torch.distributed.destroy_process_group()
