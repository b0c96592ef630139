"""Times, turn by turn, and the two rates that a floor is made of.

On a GPU a time is the median of CUDA events around single calls. On a CPU it is the least of the wall times: whatever
else runs on the machine only adds. Calls that are compared take turns, so that what else runs falls on all of them.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import attrs
import torch

from nmoe import platform

Calls = Mapping[str, Callable[[], object]]
COPY, DENSE = "copy", "dense product"
"""Names of the two calls that give the rates."""


@attrs.frozen(kw_only=True)
class Rates:
    """Of this device in this run. copy: bytes a millisecond, read and written. dense: FLOPs a millisecond."""

    copy: float
    dense: float

    def floor(self, *, bytes: float, flops: float = 0.0) -> float:
        """ms: the longer of moving the bytes and multiplying."""
        return max(bytes / self.copy, flops / self.dense)


def device_for(target: str | None, threads: int | None) -> torch.device:
    """The plan's device, or without a plan this machine's: a GPU if there is one, else all CPUs it may use.

    RunError as `platform.require`.
    """
    if target is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        target = next((t for t, c in platform.CAPABILITY_OF_TARGET.items() if c == capability), "cpu")
    target = target or "cpu"
    if target == "cpu":
        threads = threads or platform.usable_cpus()
    platform.require(target, threads)
    return platform.device(target)


def milliseconds(call: Callable[[], object], runs: int = 15) -> float:
    """On a GPU: median time of one call, after three to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(b.elapsed_time(e) for b, e in times)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph, for work that is shorter than its launches."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def turns(calls: Calls, repeats: int, device: torch.device) -> dict[str, float]:
    """ms of each call."""
    if device.type != "cpu":
        return {name: milliseconds(call, repeats) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: min(found) for name, found in times.items()}


def measure(
    calls: Calls, repeats: int, device: torch.device, *, product: tuple[int, int, int] | None = None
) -> tuple[dict[str, float], Rates]:
    """ms of each call, and the device's rates, which took turns with them.

    product: (M, K, N) of the dense product; float32 on a CPU, bf16 on a GPU.
    """
    cpu = device.type == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    M, K, N = product or ((1024,) * 3 if cpu else (8192,) * 3)
    a_MK, b_KN = torch.randn(M, K, device=device, dtype=dtype), torch.randn(N, K, device=device, dtype=dtype).t()
    out_MN = torch.empty(M, N, device=device, dtype=dtype)
    source = torch.zeros(2**27 if cpu else 2**31, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    both = {COPY: lambda: target.copy_(source), DENSE: lambda: torch.mm(a_MK, b_KN, out=out_MN)}
    times = turns({**both, **calls}, repeats, device)
    rates = Rates(copy=2 * source.nbytes / times.pop(COPY), dense=2.0 * M * K * N / times.pop(DENSE))
    return times, rates
