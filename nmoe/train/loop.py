"""The loop: from a frozen plan to a finished run.

The order of a start is the order of trust. The hardware must be the plan's; the run directory must
be ours alone; the checkpoint must verify to the last byte and fit the plan, the environment and the
data; only then is a model built and a tensor touched.

The order of a step's end makes a kill harmless: metrics of the step (and of its evaluation) are
durable before a checkpoint's HEAD moves to it, so whatever HEAD names has its ledger.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from nmoe import platform
from nmoe.checkpoint import environment, reader
from nmoe.checkpoint.manifest import Identity, Manifest
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.data.loader import Prefetcher, TokenBatch
from nmoe.errors import ConfigError, Diagnostic, NmoeError, RunError, fail
from nmoe.eval import bpb
from nmoe.graph import build
from nmoe.metrics import router_collapse, router_health
from nmoe.metrics.reader import last_value
from nmoe.metrics.sink import Sink
from nmoe.metrics.throughput import Throughput
from nmoe.plan.plan import Plan
from nmoe.train.progress import Progress, count, duration
from nmoe.train.run_dir import RunDir
from nmoe.train.signals import StopRequest
from nmoe.train.state import TrainState
from nmoe.train.step import Observer, StepResult, run_step

EXIT_SIGNAL = 130


@attrs.frozen(kw_only=True)
class Outcome:
    """How a call of `train` ended: a paragraph for stdout and the exit status."""

    summary: str
    exit_code: int


def _no_observer(step: int, phase: str) -> None:
    return


def train(
    plan: Plan, *, config_text: str, new_lineage: bool = False, observe: Observer = _no_observer
) -> Outcome:
    """Start, continue, or report as complete the run that `plan` describes.

    config_text: the config as its author wrote it, kept in the run directory for people.
    new_lineage: go on although the environment is no longer the checkpoint's, openly, as a new line.
    observe(step, phase) is called as each phase of a step begins; the gate kills from there.
    Raises ConfigError if the plan does not run, RunError for everything that stops it later.
    """
    process = platform.process()
    if process.world_size != 1:
        raise ConfigError(
            Diagnostic(
                code="N0601",
                message=f"{process.world_size} ranks were launched, and this version trains on one",
                help="run `nmoe train` without torchrun",
            )
        )
    require_runnable(plan)
    platform.require(plan.config.platform.target, plan.config.platform.threads)
    with RunDir.open(plan, config_text=config_text) as run_dir:
        if run_dir.is_complete(plan.total_steps):
            return Outcome(summary=_already_complete(plan, run_dir), exit_code=0)
        return Attempt(plan, run_dir, observe).run(new_lineage=new_lineage)


def require_runnable(plan: Plan) -> None:
    """ConfigError N0602 with the reasons if some part of the plan has no kernels on its target yet."""
    if not plan.runnable:
        raise ConfigError(
            Diagnostic(
                code="N0602",
                message=f"`{plan.name}` resolves, and does not run yet",
                notes=plan.reasons,
                help="nmoe build --print shows what each section needs",
            )
        )


def metrics_directory(plan: Plan) -> Path:
    """Where the metrics of all runs lie: [output] metrics_dir, or `metrics` beside the run's directory."""
    output = plan.config.output
    return Path(output.metrics_dir) if output.metrics_dir else Path(output.run_dir).resolve().parent / "metrics"


def _already_complete(plan: Plan, run_dir: RunDir) -> str:
    bits = last_value(metrics_directory(plan) / run_dir.name, "eval/bits_per_byte")
    return _ending(f"complete: {plan.total_steps} steps, nothing left to do", bits, run_dir)


def _ending(first: str, bits: float | None, run_dir: RunDir) -> str:
    lines = [first]
    if bits is not None:
        lines.append(f"held-out bits per byte: {bits:.4f}")
    lines.append(f"run: {run_dir.path}")
    return "\n".join(lines)


