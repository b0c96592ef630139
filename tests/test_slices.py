"""Where tensors are cut: on what depends it, what does it guarantee."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe import slices

shapes = st.lists(st.integers(0, 5000), min_size=0, max_size=4).map(tuple).filter(lambda s: math.prod(s) < 2**32)
names = st.sampled_from(["master/model.w_E2FD", "model.embedding.weight_VD", "muon.momentum/a.w_EDF", "router.bias_E"])
dtypes = st.sampled_from(sorted(slices.DTYPE_BYTES))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(names, shapes, dtypes)
def test_slices_cover_a_tensor_once_and_none_is_too_large(name, shape, dtype):
    cuts = slices.boundaries(name, shape, dtype)
    assert len(cuts) == slices.slice_count(name, shape, dtype)
    position = 0
    for start, stop in cuts:
        assert start == position < stop
        assert (stop - start) * slices.DTYPE_BYTES[dtype] <= slices.SLICE_BYTES
        position = stop
    assert position == math.prod(shape)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(names, shapes, dtypes, st.integers(0, 2**32))
def test_a_slice_is_found_by_where_it_begins_and_only_there(name, shape, dtype, element):
    starts = [start for start, _ in slices.boundaries(name, shape, dtype)] + [math.prod(shape)]
    assert [slices.slice_at(name, shape, dtype, start) for start in starts] == list(range(len(starts)))
    if element not in starts:
        with pytest.raises(ValueError, match=f"is not cut at element {element}"):
            slices.slice_at(name, shape, dtype, element)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 64), st.integers(1, 300), st.integers(1, 300), dtypes)
def test_every_expert_begins_a_slice(experts, rows, width, dtype):
    starts = {start for start, _ in slices.boundaries("adamw.exp_avg/a.experts.w_EDF", (experts, rows, width), dtype)}
    assert {expert * rows * width for expert in range(experts)} <= starts


def test_an_expert_that_is_too_large_is_cut_after_whole_rows():
    # One expert of 2 x 1408 x 2048 float32 is 22 MiB: 2048 rows of 8 KiB in the first slice, the other 768 after it.
    cuts = slices.boundaries("w_gate_up_E2FD", (64, 2, 1408, 2048), "float32")
    assert cuts[:3] == [(0, 2048 * 2048), (2048 * 2048, 2816 * 2048), (2816 * 2048, 2816 * 2048 + 2048 * 2048)]
    assert len(cuts) == 128


def test_only_the_axes_of_a_name_make_experts():
    assert slices.is_cut_by_expert("master/model.layers.1.moe.experts.w_gate_up_E2FD", (8, 2, 3, 4))
    assert not slices.is_cut_by_expert("model.layers.1.moe.router.weight_ED", (8, 4))
    assert not slices.is_cut_by_expert("model.layers.1.mlp.w_gate_up_2FD", (2, 3, 4))
    assert not slices.is_cut_by_expert("model.layers.1.Embedding", (2, 3, 4))


def test_a_row_longer_than_a_slice_is_cut_inside():
    count = 3 * slices.SLICE_BYTES // 4 + 5
    cuts = slices.boundaries("x", (2, count), "float32")
    assert [stop - start for start, stop in cuts[:1]] == [slices.SLICE_BYTES // 4]
    assert cuts[-1][1] == 2 * count
