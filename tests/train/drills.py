"""One rank of a training goes wrong: how all of them end, what they say, what stands; `python -m tests.train.drills`.

Every drill goes on from a copy of one run that has been saved at step SAVED by 4 ranks. After it the newest
checkpoint must be whole, and the same ranks go on from it to the digest of the run that nothing happened to.
Without torchrun the ranks are forked, and nobody ends them but themselves; the last drills are of torchrun itself.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

from nmoe.checkpoint.verify import verify
from tests.rdep.ranks import ROOT, Ranks
from tests.train.launches import FOUR, TINY, Launch, Launches

RANKS, SAVED, STEPS = 4, 4, 8
KEYS = (*FOUR, "output.checkpoint_every=2", "eval.bpb.every_tokens=384")
ON_FIRE, KILLED = "OnFire: the rank is on fire", "ended without a word: it was killed, or crashed outside Python"
FULL, SHORT = "no space left on device (ENOSPC) [N0301]", "can't allocate memory"
LATE = "did not come to"
SHORT_WAIT = ("output.rank_timeout=15",)
"""Where somebody is waited for in vain; long enough for a start on a busy machine."""


@attrs.frozen
class Drill:
    """fault: as `tests.train.faults`. who: the rank. cause: what all say of it. kind: as `tests.train.work`."""

    fault: str
    who: int
    cause: str
    kind: str = "file"

    @property
    def name(self) -> str:
        return f"{self.fault}, rank {self.who}" + (", which holds the store" if self.kind == "tcp" else "")

    @property
    def survives(self) -> bool:
        """Whether the rank itself can still say something."""
        return not self.fault.startswith(("SIGKILL", "SIGSTOP", "exit"))


DRILLS = (
    Drill("SIGKILL@batch", 0, KILLED),
    Drill("SIGKILL@forward", 1, KILLED),
    Drill("SIGKILL@backward", 3, KILLED),
    Drill("SIGKILL@optimizer", 2, KILLED),
    Drill("SIGKILL@metrics", 0, KILLED, "tcp"),
    Drill("SIGKILL@evaluation", 1, KILLED),
    Drill("SIGKILL@objects", 1, KILLED),
    Drill("SIGKILL@objects", 0, KILLED),
    Drill("SIGKILL@objects", 0, KILLED, "tcp"),
    Drill("exit@forward", 2, KILLED),
    Drill("SIGSTOP@forward", 1, LATE),
    Drill("SIGSTOP@evaluation", 0, LATE),
    Drill("SIGSTOP@objects", 3, LATE),
    Drill("SIGSTOP@restoring", 2, LATE),
    Drill("memory@forward", 1, SHORT),
    Drill("memory@backward", 0, SHORT),
    Drill("memory@optimizer", 3, SHORT),
    Drill("raise@loader thread", 2, f"making the batch failed: {ON_FIRE} [N0221]"),
    Drill("raise@evaluation", 1, ON_FIRE),
    Drill("raise@router", 3, ON_FIRE),
    Drill("raise@save", 0, ON_FIRE),
    Drill("ENOSPC@objects", 2, FULL),
    Drill("ENOSPC@objects", 0, FULL),
    Drill("ENOSPC@ledger", 0, FULL),
    Drill("raise@opening", 1, ON_FIRE),
    Drill("raise@building", 2, ON_FIRE),
    Drill("SIGKILL@building", 0, KILLED, "tcp"),
    Drill("SIGKILL@restoring", 3, KILLED),
    Drill("raise@restoring", 1, ON_FIRE),
)


class Ground:
    """Where drills are held: the run that they begin with, and the digest that they must come to."""

    def __init__(self, launches: Launches):
        self.launches = launches
        launches.finished("before/run", RANKS, *KEYS, f"output.stop_after_step={SAVED}")
        self.digest = launches.finished("straight/run", 1, *KEYS, f"output.stop_after_step={STEPS}")

    def begin(self, name: str) -> None:
        """The run `name`/run is a copy of the one before."""
        shutil.copytree(self.launches.directory / "before", self.launches.directory / name)

    def hold(self, drill: Drill, *sets: str) -> Launch:
        self.begin(drill.name)
        return self.launches.train(
            f"{drill.name}/run", RANKS, *KEYS, f"output.stop_after_step={STEPS}", *sets,
            who=drill.who, fault=drill.fault, kind=drill.kind,
        )  # fmt: skip

    def go_on(self, name: str) -> str:
        return self.launches.finished(f"{name}/run", RANKS, *KEYS, f"output.stop_after_step={STEPS}")

    def whole(self, name: str) -> bool:
        """Whether `nmoe verify` finds no fault, and a checkpoint not older than the one that there was."""
        report = verify(self.launches.path(name) / "run" / "checkpoints")
        return not report.faults and report.head is not None and report.head.step >= SAVED


def faults_of(drill: Drill, launch: Launch, errors: dict[int, dict]) -> Iterator[str]:
    """What is wrong with how a drill ended."""
    expected = {"SIGKILL": "signal 9", "SIGSTOP": "stopped", "exit": "exit 7"}.get(drill.fault.partition("@")[0])
    for rank, (end, code, said) in enumerate(zip(launch.ends, launch.codes, launch.said, strict=True)):
        if rank == drill.who and not drill.survives:
            if end != expected:
                yield f"rank {rank} ended as {end}"
            continue
        if end != "raised" and code != 1:
            yield f"rank {rank} ended as {end}, {code}"
        told = json.dumps(errors.get(rank, {}).get("errors", ""))
        for where, text in ((f"rank {rank}'s stderr", said), (f"rank {rank}'s error file", json.loads(f"[{told}]")[0])):
            text = text if isinstance(text, str) else " ".join(one["message"] for one in text)
            if where.endswith("file") and "@opening" in drill.fault:
                continue  # nobody knows the run's directory yet
            if drill.cause.removesuffix(" [N0301]").removesuffix(" [N0221]") not in text:
                yield f"{where} does not say `{drill.cause}`: {text}"
            if rank != drill.who and f"rank {drill.who} " not in text:
                yield f"{where} does not name rank {drill.who}: {text}"
            if rank != drill.who and "Traceback" in text:
                yield f"{where} has a traceback: {text}"


def under_torchrun(ground: Ground, drill: Drill, *sets: str) -> tuple[int, float, str]:
    """The launcher's exit status, seconds until it had ended, and its output."""
    ground.begin(f"{drill.name}, torchrun")
    path = ground.launches.path(f"{drill.name}, torchrun/run")
    keys = [*KEYS, f"output.stop_after_step={STEPS}", f'output.run_dir="{path}"',
            f'output.metrics_dir="{path.parent / "metrics"}"', *sets]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m",
               "tests.train.rank", drill.fault, str(drill.who), str(TINY), *keys]  # fmt: skip
    started = time.monotonic()
    # In a group of its own, as a terminal's: Ctrl-C is for it alone.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, start_new_session=True)
    return done.returncode, time.monotonic() - started, done.stdout + done.stderr