class Attempt:
    """One attempt at a run whose directory is ours: from what HEAD names to the last step."""

    def __init__(self, plan: Plan, run_dir: RunDir, observe: Observer):
        self.plan = plan
        self.run_dir = run_dir
        self.observe = observe
        self.output = plan.config.output
        self.last_step = min(self.output.stop_after_step or plan.total_steps, plan.total_steps)
        self.progress = Progress(
            total_steps=plan.total_steps, total_tokens=plan.total_tokens, every=self.output.progress_every
        )
        watched = self.output.router_collapse
        self.collapse = None if watched is None else watched.build()
        self.throughput = Throughput()
        self.held_up = 0.0
        self.bits: float | None = None

    def run(self, *, new_lineage: bool) -> Outcome:
        """Verify, build, restore, train, save."""
        config = self.plan.config
        manifest = reader.open_head(self.run_dir.checkpoints)
        record = environment.record(config.platform.target)
        changes = self._environment_changes(manifest, record, new_lineage=new_lineage)
        self.graph = build(self.plan)
        self.windows = None
        if config.eval.bpb is not None:
            self.windows = config.eval.bpb.build(config.data, config.batch.sequence_length)
            bpb.require_text(self.windows)
        data = self._data_digests()
        self.state = TrainState()
        if manifest is not None:
            self._require_same_data(manifest.identity.data, data)
            self._restore(manifest)
        if changes:
            self.run_dir.begin_lineage(environment.table(changes))
        self.identity = Identity(
            run=self.run_dir.name,
            lineage=self.run_dir.lineage,
            attempt=self.run_dir.attempt,
            fingerprint=self.plan.fingerprint,
            sections=self.plan.sections,
            tree_digest=self.plan.tree_digest,
            data=data,
            environment=record,
        )
        self.run_dir.record_environment(record)
        self._announce(manifest)
        # Only now, when everything has been verified, is anything of the former attempt cleared away.
        self.writer = CheckpointWriter(self.run_dir.checkpoints, keep=self.output.keep_checkpoints)
        sink = Sink(
            metrics_directory(self.plan),
            run=self.run_dir.name, lineage=self.run_dir.lineage, attempt=self.run_dir.attempt,
        )
        try:
            with sink, StopRequest() as stop:
                sink.set_aside_after(self.state.step)
                try:
                    self._steps(sink, stop)
                except BaseException as failure:
                    self._end_saving(failure)
                    raise
                self.writer.wait()
        finally:
            self.progress.close()
        self.run_dir.event("stop", step=self.state.step, signal=stop.name)
        return self._outcome(stop)

    def _environment_changes(
        self, manifest: Manifest | None, record: Mapping[str, Any], *, new_lineage: bool
    ) -> list[environment.Difference]:
        """What a new line of states has to say; nothing where the run goes on as it was."""
        if not new_lineage:
            if manifest is not None:
                environment.require_same(manifest.identity.environment, record, run=str(self.run_dir.path))
            return []
        changes = [] if manifest is None else environment.compare(manifest.identity.environment, record)
        if not changes:
            raise ConfigError(
                Diagnostic(
                    code="N0505",
                    message="nothing has changed since the last checkpoint, so there is no new line to begin",
                    place=str(self.run_dir.path),
                    help="leave out --new-lineage",
                )
            )
        return changes

    def _end_saving(self, failure: BaseException) -> None:
        """Let a save that is under way come to its end: the run must not be given back while it is being written."""
        try:
            self.writer.wait()
        except NmoeError as second:
            failure.add_note(f"the save under way failed too: {second}")

    def _data_digests(self) -> dict[str, str]:
        digests = {"train": self.graph.loader.digest}
        if self.windows is not None:
            digests["heldout"] = self.windows.source.digest
        return digests

    def _require_same_data(self, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
        # Held-out text cannot change a bit of training; what it was is recorded with each checkpoint.
        if saved.get("train") != now["train"]:
            raise fail(
                "N0504",
                "the training data is not what the checkpoint was trained on",
                place=str(self.run_dir.path),
                help="restore the data, or start another run in another `run_dir`",
                notes=(f"then {saved.get('train')}", f"now  {now['train']}"),
            )

    def _restore(self, manifest: Manifest) -> None:
        reader.read_into(self.run_dir.checkpoints, manifest, self.graph.state())
        self.graph.refresh()
        self.state = TrainState.restore(dict(manifest.state), self.graph, step=manifest.step)

    def _announce(self, manifest: Manifest | None) -> None:
        plan = self.plan
        where = "starting" if manifest is None else f"continuing after step {manifest.step} (verified)"
        self.progress.say(
            f"{plan.name}: plan {plan.fingerprint[:16]}, {count(plan.parameters_total)} parameters, "
            f"{count(plan.parameters_active)} active, {plan.total_steps} steps of {count(plan.tokens_per_step)} tokens"
        )
        self.progress.say(f"{where} in {self.run_dir.path}, attempt {self.run_dir.attempt}")

    def _steps(self, sink: Sink, stop: StopRequest) -> None:
        tokens = self.plan.tokens_per_step
        is_last = self.state.step >= self.last_step
        prefetch = Prefetcher(self.graph.loader, depth=self.output.prefetch, first_step=self.state.next_batch)
        with prefetch:
            while not is_last:
                step = self.state.step + 1
                started = time.perf_counter()
                self.observe(step, "batch")
                batch = prefetch.next()
                loaded = time.perf_counter()
                seen = self.state.tokens_seen + tokens
                result = run_step(self.graph, batch, step=step, tokens_seen=seen, observe=self.observe)
                self.observe(step, "router")
                health = {
                    layer: router_health.health(one.load_E, one.bias_E, one.losses)
                    for layer, one in result.routed.items()
                }
                for _, router in self.graph.routers():
                    router.end_step(seen)
                self.state.advance(tokens)
                now = time.perf_counter()
                self.throughput.step(tokens, now - started)
                self.progress.step(step, seen, result.loss, result.bits_per_byte, self.throughput)

                self.observe(step, "metrics")
                stopping = self._look_for_collapse(step, health)
                evaluation = self._evaluate_if_due(step, seen)
                # The one look at signals: what comes after it ends the next step, so the last step of an
                # attempt always has its metrics and its checkpoint.
                is_last = step == self.last_step or stop.name is not None
                if step % self.output.metrics_every == 0 or is_last or evaluation or stopping:
                    seconds = {**result.seconds, "loader": loaded - started, "step": now - started}
                    self._record(sink, batch, result, health, seconds)
                    if evaluation is not None:
                        self._record_evaluation(sink, *evaluation)
                    sink.commit(step, seen, time.time_ns())
                self.writer.check()
                if stopping is not None:
                    # Not saved: the older checkpoints, from which the run can still be mended, keep their places.
                    raise stopping
                if step % self.output.checkpoint_every == 0 or is_last:
                    self._save(sink)

    def _look_for_collapse(self, step: int, health: dict[int, router_health.Health]) -> RunError | None:
        """Says which routers have collapsed, here and in the run's events; the error, if that is to stop the run."""
        spec = self.output.router_collapse
        found = [] if self.collapse is None else self.collapse.look(step, health)
        if spec is None or not found:
            return None
        for one in found:
            self.run_dir.event("router_collapse", action=spec.action, **attrs.asdict(one))
        if spec.action == "stop":
            return router_collapse.stopped(found, run=str(self.run_dir.path))
        for one in found:
            self.progress.say(f"step {step}: warning: {one}")
        return None

    def _evaluate_if_due(self, step: int, seen: int) -> tuple[bpb.BpbResult, float] | None:
        spec = self.plan.config.eval.bpb
        if spec is None or self.windows is None:
            return None
        every = spec.every_tokens
        due = every is not None and seen // every > (seen - self.plan.tokens_per_step) // every
        if not due and step != self.plan.total_steps:
            return None
        self.observe(step, "evaluation")
        started = time.perf_counter()
        result = bpb.evaluate(
            self.graph.model,
            self.windows,
            sequences=spec.sequences,
            document_mask=self.graph.document_mask,
            on_batch=lambda done, total: self.progress.transient(f"held-out text: {done}/{total}"),
        )
        seconds = time.perf_counter() - started
        self.throughput.pause(seconds)
        self.bits = result.bits_per_byte
        self.progress.say(
            f"step {step}: held-out {result.bits_per_byte:.4f} bits/byte over {count(result.num_bytes)} bytes "
            f"({duration(seconds)})"
        )
        return result, seconds

    def _record(
        self, sink: Sink, batch: TokenBatch, result: StepResult, health: dict[int, router_health.Health],
        seconds: dict[str, float],
    ) -> None:
        tokens = self.plan.tokens_per_step
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
        sink.add("throughput/smoothed", self.throughput.tokens_per_second)
        sink.add("throughput/bytes_per_second", batch.num_bytes / seconds["step"])
        sink.add("throughput/eta", self.throughput.eta_seconds(self.plan.total_tokens - self.state.tokens_seen))
        for name, value in seconds.items():
            sink.add(f"time/{name}", value)
        sink.add("time/checkpoint", self.held_up)
        memory = platform.memory(self.plan.config.platform.target)
        sink.add("memory/resident", memory.resident, rank=0)
        sink.add("memory/resident_peak", memory.resident_peak, rank=0)
        if self.graph.device.type != "cpu":
            sink.add("memory/device", memory.device_allocated, rank=0)
            sink.add("memory/device_peak", memory.device_peak, rank=0)
        for name, layer, expert, value in router_health.rows(health):
            sink.add(name, value, layer=layer, expert=expert)
        sink.add("data/batch_digest", None, label=batch.digest)
        sink.add("data/tokens", tokens)
        sink.add("data/bytes", batch.num_bytes)

    def _record_evaluation(self, sink: Sink, result: bpb.BpbResult, seconds: float) -> None:
        sink.add("eval/bits_per_byte", result.bits_per_byte, label="heldout")
        sink.add("eval/loss", result.loss, label="heldout")
        sink.add("eval/tokens", result.num_tokens, label="heldout")
        sink.add("eval/bytes", result.num_bytes, label="heldout")
        sink.add("time/evaluation", seconds, label="heldout")

    def _save(self, sink: Sink) -> None:
        step = self.state.step
        started = time.perf_counter()
        self.observe(step, "save")
        self.writer.save(
            step=step,
            tensors=self.graph.state(),
            state=self.state.scalars(self.graph),
            identity=self.identity,
            before_head=sink.flush,
        )
        self.held_up = time.perf_counter() - started
        self.throughput.pause(self.held_up)
        self.run_dir.event("saving", step=step)

    def _outcome(self, stop: StopRequest) -> Outcome:
        step, total = self.state.step, self.plan.total_steps
        if step == total:
            return Outcome(summary=_ending(f"complete: {total} steps", self.bits, self.run_dir), exit_code=0)
        if stop.name is not None:
            first = f"stopped by {stop.name} after step {step} of {total}, saved; run again to continue"
            return Outcome(summary=_ending(first, None, self.run_dir), exit_code=EXIT_SIGNAL)
        first = f"stopped after step {step} of {total}, as [output] stop_after_step says; raise it to continue"
        return Outcome(summary=_ending(first, None, self.run_dir), exit_code=0)
