"""What saving costs a training: how long the steps are held up, and what hashing adds to the writing.

`python -m nmoe.bench.checkpoint [CONFIG] [--parameters P] [--repeats N] [--threads J] [--directory D] [--json]` saves
the whole state of CONFIG, after three steps of it, with the writer of a run; or, with --parameters, a state of P
parameters that no model has: for each a bf16 master and two bf16 moments, in tensors of 2048 columns, on the CPU.

    step          seconds of a training step, the mean of N; for CONFIG alone
    held          seconds for which `save` holds the steps up: the copy, and whatever else it does
    save          seconds from there until HEAD names the checkpoint, all in threads beside the training
    stored        seconds of the objects alone: each value looked at, SHA-256, file, fsync, rename, fsync of directories
    unhashed      the same bytes in as many files by as many threads, with the same fsyncs and renames, and nothing else
    unnamed       unhashed, and each value looked at for being finite
    hashing       stored / unnamed - 1: what the hashes add

Each is the median of N, taken in turn. The directory has to lie on the disk that is to be measured, and gets room for
three states; what is written into it is removed.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nmoe import platform
from nmoe.bench.memory import with_data
from nmoe.bench.step import take
from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.manifest import Identity
from nmoe.checkpoint.objects import require_finite, store
from nmoe.checkpoint.parts import Span
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.errors import NmoeError
from nmoe.graph import build
from nmoe.part import Part
from nmoe.plan.resolve import resolve
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


def measure(parts: Mapping[str, Part], repeats: int, threads: int, below: Path | None) -> dict[str, Any]:
    """All but `step`; `parts` are the state, on any device."""
    times: dict[str, list[float]] = {name: [] for name in ("held", "save", "stored", "unhashed", "unnamed")}
    with tempfile.TemporaryDirectory(dir=below, prefix="nmoe-bench-") as name:
        for held, saved in saves(Path(name) / "run", parts, repeats, threads):
            times["held"].append(held)
            times["save"].append(saved)
        shutil.rmtree(Path(name) / "run")
        copied = {name: Part(part.tensor.detach().cpu(), part.start, part.shape) for name, part in parts.items()}
        ways: dict[str, Callable[[Path], object]] = {
            "stored": lambda where: store(where, copied, threads=threads),
            "unhashed": lambda where: unhashed(where, copied, threads=threads, looked_at=False),
            "unnamed": lambda where: unhashed(where, copied, threads=threads, looked_at=True),
        }
        for _ in range(repeats):
            for way, act in ways.items():
                where = Path(name) / way
                for directory in (layout.temporary_directory(where), layout.objects_directory(where)):
                    directory.mkdir(parents=True)
                times[way].append(timed(lambda act=act, where=where: act(where)))  # type: ignore[misc]
                shutil.rmtree(where)
    row: dict[str, Any] = {key: statistics.median(values) for key, values in times.items()}
    size = sum(part.tensor.numel() * part.tensor.element_size() for part in copied.values())
    return {"bytes": size, "threads": threads, **row, "hashing": row["stored"] / row["unnamed"] - 1}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--parameters", type=int, metavar="P")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=4, metavar="J", help="that write; a run has 4")
    parser.add_argument("--directory", type=Path, metavar="D", help="on the disk to measure; absent: the temporary one")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    a = parser.parse_args()
    if (a.config is None) == (a.parameters is None):
        parser.error("name a CONFIG or --parameters")
    try:
        if a.config is None:
            platform.require("cpu", threads=1)
            row = {"parameters": a.parameters, **measure(state_of(a.parameters), a.repeats, a.threads, a.directory)}
        else:
            plan = with_data(resolve(a.config, a.sets))
            require_runnable(plan)
            platform.require(plan.config.platform.target, plan.config.platform.threads)
            graph = build(plan, None)
            take(graph, plan, range(1, 4), text=False)
            step = take(graph, plan, range(4, 4 + a.repeats), text=False) / a.repeats
            row = {"config": plan.name, "step": step, **measure(graph.kept(), a.repeats, a.threads, a.directory)}
    except NmoeError as error:
        sys.exit(str(error))
    if a.json:
        print(json.dumps(row))
    else:
        print(", ".join(f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()))  # fmt: skip


if __name__ == "__main__":
    main()
