"""Trainings of the learning tests, step by step in this process, and what counting alone would reach.

The losses are those of the training itself: a pass over fresh text, each step's loss taken before its
update, so no figure here has seen its own text.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import attrs
import numpy as np

from nmoe import platform
from nmoe.data import corpus
from nmoe.data.loader import TokenBatch
from nmoe.graph import build
from nmoe.plan.plan import Plan
from nmoe.plan.resolve import resolve
from nmoe.train.step import run_step

MOE = Path(__file__).parent / "moe.toml"
DENSE = Path(__file__).parent / "dense.toml"
TEXT = "shakespeare"


@attrs.frozen(kw_only=True)
class Training:
    """A finished training.

    losses: nats a token of every step. unigram, bigram: what models that have counted the whole training text
    lose on the same tokens; see `counted`.
    """

    plan: Plan
    losses: np.ndarray
    unigram: np.ndarray
    bigram: np.ndarray


def train(config: Path, sets: Sequence[str]) -> Training:
    """All steps of the plan; nothing is written."""
    plan = resolve(config, sets)
    platform.require(plan.config.platform.target, plan.config.platform.threads)
    graph = build(plan)
    losses, references = [], []
    for step in range(1, plan.total_steps + 1):
        batch = graph.loader.batch(step)
        seen = step * plan.tokens_per_step
        losses.append(run_step(graph, batch, step=step, tokens_seen=seen, observe=lambda step, phase: None).loss)
        references.append(counted(batch))
        for _, router in graph.routers():
            router.end_step(seen)
    unigram, bigram = np.array(references).T
    return Training(plan=plan, losses=np.array(losses), unigram=unigram, bigram=bigram)


@cache
def bigrams() -> np.ndarray:
    """How often token j follows token i in the whole training text, (257, 257): bytes, and 256 at a document's end."""
    counts = np.zeros((257, 257))
    before = 256
    for text in corpus.documents(TEXT, "train"):
        ids = np.array([before, *text.encode("ascii"), 256])
        np.add.at(counts, (ids[:-1], ids[1:]), 1.0)
    return counts


def counted(batch: TokenBatch) -> tuple[float, float]:
    """Nats a token that a unigram and a bigram model lose on a batch.

    Both have counted all 4.7 MB of the training text, the scored tokens included, which only helps them. A model
    without attention can be no better than the bigram: its output depends on the one token before.
    """
    inputs, targets, counts = batch.input_ids_BS.numpy(), batch.targets_BS.numpy(), bigrams()
    singles = counts.sum(axis=0)
    unigram = -np.log(singles[targets] / singles.sum())
    bigram = -np.log(counts[inputs, targets] / counts.sum(axis=1)[inputs])
    return float(unigram.mean()), float(bigram.mean())
