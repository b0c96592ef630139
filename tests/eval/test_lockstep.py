"""Every rank makes the same number of calls, and every batch is scored by one of them."""

from hypothesis import given
from hypothesis import strategies as st

from nmoe.eval.lockstep import calls


@given(st.integers(0, 200), st.integers(1, 17))
def test_equal_calls_and_each_batch_once(num_batches, world_size):
    ranks = [calls(num_batches, rank, world_size) for rank in range(world_size)]
    assert {len(mine) for mine in ranks} == {-(-num_batches // world_size)}
    scored = [index for mine in ranks for index in mine if index is not None]
    assert sorted(scored) == list(range(num_batches))
    # Call by call the ranks work side by side, in the order of the batches; the empty ones are the last.
    rounds = [index for together in zip(*ranks, strict=True) for index in together]
    assert rounds[:num_batches] == list(range(num_batches))
    assert all(index is None for index in rounds[num_batches:])
