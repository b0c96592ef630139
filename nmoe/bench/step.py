"""`nmoe bench step CONFIG`: tokens a second of a plan's whole training step, beside the transformers library's.

Steps go through nmoe.train.step on the plan's target, after three to warm up. Tokens are drawn evenly from the
vocabulary (`--text`: the packaged text in bytes, as in nmoe.bench.memory; its few tokens make experts of the first
layers very uneven).

    ours            on a GPU the mean over all steps, which follow each other as in a training; on a CPU the least of
                    single steps, which take turns with the peers' steps; everybody has a process of their own
    transformers    where a stock class computes the plan's model (nmoe.plan.families): the same tokens, microbatches
                    and state dtypes, warmed up alike; eager and grouped_mm experts, --compile: compiled too
    floor           the plan's FLOPs at the rate of a dense product of this run, so that `of the floor` is the MFU
    busy            of a profiled step, which begins and ends with an idle device: the part in which some kernel ran
    kernels         by name: milliseconds of the profiled step, launches

Under torchrun all ranks train together and rank 0 speaks, without peers; the step's microbatches are dealt out to them,
so for as many tokens on each rank `--set batch.sequences=` takes as many times as many. tokens/s are then of each.

--trace writes the profiled step as a trace that Perfetto opens, CONFIG.json.gz.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nmoe import platform
from nmoe.bench.clock import milliseconds
from nmoe.bench.contender import OURS, Contender
from nmoe.bench.peers import StockStep, difference
from nmoe.bench.rows import Row
from nmoe.bench.training import WARM_UP, even_batch, spent, stock_steps, take
from nmoe.graph import build
from nmoe.plan.plan import Plan
from nmoe.rdep.peers import Peers
from nmoe.train.launch import launched, require_ranks
from nmoe.train.loop import require_runnable

SHOWN = 40
"""Kernels, the longest first."""


def dense(device: torch.device) -> float:
    """FLOPs a millisecond of a product: bf16 of 8192^3 on a GPU, float32 of 1024^3 on a CPU."""
    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    if device.type != "cpu":
        return 2.0 * size**3 / milliseconds(lambda: torch.mm(a, b.T))
    return 2.0 * size**3 / min(spent(lambda: torch.mm(a, b.T)) for _ in range(7))


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


def rows(plan: Plan, *, steps: int, text: bool, trace: Path | None, compile: bool) -> Iterator[Row]:
    """See the module; none on a rank that does not lead. Raises what a training of the plan would."""
    process = platform.process()
    require_runnable(plan)
    require_ranks(plan, process.world_size, process.local_world_size)
    platform.require(plan.config.platform.target, plan.config.platform.threads)
    with launched(plan, process) as launch:
        if plan.config.platform.target != "cpu":
            found = list(on_a_gpu(plan, launch.peers, steps, text, trace if launch.leads else None))
            if process.world_size == 1:
                found += stock_on_a_gpu(plan, steps, compile)
        elif process.world_size == 1:
            found = list(on_a_cpu(plan, steps, text, compile))
        else:
            graph = build(plan, launch.peers)
            take(graph, plan, range(1, 1 + WARM_UP), text)
            time_each = [take(graph, plan, range(s, s + 1), text) for s in range(1 + WARM_UP, 1 + WARM_UP + steps)]
            found = [row(plan, "ours", min(time_each), dense(graph.device), text, ranks=process.world_size)]
    if launch.leads:
        yield from found


def row(
    plan: Plan, who: str, seconds: float, rate: float, text: bool, *, ranks: int = 1, note: str = ""
) -> Row:
    """Of a step of so many seconds. rate: of the dense product, FLOPs a millisecond."""
    tokens = plan.tokens_per_step / ranks
    return Row(
        work="step", case=case_of(plan, text, ranks), part="step", who=who, milliseconds=1e3 * seconds,
        floor=plan.flops_per_token * tokens / rate, rate=tokens / seconds, unit="tokens/s", note=note,
    )  # fmt: skip


def case_of(plan: Plan, text: bool, ranks: int) -> str:
    tokens = f"{plan.tokens_per_step:,} tokens {'of text' if text else 'drawn evenly'}"
    return f"{plan.name}, {tokens}" + (f", {ranks} ranks" if ranks > 1 else "")


def on_a_cpu(plan: Plan, steps: int, text: bool, compile: bool) -> Iterator[Row]:
    """Ours and the peers' steps in turns, everybody in a process of their own."""
    names = [OURS, *(who for who, _ in stock_steps(plan, torch.device("cpu"), compile=compile))]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nmoe-bench-")))
        resolved = directory / f"{plan.name}.toml"
        resolved.write_text(plan.to_toml(), encoding="utf-8")
        contenders = {who: stack.enter_context(Contender(resolved, who, text=text)) for who in names}
        times: dict[str, list[float]] = {who: [] for who in names}
        for _ in range(WARM_UP + steps):
            for who, contender in contenders.items():
                times[who].append(1e-3 * contender.step())
    measured = {who: found[WARM_UP:] for who, found in times.items()}
    rate = dense(torch.device("cpu"))
    for who in names:
        note = ""
        if who != OURS:
            ratio = statistics.median(a / b for a, b in zip(measured[who], measured[OURS], strict=True))
            note = f"ours {ratio:.2f} times as fast, median of turns; {difference(plan)}"
        yield row(plan, who, min(measured[who]), rate, text, note=note)


def stock_on_a_gpu(plan: Plan, steps: int, compile: bool) -> Iterator[Row]:
    """The peers' steps, one peer after the other: two of them need not fit beside each other."""
    device, rate = platform.device(plan.config.platform.target), 0.0
    for who, make in stock_steps(plan, device, compile=compile):
        torch.cuda.empty_cache()
        try:
            seconds = stock_seconds(make(), plan, steps)
        except torch.OutOfMemoryError:
            yield Row(work="step", case=case_of(plan, False, 1), part="step", who=who, note="out of memory")
            continue
        rate = rate or dense(device)
        yield row(plan, who, seconds, rate, False, note=difference(plan))


def stock_seconds(peer: StockStep, plan: Plan, steps: int) -> float:
    """Of a step, the mean over steps that follow each other."""
    batches = [even_batch(plan, step) for step in range(1, 1 + WARM_UP + steps)]
    for batch in batches[:WARM_UP]:
        peer.run(batch)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for batch in batches[WARM_UP:]:
        peer.run(batch)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def on_a_gpu(plan: Plan, peers: Peers | None, steps: int, text: bool, trace: Path | None) -> Iterator[Row]:
    """Ours, and what its kernels take."""
    graph = build(plan, peers)
    first = WARM_UP + 1
    take(graph, plan, range(1, first), text)
    seconds = take(graph, plan, range(first, first + steps), text) / steps
    peak = torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        profiled = take(graph, plan, range(first + steps, first + steps + 1), text)
    if trace is not None:
        found.export_chrome_trace(str(trace / f"{plan.name}.json.gz"))
    by_name, busy = kernels(found)
    note = f"{torch.cuda.get_device_name()}, peak {peak:.2f} GiB, busy {busy / 1e3 / profiled:.1%}"
    whole = row(plan, "ours", seconds, dense(graph.device), text, ranks=graph.ranks.ranks, note=note)
    yield whole
    for name, (time_spent, count) in list(by_name.items())[:SHOWN]:
        yield Row(work="step", case=whole.case, part="kernel", who=name[:60], milliseconds=time_spent, rate=count,
                  unit="launches")  # fmt: skip
