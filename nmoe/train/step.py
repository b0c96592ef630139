"""One step: microbatches forward and backward, clip, rates, optimizer, router bias.

The microbatch is the unit of arithmetic. Each one's gradient is computed on its own in float32 and
added to the step's in the order 0 .. V-1, so that the sum does not depend on who computed which: rank r of N
takes microbatch jN + r in pass j (`nmoe.optim.reduction`).
The loss is the mean over the step's tokens:

    L = (1 / T) sum over microbatches v of sum over tokens t in v of -log p(target_t),   T = B * S

Balance losses that the plan asks for join in backward, in the routers (`nmoe.model.balance`), at the
scale of this mean; they are no part of L.

Nothing is written before the verdict: a loss or a gradient norm that is not finite stops the run
with weights, moments, counters and router biases as they were.

A GPU's host waits once a step, for the verdict, and then has read all that it will report: what follows it,
the update and the routers' biases, runs while the host begins the next step.

On several GPUs a microbatch's pre-activations may not fit into the experts' arena (`nmoe.rdep.arena`). The verdict says
so to all ranks, from the same counts; gradients, loads and balance losses are then forgotten, and the same batch is
taken again with the experts of every layer computed again in backward.
"""

import math
import time
from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from nmoe import platform
from nmoe.data.loader import TokenBatch
from nmoe.errors import RunError, fail
from nmoe.graph import TrainingGraph
from nmoe.optim import norm
from nmoe.train.marks import Marks
from nmoe.train.tally import Tally, exchange

Observer = Callable[[int, str], None]


@attrs.frozen(kw_only=True, eq=False)
class Routed:
    """On the CPU: load_E, the pairs of a step; bias_E, None where a router has none; balance losses by name."""

    load_E: Tensor
    bias_E: Tensor | None
    losses: dict[str, float]


@attrs.frozen(kw_only=True)
class StepResult:
    """What one step measured, over all ranks.

    loss: mean nats per token. bits_per_byte: the same in bits over the bytes of text that the
    targets stand for. norms: gradient norm of each group; norm: of all, before clipping.
    clip: the factor that clipping put on the gradient. scale: the schedule's factor. rates: each
    group's learning rate. routed: what each layer's router counted, before the routers' `end_step`.
    seconds: wall time by part on this rank; on a GPU the host's, whose wait for the device falls into `norm`, and
    whose launch of a recorded microbatch is all `forward`.
    memory: of each rank. marks: where the device's parts of the step end. activation_rows: what a microbatch brought to
    each rank's arena at most; None without arenas. repeated: seconds of the passes that did not fit there and were
    repeated, 0 if they did; they are no part of the others.
    """

    loss: float
    bits_per_byte: float
    norm: float
    norms: dict[str, float]
    clip: float
    scale: float
    rates: dict[str, float]
    routed: dict[int, Routed]
    seconds: dict[str, float]
    memory: list[platform.Memory]
    marks: Marks
    activation_rows: list[int] | None
    repeated: float


@attrs.frozen(kw_only=True, eq=False)
class Passes:
    """What forward and backward of this rank's microbatches gave; wall time of the host, and marks of the device."""

    losses: list[Tensor]
    forward_seconds: float
    backward_seconds: float
    marks: Marks


def nothing() -> None:
    """Nobody reads what a step writes."""


