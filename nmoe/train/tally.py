"""What every rank tells the others once in a step, so that all of them decide the same.

It travels between the processes as one vector of float64, in which counts are exact up to 2^53 and float32 values are
what they were: the batch, memory, the rows that the experts' arena needed, the losses of the rank's microbatches, each
router's load and balance losses, and in some steps the digests of what all ranks hold alike (`nmoe.train.divergence`).
The loads and balance losses of all ranks then stand in the routers.
"""

import attrs
import torch
from torch import Tensor

from nmoe import platform
from nmoe.errors import fail
from nmoe.graph import TrainingGraph
from nmoe.optim.norm import Norms
from nmoe.optim.reduction import Alone
from nmoe.plan.plan import Plan
from nmoe.sharding import Share
from nmoe.train.divergence import judge

DIGEST_DIGITS = 13
"""Hexadecimal digits of a batch's digest that a float64 holds."""

HEAD = 6
MOST_LOSSES = 2
"""Balance losses of a router, at most."""


@attrs.frozen(kw_only=True, eq=False)
class Tally:
    """All ranks' together.

    nats: the loss of each microbatch of the step, in their order. memory: each rank's. activation_rows: the most that
    a microbatch of the step brought to each rank's arena; 0 where there is none. norms: of the gradients.
    """

    nats: list[float]
    memory: list[platform.Memory]
    activation_rows: list[int]
    norms: Norms


def most_values(plan: Plan, shares: tuple[Share, ...], ranks: int) -> int:
    """Values of the longest vector that a rank tells."""
    model, microbatches = plan.config.model, plan.config.batch.microbatches
    routers = model.num_layers * (model.moe.router.num_experts + MOST_LOSSES * microbatches) if model.moe else 0
    halves = 2 * (len(list(model.parameters())) + model.num_layers)  # of digests: parameters, biases
    rows = max(sum(share.rows for share in shares if share.rank == rank) for rank in range(ranks))
    return max(HEAD + microbatches + routers + halves, rows)


def exchange(
    graph: TrainingGraph, *, step: int, digest: str, losses: list[Tensor], memory: platform.Memory
) -> Tally:
    """Tell, and hear, at the end of a step's backward. losses: of this rank's microbatches.

    RunError N0509 if a rank has another batch, N0510 if the ranks do not hold the same and this step compares.
    """
    norms = graph.norms.squared()  # a GPU has it in its queue before the host waits for the losses
    if isinstance(graph.ranks, Alone):
        return Tally(nats=torch.stack(losses).tolist(), memory=[memory], activation_rows=[0], norms=norms)
    halves = graph.replicas.halves() if graph.replicas.due(step) else torch.empty(0)  # in the queue too
    nats = torch.stack(losses).tolist()

    routers = [router for _, router in graph.routers()]
    batch = int(digest[:DIGEST_DIGITS], 16)
    head = [batch, 0 if graph.arena is None else graph.arena.needed(), *attrs.astuple(memory)]
    terms = [router.balance.terms() for router in routers if router.balance is not None]
    loads = torch.stack([router.load_E for router in routers]).cpu() if routers else torch.empty(0)
    mine = [torch.tensor(head), torch.tensor(nats), loads, *terms, halves.cpu()]
    told = graph.ranks.gather(torch.cat([part.to(torch.float64).view(-1) for part in mine]))

    parts = [vector.split([part.numel() for part in mine]) for vector in told]
    heads = [part[0].long().tolist() for part in parts]
    for rank, (other, *_) in enumerate(heads):
        if other != batch:
            raise fail(
                "N0509",
                f"rank {rank} has the batch {other:013x}..., rank {graph.ranks.rank} {digest[:DIGEST_DIGITS]}...",
                place="the ranks' batches of one step",
                help="all ranks must read the same data: compare `nmoe verify RUN --read-data` on their machines",
            )
    if halves.numel():
        judge(graph, [part[-1] for part in parts], place=f"step {step}, before its update")
    all_loads = torch.stack([part[2] for part in parts]).sum(0).long().view(loads.shape)
    for router, load_E in zip(routers, all_loads, strict=True):
        router.load_E.copy_(load_E)
    with_losses = [router for router in routers if router.balance is not None]
    for index, router in enumerate(with_losses, start=3):
        assert router.balance is not None
        all_terms = torch.cat([part[index] for part in parts]).view(-1, len(router.balance.losses))
        router.balance.replace(all_terms, graph.tokens_per_step)
    return Tally(
        nats=torch.stack([part[1] for part in parts], dim=1).view(-1).tolist(),
        memory=[platform.Memory(**dict(zip(attrs.asdict(memory), found[2:], strict=True))) for found in heads],
        activation_rows=[found[1] for found in heads],
        norms=norms,
    )

