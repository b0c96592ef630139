"""Counts are exact, the order is a pure function, and no token is left out."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.data.mixture import Mixture, MixtureStage
from nmoe.data.source import MemorySource
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.errors import RunError


class Row:
    """A source whose token i is i: what is read shows where it was read."""

    end_of_document, vocab_size, tokenizer_digest = 0, 2**31, "0" * 64

    def __init__(self, num_tokens, digest="1" * 64):
        self.num_tokens, self.digest = num_tokens, digest
        self.token_bytes_V = np.ones(1, np.int64)

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.num_tokens
        return np.arange(start, stop, dtype=np.int64)


def stage(end, *weights):
    return MixtureStage(end_sequence=end, weights=weights)


def by_hand(weights, stages_of, count):
    """Largest remainder, sequence after sequence, with exact integers and no blocks."""
    sequence = []
    for (first, end), w in zip(stages_of, weights, strict=True):
        given_ = [0] * len(w)
        for n in range(1, (count if end is None else end) - first + 1):
            remainder = [w_j * n - sum(w) * g for w_j, g in zip(w, given_, strict=True)]
            best = remainder.index(max(remainder))
            given_[best] += 1
            sequence.append(best)
    return sequence[:count]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_sources_follow_largest_remainder(data):
    number = data.draw(st.integers(1, 4))
    weights = data.draw(
        st.lists(
            st.lists(st.integers(0, 9), min_size=number, max_size=number).filter(any), min_size=1, max_size=3
        )
    )
    ends = np.cumsum([data.draw(st.integers(1, 40)) for _ in weights[1:]]).tolist()
    stages = [stage(end, *w) for end, w in zip([*ends, None], weights, strict=True)]
    mixture = Mixture([Row(50 + 7 * j) for j in range(number)], stages, seed=1, sequence_length=8)
    count = 120
    expected = by_hand(weights, list(zip([0, *ends], [*ends, None], strict=True)), count)
    assert mixture.locate(0, count)[0].tolist() == expected
    for sequences in range(count + 1):
        assert mixture.counts(sequences).tolist() == [expected[:sequences].count(j) for j in range(number)]


def test_counts_are_exact_far_out():
    mixture = Mixture([Row(100), Row(200)], [stage(10, 1, 0), stage(None, 3, 2)], seed=0, sequence_length=8)
    assert mixture.counts(10 + 5 * 10**15).tolist() == [10 + 3 * 10**15, 2 * 10**15]
    source, start = mixture.locate(10**15, 4)
    assert len(source) == 4 and (start >= 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(9, 300), length=st.integers(1, 8), epochs=st.integers(1, 6), seed=st.integers(0, 2**32)
)
def test_no_token_is_left_out(num_tokens, length, epochs, seed):
    """After any number of epochs the visits of two tokens as targets differ by at most one."""
    mixture = Mixture.single(Row(num_tokens), seed=seed, sequence_length=length)
    windows = mixture.windows_per_epoch(0)
    tokens, _ = mixture.windows(0, epochs * windows)
    visits = np.bincount(tokens[:, 1:].ravel(), minlength=num_tokens)
    assert visits.sum() == epochs * windows * length and visits.max() - visits.min() <= 1
    assert np.array_equal(tokens[:, 1:], (tokens[:, :-1] + 1) % num_tokens)


def test_each_epoch_visits_each_window_once_in_another_order():
    mixture = Mixture.single(Row(801), seed=5, sequence_length=8)
    epochs = [mixture.locate(100 * e, 100)[1].tolist() for e in range(4)]
    for e, starts in enumerate(epochs):
        assert sorted(starts) == sorted((800 * e + 8 * w) % 801 for w in range(100))
        assert starts != sorted(starts)
    ranks = [np.argsort(np.argsort((np.array(starts) - 800 * e) % 801)).tolist() for e, starts in enumerate(epochs)]
    assert len({tuple(rank) for rank in ranks}) == 4


def test_a_stage_goes_on_where_the_one_before_stopped():
    """A source's epochs run through the stages: 30 + 70 of its 100 windows are all of them, once."""
    stages = [stage(45, 2, 1), stage(80, 0, 1), stage(None, 7, 3)]
    mixture = Mixture([Row(801), Row(400)], stages, seed=5, sequence_length=8)
    source, start = mixture.locate(0, 180)
    assert sorted(start[source == 0].tolist()) == [8 * w for w in range(100)]
    assert sorted(start[source == 1][:50].tolist()) == [8 * w for w in range(50)]