def main(wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="nmoe-drills-") as directory:
        (Path(directory) / "ranks").mkdir()
        server = Ranks(Path(directory) / "ranks", "tests.train.work")
        ground = Ground(Launches(Path(directory), server))
        print(f"{'drill':52} {'launcher':9} {'seconds':>7}  {'ends':44} {'first cause named by':20} whole  then")
        for drill in DRILLS:
            if wanted and drill.name not in wanted:
                continue
            patience = SHORT_WAIT if drill.cause == LATE and drill.name != "SIGSTOP@forward, rank 1" else ()
            started = time.monotonic()
            launch = ground.hold(drill, *patience)
            seconds = time.monotonic() - started
            errors = ground.launches.errors(f"{drill.name}/run")
            wrong = list(faults_of(drill, launch, errors))
            ends = ", ".join(
                str(code) if code is not None else {"raised": "1"}.get(end, end)
                for end, code in zip(launch.ends, launch.codes, strict=True)
            )
            named = [rank for rank, one in errors.items() if re.escape(drill.cause)[:9] in re.escape(json.dumps(one))]
            _row(ground, drill.name, drill.name, "none", seconds, ends, sorted(named), wrong)
        for drill in AGENT:
            if wanted and drill.name not in wanted:
                continue
            code, seconds, output = under_torchrun(ground, drill, *(SHORT_WAIT if drill.cause == LATE else ()))
            name = f"{drill.name}, torchrun"
            errors = ground.launches.errors(f"{name}/run")
            named = [rank for rank, one in errors.items() if drill.cause[:9] in json.dumps(one)]
            wrong = [] if drill.cause.partition(" [")[0] in output else [f"the cause is nowhere to be read: {output}"]
            _row(ground, drill.name, name, "torchrun", seconds, f"launcher: {code}", sorted(named), wrong)
        server.close()


def _row(ground, drill, run, launcher, seconds, ends, named, wrong) -> None:
    whole = ground.whole(run)
    same = ground.go_on(run) == ground.digest
    files = ", ".join(map(str, named))
    print(f"{drill:52} {launcher:9} {seconds:7.1f}  {ends:44} {files:20} {'yes' if whole else 'NO':5}  "
          f"{'same digest' if same else 'OTHER DIGEST'}", *wrong, flush=True)  # fmt: skip


AGENT = (
    Drill("SIGKILL@forward", 1, KILLED),
    Drill("SIGSTOP@forward", 2, LATE),
    Drill("memory@backward", 0, SHORT),
    Drill("raise@evaluation", 3, ON_FIRE),
    Drill("ENOSPC@objects", 2, FULL),
    Drill("raise@building", 1, ON_FIRE),
    Drill("SIGKILL@restoring", 0, KILLED),
)

if __name__ == "__main__":
    main(sys.argv[1:])
