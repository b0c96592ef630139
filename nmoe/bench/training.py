"""Steps of a plan as the bench takes them: their batches, ours as the loop takes one, and peers that take them too."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from nmoe.bench.peers import WAYS, StockStep, is_installed
from nmoe.data.loader import TokenBatch
from nmoe.graph import TrainingGraph
from nmoe.plan.plan import Plan
from nmoe.train.step import nothing, run_step

WARM_UP = 3
"""Steps before those that are timed."""


def even_batch(plan: Plan, step: int) -> TokenBatch:
    """A step's batch of tokens drawn evenly from the vocabulary, one document a row."""
    batch, vocab_size = plan.config.batch, plan.config.model.vocab_size
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocab_size, (batch.sequences, batch.sequence_length + 1), generator=generator)
    return TokenBatch(
        step=step, input_ids_BS=tokens[:, :-1].contiguous(), targets_BS=tokens[:, 1:].contiguous(),
        document_ids_BS=torch.zeros_like(tokens[:, 1:]), digest=f"{step:064x}", num_bytes=tokens[:, 1:].numel(),
    )  # fmt: skip


def take(
    graph: TrainingGraph, plan: Plan, steps: range, text: bool, before_update: Callable[[], None] = nothing
) -> float:
    """Steps as the loop takes them, with their batches at hand; seconds until the device has done them."""
    batches = [graph.loader.batch(step) if text else even_batch(plan, step) for step in steps]
    wait(graph)
    started = time.perf_counter()
    for step, batch in zip(steps, batches, strict=True):
        seen = step * plan.tokens_per_step
        run_step(
            graph, batch, step=step, tokens_seen=seen, observe=lambda step, phase: None, before_update=before_update
        )
        for _, router in graph.routers():
            router.end_step(seen)
    wait(graph)
    return time.perf_counter() - started


def wait(graph: TrainingGraph) -> None:
    if graph.device.type != "cpu":
        torch.cuda.synchronize()


def spent(call: Callable[[], object]) -> float:
    """Wall time of a call on a CPU, ms."""
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def stock_steps(plan: Plan, device: torch.device, *, compile: bool) -> Iterator[tuple[str, Callable[[], StockStep]]]:
    """(who, how it is made) of the peers of this plan."""
    if plan.stock_class.name is None or not is_installed():
        return
    for way in WAYS:
        for compiled in (False, True) if compile else (False,):
            name = f"transformers {way}" + (" compiled" if compiled else "")
            yield name, partial(StockStep, plan, way, device=device, compile=compiled)
