"""Who keeps what: every element once, cut where checkpoints cut, and about the same for everybody."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe import slices
from nmoe.sharding import Tensor, deal

SLICE_BYTES = 64
DTYPE = "float32"


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    """So that small tensors have several."""
    monkeypatch.setattr(slices, "SLICE_BYTES", SLICE_BYTES)


@st.composite
def deals(draw):
    """(tensors, ranks, ranks_per_node): of every rule, some smaller than the ranks are many."""
    per_node = draw(st.integers(1, 4))
    ranks = per_node * draw(st.integers(1, 3))
    sizes, tensors = st.integers(1, 9), []
    for number in range(draw(st.integers(1, 12))):
        rule = draw(st.sampled_from(["rows", "rows", "tensors", "experts"]))
        if rule == "rows":
            shape = tuple(draw(st.lists(sizes, min_size=1, max_size=2)))
        elif rule == "tensors":
            shape = (draw(sizes), draw(sizes))
        else:
            shape = (per_node * draw(st.integers(1, 5)), draw(sizes), draw(sizes))
        tensors.append(Tensor(name=f"t{number}", shape=shape, rule=rule, state_dtype=DTYPE))
    return tensors, ranks, per_node


def of(shares, tensor):
    return [share for share in shares if share.name == tensor.name]


@given(deals())
@settings(max_examples=300, deadline=None)
def test_every_element_has_one_keeper(dealt):
    tensors, ranks, per_node = dealt
    shares = deal(tensors, ranks=ranks, ranks_per_node=per_node)
    assert [share.name for share in shares] == [tensor.name for tensor in tensors for _ in of(shares, tensor)]
    for tensor in tensors:
        end = 0
        for share in of(shares, tensor):
            assert share.start == end < share.stop, "not rising, or empty, or a gap"
            assert 0 <= share.rank < ranks
            assert share.shape == tensor.shape
            end = share.stop
        assert end == math.prod(tensor.shape)


@given(deals())
@settings(max_examples=300, deadline=None)
def test_cuts_are_at_whole_rows_and_where_checkpoints_cut(dealt):
    tensors, ranks, per_node = dealt
    shares = deal(tensors, ranks=ranks, ranks_per_node=per_node)
    for tensor in tensors:
        cuts = {start for start, _ in slices.boundaries(tensor.name, tensor.shape, DTYPE)}
        for share in of(shares, tensor):
            assert share.start % tensor.shape[-1] == share.stop % tensor.shape[-1] == 0
            assert math.prod(share.local_shape) == share.stop - share.start
            assert share.local_shape[-1] == tensor.shape[-1]
            assert share.rows == (share.stop - share.start) // tensor.shape[-1]
            if tensor.rule == "rows":
                assert share.start in cuts
            elif tensor.rule == "tensors":
                assert share.is_whole
            else:
                assert share.start % math.prod(tensor.shape[1:]) == 0, "not whole experts"
                assert len(share.local_shape) == 3


@given(deals())
@settings(max_examples=300, deadline=None)
def test_experts_stay_with_the_rank_that_has_them(dealt):
    """As weights: local rank l of every node has experts [l E/M, (l+1) E/M), and keeps none but of those."""
    tensors, ranks, per_node = dealt
    for tensor in (one for one in tensors if one.rule == "experts"):
        each, local = math.prod(tensor.shape[1:]), tensor.shape[0] // per_node
        kept = [0] * ranks
        for share in of(deal(tensors, ranks=ranks, ranks_per_node=per_node), tensor):
            first, last = share.start // each, (share.stop - 1) // each
            assert first // local == last // local == share.rank % per_node
            kept[share.rank] += last - first + 1
        nodes = ranks // per_node
        assert all(local // nodes <= count <= -(-local // nodes) for count in kept), "uneven among the nodes"


@given(deals())
@settings(max_examples=300, deadline=None)
def test_rows_are_even_to_a_slice(dealt):
    """The ranks' runs of the one sequence of elements end at most a piece away from where even shares end."""
    tensors, ranks, per_node = dealt
    rows = [tensor for tensor in tensors if tensor.rule == "rows"]
    shares = deal(tensors, ranks=ranks, ranks_per_node=per_node)
    order = [share for tensor in rows for share in of(shares, tensor)]
    assert [share.rank for share in order] == sorted(share.rank for share in order)
    total = sum(math.prod(tensor.shape) for tensor in rows)
    largest = max(
        (
            stop - start
            for tensor in rows
            for start, stop in (
                [(0, tensor.shape[0])]
                if len(tensor.shape) == 1
                else slices.boundaries(tensor.name, tensor.shape, DTYPE)
            )
        ),
        default=0,
    )
    for rank in range(ranks):
        upto = sum(share.stop - share.start for share in order if share.rank <= rank)
        assert 0 <= upto - total * (rank + 1) / ranks < largest + 1e-9 or upto == total


@given(deals())
@settings(max_examples=300, deadline=None)
def test_matrices_are_dealt_by_their_cost(dealt):
    """Nobody has more than the average and one matrix: Graham's bound of dealing the largest first."""
    tensors, ranks, per_node = dealt
    cost = {
        tensor.name: min(tensor.shape) ** 2 * (2 * max(tensor.shape) + min(tensor.shape))
        for tensor in tensors
        if tensor.rule == "tensors"
    }
    load = [0] * ranks
    for share in deal(tensors, ranks=ranks, ranks_per_node=per_node):
        load[share.rank] += cost.get(share.name, 0)
    assert max(load) <= sum(cost.values()) / ranks + max(cost.values(), default=0)
    if cost:
        shuffled = deal(tensors[::-1], ranks=ranks, ranks_per_node=per_node)
        owner = {share.name: share.rank for share in shuffled if share.name in cost}
        assert owner == {
            share.name: share.rank
            for share in deal(tensors, ranks=ranks, ranks_per_node=per_node)
            if share.name in cost
        }, "the order of the parameters decides"
