"""A small ledger to write and to look at."""

from nmoe.metrics.sink import Sink


def opened(directory, attempt=1, run="moonlet"):
    return Sink(directory, run=run, lineage="line-1", attempt=attempt)


def fill(into, step):
    into.add("train/loss", 1.0 / 3.0 + step)
    for layer in (0, 3):
        into.add("router/entropy", 0.9 + layer, layer=layer)
        into.add("router/expert_load", float(step), layer=layer, expert=7)
    into.add("grad/group_norm", 2.5, label="dense")
    into.add("memory/resident", 2**40 + 1, rank=0)
    into.add("data/batch_digest", None, label=f"{step:064x}")
    into.commit(step, step * 1000, 1_700_000_000_000_000_000 + step)


def expected(step, attempt=1):
    head = ("moonlet", "line-1", attempt, step, step * 1000, 1_700_000_000_000_000_000 + step)
    return [
        (*head, "train/loss", None, None, None, None, 1.0 / 3.0 + step),
        (*head, "router/entropy", 0, None, None, None, 0.9),
        (*head, "router/expert_load", 0, 7, None, None, float(step)),
        (*head, "router/entropy", 3, None, None, None, 3.9),
        (*head, "router/expert_load", 3, 7, None, None, float(step)),
        (*head, "grad/group_norm", None, None, None, "dense", 2.5),
        (*head, "memory/resident", None, None, 0, None, 2.0**40 + 1),
        (*head, "data/batch_digest", None, None, None, f"{step:064x}", None),
    ]
