"""Sums over ranks: one rank's additions in one rank's order, whoever makes the parts and whoever adds them."""

import pytest
import torch

from tests.optim import work
from tests.rdep.ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    server = Ranks(tmp_path_factory.mktemp("ranks"), "tests.optim.work")
    yield server
    server.close()


def sum_of(name, microbatches, step, order=None):
    """(((g_0 + g_1) + g_2) + ...) in float32."""
    first, *rest = order or range(microbatches)
    total = work.part(name, first, step)
    for microbatch in rest:
        total = total + work.part(name, microbatch, step)
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("number", "microbatches"), [(2, 2), (2, 8), (3, 6), (4, 8), (6, 6)])
def test_the_owner_adds_what_one_rank_would(ranks, number, microbatches, dtype):
    answers = ranks.run("reducing", number, microbatches=microbatches, dtype=dtype)
    assert [end for end, _ in answers] == ["done"] * number, answers
    found = {key: value for _, one in answers for key, value in one.items()}
    dealt = work.shares(number)
    assert (len({share.rank for share in dealt}) == number) == (number < 6), "of six, some own nothing"
    for step in range(work.STEPS):
        whole = {name: sum_of(name, microbatches, step) for name in work.SHAPES}
        for share in dealt:
            mine = whole[share.name].view(-1)[share.start : share.stop]
            assert found[f"{step} sum {share.name} {share.start} {share.stop}"] == work.digest(mine)
        for name, total in whole.items():
            weights = work.digest(work.updated(total, getattr(torch, dtype)))
            assert {found[f"{step} weights {name} of {rank}"] for rank in range(number)} == {weights}
        told = [[float(value + 100 * step) for value in range(1 + rank)] for rank in range(number)]
        assert all(found[f"{step} gathered by {rank}"] == told for rank in range(number))


@pytest.mark.parametrize("order", [[1, 0, 3, 2, 5, 4], [0, 2, 4, 1, 3, 5], [5, 4, 3, 2, 1, 0], [0, 1, 4, 5, 2, 3]])
def test_the_parts_show_the_order(order):
    """Else the test above would say nothing: in the first, by passes of two, only sums of two change their sides."""
    differs = [name for name in work.SHAPES if not torch.equal(sum_of(name, 6, 0), sum_of(name, 6, 0, order))]
    assert set(differs) >= {"table", "matrix", "wide"}
