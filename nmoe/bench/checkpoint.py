"""`nmoe bench checkpoint`: what saving costs a training: how long the steps are held up, and what hashing adds.

With the writer of a run the whole state of CONFIG is saved, after three steps of it; or, with --parameters, a state of
P parameters that no model has: for each a bf16 master and two bf16 moments, in tensors of 2048 columns, on the CPU.

    held  ours             for which `save` holds the steps up: the copy, and whatever else it does; on a GPU, where the
                           copy runs beside the next step, by how much the two together take longer than a step
          a training step  the mean of several; for CONFIG alone
    save  ours             from the call until HEAD names the checkpoint; but for `held` in threads beside the training
          unhashed         the same by the same writer, but for the names of objects, which are hashes of a count and
                           not of their bytes: hashing adds ours / unhashed - 1, the median over the turns
          one file         as many bytes written into one file and synced: the disk, and nothing else

The two kinds of save take turns, now one first and now the other, a file after each two; between two saves every slice
of the state changes, so none is kept from the save before. Each figure is the median of the repeats, the first not
among them; of those of `save` the lowest and the highest are told too, as a disk that others use is not the same twice.
On a CPU nothing trains meanwhile. Hashing takes cores, where writing waits for the disk: a machine whose cores are busy
shows more of it.

The directory has to lie on the disk that is to be measured, and gets room for three states; what is written into it is
removed.
"""

import hashlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import attrs
import torch

from nmoe import platform
from nmoe.bench.rows import Row
from nmoe.bench.training import take
from nmoe.checkpoint import disk
from nmoe.checkpoint.manifest import Identity
from nmoe.checkpoint.objects import Address, sha256
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.graph import TrainingGraph, build
from nmoe.part import Part
from nmoe.plan.plan import Plan
from nmoe.rdep.control import Control
from nmoe.slices import boundaries
from nmoe.train.loop import require_runnable

COLUMNS = 2048
ROWS = 8192  # of a tensor: 16 Mi parameters
DIGEST = "00" * 32
IDENTITY = Identity(
    run="bench", lineage="bench", attempt=1, fingerprint=DIGEST, sections={}, tree_digest=DIGEST,
    data={"train": DIGEST}, environment={"exact": {}, "recorded": {}},
)  # fmt: skip


