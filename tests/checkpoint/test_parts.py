"""Whether what the ranks hold is all of every tensor, against counting slice by slice."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.checkpoint.manifest import TensorRecord
from nmoe.checkpoint.parts import Span, differences, join
from nmoe.errors import RunError

NAME, SHAPE = "w_EDF", (6, 2, 2)  # six slices, one an expert
HASHES = tuple(f"{number:064x}" for number in range(6))

spans = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted).map(
    lambda ends: Span("float32", SHAPE, *ends, HASHES[ends[0] : ends[1]])
)  # fmt: skip
held = st.lists(st.none() | spans, min_size=1, max_size=5).filter(any)
cut = st.lists(st.integers(0, 6), max_size=4).map(lambda inner: sorted([0, *inner, 6]))


def holders(ranks, number):
    return [rank for rank, span in enumerate(ranks) if span is not None and span.first <= number < span.last]


def as_ranks(ranks):
    return [{} if span is None else {NAME: span} for span in ranks]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(held)
def test_join_takes_what_is_there_exactly_once(ranks):
    counts = [len(holders(ranks, number)) for number in range(6)]
    if counts == [1] * 6:
        assert join(as_ranks(ranks), step=1)[NAME].slices == HASHES
        return
    with pytest.raises(RunError, match="N0320") as caught:
        join(as_ranks(ranks), step=1)
    assert ("held by no rank" in caught.value.render()) == (0 in counts)
    assert ("given by ranks" in caught.value.render()) == (max(counts) > 1)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(cut, st.randoms(use_true_random=False))
def test_join_puts_runs_in_order_whoever_holds_them(ends, random):
    ranks = [Span("float32", SHAPE, *run, HASHES[run[0] : run[1]]) for run in itertools.pairwise(ends)]
    random.shuffle(ranks)
    assert join(as_ranks(ranks), step=1) == {NAME: TensorRecord(dtype="float32", shape=SHAPE, slices=HASHES)}


@settings(deadline=None, max_examples=300, derandomize=True)
@given(held)
def test_a_read_wants_every_slice_held_by_somebody(ranks):
    saved = {NAME: TensorRecord(dtype="float32", shape=SHAPE, slices=HASHES)}
    complete = all(holders(ranks, number) for number in range(6))
    assert (differences(saved, as_ranks(ranks)) == []) == complete


def test_the_missing_and_the_double_are_named():
    ranks = [Span("float32", SHAPE, 0, 3, HASHES[:3]), Span("float32", SHAPE, 2, 4, HASHES[2:4])]
    with pytest.raises(RunError) as caught:
        join(as_ranks(ranks), step=7)
    text = caught.value.render()
    assert "slices 4 to 5 of 6 of `w_EDF` are held by no rank" in text
    assert "slice 2 of `w_EDF` is given by ranks 0 and 1" in text
    assert "step 7" in text


def test_a_tensor_without_elements_needs_somebody_to_name_it():
    saved = {"empty": TensorRecord(dtype="float32", shape=(0, 3), slices=())}
    assert differences(saved, [{}]) == ["`empty` is in the checkpoint and not in this program"]
    assert differences(saved, [{}, {"empty": Span("float32", (0, 3), 0, 0)}]) == []
