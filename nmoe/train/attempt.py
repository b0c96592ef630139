"""One attempt at a run: from what HEAD names to the last step.

The order of a start is the order of trust. The run directory is ours alone; the checkpoint must verify
to the last byte and fit the plan, the environment and the data; only then is a model built and a
tensor touched.

The order of a step's end makes a kill harmless: metrics of the step (and of its evaluation) are
durable before a checkpoint's HEAD moves to it, so whatever HEAD names has its ledger.

Several ranks go through all of it together. What a rank decides by, it has from all (`nmoe.train.tally`);
what there is one of, rank 0 writes.
"""

import signal
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch

from nmoe import platform
from nmoe.checkpoint import environment, reader
from nmoe.checkpoint.manifest import Identity, Manifest
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.data.loader import Prefetcher
from nmoe.errors import ConfigError, Diagnostic, NmoeError, RunError, fail
from nmoe.eval import bpb
from nmoe.graph import build
from nmoe.metrics import router_collapse, router_health
from nmoe.metrics.peaks import seconds_at_peak
from nmoe.metrics.sink import Sink
from nmoe.metrics.throughput import Throughput
from nmoe.plan.plan import Plan
from nmoe.rdep.control import GIVEN_UP
from nmoe.report.run import metrics_directory
from nmoe.train.divergence import require_alike
from nmoe.train.launch import Launch
from nmoe.train.marks import Marks
from nmoe.train.progress import Progress, count, duration
from nmoe.train.recording import record_evaluation, record_step
from nmoe.train.run_dir import FollowedRun, RunDir
from nmoe.train.signals import StopRequest
from nmoe.train.state import TrainState
from nmoe.train.step import Observer, StepResult, run_step
from nmoe.train.trace import Tracer


@attrs.frozen(kw_only=True)
class End:
    """How an attempt came to its end: after which step, by which signal if by one, the last evaluation's figure."""

    step: int
    signal: str | None
    bits_per_byte: float | None


