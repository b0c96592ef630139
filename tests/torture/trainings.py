"""Whole trainings of a tiny model in forked processes, and whether what they leave is what the straight run left.

A training has a disk: a directory with its `run` and `metrics`, and nothing else in it. The process that forks has
trained once itself: what a first training loads and initialises is then there for all of them.
"""

import gc
import itertools
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import attrs
import torch

from nmoe.checkpoint.verify import verify
from nmoe.cli.main import run
from nmoe.data import corpus
from nmoe.rdep import control
from tests.torture import tracer
from tests.torture.calls import Call
from tests.torture.tracer import MADE, Do
from tests.train import work
from tests.train.launches import Launches, first_difference

SMALL = Path(__file__).with_name("small.toml")
STEPS = 3
CLOSE_S = 0.5  # that the first rank stays for one that is dead; the store is a file, and holds without it

_numbers = itertools.count()
_fsync = os.fsync


@attrs.frozen(kw_only=True)
class Straight:
    """What the run that nothing happened to left. files: names below its disk, without what was set aside.

    sets: keys that it was trained with, and that those have which are compared with it.
    """

    sets: tuple[str, ...]
    left: list[tuple]
    files: set[str]


@attrs.frozen(kw_only=True)
class Ended:
    """How each rank of an attempt ended ("exit 0", "signal 9"), and what each wrote."""

    ends: list[str]
    said: list[str]


def begin(directory: Path, *sets: str) -> Straight:
    """Make this process one that forks trainings, by the straight run, on the disk `directory`/straight."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    os.fsync = lambda descriptor: None  # nobody cuts the power; a traced rank makes the call, and the tracer answers
    load, tokens = corpus.load, {}

    def load_once(name, part, tokenizer):
        if part not in tokens:
            tokens[part] = load(name, part, tokenizer)
        return tokens[part]

    corpus.load = load_once
    control.LEAVE_S = CLOSE_S
    work.speak_into(directory / "straight.txt")
    disk = directory / "straight"
    assert run(command(disk, *sets)) == 0, (directory / "straight.txt").read_text()
    straight = Straight(sets=sets, left=left(disk), files=files(disk))
    gc.collect()
    gc.freeze()
    return straight


def command(disk: Path, *sets: str) -> list[str]:
    keys = (f'output.run_dir="{disk / "run"}"', f'output.metrics_dir="{disk / "metrics"}"', *sets)
    return ["train", str(SMALL), *(word for key in keys for word in ("--set", key))]


def attempt(
    disk: Path,
    ranks: int = 1,
    decide: Callable[[Call], Do] = lambda call: MADE,
    *,
    told: Callable[[Call, int], None] = lambda call, result: None,
    traced: Collection[int] = (),
    prepare: Callable[[], None] = lambda: None,
    sets: Collection[str] = (),
) -> Ended:
    """`nmoe train` on forked ranks; `decide` is asked about each call on `disk` of those `traced`.

    prepare: called in each rank before it starts.
    """
    disk.mkdir(exist_ok=True)
    beside = disk.with_name(f"{disk.name}.{next(_numbers)}")
    beside.mkdir()
    files = [beside / f"{rank}.txt" for rank in range(ranks)]

    def rank_of(rank: int) -> Callable[[], int]:
        def body() -> int:
            if rank in traced:
                os.fsync = _fsync
            prepare()
            store = work.store(beside, ranks) if ranks > 1 else None
            return work.training(
                rank=rank, ranks=ranks, store=store, config=str(SMALL), sets=command(disk, *sets)[3::2], log=beside
            )

        return body

    ends = tracer.run([rank_of(rank) for rank in range(ranks)], disk, decide, told=told, traced=traced)
    said = [file.read_text() if file.exists() else "" for file in files]
    shutil.rmtree(beside)
    return Ended(ends=ends, said=said)


def left(disk: Path) -> list[tuple]:
    return Launches(disk, None).left("run")


def files(disk: Path) -> set[str]:
    """Names below it; those of a ledger's files that were set aside are another matter."""
    found = (str(path.relative_to(disk)) for path in disk.rglob("*"))
    return {name for name in found if "/superseded" not in name}


def whole(disk: Path) -> tuple[int, str]:
    """The step that HEAD names, and what is wrong with the checkpoints, if anything is."""
    report = verify(disk / "run" / "checkpoints", threads=1)
    return 0 if report.head is None else report.head.step, "; ".join(map(str, report.faults))


def going_on(disk: Path, straight: Straight, ranks: int = 1) -> str:
    """`nmoe train` again, to the end: what is not as the straight run left it, if anything is not."""
    ended = attempt(disk, ranks, sets=straight.sets)
    if ended.ends != ["exit 0"] * ranks:
        return f"did not go on: {ended.ends} {' '.join(ended.said)[-2000:]}"
    report = verify(disk / "run" / "checkpoints", threads=1)
    if report.faults or report.notes:
        return f"went on to {'; '.join(map(str, (*report.faults, *report.notes)))}"
    if different := first_difference(left(disk), straight.left):
        return f"went on to another end: {different}"
    if different := files(disk) ^ straight.files:
        return f"files are left over or missing: {', '.join(sorted(different))}"
    return ""
