"""What a rank does in the tests of whole trainings: `nmoe train`, as its command line runs it, drilled or not."""

import os
from functools import cache
from pathlib import Path

from nmoe.checkpoint import environment
from nmoe.cli.main import run
from nmoe.data import corpus
from nmoe.rdep import rendezvous
from tests.rdep.talk import tcp
from tests.rdep.work import Planned as Planned  # the server of ranks asks for these here
from tests.rdep.work import store as store
from tests.train import arithmetic, faults

# What a process reads at each start is read once, before the ranks are forked: the packaged text, the sources.
corpus.documents = cache(corpus.documents)
for _part in ("train", "heldout"):
    corpus.documents("shakespeare", _part)
_hashes = environment.source_hashes()
environment.source_hashes = lambda: _hashes


def training(
    *, rank, ranks, store, config, sets, log, kind="file", who=None, fault="", odd="", more=None, new_lineage=False
):
    """The exit status of `nmoe train`.

    kind: of the store; a file outlives all ranks, as torchrun's store does, "tcp" is served by rank 0. who, fault:
    the rank that goes wrong, and how. odd: what is odd about the arithmetic of all ranks, with commas between.
    more: keys of single ranks, by rank. new_lineage: --new-lineage. log: directory for what each rank writes.
    """
    speak_into(Path(log) / f"{rank}.txt")
    if ranks > 1:
        found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": 1}
        os.environ.update({name: str(value) for name, value in found.items()}, MASTER_ADDR="127.0.0.1")
        rendezvous.launch_store = lambda timeout_s: tcp(store, rank) if kind == "tcp" else store
    for name in filter(None, odd.split(", ")):
        arithmetic.ODD[name]()
    if rank == who:
        faults.arm(fault)
    own = (more or {}).get(str(rank), [])
    words = ["train", config, *(word for item in [*sets, *own] for word in ("--set", item))]
    return run([*words, *(["--new-lineage"] if new_lineage else [])])


def speak_into(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


WORK = {"training": training}