class Attempt:
    """One rank's part of an attempt at a run that rank 0 owns. state: how far it has come."""

    def __init__(
        self, plan: Plan, run: RunDir | FollowedRun, launch: Launch, stop: StopRequest, observe: Observer
    ) -> None:
        self.plan = plan
        self.run_dir = run
        self.launch = launch
        self.control = launch.control
        self.stop = stop
        self.observe = observe
        self.output = plan.config.output
        self.last_step = min(self.output.stop_after_step or plan.total_steps, plan.total_steps)
        self.progress = Progress(
            total_steps=plan.total_steps, total_tokens=plan.total_tokens, every=self.output.progress_every,
            silent=not launch.leads,
        )
        watched = self.output.router_collapse
        self.collapse = None if watched is None else watched.build()
        self.throughput = Throughput()
        self.held_up = 0.0
        self.repeated = False
        self.bits: float | None = None
        self.state = TrainState()

    def run(self, *, new_lineage: bool) -> End:
        """Verify, build, restore, train, save."""
        config = self.plan.config
        manifest = reader.open_head(self.run_dir.checkpoints, self.control)
        if manifest is not None:
            self.control.first("whose checkpoint it is", partial(self.run_dir.require_own, manifest))
        record = self._environment(config.platform.target)
        changes = self._environment_changes(manifest, record, new_lineage=new_lineage)
        self.graph = build(self.plan, self.launch.peers)
        self.windows = None
        if config.eval.bpb is not None:
            self.windows = config.eval.bpb.build(config.data, config.batch.sequence_length)
            bpb.require_text(self.windows)
        data = self._data_digests()
        if manifest is not None:
            self._require_same_data(manifest.identity.data, data)
            self._restore(manifest)
            self.run_dir.continue_lineage(manifest.identity.lineage)
            self._tell_changes(manifest, record, data)
        if changes:
            self.run_dir.begin_lineage(environment.table(changes))
        self.run_dir.lineage = self.control.tell("the lineage", self.run_dir.lineage)
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
        keep = self.output.keep_checkpoints
        self.writer = CheckpointWriter(self.run_dir.checkpoints, keep=keep, control=self.control)
        for gone in self.writer.removed:
            self.run_dir.event("removed", **attrs.asdict(gone))
            self.progress.say(f"the checkpoint of step {gone.step} is removed: {gone.reason}")
        try:
            self.stop.at_once = False
            if isinstance(self.run_dir, FollowedRun):
                ended_by = self._train(None)
            else:
                with Sink(
                    metrics_directory(self.run_dir.path, self.output.metrics_dir),
                    run=self.run_dir.name, lineage=self.run_dir.lineage, attempt=self.run_dir.attempt,
                ) as sink:  # fmt: skip
                    sink.set_aside_after(self.state.step)
                    ended_by = self._train(sink)
        finally:
            self.progress.close()
        self.run_dir.event("stop", step=self.state.step, signal=ended_by)
        return End(step=self.state.step, signal=ended_by, bits_per_byte=self.bits)

    def _train(self, sink: Sink | None) -> str | None:
        """The steps, and the end of the last save; the signal that ended them, if one did."""
        try:
            ended_by = self._steps(sink)
        except BaseException as failure:
            self._end_saving(failure)
            raise
        self._wait_for_save()
        return ended_by

    def _environment(self, target: str) -> dict[str, Any]:
        """This rank's record. RunError N0502 if another rank's can give other bits."""
        record = environment.record(target)
        for rank, theirs in enumerate(self.control.gather("the environment", record)):
            if differences := environment.compare(theirs, record):
                raise fail(
                    "N0502",
                    f"rank {rank} has another environment than rank {self.control.rank}, so their bits may differ",
                    place=str(self.run_dir.path), notes=environment.table(differences),
                    help="run all ranks on the same software and the same kind of hardware",
                )  # fmt: skip
        return record

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

    def _tell_changes(self, manifest: Manifest, record: Mapping[str, Any], data: Mapping[str, str]) -> None:
        """Says what is not as when the checkpoint was saved and cannot change a bit, here and in the run's events."""
        saved = manifest.identity
        changes = [
            one
            for one in environment.compare(saved.environment, record, part="recorded")
            if one.what not in environment.PASSING
        ]
        if saved.data.get("heldout") != data.get("heldout"):
            then, now = (one.get("heldout", "absent") for one in (saved.data, data))
            changes.append(environment.Difference(what="held-out text", then=then, now=now))
        if changes:
            self.run_dir.event("moved", changes=environment.table(changes))
            names = ", ".join(one.what for one in changes)
            self.progress.say(f"not as at the last checkpoint, and without effect on any bit: {names}")

    def _wait_for_save(self) -> None:
        """Wait until the save under way is whole on all ranks; a peer that dies meanwhile ends the wait."""
        while not self.writer.done(timeout_s=1.0):
            try:
                self.launch.check()
            except RunError as failure:
                self.launch.give_up(failure)
                raise
        self.writer.wait()

    def _end_saving(self, failure: BaseException) -> None:
        """Let a save that is under way come to its end: the run must not be given back while it is being written.

        With several ranks it may need one that is gone, so nobody waits for the others any more.
        """
        self.launch.give_up(failure)
        try:
            self.writer.wait()
        except NmoeError as second:
            (also,) = second.diagnostics[:1]
            if also.code != GIVEN_UP and also.message not in str(failure):
                failure.add_note(f"the save under way failed too: {also.message}")

    def _data_digests(self) -> dict[str, str]:
        digests = {"train": self.graph.loader.digest}
        if self.windows is not None:
            digests["heldout"] = self.windows.source.digest
        return digests

    def _require_same_data(self, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
        # Held-out text cannot change a bit of training; what it was is recorded with each checkpoint.
        if saved.get("train") != now["train"]:
            raise fail(
                "N0504", "the training data is not what the checkpoint was trained on", place=str(self.run_dir.path),
                help="restore the data, or start another run in another `run_dir`",
                notes=(f"then {saved.get('train')}", f"now  {now['train']}"),
            )  # fmt: skip

    def _restore(self, manifest: Manifest) -> None:
        reader.read_into(self.run_dir.checkpoints, manifest, self.graph.state(), self.control)
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

    def _steps(self, sink: Sink | None) -> str | None:
        """Train until the last step, or until a rank has been asked to stop: the signal's name."""
        tokens = self.plan.tokens_per_step
        ended_by = self._asked_to_stop()
        is_last = self.state.step >= self.last_step or ended_by is not None
        tracer = Tracer(
            self.run_dir.path, steps=self.output.profile_steps or (), rank=self.control.rank,
            device_type=self.graph.device.type, observe=self.observe,
        )  # fmt: skip
        marks: Marks | None = None
        device = platform.device_facts(self.plan.config.platform.target).get("name")
        flops = self.plan.flops_per_token * tokens / self.control.ranks
        at_peak = seconds_at_peak(flops, device, self.plan.config.model.dtype)
        if not is_last:
            self.writer.prepare(self.graph.kept())
        prefetch = Prefetcher(self.graph.loader, depth=self.output.prefetch, first_step=self.state.next_batch)
        with prefetch:
            while not is_last:
                step = self.state.step + 1
                started = time.perf_counter()
                seen = self.state.tokens_seen + tokens
                with tracer.of(step):
                    tracer.observe(step, "batch")
                    batch = prefetch.next()
                    loaded = time.perf_counter()
                    result = run_step(
                        self.graph, batch, step=step, tokens_seen=seen, observe=tracer.observe,
                        before_update=self.writer.before_change,
                    )  # fmt: skip
                on_device, marks = {} if marks is None else marks.seconds(), result.marks
                self._say_what_was_recorded()
                self._look_for_repetition(step, result)
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
                # The one look of a step at signals: what comes after it ends the next step, so the last step of
                # an attempt always has its metrics and its checkpoint.
                ended_by = self._asked_to_stop()
                is_last = step == self.last_step or ended_by is not None
                if sink is not None and (step % self.output.metrics_every == 0 or is_last or evaluation or stopping):
                    record_step(
                        sink, batch, result, health, tokens=tokens, tokens_left=self.plan.total_tokens - seen,
                        seconds={**result.seconds, "loader": loaded - started, "step": now - started},
                        held_up=self.held_up, throughput=self.throughput, on_a_device=self.graph.device.type != "cpu",
                        on_device=on_device, at_peak=at_peak,
                    )  # fmt: skip
                    if evaluation is not None:
                        record_evaluation(sink, *evaluation)
                    sink.commit(step, seen, time.time_ns())
                self.writer.check()
                if stopping is not None:
                    # Not saved: the older checkpoints, from which the run can still be mended, keep their places.
                    raise stopping
                if step % self.output.checkpoint_every == 0 or is_last:
                    self._save(sink)
        return ended_by

    def _say_what_was_recorded(self) -> None:
        """Once, after the step in which it was."""
        if (recorded := self.graph.microbatch.news()) is not None:
            self.progress.say(recorded)

    def _asked_to_stop(self) -> str | None:
        """The name of the signal by which a rank has been asked to stop, the lowest such rank's."""
        asked = self.graph.ranks.gather(torch.tensor([float(self.stop.number)], dtype=torch.float64))
        numbers = [int(number) for number in asked if number]
        return signal.Signals(numbers[0]).name if numbers else None

    def _look_for_repetition(self, step: int, result: StepResult) -> None:
        """Says of the first step whose activations did not fit that it was repeated; the metrics say it of each."""
        if not result.repeated or self.repeated or result.activation_rows is None or self.graph.arena is None:
            return
        self.repeated = True
        most, rows = max(result.activation_rows), self.graph.arena.rows
        self.run_dir.event("step_repeated", step=step, activation_rows=rows, needed=most)
        self.progress.say(
            f"step {step}: repeated, with each layer's experts computed again: a microbatch brought {most} rows to a "
            f"rank, and activation_rows = {rows}; `time/repeated` tells of others"
        )

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
            ranks=self.graph.ranks,
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

    def _save(self, sink: Sink | None) -> None:
        step = self.state.step
        started = time.perf_counter()
        self.observe(step, "save")
        self._wait_for_save()
        require_alike(self.graph, step=step)
        self.writer.save(
            step=step,
            tensors=self.graph.kept(),
            state=self.state.scalars(self.graph),
            identity=self.identity,
            before_head=None if sink is None else sink.flush,
        )
        self.held_up = time.perf_counter() - started
        self.throughput.pause(self.held_up)
        self.run_dir.event("saving", step=step)
