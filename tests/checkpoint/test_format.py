"""Where tensors are cut: on what depends it, what does it guarantee."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage

MIB = 1 << 20
shapes = st.lists(st.integers(0, 5000), min_size=0, max_size=4).map(tuple).filter(lambda s: math.prod(s) < 2**32)
names = st.sampled_from(["master/model.w_E2FD", "model.embedding.weight_VD", "muon.momentum/a.w_EDF", "router.bias_E"])
dtypes = st.sampled_from(sorted(layout.DTYPE_BYTES))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(names, shapes, dtypes)
def test_slices_cover_a_tensor_once_and_none_is_too_large(name, shape, dtype):
    cuts = layout.boundaries(name, shape, dtype)
    assert len(cuts) == layout.slice_count(name, shape, dtype)
    position = 0
    for start, stop in cuts:
        assert start == position < stop
        assert (stop - start) * layout.DTYPE_BYTES[dtype] <= layout.SLICE_BYTES
        position = stop
    assert position == math.prod(shape)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 64), st.integers(1, 300), st.integers(1, 300), dtypes)
def test_every_expert_begins_a_slice(experts, rows, width, dtype):
    starts = {start for start, _ in layout.boundaries("adamw.exp_avg/a.experts.w_EDF", (experts, rows, width), dtype)}
    assert {expert * rows * width for expert in range(experts)} <= starts


def test_an_expert_that_is_too_large_is_cut_after_whole_rows():
    # One expert of 2 x 1408 x 2048 float32 is 22 MiB: 2048 rows of 8 KiB in the first slice, the other 768 after it.
    cuts = layout.boundaries("w_gate_up_E2FD", (64, 2, 1408, 2048), "float32")
    assert cuts[:3] == [(0, 2048 * 2048), (2048 * 2048, 2816 * 2048), (2816 * 2048, 2816 * 2048 + 2048 * 2048)]
    assert len(cuts) == 128


def test_only_the_axes_of_a_name_make_experts():
    assert layout.is_cut_by_expert("master/model.layers.1.moe.experts.w_gate_up_E2FD", (8, 2, 3, 4))
    assert not layout.is_cut_by_expert("model.layers.1.moe.router.weight_ED", (8, 4))
    assert not layout.is_cut_by_expert("model.layers.1.mlp.w_gate_up_2FD", (2, 3, 4))
    assert not layout.is_cut_by_expert("model.layers.1.Embedding", (2, 3, 4))


def test_a_row_longer_than_a_slice_is_cut_inside():
    count = 3 * layout.SLICE_BYTES // 4 + 5
    cuts = layout.boundaries("x", (2, count), "float32")
    assert [stop - start for start, stop in cuts[:1]] == [layout.SLICE_BYTES // 4]
    assert cuts[-1][1] == 2 * count


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "/x", "a b", "a\n", "é", "x" * 600, ".hidden"])
def test_names_that_are_no_logical_names(name):
    with pytest.raises(Damage):
        layout.check_tensor(name, (1,), "float32")


@pytest.mark.parametrize("shape", [(2**49,), (2**30, 2**30), (1,) * 17])
def test_absurd_shapes(shape):
    with pytest.raises(Damage, match="absurd"):
        layout.check_tensor("x", shape, "float32")


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "a" * 65])
def test_no_digest_becomes_a_path_unchecked(sha256, tmp_path):
    with pytest.raises(ValueError, match="not a SHA-256"):
        layout.object_path(tmp_path, sha256)


def test_steps_on_disk_are_those_with_canonical_names(tmp_path):
    for name in ("step_00000010", "step_00000002", "step_123456789", "step_10", "step_000000003", "step_0000000a", "x"):
        (tmp_path / name).mkdir()
    assert layout.steps_on_disk(tmp_path) == [2, 10, 123456789]
