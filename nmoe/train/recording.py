"""What a step and an evaluation put into the ledger."""

from nmoe.data.loader import TokenBatch
from nmoe.eval.bpb import BpbResult
from nmoe.metrics import router_health
from nmoe.metrics.sink import Sink
from nmoe.metrics.throughput import Throughput
from nmoe.train.step import StepResult


def record_step(
    sink: Sink, batch: TokenBatch, result: StepResult, health: dict[int, router_health.Health], *,
    tokens: int, tokens_left: int, seconds: dict[str, float], held_up: float, throughput: Throughput,
    on_a_device: bool, on_device: dict[str, float], at_peak: float | None,
) -> None:  # fmt: skip
    """One step's rows. tokens: of the step. seconds: wall time by part; held_up: by the last save.

    on_device: the device's time by part, of the step before. at_peak: seconds of a step at the devices' named peak.
    """
    sink.add("train/loss", result.loss)
    sink.add("train/bits_per_byte", result.bits_per_byte)
    sink.add("grad/norm", result.norm)
    for name, value in result.norms.items():
        sink.add("grad/group_norm", value, label=name)
    sink.add("grad/clip", result.clip)
    sink.add("optimizer/scale", result.scale)
    for name, value in result.rates.items():
        sink.add("optimizer/rate", value, label=name)
    sink.add("throughput/tokens_per_second", tokens / seconds["step"])
    sink.add("throughput/smoothed", throughput.tokens_per_second)
    sink.add("throughput/bytes_per_second", batch.num_bytes / seconds["step"])
    if at_peak is not None:
        sink.add("throughput/mfu", at_peak / seconds["step"])
    sink.add("throughput/eta", throughput.eta_seconds(tokens_left))
    for name, value in seconds.items():
        sink.add(f"time/{name}", value)
    for name, value in on_device.items():
        sink.add("time/device", value, label=name)
    sink.add("time/checkpoint", held_up)
    for rank, memory in enumerate(result.memory):
        sink.add("memory/resident", memory.resident, rank=rank)
        sink.add("memory/resident_peak", memory.resident_peak, rank=rank)
        if on_a_device:
            sink.add("memory/device", memory.device_allocated, rank=rank)
            sink.add("memory/device_peak", memory.device_peak, rank=rank)
    if result.activation_rows is not None:
        sink.add("time/repeated", result.repeated)
        for rank, count in enumerate(result.activation_rows):
            sink.add("memory/activation_rows", count, rank=rank)
    for name, layer, expert, value in router_health.rows(health):
        sink.add(name, value, layer=layer, expert=expert)
    sink.add("data/batch_digest", None, label=batch.digest)
    sink.add("data/tokens", tokens)
    sink.add("data/bytes", batch.num_bytes)


def record_evaluation(sink: Sink, result: BpbResult, seconds: float) -> None:
    """The rows of one evaluation of held-out text."""
    sink.add("eval/bits_per_byte", result.bits_per_byte, label="heldout")
    sink.add("eval/loss", result.loss, label="heldout")
    sink.add("eval/tokens", result.num_tokens, label="heldout")
    sink.add("eval/bytes", result.num_bytes, label="heldout")
    sink.add("time/evaluation", seconds, label="heldout")
