"""The ranks of a launch, brought together before anything else is done with them.

One process alone is rank 0 of 1 and needs no sockets. Under torchrun the ranks meet at the launch's store,
which then carries the talk of starts, saves and ends (`nmoe.rdep.control`), and those of a node share memory
and signals (`nmoe.rdep.node`), by which they exchange tokens and gradients and learn of each other's end.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from nmoe import platform
from nmoe.errors import ConfigError, Diagnostic
from nmoe.graph import regions_of, transport_sizes
from nmoe.plan.plan import Plan
from nmoe.plan.ranks import shares_of
from nmoe.plan.resolve import rank_problems
from nmoe.rdep.control import Control
from nmoe.rdep.node import Node
from nmoe.train.tally import most_values


@attrs.frozen(kw_only=True, eq=False)
class Launch:
    """This process among the launch's. node: None for one alone."""

    control: Control
    node: Node | None

    @property
    def leads(self) -> bool:
        """Rank 0 speaks, and writes what there is one of: the run's directory, metrics, manifests."""
        return self.control.rank == 0

    def check(self) -> None:
        """RunError N0802 if a peer has failed or died; for a rank that waits for something else than its peers."""
        if self.node is not None:
            self.node.signals.check()


def require_ranks(plan: Plan, process: platform.Process) -> None:
    """ConfigError N0601 or N0119 if the plan cannot be trained by these ranks."""
    ranks, per_node = process.world_size, process.local_world_size
    problem = ""
    if ranks > 1 and plan.config.platform.target != "cpu":
        problem = f"{ranks} ranks were launched, and target `{plan.config.platform.target}` trains on one so far"
    elif ranks != per_node:
        problem = f"{ranks} ranks were launched, {per_node} on this node, and this version trains on one node"
    if problem:
        raise ConfigError(Diagnostic(code="N0601", message=problem, help="run `nmoe train` without torchrun"))
    found = rank_problems(plan.config, ranks, per_node)
    if found:
        raise ConfigError([attrs.evolve(one, place=f"{ranks} ranks launched") for one in found])


@contextmanager
def launched(plan: Plan, process: platform.Process) -> Iterator[Launch]:
    """Meet the other ranks; leaving tells them whether this one is done or has failed."""
    ranks, timeout_s = process.world_size, plan.config.output.rank_timeout
    if ranks == 1:
        yield Launch(control=Control.alone(), node=None)
        return
    from nmoe.rdep.rendezvous import launch_store

    store = launch_store(timeout_s)
    shares = shares_of(plan.config, ranks, ranks)
    regions = regions_of(plan, ranks, values=most_values(plan, shares, ranks))
    with Node(
        store=store, rank=process.rank, ranks=ranks, regions=regions,
        sizes=f"plan {plan.fingerprint[:16]}, {transport_sizes(plan, ranks)}", timeout_s=timeout_s,
    ) as node:  # fmt: skip
        control = Control(store, rank=process.rank, ranks=ranks, timeout_s=timeout_s)
        try:
            yield Launch(control=control, node=node)
        finally:
            control.leave()
