"""What a plan's training step takes: tokens a second, and where the device's time goes.

`python -m nmoe.bench.step CONFIG... [--set KEY=VALUE] [--steps N] [--json] [--trace DIRECTORY]` resolves each config,
takes N steps through nmoe.train.step on the plan's target after three to warm up, and profiles one more. Tokens are
drawn evenly from the vocabulary (`--text`: the packaged text in bytes, as in nmoe.bench.memory; its few tokens make
experts of the first layers very uneven).

    seconds       of a step: the mean over all N, which follow each other as in a training
    tokens/s      the step's tokens over it and the ranks, so of each GPU; mfu: the plan's FLOPs over it and the dense
                  bf16 product of this run
    busy          of the profiled step, which begins and ends with an idle device: the part in which some kernel ran
    kernels       by name: milliseconds of the profiled step, launches, share of all kernels' time

Under torchrun all ranks train together and rank 0 speaks; the step's microbatches are dealt out to them, so for as many
tokens on each rank `--set batch.sequences=` takes as many times as many.

--trace writes the profiled step as a trace that Perfetto opens, CONFIG.json.gz.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nmoe import platform
from nmoe.bench.memory import with_data
from nmoe.bench.moe import milliseconds
from nmoe.data.loader import TokenBatch
from nmoe.errors import NmoeError
from nmoe.graph import TrainingGraph, build
from nmoe.plan.plan import Plan
from nmoe.plan.resolve import resolve
from nmoe.train.launch import launched, require_ranks
from nmoe.train.loop import require_runnable
from nmoe.train.step import run_step

WARM_UP = 3


def even_batch(plan: Plan, step: int) -> TokenBatch:
    """A step's batch of tokens drawn evenly from the vocabulary, one document a row."""
    batch, vocab_size = plan.config.batch, plan.config.model.vocab_size
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocab_size, (batch.sequences, batch.sequence_length + 1), generator=generator)
    return TokenBatch(
        step=step, input_ids_BS=tokens[:, :-1].contiguous(), targets_BS=tokens[:, 1:].contiguous(),
        document_ids_BS=torch.zeros_like(tokens[:, 1:]), digest=f"{step:064x}", num_bytes=tokens[:, 1:].numel(),
    )  # fmt: skip


def take(graph: TrainingGraph, plan: Plan, steps: range, text: bool) -> float:
    """Steps as the loop takes them, with their batches at hand; seconds until the device has done them."""
    batches = [graph.loader.batch(step) if text else even_batch(plan, step) for step in steps]
    wait(graph)
    started = time.perf_counter()
    for step, batch in zip(steps, batches, strict=True):
        seen = step * plan.tokens_per_step
        run_step(graph, batch, step=step, tokens_seen=seen, observe=lambda step, phase: None)
        for _, router in graph.routers():
            router.end_step(seen)
    wait(graph)
    return time.perf_counter() - started


def wait(graph: TrainingGraph) -> None:
    if graph.device.type != "cpu":
        torch.cuda.synchronize()


def dense() -> float:
    """FLOPs a second of a bf16 product of 8192^3 on this device."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * 8192**3 / milliseconds(lambda: torch.mm(a, b.T))


def kernels(found: profile) -> tuple[dict[str, tuple[float, int]], float]:
    """Milliseconds and launches of each kernel, the longest first, and milliseconds in which any ran."""
    events = [e for e in found.events() or () if e.device_type == DeviceType.CUDA]
    by_name: dict[str, tuple[float, int]] = {}
    for event in events:
        spent, count = by_name.get(event.name, (0.0, 0))
        by_name[event.name] = (spent + event.time_range.elapsed_us() / 1e3, count + 1)
    busy, until = 0.0, 0.0
    for event in sorted(events, key=lambda e: e.time_range.start):
        busy += max(0.0, event.time_range.end - max(until, event.time_range.start))
        until = max(until, event.time_range.end)
    return dict(sorted(by_name.items(), key=lambda item: -item[1][0])), busy / 1e3


def measure(plan: Plan, steps: int, text: bool, trace: Path | None) -> dict[str, Any]:
    """See the module. Raises what a training of the plan would."""
    process = platform.process()
    require_runnable(plan)
    require_ranks(plan, process.world_size, process.local_world_size)
    platform.require(plan.config.platform.target, plan.config.platform.threads)
    with launched(plan, process) as launch:
        return measured(build(plan, launch.peers), plan, steps, text, trace if launch.leads else None)


def measured(graph: TrainingGraph, plan: Plan, steps: int, text: bool, trace: Path | None) -> dict[str, Any]:
    """As `measure`, of this rank's parts."""
    first = WARM_UP + 1
    take(graph, plan, range(1, first), text)
    seconds = take(graph, plan, range(first, first + steps), text) / steps
    row: dict[str, Any] = {
        "config": plan.name,
        "tokens": "text" if text else "even",
        "ranks": graph.ranks.ranks,
        "seconds": seconds,
        "tokens/s": plan.tokens_per_step / seconds / graph.ranks.ranks,
    }
    if graph.device.type == "cpu":
        return row
    row["device"] = torch.cuda.get_device_name()
    row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        profiled = take(graph, plan, range(first + steps, first + steps + 1), text)
    if trace is not None:
        found.export_chrome_trace(str(trace / f"{plan.name}.json.gz"))
    row["profiled seconds"] = profiled
    row["kernels"], busy = kernels(found)
    row["busy"] = busy / 1e3 / profiled
    row["dense TFLOP/s"] = dense() / 1e12
    row["mfu"] = plan.flops_per_token * row["tokens/s"] / 1e12 / row["dense TFLOP/s"]
    return row


def show(row: dict[str, Any], names: int = 40) -> None:
    """For people."""
    found = row.pop("kernels", {})
    print(", ".join(f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in row.items()), flush=True)  # fmt: skip
    total = sum(spent for spent, _ in found.values())
    for name, (spent, count) in list(found.items())[:names]:
        print(f"  {spent:9.3f} ms {spent / total:6.1%} {count:6d}  {name[:110]}")
    if found:
        print(f"  {total:9.3f} ms in {sum(count for _, count in found.values())} launches", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--text", action="store_true", help="train on the packaged text")
    parser.add_argument("--json", action="store_true", help="one JSON object a config")
    parser.add_argument("--trace", type=Path, default=None, metavar="DIRECTORY")
    arguments = parser.parse_args()
    for config in arguments.configs:
        try:
            plan = with_data(resolve(config, arguments.sets))
            row = measure(plan, arguments.steps, arguments.text, arguments.trace)
        except NmoeError as error:
            sys.exit(str(error))
        if platform.process().rank:
            continue
        if arguments.json:
            print(json.dumps(row), flush=True)
        else:
            show(row)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
