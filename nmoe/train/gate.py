"""The gate: is a run that was killed and continued, bit for bit, the run that never stopped?

Two runs of one plan, every attempt in a fresh process:

    straight   N steps
    killed     kill -9 in the middle of each step S, each time continued by a new process, to N steps

With --ranks R the killed run is one of R ranks. One of them is killed, another each time, the others have
to end by themselves, and R new ones continue; the straight run stays one of one rank, so that the comparison
proves both.

The killed run saves at a cadence that divides no S and differs from the straight run's, so that each
continuation starts some steps back and repeats them. Then everything that can be compared is, as by `nmoe compare`:
of every step the digest of the batch, router loads, loss, gradient norms and rates at full digits; at the end every
tensor of the state (weights, masters, moments, biases) and every counter (schedule, loader, random streams).
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from nmoe.checkpoint import reader
from nmoe.errors import ConfigError, Diagnostic
from nmoe.plan.plan import Plan
from nmoe.report import compare as report
from nmoe.report.run import read_run
from nmoe.train.drill import PHASES
from nmoe.train.launch import require_ranks
from nmoe.train.launcher import END_S, launch, otherwise
from nmoe.train.loop import require_runnable

OWN_KEYS = ("run_dir", "metrics_dir", "metrics_every", "checkpoint_every", "stop_after_step")


@attrs.frozen(kw_only=True)
class GateResult:
    """identical, or the first thing that differs (empty string when nothing does)."""

    identical: bool
    first_difference: str
    steps: int
    kills: tuple[str, ...]
    fingerprint: str
    state_digest: str
    compared: dict[str, int]
    ranks: int

    def to_json(self) -> dict[str, Any]:
        return attrs.asdict(self)


def kill_points(steps: Sequence[int]) -> list[str]:
    """STEP:PHASE for each step, going round the phases so that different places are hit."""
    middle = PHASES[1:]
    return [f"{step}:{middle[index % len(middle)]}" for index, step in enumerate(steps)]


def cadences(steps: int, kills: Sequence[int]) -> tuple[int, int]:
    """(straight, killed) save cadences: the killed one divides no kill step; both save before the end.

    A cadence near a sixth of the run leaves several saves and several repeated steps.
    """
    wanted = max(steps // 6, 2)
    candidates = sorted(range(2, max(steps, 3)), key=lambda c: (abs(c - wanted), c))
    killed = next((c for c in candidates if all(s % c for s in kills)), steps + 1)
    straight = next(c for c in range(max(killed // 2, 1), steps + 3) if c != killed)
    return straight, killed


def run_gate(
    plan: Plan, config: str, sets: Sequence[str], *, steps: int, kills: Sequence[int], directory: Path,
    say: Callable[[str], None], ranks: int = 1,
) -> GateResult:
    """Run both trainings below `directory` and compare them. ranks: of the killed one.

    Raises ConfigError if what is asked for does not fit the plan, RunError N0511 if an attempt ends
    in another way than it should.
    """
    require_runnable(plan)
    require_ranks(plan, ranks, ranks)
    _check(plan, sets, steps, kills, directory)
    straight_every, killed_every = cadences(steps, kills)
    common = [
        *sets,
        f"output.stop_after_step={steps}",
        f"output.metrics_dir={json.dumps(str(directory / 'metrics'))}",
        "output.metrics_every=1",
    ]

    def arguments(name: str, every: int) -> list[str]:
        mine = [*common, f"output.run_dir={json.dumps(str(directory / name))}", f"output.checkpoint_every={every}"]
        return [config, *(word for item in mine for word in ("--set", item))]

    directory.mkdir(parents=True, exist_ok=True)

    say(f"straight: {steps} steps, saving every {straight_every}")
    _attempt([sys.executable, "-m", "nmoe", "train", *arguments("straight", straight_every)], directory, expect=0)
    points, end_s = kill_points(sorted(kills)), plan.config.output.rank_timeout + END_S
    for index, point in enumerate(points):
        victim = index % ranks
        who = f" in rank {victim} of {ranks}" if ranks > 1 else ""
        say(f"killed:   SIGKILL at step {point.replace(':', ', ')}{who}, saving every {killed_every}")
        command = [sys.executable, "-m", "nmoe.train.drill", *arguments("killed", killed_every), "--kill", point]
        if ranks == 1:
            _attempt(command, directory, expect=-signal.SIGKILL)
        else:
            expected = [-signal.SIGKILL if rank == victim else 1 for rank in range(ranks)]
            launch([*command, "--rank", str(victim)], directory, expected, end_s=end_s)
    say(f"killed:   continuing to step {steps}" + (f" with {ranks} ranks" if ranks > 1 else ""))
    command = [sys.executable, "-m", "nmoe", "train", *arguments("killed", killed_every)]
    if ranks == 1:
        _attempt(command, directory, expect=0)
    else:
        launch(command, directory, [0] * ranks, end_s=end_s)

    difference, compared, digest = compare(directory, "straight", "killed", steps)
    return GateResult(
        identical=not difference, first_difference=difference, steps=steps, kills=tuple(points),
        fingerprint=plan.fingerprint, state_digest=digest, compared=compared, ranks=ranks,
    )


def compare(directory: Path, a: str, b: str, steps: int) -> tuple[str, dict[str, int], str]:
    """The first difference between two runs ('' if none), how much was compared, and a's state digest.

    As `nmoe compare`; but every step has to be in both, both have to end with the last one, and every byte of what
    they end with is read.
    """
    heads = [reader.require_head(directory / name / "checkpoints") for name in (a, b)]
    found = report.compare(*(read_run(directory / name, metrics=directory / "metrics") for name in (a, b)))
    difference = ""
    if found.first is not None:
        stage, first = found.first
        what = first.what + (f" of layer {first.layer}" if first.layer is not None else "")
        difference = f"step {found.step}, {stage.name}: {what} is {first.a!r} in `{a}` and {first.b!r} in `{b}`"
        difference += f" ({first.where})" if first.where else ""
    elif missing := sorted(set(range(1, steps + 1)) - set(found.rows)):
        difference = f"step {missing[0]}: not both have its rows"
    elif found.lonely:
        name, who = next(iter(found.lonely.items()))
        difference = f"{name}: only `{a if who == 'A' else b}` has it"
    elif [head.step for head in heads] != [steps, steps] or steps not in found.checkpoints:
        difference = f"step {steps}: not both end with its checkpoint"
    if difference:
        return difference, {}, ""
    compared = {
        "steps": steps,
        "figures": sum(stage.compared for stage in found.stages if stage.name != "weights"),
        "tensors": len(heads[0].tensors),
        "counters": len(heads[0].state),
    }
    return "", compared, heads[0].state_digest


def _attempt(command: list[str], directory: Path, *, expect: int) -> None:
    """One process; its output is kept for the message if it ends in another way than expected."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != expect:
        log = directory / "attempt.log"
        log.write_text(done.stdout + done.stderr)
        tail = tuple((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise otherwise(f"ended with status {done.returncode}, not {expect}", command, log, tail)


def _check(plan: Plan, sets: Sequence[str], steps: int, kills: Sequence[int], directory: Path) -> None:
    wrong = ""
    mine = [key for key in OWN_KEYS if any(item.partition("=")[0].strip() == f"output.{key}" for item in sets)]
    if not 1 <= steps <= plan.total_steps:
        wrong = f"--steps {steps} does not fit the plan's {plan.total_steps} steps"
    elif not kills:
        wrong = "--kill names no step"
    elif bad := [step for step in kills if not 1 <= step <= steps]:
        wrong = f"--kill {bad[0]} is not one of the steps 1 to {steps}"
    elif len(set(kills)) != len(kills):
        wrong = "--kill names a step twice"
    elif mine:
        wrong = f"--set output.{mine[0]} is the gate's own: its two runs differ in it"
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        wrong = f"--directory {directory} is not an empty or new directory"
    if wrong:
        raise ConfigError(Diagnostic(code="N0512", message=wrong, help="for example: --steps 30 --kill 7,13,22"))
