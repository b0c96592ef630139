"""The ranks of a launch, brought together before anything else is done with them.

One process alone is rank 0 of 1 and needs no sockets. Under torchrun the ranks meet at the launch's store,
which then carries the talk of starts, saves and ends (`nmoe.rdep.control`), and those of a node share memory
and signals (`nmoe.rdep.node`), by which they exchange tokens and gradients and learn of each other's end; between
nodes each has its counterparts (`nmoe.rdep.nodes`). A node is LOCAL_WORLD_SIZE ranks with consecutive numbers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import attrs
import torch

from nmoe import platform
from nmoe.errors import ConfigError, Diagnostic
from nmoe.graph import regions_of, transport_sizes
from nmoe.plan.plan import Plan
from nmoe.plan.ranks import shares_of
from nmoe.plan.resolve import rank_problems
from nmoe.rdep.control import Control
from nmoe.rdep.node import Node
from nmoe.rdep.nodes import Nodes
from nmoe.rdep.peers import Peers
from nmoe.rdep.signals import Failure, PeerFailed, describe
from nmoe.train.tally import most_values

if TYPE_CHECKING:
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
            self.control.report(_cause(self.peers.host, self.control, error))
            self.control.abort(error)


def require_ranks(plan: Plan, ranks: int, per_node: int) -> None:
    """ConfigError N0601 or N0119 if the plan cannot be trained by these ranks."""
    found = rank_problems(plan.config, ranks, per_node)
    if found:
        raise ConfigError([attrs.evolve(one, place=f"{ranks} ranks launched") for one in found])


def _require_nodes(plan: Plan, control: Control, process: platform.Process) -> None:
    """As `require_ranks`, and N0601 unless each rank is local rank r % M of M; on all ranks alike."""
    told = control.gather("the size of each node", [process.local_rank, process.local_world_size])
    per_node = told[0][1]
    for rank, (_, theirs) in enumerate(told):
        if theirs != per_node:
            raise _refused(
                f"rank {rank} is one of {theirs} on its node, and rank 0 one of {per_node}",
                "start as many ranks on every node: torchrun --nproc-per-node",
            )
    for rank, (local_rank, _) in enumerate(told):
        if local_rank != rank % per_node:
            raise _refused(
                f"rank {rank} is local rank {local_rank} of {per_node}",
                "number the ranks node by node, as torchrun does",
            )
    require_ranks(plan, len(told), per_node)


def _refused(message: str, help: str) -> ConfigError:
    return ConfigError(Diagnostic(code="N0601", message=message, help=help))


@contextmanager
def launched(plan: Plan, process: platform.Process) -> Iterator[Launch]:
    """Meet the other ranks; leaving tells them whether this one is done or has failed."""
    ranks, timeout_s = process.world_size, plan.config.output.rank_timeout
    if ranks == 1:
        yield Launch(control=Control.alone(), peers=None)
        return
    from nmoe.rdep.rendezvous import launch_store

    store = launch_store(timeout_s)
    control = Control(store, rank=process.rank, ranks=ranks, timeout_s=timeout_s)
    try:
        _require_nodes(plan, control, process)
        with _together(plan, process, store, control) as peers:
            yield Launch(control=control, peers=peers)
    finally:
        control.leave()


@contextmanager
def _together(
    plan: Plan, process: platform.Process, store: torch.distributed.Store, control: Control
) -> Iterator[Peers]:
    """This rank's node and its counterparts; a failure is told to the node, and then to everybody."""
    ranks, per_node, timeout_s = process.world_size, process.local_world_size, plan.config.output.rank_timeout
    first = process.rank - process.local_rank
    shares = shares_of(plan.config, ranks, per_node)
    values = most_values(plan, shares, ranks)
    of_hosts, of_gpus = regions_of(plan, ranks, per_node, values=values)
    host: Node | None = None
    try:
        with Node(
            store=torch.distributed.PrefixStore(f"node/{first}", store), rank=process.local_rank, ranks=per_node,
            first=first, regions=of_hosts, timeout_s=timeout_s,
            sizes=f"plan {plan.fingerprint[:16]}, {transport_sizes(plan, per_node)}",
        ) as host, ExitStack() as stack:  # fmt: skip
            control.look = host.signals.check
            device = stack.enter_context(gpus(store, process, of_gpus, values, timeout_s)) if of_gpus else host
            nodes = Nodes(
                node=host, count=ranks // per_node, store=store, control=control, timeout_s=timeout_s,
                gpus=None if isinstance(device, Node) else device,
            )  # fmt: skip
            yield Peers(stack.enter_context(nodes), device)
    except BaseException as error:
        control.report(_cause(host, control, error))
        raise


def _cause(host: Node | None, control: Control, error: BaseException) -> Failure:
    """The first that this rank knows of its own end."""
    if isinstance(error, PeerFailed):
        return error.first
    known = None if host is None else host.signals.failure
    return known or Failure(control.rank, describe(error))


@contextmanager
def gpus(
    store: torch.distributed.Store, process: platform.Process, regions: "Regions", values: int, timeout_s: float
) -> "Iterator[CudaNode]":
    """The node's GPUs, one for each rank; values: rows' sums that a rank brings to a norm, at most."""
    from nmoe.rdep.cuda_node import CudaNode

    platform.watch_nccl()
    device = torch.device("cuda", process.local_rank)
    with ExitStack() as stack:
        group = None
        if process.local_world_size > 1:
            first = process.rank - process.local_rank
            torch.distributed.init_process_group(
                "nccl", store=torch.distributed.PrefixStore(f"gpus of {first}", store), rank=process.local_rank,
                world_size=process.local_world_size, timeout=timedelta(seconds=timeout_s), device_id=device,
            )  # fmt: skip
            stack.callback(torch.distributed.destroy_process_group)
            group = torch.distributed.group.WORLD
        node = CudaNode(group=group, regions=regions, values=4 * values, device=device, timeout_s=timeout_s)
        yield stack.enter_context(node)
