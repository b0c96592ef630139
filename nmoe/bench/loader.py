"""`nmoe bench loader CONFIG`: a step's batch as the trainer reads it, beside a copy and beside the step.

    ours              the loader's batch: windows in their order, targets, documents, bytes of text, SHA-256
    plain windows     random windows of one memory-mapped array to int64, as small trainers read them: no order that
                      can be resumed, no documents, no digest
    the step needs    the time of a training step on this machine: a loader within it, on a thread of its own, costs
                      nothing

The floor is reading the batch's tokens once (2 or 4 bytes each) and writing three int64 arrays.
"""

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch

from nmoe.bench.clock import device_for, measure
from nmoe.bench.rows import Row
from nmoe.bench.training import take
from nmoe.graph import build
from nmoe.plan.plan import Plan
from nmoe.train.loop import require_runnable

STEPS = 3


def rows(plan: Plan, *, repeats: int) -> Iterator[Row]:
    """See the module. Raises what a training of the plan would, unreadable data included."""
    require_runnable(plan)
    device = device_for(plan.config.platform.target, plan.config.platform.threads)
    graph = build(plan)
    batch, tokens = plan.config.batch, plan.tokens_per_step
    steps = count(1)
    width = 2 if plan.config.model.vocab_size <= 1 << 16 else 4
    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as directory:
        path = Path(directory) / "tokens"
        drawn = np.random.default_rng(0).integers(0, plan.config.model.vocab_size, max(1 << 22, 2 * tokens))
        drawn.astype(f"u{width}").tofile(path)
        whole = np.memmap(path, dtype=f"u{width}", mode="r")
        generator = np.random.default_rng(1)

        def plain() -> tuple[torch.Tensor, torch.Tensor]:
            starts = generator.integers(0, len(whole) - batch.sequence_length - 1, batch.sequences)
            found = [whole[start : start + batch.sequence_length + 1].astype(np.int64) for start in starts]
            windows = torch.from_numpy(np.stack(found))
            return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

        calls = {"ours": lambda: graph.loader.batch(next(steps)), "plain windows": plain}
        times, rates = measure(calls, repeats, torch.device("cpu"))
    floor = rates.floor(bytes=tokens * (width + 3 * 8.0))
    times["the step needs"] = 1e3 * min(take(graph, plan, range(s, s + 1), True) for s in range(1, 1 + STEPS))
    for who, spent in times.items():
        yield Row(
            work="loader", case=f"{plan.name}, {tokens:,} tokens a step", part="batch", who=who, milliseconds=spent,
            floor=None if who == "the step needs" else floor, rate=1e3 * tokens / spent, unit="tokens/s",
            note=f"on {device.type}" if who == "the step needs" else "",
        )  # fmt: skip
