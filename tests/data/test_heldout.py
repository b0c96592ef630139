"""Every held-out byte is scored exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.data import corpus
from nmoe.data.heldout import HeldoutWindows
from nmoe.data.source import MemorySource
from nmoe.data.tokenizer import BytesTokenizer


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=6),
    length=st.integers(1, 20),
    context=st.integers(0, 19),
    count=st.integers(1, 5),
)
def test_each_target_once_each_byte_once(documents, length, context, count):
    source = MemorySource(documents, BytesTokenizer())
    context %= length
    windows = HeldoutWindows(source, sequence_length=length, context=context)
    inputs, targets, num_bytes = [], [], 0
    for first in range(0, len(windows), count):
        batch = windows.batch(first, count)
        assert batch.input_ids_BS.shape == batch.valid_BS.shape == (count, length)
        inputs += batch.input_ids_BS[batch.valid_BS].tolist()
        targets += batch.targets_BS[batch.valid_BS].tolist()
        num_bytes += batch.num_bytes
        for row, valid in enumerate(batch.valid_BS[: len(windows) - first].tolist(), first):
            assert row == 0 or valid.index(True) == context
    stream = source.read(0, source.num_tokens).tolist()
    assert inputs == stream[:-1] and targets == stream[1:]
    assert num_bytes == sum(len(text.encode("utf-8")) for text in documents)


def test_past_the_end_nothing_counts():
    windows = HeldoutWindows(MemorySource(["abcd"], BytesTokenizer()), sequence_length=3)
    assert len(windows) == 2
    batch = windows.batch(1, 3)
    assert batch.valid_BS.tolist() == [[True, False, False]] + [[False] * 3] * 2
    assert batch.num_bytes == 1 and int(batch.targets_BS[0, 0]) == ord("d")
    empty = windows.batch(7, 2)
    assert not empty.valid_BS.any() and empty.num_bytes == 0 and (empty.input_ids_BS == 256).all()


def test_rows_do_not_depend_on_the_batch():
    source = MemorySource(["abcdefgh" * 9, "xyz" * 11], BytesTokenizer())
    windows = HeldoutWindows(source, sequence_length=7)
    one = [windows.batch(i, 1) for i in range(len(windows))]
    for row, window in enumerate(windows.batch(0, len(windows)).input_ids_BS):
        assert np.array_equal(window, one[row].input_ids_BS[0])


@pytest.mark.parametrize("length", [128, 500])
def test_the_packaged_plays_are_scored_to_the_byte(length):
    source = corpus.load("shakespeare", "heldout", BytesTokenizer())
    windows = HeldoutWindows(source, sequence_length=length)
    total = sum(windows.batch(i, 16).num_bytes for i in range(0, len(windows), 16))
    assert total == sum(len(text) for text in corpus.documents("shakespeare", "heldout")) == 214_208
