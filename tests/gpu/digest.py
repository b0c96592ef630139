"""A few steps of a config on a GPU, and a digest of all bits of the state that they leave; under torchrun all ranks'.

    python -m tests.gpu.digest CONFIG [--set KEY=VALUE ...] [--steps N]      prints {"digest": ..., "losses": [...]}

For models whose checkpoints are too large to write for a comparison. The digest is a sum over the logical tensors'
elements, modulo 2^64: of each element's bits times an odd number that follows from its tensor's name and its place.
Integers add up to the same in any order, so that it does not depend on who holds what.
"""

import argparse
import json
import zlib

import torch

from nmoe import platform
from nmoe.bench.memory import with_data
from nmoe.bench.training import even_batch
from nmoe.graph import TrainingGraph, build
from nmoe.part import Part
from nmoe.plan.resolve import resolve
from nmoe.train.launch import launched
from nmoe.train.step import run_step

PIECE = 1 << 26


def digest(name: str, part: Part) -> int:
    """Of one tensor's part."""
    bits = part.tensor.detach().reshape(-1).view(torch.int32 if part.tensor.element_size() == 4 else torch.int16)
    first, salt, total = part.start, zlib.crc32(name.encode()), 0
    for start in range(0, bits.numel(), PIECE):
        piece = bits[start : start + PIECE].to(torch.int64)
        place = torch.arange(first + start, first + start + piece.numel(), device=piece.device)
        total += int((piece * ((place * 0x9E3779B1 + salt) * 2 + 1)).sum())
    return total


def whole(graph: TrainingGraph) -> str:
    """Of all ranks' state."""
    mine = sum(digest(name, part) for name, part in graph.kept().items()) % 2**64
    halves = torch.tensor([mine >> 32, mine & 0xFFFFFFFF], dtype=torch.float64)
    told = [(int(high) << 32) + int(low) for high, low in graph.ranks.gather(halves)]
    return f"{sum(told) % 2**64:016x}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    plan = with_data(resolve(arguments.config, arguments.sets))
    process = platform.process()
    platform.require(plan.config.platform.target, plan.config.platform.threads)
    with launched(plan, process) as launch:
        graph = build(plan, launch.peers)
        losses = []
        for step in range(1, arguments.steps + 1):
            seen = step * plan.tokens_per_step
            batch = even_batch(plan, step)
            result = run_step(graph, batch, step=step, tokens_seen=seen, observe=lambda step, phase: None)
            losses.append(result.loss)
            for _, router in graph.routers():
                router.end_step(seen)
        found = whole(graph)
        if process.rank == 0:
            print(json.dumps({"digest": found, "losses": losses, "recorded": graph.microbatch.news()}), flush=True)


if __name__ == "__main__":
    main()
