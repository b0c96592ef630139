"""What `nmoe bench rdep` counts as a wait of the host, in traces of the profiler's format."""

import pytest

from nmoe.bench.rdep_cuda import waits_of


def event(name: str, ts: float, tid: int = 7, cat: str = "cuda_runtime") -> dict[str, object]:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "tid": tid, "pid": 1, "dur": 1.0}


LAUNCHES = [event("cudaLaunchKernel", 1.0), event("cuLaunchKernelEx", 9.0, cat="cuda_driver")]


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ([], []),
        ([event("cudaStreamSynchronize", 5.0)], ["cudaStreamSynchronize"]),
        ([event("cudaEventQuery", 5.0)], ["cudaEventQuery"]),
        ([event("cudaEventQuery", 5.0, tid=8)], []),
        ([event("cudaDeviceSynchronize", 9.5)], []),
        ([event("Memcpy DtoH (Device -> Pinned)", 5.0, tid=2, cat="gpu_memcpy")], ["Memcpy DtoH (Device -> Pinned)"]),
        ([event("Memcpy DtoD (Device -> Device)", 5.0, tid=2, cat="gpu_memcpy")], []),
        ([{"ph": "i", "name": "Iteration Start", "ts": 2.0, "tid": "Spans"}], []),
    ],
    ids=["none", "wait", "question", "watchdog", "after the last launch", "to the host", "on the device", "no call"],
)
def test_waits_of_a_trace(others, found):
    assert waits_of([*LAUNCHES, *others]) == found
