"""Every kind learns more than the counts of byte pairs; `make learning` prints the table."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from nmoe.data import corpus
from nmoe.plan.resolve import resolve
from nmoe.registry.table import TABLE
from tests.learning.kinds import KINDS, row
from tests.learning.training import MOE, bigrams


@pytest.mark.parametrize("name", KINDS)
def test_learns_more_than_byte_pairs(name):
    found = row(name)
    assert found.unigram > found.bigram > found.loss


def test_every_kind_of_the_table_is_there():
    """A new kind of router, attention or optimizer needs a line in kinds.py."""
    plans = [resolve(MOE, sets).config for sets in KINDS.values()]
    sections = {
        "model.attention": lambda c: c.model.attention,
        "model.attention.local": lambda c: c.model.attention.local,
        "model.moe.router": lambda c: c.model.moe.router,
        "optimizer.matrices": lambda c: c.optimizer.matrices,
        "optimizer.router": lambda c: c.optimizer.router,
        "optimizer.experts": lambda c: c.optimizer.experts,
    }
    # Local layers of another kind than the global ones; a local mla is the global one's class with a window.
    missing = {
        (section, kind)
        for section, part in sections.items()
        for kind, spec in TABLE[section].items()
        if spec not in {type(part(config)) for config in plans}
    }
    assert missing <= {("model.attention.local", "mla")}


def test_the_bigrams_are_those_of_the_text():
    """Counted another way; and a byte after a byte has the entropy of English, near 2.5 nats."""
    texts = corpus.documents("shakespeare", "train")
    expected = Counter(pair for text in texts for pair in pairwise(text))
    counts = bigrams()
    assert {(chr(i), chr(j)): counts[i, j] for i, j in zip(*counts[:256, :256].nonzero(), strict=True)} == expected
    assert counts[256].sum() == counts[:, 256].sum() == len(texts)
    conditional = counts / counts.sum(axis=1, keepdims=True).clip(min=1.0)
    seen = counts > 0
    assert 2.4 < -float((counts[seen] * np.log(conditional[seen])).sum() / counts.sum()) < 2.6
