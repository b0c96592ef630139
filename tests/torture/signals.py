"""A rank is asked to stop at a random instant, once or twice, or all of them are; every launch ends as documented.

All ranks stop after the same step, saved, with status 130; or with 0, where the run had come to its end. No rank
leaves an error, the next launch goes on, with another number of ranks, and at the end stands what the run of one
rank leaves that nothing happened to. One rank alone may also end at once, until its first step.
"""

import random
import signal
from functools import partial
from pathlib import Path

from nmoe.train.signals import WATCHED
from tests.torture.blows import Trainings
from tests.torture.campaign import Batch, Tally
from tests.train.launches import FOUR, SIX, SOFTMAX, first_difference

TITLE = "signals at any instant to one rank, twice, or to all / not obeyed, not exact"
STEPS, A_RUN = 16, 5
BATCHES = {f"{ranks} ranks, {part}": (ranks, 20) for ranks in (1, 2, 3, 4) for part in (1, 2)}
SAMPLE = {"2 ranks, 1": (2, 2)}


def batches(sample: bool) -> list[Batch]:
    wanted = SAMPLE if sample else BATCHES
    return [Batch(name, partial(_ask, name, ranks, signals)) for name, (ranks, signals) in wanted.items()]


def _ask(name: str, ranks: int, signals: int, directory: Path) -> Tally:
    draws = random.Random(f"signals: {name}")
    keys = (*SIX, *SOFTMAX) if ranks == 3 else FOUR
    runs = Trainings(directory, *keys, f"output.stop_after_step={STEPS}", "eval.bpb.every_tokens=192",
                     "eval.bpb.max_tokens=64", "output.checkpoint_every=3", "output.progress_every=1")  # fmt: skip
    runs.straight("straight")
    wanted = runs.left("straight")
    lost, obeyed, number = [], 0, 0
    while obeyed < signals:
        number += 1
        run = f"run {number}"
        for _ in range(min(A_RUN, signals - obeyed)):
            blow = runs.draw(draws, run, ranks, STEPS, draws.choice(WATCHED))
            how = draws.choice(({}, {"twice": True}, {"group": True}))
            past, ended = runs.head(run), runs.attempt(run, ranks, blow=blow, **how)
            said = f"{run}, {blow}, {how}: {ended.codes}\n" + "\n".join(ended.said)
            if ended.codes == (0,) * ranks:
                break
            obeyed += 1
            name_of = signal.Signals(blow.number).name
            at_once = ranks == 1 and _before_its_first_step(ended.said[0])
            if ended.codes != (130,) * ranks or not (at_once or f"stopped by {name_of} " in ended.said[0]):
                lost.append(said)
            elif not at_once and f"after step {runs.head(run)} of" not in ended.said[0] and runs.head(run):
                lost.append(f"HEAD names step {runs.head(run)}: {said}")
            if runs.runs().errors(run) or runs.head(run) < past:
                lost.append(f"an error is left, or HEAD has gone back from {past}: {said}")
        ended = runs.attempt(run, draws.choice((1, ranks)))
        if any(ended.codes):
            lost.append(f"{run}: could not go on: {ended.codes}\n" + "\n".join(ended.said))
            continue
        difference = first_difference(wanted, runs.left(run))
        lost += [f"{run}: {difference}"] if difference else []
    return Tally(tried=obeyed, lost=tuple(lost), notes={"runs": number})


def _before_its_first_step(said: str) -> bool:
    """Whether a rank says that it has ended at once, and of no step that it has taken one."""
    *before, last = said.splitlines() or [""]
    return last == "interrupted" and not any(line.startswith("step ") for line in before)
