"""From a frozen plan to a finished run: hardware, ranks and directory first, then one attempt."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs

from nmoe import platform
from nmoe.checkpoint.objects import left_over
from nmoe.checkpoint.reader import open_head
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.errors import ConfigError, Diagnostic
from nmoe.metrics.reader import last_value
from nmoe.plan.plan import Plan
from nmoe.report.run import metrics_directory
from nmoe.train import failure
from nmoe.train.attempt import Attempt, End
from nmoe.train.launch import Launch, launched, require_ranks
from nmoe.train.run_dir import FollowedRun, RunDir
from nmoe.train.signals import StopRequest
from nmoe.train.step import Observer

EXIT_SIGNAL = 130


@attrs.frozen(kw_only=True)
class Outcome:
    """How a call of `train` ended: a paragraph for stdout, empty on all ranks but the first, and the exit status."""

    summary: str
    exit_code: int


def _no_observer(step: int, phase: str) -> None:
    return


def train(
    plan: Plan, *, config_text: str, new_lineage: bool = False, observe: Observer = _no_observer,
    stop: StopRequest | None = None,
) -> Outcome:
    """Start, continue, or report as complete the run that `plan` describes; every rank of a launch calls it.

    config_text: the config as its author wrote it, kept in the run directory for people.
    new_lineage: go on although the environment is no longer the checkpoint's, openly, as a new line.
    observe(step, phase) is called as each phase of a step begins; the gate kills from there.
    stop: the caller's, if it watches signals already.
    Raises ConfigError if the plan does not run, RunError for everything that stops it later.
    """
    process = platform.process()
    require_runnable(plan)
    if process.world_size == process.local_world_size:  # of several nodes nobody knows the others before they meet
        require_ranks(plan, process.world_size, process.local_world_size)
    platform.require(plan.config.platform.target, plan.config.platform.threads)
    with ExitStack() as stack:
        stack.enter_context(_named(process))
        if stop is None:
            stop = stack.enter_context(StopRequest(at_once=process.world_size == 1))
        launch = stack.enter_context(launched(plan, process))
        run = _open(plan, config_text, launch, stack)
        if run.is_complete(plan.total_steps):
            launch.control.first("whose checkpoint it is", run.require_own_head)
            _clear(run, launch, keep=plan.config.output.keep_checkpoints)
            return _outcome(plan, run, launch, None)
        attempt = Attempt(plan, run, launch, stop, observe)
        try:
            end = attempt.run(new_lineage=new_lineage)
        except KeyboardInterrupt:  # asked to stop before its first step: no failure
            raise
        except BaseException as error:
            failure.record(
                run.path, error, rank=launch.control.rank, ranks=launch.control.ranks,
                lineage=run.lineage, attempt=run.attempt, step=attempt.state.step,
            )  # fmt: skip
            raise
        return _outcome(plan, run, launch, end)


@contextmanager
def _named(process: platform.Process) -> Iterator[None]:
    """Of several ranks that write to one terminal each says which it is."""
    try:
        yield
    except Exception as error:
        if process.world_size > 1:
            error.add_note(f"this was rank {process.rank} of {process.world_size}")
        raise


def _open(plan: Plan, config_text: str, launch: Launch, stack: ExitStack) -> RunDir | FollowedRun:
    """Rank 0 opens the run's directory and owns it until `stack` ends; the others hear of it."""
    mine: list[RunDir] = []

    def open_it() -> Mapping[str, Any]:
        run = stack.enter_context(RunDir.open(plan, config_text=config_text))
        mine.append(run)
        return {"path": str(run.path), "lineage": run.lineage, "attempt": run.attempt}

    told = launch.control.first("opening the run's directory", open_it)
    if mine:
        return mine[0]
    return FollowedRun(path=Path(told["path"]), lineage=told["lineage"], attempt=told["attempt"])


def _clear(run: RunDir | FollowedRun, launch: Launch, *, keep: int) -> None:
    """No attempt follows the last, so what a kill in its last save's retention has left goes here, if there is any.

    As at a start: only after all that HEAD stands for has been verified.
    """
    if launch.control.first("looking for what a kill has left", lambda: left_over(run.checkpoints, keep=keep)):
        open_head(run.checkpoints, launch.control)
        CheckpointWriter(run.checkpoints, keep=keep, control=launch.control)


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


def _outcome(plan: Plan, run: RunDir | FollowedRun, launch: Launch, end: End | None) -> Outcome:
    """What is said of an attempt, or of a run in which nothing was left to do."""
    total, bits, exit_code = plan.total_steps, None, 0
    if end is None:
        first = f"complete: {total} steps, nothing left to do"
        metrics = metrics_directory(run.path, plan.config.output.metrics_dir)
        bits = last_value(metrics / run.name, "eval/bits_per_byte")
    elif end.step == total:
        first, bits = f"complete: {total} steps", end.bits_per_byte
    elif end.signal is not None:
        where = f"after step {end.step} of {total}, saved" if end.step else "before the first step"
        first = f"stopped by {end.signal} {where}; run again to continue"
        exit_code = EXIT_SIGNAL
    else:
        first = f"stopped after step {end.step} of {total}, as [output] stop_after_step says; raise it to continue"
    lines = [first]
    if bits is not None:
        lines.append(f"held-out bits per byte: {bits:.4f}")
    lines.append(f"run: {run.path}")
    return Outcome(summary="\n".join(lines) if launch.leads else "", exit_code=exit_code)
