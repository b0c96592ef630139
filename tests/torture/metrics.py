"""A run is killed again and again, and its ledger is looked at each time, as it stands.

After each kill every file that a reader sees must be a whole step, each step there once and none left out, up to HEAD's
at least; and whatever has ever been seen must still be there, with the run's rows or set aside under the attempt
that wrote it. The ledger of the finished run must be, metric by metric and bit for bit, that of the run that nothing
happened to.
"""

import random
import signal
from functools import partial
from pathlib import Path

from nmoe.metrics import ledger
from nmoe.metrics.reader import read_rows
from tests.torture.blows import Trainings, apart
from tests.torture.campaign import Batch, Tally
from tests.torture.kills import SHORT_WAIT
from tests.train.launches import FOUR, first_difference

TITLE = "kills mid-run / torn, double or lost steps of metrics"
STEPS, A_RUN = 12, 10
BATCHES = {f"one rank, {number}": (1, 50) for number in range(1, 10)} | {"two ranks": (2, 50)}
SAMPLE = {"one rank, 1": (1, 3)}


def batches(sample: bool) -> list[Batch]:
    wanted = SAMPLE if sample else BATCHES
    return [Batch(name, partial(_cut, name, ranks, kills)) for name, (ranks, kills) in wanted.items()]


def _cut(name: str, ranks: int, kills: int, directory: Path) -> Tally:
    draws = random.Random(f"metrics: {name}")
    keys = (*FOUR, f"output.stop_after_step={STEPS}", "eval.bpb.every_tokens=192", "eval.bpb.max_tokens=64")
    runs = Trainings(directory, *keys)
    runs.straight("straight")
    wanted = runs.left("straight")
    lost, landed, number, aside = [], 0, 0, 0
    while landed < kills:
        number += 1
        run, seen = f"killed {number}", set()
        for _ in range(min(A_RUN, kills - landed)):
            every = f"output.checkpoint_every={draws.randint(1, 5)}"
            blow = runs.draw(draws, run, ranks, STEPS, signal.SIGKILL)
            ended = runs.attempt(run, ranks, every, SHORT_WAIT, blow=blow)
            if ended.codes[blow.rank] != -signal.SIGKILL:
                if any(ended.codes):
                    lost.append(f"{run}, {blow}: {ended.codes}\n" + "\n".join(ended.said))
                break
            landed += 1
            lost += [f"{run}, {blow}: {fault}" for fault in _look(runs, run, seen)]
        ended = runs.attempt(run, ranks)
        if any(ended.codes):
            lost.append(f"{run}: could not go on: {ended.codes}\n" + "\n".join(ended.said))
            continue
        lost += [f"{run}, finished: {fault}" for fault in _look(runs, run, seen)]
        aside += sum(there == "aside" for *_, there in seen)
        difference = first_difference(wanted, runs.left(run))
        lost += [f"{run}: {difference}"] if difference else []
    return Tally(tried=landed, lost=tuple(lost), notes={"runs": number, "steps set aside": aside})


def _look(runs: Trainings, run: str, seen: set[tuple[int, int, str]]) -> list[str]:
    """What is wrong with a run's ledger; `seen` becomes what is there now, and says what was there before."""
    head = runs.head(run)
    found = apart(lambda: _state(runs.directory / "metrics" / run), runs.directory / "logs" / "ledger.json")
    here = {(step, attempt) for step, attempt in found["here"]}
    aside = {(step, attempt) for step, attempt in found["aside"]}
    faults = list(found["faults"])
    steps = sorted(step for step, _ in here)
    if steps != list(range(1, len(steps) + 1)):
        faults.append(f"the ledger has the steps {steps}")
    if len(steps) < head:
        faults.append(f"HEAD names step {head}, the ledger ends at {len(steps)}")
    attempts = [attempt for _, attempt in sorted(here)]
    if attempts != sorted(attempts):
        faults.append(f"an older attempt's rows come after a newer one's: {sorted(here)}")
    gone = {(step, attempt) for step, attempt, _ in seen} - here - aside
    if gone:
        faults.append(f"rows of (step, attempt) {sorted(gone)} were there, and are nowhere")
    back = {(step, attempt) for step, attempt, there in seen if there == "aside"} & here
    if back:
        faults.append(f"rows of (step, attempt) {sorted(back)} had been set aside, and are back")
    seen.clear()
    seen |= {(*one, "here") for one in here} | {(*one, "aside") for one in aside}
    return faults


def _state(directory: Path) -> dict[str, list]:
    """(step, attempt) of every file that stands or is set aside, read whole, and what is wrong with them."""
    faults: list[str] = []
    here, aside = [], []
    for step, path in ledger.files(directory).items():
        table = ledger.read(path, step=step, run=directory.name)
        attempts = table.column("attempt").unique().to_pylist()
        if len(attempts) != 1:
            faults.append(f"{path.name} has rows of the attempts {attempts}")
        here.append((step, attempts[0]))
    rows = read_rows(directory)
    keys = [(row.step, row.name, row.layer, row.expert, row.rank, row.label) for row in rows]
    if len(set(keys)) != len(keys):
        faults.append("a reader sees a row twice")
    if {(row.step, row.attempt) for row in rows} != set(here):
        faults.append("a reader sees other steps than the files have")
    for folder in (directory / "superseded").glob("*"):
        for step, path in ledger.files(folder).items():
            attempts = ledger.read(path, step=step, run=directory.name).column("attempt").unique().to_pylist()
            if [f"attempt_{attempt}" for attempt in attempts] != [folder.name.partition(".")[0]]:
                faults.append(f"{folder.name}/{path.name} has rows of the attempts {attempts}")
            aside.append((step, attempts[0]))
    return {"here": here, "aside": aside, "faults": faults}
