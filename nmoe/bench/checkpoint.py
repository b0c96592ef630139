"""`nmoe bench checkpoint`: what saving costs a training: how long the steps are held up, and what hashing adds.

With the writer of a run the whole state of CONFIG is saved, after three steps of it; or, with --parameters, a state of
P parameters that no model has: for each a bf16 master and two bf16 moments, in tensors of 2048 columns, on the CPU.

    held       ours             for which `save` holds the steps up: the copy, and whatever else it does
               a training step  the mean of several; for CONFIG alone
    save       ours             from there until HEAD names the checkpoint, all in threads beside the training
    objects    ours             each value looked at, SHA-256, file, fsync, rename, fsync of directories
               unhashed         the same bytes in as many files by as many threads, each value looked at, with the same
                                fsyncs and renames: ours / unhashed - 1 is what the hashes add
               only written     the same without a look at the values

Each is the median of several, taken in turn. The directory has to lie on the disk that is to be measured, and gets room
for three states; what is written into it is removed.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nmoe import platform
from nmoe.bench.rows import Row
from nmoe.bench.step import take
from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.manifest import Identity
from nmoe.checkpoint.objects import require_finite, store
from nmoe.checkpoint.parts import Span
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.graph import build
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


def unhashed(directory: Path, parts: Mapping[str, Part], *, threads: int, looked_at: bool) -> None:
    """What nmoe.checkpoint.objects.store writes, under names that no content decides."""
    temporary, objects = layout.temporary_directory(directory), layout.objects_directory(directory)

    def put(number: int, name: str, start: int, values: torch.Tensor) -> None:
        if looked_at:
            require_finite(name, start, values)
        folder = objects / f"{number % 256:02x}"
        folder.mkdir(exist_ok=True)
        disk.write_synced(temporary / str(number), values.view(torch.uint8).numpy().data)
        disk.rename(temporary / str(number), folder / str(number))

    with ThreadPoolExecutor(threads) as pool:
        pending, number = [], 0
        for name, part in parts.items():
            values, span = part.tensor.reshape(-1), Span.of(name, part)
            for start, stop in boundaries(name, part.shape, span.dtype)[span.first : span.last]:
                pending.append(pool.submit(put, number, name, start, values[start - part.start : stop - part.start]))
                number += 1
        for one in pending:
            one.result()
        for one in [pool.submit(disk.sync_directory, folder) for folder in sorted(objects.iterdir())]:
            one.result()
    disk.sync_directory(objects)


HELD, SAVE, OBJECTS = ("held", "ours"), ("save", "ours"), ("objects", "ours")
UNHASHED, WRITTEN = ("objects", "unhashed"), ("objects", "only written")


def measure(
    parts: Mapping[str, Part], repeats: int, threads: int, below: Path | None
) -> dict[tuple[str, str], float]:
    """Seconds by part and who; `parts` are the state, on any device."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in (HELD, SAVE, OBJECTS, UNHASHED, WRITTEN)}
    with tempfile.TemporaryDirectory(dir=below, prefix="nmoe-bench-") as name:
        for held, saved in saves(Path(name) / "run", parts, repeats, threads):
            times[HELD].append(held)
            times[SAVE].append(saved)
        shutil.rmtree(Path(name) / "run")
        copied = {name: Part(part.tensor.detach().cpu(), part.start, part.shape) for name, part in parts.items()}
        ways: dict[tuple[str, str], Callable[[Path], object]] = {
            OBJECTS: lambda where: store(where, copied, threads=threads),
            UNHASHED: lambda where: unhashed(where, copied, threads=threads, looked_at=True),
            WRITTEN: lambda where: unhashed(where, copied, threads=threads, looked_at=False),
        }
        for _ in range(repeats):
            for way, act in ways.items():
                where = Path(name) / "objects"
                for directory in (layout.temporary_directory(where), layout.objects_directory(where)):
                    directory.mkdir(parents=True)
                times[way].append(timed(lambda act=act, where=where: act(where)))  # type: ignore[misc]
                shutil.rmtree(where)
    return {key: statistics.median(values) for key, values in times.items()}


def saves(directory: Path, parts: Mapping[str, Part], repeats: int, threads: int) -> list[tuple[float, float]]:
    """(held, save) of each save but the first, which makes the buffers and is a run's first alone."""
    writer, found = CheckpointWriter(directory, keep=1, control=Control.alone(), threads=threads), []
    for step in range(1, repeats + 2):
        change(parts, step)
        started = time.perf_counter()
        writer.save(step=step, tensors=parts, state={"step": step}, identity=IDENTITY)
        held = time.perf_counter() - started
        found.append((held, timed(writer.wait)))
    return found[1:]


def change(parts: Mapping[str, Part], step: int) -> None:
    """Every slice gets another content, so that none is kept from the save before."""
    for name, part in parts.items():
        flat, start = part.tensor.detach().view(-1), part.start
        for first, _ in boundaries(name, part.shape, str(flat.dtype).removeprefix("torch.")):
            if start <= first < start + len(flat):
                flat[first - start] = step


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def rows(
    plan: Plan | None, *, parameters: int, steps: int, repeats: int, threads: int, directory: Path | None
) -> Iterator[Row]:
    """See the module; parameters: where there is no plan. Raises what a training of the plan would."""
    times: dict[tuple[str, str], float] = {}
    if plan is None:
        platform.require("cpu", threads=1)
        case, parts = f"{parameters:,} parameters", state_of(parameters)
    else:
        require_runnable(plan)
        platform.require(plan.config.platform.target, plan.config.platform.threads)
        graph = build(plan)
        case, parts = plan.name, graph.kept()
        take(graph, plan, range(1, 4), text=False)
        times["held", "a training step"] = take(graph, plan, range(4, 4 + steps), text=False) / steps
    size = sum(part.tensor.numel() * part.tensor.element_size() for part in parts.values())
    times = {**measure(parts, repeats, threads, directory), **times}
    hashing = times[OBJECTS] / times[UNHASHED] - 1
    for (part, who), seconds in sorted(times.items(), key=lambda item: ("held", "save", "objects").index(item[0][0])):
        yield Row(
            work="checkpoint", case=f"{case}, {size:,} bytes by {threads} threads", part=part, who=who,
            milliseconds=1e3 * seconds, rate=None if who == "a training step" else size / seconds / 1e9, unit="GB/s",
            note=f"hashing adds {hashing:.0%}" if (part, who) == OBJECTS else "",
        )  # fmt: skip