def run_step(
    graph: TrainingGraph, batch: TokenBatch, *, step: int, tokens_seen: int, observe: Observer,
    before_update: Callable[[], None] = nothing,
) -> StepResult:  # fmt: skip
    """Train on one batch, which is the whole step's on every rank.

    step counts from 1; tokens_seen includes this step. observe(step, phase) is called as each phase
    begins; before_update() before the first write to what a checkpoint keeps, which another stream may still read.
    Raises RunError N0501 or N0522 if the loss or the gradient is not finite, N0509 or N0510 if the ranks are not alike.
    """
    repeated = 0.0
    passes = forward_and_backward(graph, batch, step=step, observe=observe)
    before = time.perf_counter()
    told = tell(graph, passes, step=step, digest=batch.digest)
    if graph.arena is not None and not graph.arena.alone and max(told.activation_rows) > graph.arena.rows:
        repeated = passes.forward_seconds + passes.backward_seconds + time.perf_counter() - before
        for _, router in graph.routers():
            router.forget()
        with graph.arena.each_layer_alone(), graph.microbatch.unrecorded():
            passes = forward_and_backward(graph, batch, step=step, observe=observe)
        before = time.perf_counter()
        told = tell(graph, passes, step=step, digest=batch.digest)
    nats, norms = told.nats, told.norms
    total = norms.total.sqrt().item()
    for index, value in enumerate(nats):
        if not math.isfinite(value):
            raise fail(
                "N0501",
                f"the loss of microbatch {index} is {value}",
                place=f"step {step}, batch {batch.digest[:16]}",
                help="weights are as they were before the step; lower the rate or look at the batch",
            )
    if not math.isfinite(total):
        raise not_finite(graph, told, step=step, batch=batch)
    clip = norm.clip_coefficient(norms.total, graph.clip_norm)
    by_group = dict(zip(norms.groups, torch.stack(list(norms.groups.values())).sqrt().tolist(), strict=True))
    clipped = clip.item()
    counted = routed(graph)
    passes.marks.end("norm")
    norm_seconds = time.perf_counter() - before

    before = time.perf_counter()
    observe(step, "optimizer")
    before_update()
    factor = graph.schedule.scale(tokens_seen)
    graph.optimizer.step(step=step, scale=factor, grad_scale=clip)
    graph.ranks.share()
    passes.marks.end("optimizer")
    optimizer_seconds = time.perf_counter() - before

    total_nats = math.fsum(nats)
    return StepResult(
        loss=total_nats / graph.tokens_per_step,
        bits_per_byte=total_nats / (math.log(2) * batch.num_bytes) if batch.num_bytes else math.nan,
        norm=total,
        norms=by_group,
        clip=clipped,
        scale=factor,
        rates=graph.optimizer.rates(factor),
        routed=counted,
        seconds={
            "forward": passes.forward_seconds,
            "backward": passes.backward_seconds,
            "norm": norm_seconds,
            "optimizer": optimizer_seconds,
        },
        memory=told.memory,
        marks=passes.marks,
        activation_rows=None if graph.arena is None else told.activation_rows,
        repeated=repeated,
    )


def forward_and_backward(graph: TrainingGraph, batch: TokenBatch, *, step: int, observe: Observer) -> Passes:
    """The gradients of a step, from nothing: its microbatches on this rank, and the ranks' sums."""
    started = time.perf_counter()
    marks = Marks(graph.device)
    graph.optimizer.clear_gradients()
    graph.ranks.clear()
    if graph.arena is not None:
        graph.arena.clear()
    graph.model.train()
    losses = []
    began: dict[str, list[float]] = {"forward": [], "backward": []}

    def passing(phase: str) -> None:
        began[phase].append(time.perf_counter())
        observe(step, phase)

    ours = slice(graph.ranks.rank, None, graph.ranks.ranks)
    whole = (batch.input_ids_BS, batch.targets_BS, batch.document_ids_BS)
    mine = [t.split(graph.microbatch.sequences)[ours] for t in whole]
    for number, parts in enumerate(zip(*mine, strict=True)):
        losses.append(graph.microbatch.run(*parts, begins=number == 0, observe=passing))
        graph.ranks.add()
    marks.end("passes")
    graph.ranks.deliver()
    marks.end("reduce")
    forward_seconds = sum(began["backward"]) - sum(began["forward"])
    backward_seconds = time.perf_counter() - started - forward_seconds
    return Passes(losses=losses, forward_seconds=forward_seconds, backward_seconds=backward_seconds, marks=marks)


def tell(graph: TrainingGraph, passes: Passes, *, step: int, digest: str) -> Tally:
    """What the ranks make of it together."""
    memory = platform.memory(graph.device.type)
    return exchange(graph, step=step, digest=digest, losses=passes.losses, memory=memory)


def not_finite(graph: TrainingGraph, told: Tally, *, step: int, batch: TokenBatch) -> RunError:
    """The error of a step whose gradients have no norm; on several ranks the owner of the first at fault names it."""
    notes = (f"batch {batch.digest}",)
    mine = graph.optimizer.members()
    for group, members in graph.groups.items():
        for name in members:
            if math.isfinite(told.norms.parameters[name]):
                continue
            if any(name == owned for owned, _ in mine[group]):
                return norm.not_finite({group: [m for m in mine[group] if m[0] == name]}, step=step, notes=notes)
            return fail(
                "N0522",
                f"the gradient of `{name}` is not finite; another rank keeps it, and says where",
                place=f"step {step}, group `{group}`",
                help="weights are as they were before the step; lower the rate or look at the batch",
                notes=notes,
            )
    return norm.not_finite(mine, step=step, notes=notes)


def routed(graph: TrainingGraph) -> dict[int, Routed]:
    """What each router has counted, by layer; on a GPU two copies for all layers."""
    routers = dict(graph.routers())
    if not routers:
        return {}
    loads = torch.stack([router.load_E for router in routers.values()]).cpu()
    biases = [router.bias_E for router in routers.values() if router.bias_E is not None]
    rows = iter(torch.stack(biases).cpu() if biases else ())
    return {
        layer: Routed(load_E=load_E, bias_E=None if router.bias_E is None else next(rows), losses=router.losses())
        for (layer, router), load_E in zip(routers.items(), loads, strict=True)
    }