def test_sources_of_one_length_and_seeds_have_their_own_order():
    stages = [stage(None, 1, 1)]
    mixture = Mixture([Row(801), Row(801)], stages, seed=5, sequence_length=8)
    source, start = mixture.locate(0, 200)
    assert start[source == 0].tolist() != start[source == 1].tolist()
    other = Mixture([Row(801), Row(801)], stages, seed=6, sequence_length=8)
    assert other.locate(0, 200)[1].tolist() != start.tolist()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(first=st.integers(0, 500), count=st.integers(0, 60))
def test_any_stretch_equals_the_same_stretch_of_the_whole(first, count):
    """Three sources, two stages, several epochs."""
    rows = [Row(100), Row(177), Row(64)]
    stages = [stage(90, 3, 0, 1), stage(None, 2, 5, 4)]
    mixture = Mixture(rows, stages, seed=9, sequence_length=8)
    whole_tokens, whole_source = Mixture(rows, stages, seed=9, sequence_length=8).windows(0, 560)
    tokens, source = mixture.windows(first, count)
    assert np.array_equal(tokens, whole_tokens[first : first + count])
    assert np.array_equal(source, whole_source[first : first + count])
    assert mixture.epochs(560)[2] > 3


def test_a_window_over_the_end_begins_the_row_again():
    text = MemorySource(["abc", "defgh"], BytesTokenizer())
    tokens, _ = Mixture.single(text, seed=0, sequence_length=4).windows(0, 10)
    row = [256, *b"abc", 256, *b"defgh"] * 2
    found = collections.Counter(tuple(t) for t in tokens.tolist())
    assert found == collections.Counter(tuple(row[i % 10 : i % 10 + 5]) for i in range(0, 40, 4))


def test_digest_names_content_and_order(memory_source):
    a, b = memory_source(5, 1), memory_source(5, 2)

    def digest(*sources):
        return Mixture(sources, [stage(None, *[1] * len(sources))], seed=0, sequence_length=8).digest

    assert len({digest(a), digest(b), digest(a, b), digest(b, a)}) == 4
    assert digest(a, b) == digest(memory_source(5, 1), memory_source(5, 2))


def test_what_cannot_be_mixed_is_refused():
    other = Row(100)
    other.tokenizer_digest = "f" * 64
    with pytest.raises(RunError, match=r"N0210.*source 1 was made by another tokenizer"):
        Mixture([Row(100), other], [stage(None, 1, 1)], seed=0, sequence_length=8)
    with pytest.raises(RunError, match=r"N0212.*source 0 has 8 tokens, less than one window of 9"):
        Mixture.single(Row(8), seed=0, sequence_length=8)
    with pytest.raises(RunError, match="N0211"):
        Mixture([Row(100), Row(100)], [stage(None, 2**20, 2**20 - 1)], seed=0, sequence_length=8)
    for stages in ([], [stage(5, 1)], [stage(None, 1), stage(None, 1)], [stage(None, 0)], [stage(None, 1, 1)]):
        with pytest.raises(ValueError):
            Mixture([Row(100)], stages, seed=0, sequence_length=8)


def test_large_weights_with_a_common_factor_are_fine():
    mixture = Mixture([Row(100), Row(100)], [stage(None, 2**20, 2**19)], seed=0, sequence_length=8)
    assert mixture.counts(6).tolist() == [4, 2]
