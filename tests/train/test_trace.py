"""`[output] profile_steps`: a trace for each step named, which Perfetto reads; and the device's times of a step."""

import gzip
import json
from itertools import pairwise

import pytest
import torch

from nmoe.metrics.peaks import PEAKS, seconds_at_peak
from nmoe.metrics.reader import read_rows
from nmoe.train.marks import PARTS, Marks
from nmoe.train.trace import Tracer


@pytest.fixture(scope="module")
def traced(module_runs):
    """The traces of two steps, by file name."""
    module_runs.train("traced", "output.stop_after_step=3", "output.profile_steps=[1, 3]", "batch.sequences=4",
                      "batch.microbatch=2")  # fmt: skip
    folder = module_runs.path("traced") / "traces"
    return {path.name: json.loads(gzip.decompress(path.read_bytes())) for path in sorted(folder.iterdir())}


def test_a_file_for_each_step_by_step_and_rank(traced):
    assert list(traced) == ["step_00000001.rank0.json.gz", "step_00000003.rank0.json.gz"]


def test_it_is_what_perfetto_reads(traced):
    """Chrome's trace event format: an object with traceEvents, complete events with their begin and duration."""
    for trace in traced.values():
        complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        assert all({"name", "pid", "tid", "ts", "dur"} <= event.keys() for event in complete)
        assert any(event["name"] == "aten::mm" for event in complete)


def test_the_phases_stand_in_it_in_their_order(traced):
    for trace in traced.values():
        names = ("batch", "forward", "backward", "optimizer")
        phases = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["name"] in names]
        phases.sort(key=lambda event: event["ts"])
        assert [event["name"] for event in phases] == ["batch", *["forward", "backward"] * 2, "optimizer"]
        for before, after in pairwise(phases):
            assert before["ts"] + before["dur"] <= after["ts"]


def test_a_trace_that_cannot_be_written_stops_the_run_with_the_way_out(tmp_path):
    (tmp_path / "traces").write_text("in the way")
    tracer = Tracer(tmp_path, steps=(2,), rank=0, device_type="cpu", observe=lambda step, phase: None)
    with tracer.of(1):
        tracer.observe(1, "forward")
    with pytest.raises(Exception, match="N0301") as caught, tracer.of(2):
        tracer.observe(2, "forward")
    assert "profile_steps" in str(caught.value)


def test_a_failure_inside_passes_through(tmp_path):
    tracer = Tracer(tmp_path, steps=(1,), rank=0, device_type="cpu", observe=lambda step, phase: None)
    with pytest.raises(ZeroDivisionError), tracer.of(1):
        tracer.observe(1, "forward")
        raise ZeroDivisionError
    assert not (tmp_path / "traces").exists()


def test_a_cpu_has_no_times_of_a_device_and_no_named_peak(module_runs, traced):
    names = {row.name for row in read_rows(module_runs.metrics / "traced")}
    assert "time/backward" in names
    assert not names & {"time/device", "throughput/mfu"}
    assert Marks(torch.device("cpu")).seconds() == {}


def test_parts_are_what_lies_between_their_events(monkeypatch):
    """Events of a device whose clock we are."""
    clock = iter([10.0, 13.0, 17.0, 18.0, 30.0])  # ms

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    marks = Marks(torch.device("cuda"))
    for part in PARTS:
        marks.end(part)
    assert marks.seconds() == pytest.approx({"passes": 0.003, "reduce": 0.004, "norm": 0.001, "optimizer": 0.012})


def test_an_unknown_device_has_no_peak():
    assert seconds_at_peak(1e12, "NVIDIA A100-SXM4-80GB", "bf16") is None
    assert seconds_at_peak(1e12, "NVIDIA H200", "fp32") is None
    assert seconds_at_peak(1e12, None, "bf16") is None
    assert seconds_at_peak(989.4e12, "NVIDIA H200", "bf16") == 1.0


def test_peaks_are_what_the_clocks_and_the_tensor_cores_give():
    """H100 SXM: 132 SMs, 4 tensor cores each, 512 bf16 multiply-adds a clock (Hopper's tuning guide), at 1.83 GHz."""
    assert PEAKS["NVIDIA H100 80GB HBM3", "bf16"] == pytest.approx(132 * 4 * 512 * 2 * 1.83e9, rel=1e-3)
