"""Whatever nmoe parses, from hostile hands: configs, and every file that it reads back from the disk.

A case is one text or file, changed as its batch's name draws it. It must be accepted or refused in nmoe's own words;
what is accepted must be what the schema allows, by a judge that shares no line with the reader (`fuzz_keys`,
`fuzz_judges`).
"""

from functools import partial

from tests.torture import fuzz_bounds, fuzz_files, fuzz_toml
from tests.torture.campaign import Batch

TITLE = "TOML and file fuzz cases / tracebacks, hangs or wrongly accepted"
KINDS = {**fuzz_toml.KINDS, **fuzz_files.KINDS, **fuzz_bounds.KINDS}
ALL = 1_000_000
WHOLE = {
    "values": (14_000, 7), "within": (8_000, 8), "lines": (14_000, 7), "bytes": (14_000, 7), "sets": (9_000, 3),
    "parents": (4_000, 4), "run": (16_000, 8), "data": (20_500, 5), "train": (300, 3),
    "bounds run": (ALL, 1), "bounds data": (ALL, 1), "pickles run": (ALL, 1), "pickles data": (ALL, 1),
}  # fmt: skip
"""Cases of a kind in all, and the batches that they are divided among; ALL: what there is."""

SAMPLE = {
    "values": 150, "within": 60, "lines": 120, "bytes": 120, "sets": 150, "parents": 60, "run": 120, "data": 250,
    "bounds data": 4, "pickles data": 40,
}  # fmt: skip


def batches(sample: bool) -> list[Batch]:
    wanted = {kind: (cases, 1) for kind, cases in SAMPLE.items()} if sample else WHOLE
    found = []
    for kind, (cases, parts) in wanted.items():
        for part in range(parts):
            name = f"{kind}, {part + 1}/{parts}"
            found.append(Batch(name, partial(KINDS[kind.partition(" ")[0]], name, cases // parts)))
    return found