def state_of(parameters: int) -> dict[str, Part]:
    """Masters and moments of that many parameters, rounded up to whole rows, bf16."""
    rows, parts, generator = -(-parameters // COLUMNS), {}, torch.Generator().manual_seed(0)
    for number, first in enumerate(range(0, rows, ROWS)):
        shape = (min(ROWS, rows - first), COLUMNS)
        for kind in ("master", "adamw.exp_avg", "adamw.exp_avg_sq"):
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
            parts[f"{kind}/layers.{number}.weight_FD"] = Part.whole(values)
    return parts


HELD, SAVE, UNHASHED, FILE = ("held", "ours"), ("save", "ours"), ("save", "unhashed"), ("save", "one file")


def measure(
    parts: Mapping[str, Part],
    repeats: int,
    threads: int,
    below: Path | None,
    beside: Callable[[Callable[[], None]], float] | None = None,
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each repeat by part and who; `parts` are the state, on any device.

    beside: trains a step, which calls what it is given before its update; by how many seconds it took too long.
    """
    times: dict[tuple[str, str], list[float]] = {name: [] for name in (HELD, SAVE, UNHASHED, FILE)}
    count = itertools.count()
    with tempfile.TemporaryDirectory(dir=below, prefix="nmoe-bench-") as name:
        writer = CheckpointWriter(Path(name) / "run", keep=1, control=Control.alone(), threads=threads)
        writer.prepare(parts)
        ways: dict[tuple[str, str], Address] = {
            SAVE: sha256,
            UNHASHED: lambda content: hashlib.sha256(b"%d" % next(count)).hexdigest(),
        }
        turns = [way for turn in range(repeats + 1) for way in (SAVE, UNHASHED)[:: 1 if turn % 2 else -1]]
        for step, way in enumerate(turns, start=1):
            change(parts, step)
            writer.address = ways[way]
            started = time.perf_counter()
            writer.save(step=step, tensors=parts, state={}, identity=IDENTITY)
            held = time.perf_counter() - started
            times[HELD].append(held if beside is None else held + beside(writer.before_change))
            writer.wait()
            times[way].append(time.perf_counter() - started)
            if step % 2 == 0:
                times[FILE].append(one_file(Path(name) / "file", parts))
    return {name: found[1:] for name, found in times.items()}


def longer(
    graph: TrainingGraph, plan: Plan, usual: float, numbers: Iterator[int], before_update: Callable[[], None]
) -> float:
    """Seconds more than usual that the next step takes."""
    step = next(numbers)
    return take(graph, plan, range(step, step + 1), False, before_update) - usual


def one_file(path: Path, parts: Mapping[str, Part]) -> float:
    """Seconds to write as many bytes as the state has, and to sync them."""
    piece = memoryview(bytes(disk.CHUNK))
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size_of(parts), len(piece)):
            file.write(piece[: size_of(parts) - start])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def size_of(parts: Mapping[str, Part]) -> int:
    return sum(part.tensor.numel() * part.tensor.element_size() for part in parts.values())


def change(parts: Mapping[str, Part], step: int) -> None:
    """Every slice gets another content, so that none is kept from the save before."""
    for name, part in parts.items():
        flat, start = part.tensor.detach().view(-1), part.start
        for first, _ in boundaries(name, part.shape, str(flat.dtype).removeprefix("torch.")):
            if start <= first < start + len(flat):
                flat[first - start] = step
    if any(part.tensor.is_cuda for part in parts.values()):
        torch.cuda.synchronize()


def rows(
    plan: Plan | None, *, parameters: int, steps: int, repeats: int, threads: int, directory: Path | None
) -> Iterator[Row]:
    """See the module; parameters: where there is no plan. Raises what a training of the plan would."""
    step_seconds, beside = None, None
    if plan is None:
        platform.require("cpu", threads=1)
        case, parts = f"{parameters:,} parameters", state_of(parameters)
    else:
        require_runnable(plan)
        platform.require(plan.config.platform.target, plan.config.platform.threads)
        graph = build(plan)
        case, parts = plan.name, graph.kept()
        take(graph, plan, range(1, 4), text=False)
        step_seconds = take(graph, plan, range(4, 4 + steps), text=False) / steps
        if graph.device.type != "cpu":
            beside = partial(longer, graph, plan, step_seconds, itertools.count(4 + steps))
    size, times = size_of(parts), measure(parts, repeats, threads, directory, beside)
    medians = {key: statistics.median(found) for key, found in times.items()}

    def row(key: tuple[str, str], seconds: float, note: str = "") -> Row:
        what = f"{case}, {size:,} bytes by {threads} threads"
        rate = size / seconds / 1e9
        return Row(
            work="checkpoint", case=what, part=key[0], who=key[1], milliseconds=1e3 * seconds, rate=rate, unit="GB/s",
            note=note,
        )  # fmt: skip

    held = medians[HELD]
    yield row(HELD, held, "" if step_seconds is None else f"{held / step_seconds:.0%} of a step")
    if step_seconds is not None:
        yield attrs.evolve(row(("held", "a training step"), step_seconds), rate=None, unit="")
    for key in (SAVE, UNHASHED, FILE):
        note = f"{1e3 * min(times[key]):.4g} to {1e3 * max(times[key]):.4g} ms"
        if key == SAVE:
            share = statistics.median(one / other for one, other in zip(times[SAVE], times[UNHASHED], strict=True)) - 1
            note += f", hashing adds {share:+.1%}"
        yield row(key, medians[key], note)
