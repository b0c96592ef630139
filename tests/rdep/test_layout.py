"""The layout is a permutation of the pairs, sorted by expert, then token, then k; the return adds in the order of k."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.errors import RunError
from nmoe.rdep.layout import combine, layout


def check(indices_TK, experts):
    places = layout(indices_TK, experts)
    tokens, top_k = indices_TK.shape
    pairs = [(int(indices_TK[t, k]), t, k) for t in range(tokens) for k in range(top_k)]
    expected = sorted(pairs)
    assert places.pair_of_row_R.tolist() == [t * top_k + k for _, t, k in expected]
    assert places.token_of_row_R.tolist() == [t for _, t, _ in expected]
    for row, (_, t, k) in enumerate(expected):
        assert int(places.row_of_pair_TK[t, k]) == row
    counts = [sum(1 for e, _, _ in pairs if e == expert) for expert in range(experts)]
    assert places.rows == counts == places.rows_per_expert_E.tolist()
    assert places.start_E.tolist() == [sum(counts[:expert]) for expert in range(experts)]
    assert places.rows_per_expert_E.dtype == places.pair_of_row_R.dtype == torch.int64


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_routing(data):
    experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, experts))
    tokens = data.draw(st.integers(0, 12))
    rows = [data.draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    check(torch.tensor(rows, dtype=torch.int64).reshape(tokens, top_k), experts)


@pytest.mark.parametrize("expert", [0, 3, 7])
def test_all_to_one_expert(expert):
    check(torch.full((50, 1), expert), 8)


def test_the_same_expert_twice_keeps_both_pairs():
    check(torch.tensor([[2, 2], [0, 2], [2, 0]]), 4)


def test_every_token_uses_every_expert():
    check(torch.arange(6).repeat(17, 1), 6)
    check(torch.arange(5, -1, -1).repeat(17, 1), 6)


def test_an_expert_that_does_not_exist_is_named():
    with pytest.raises(RunError, match="a pair names expert 8, and there are 8"):
        layout(torch.tensor([[1], [8]]), 8)


def sequential(rows_RD, weights_TK, places, order):
    y_TD = torch.zeros(places.row_of_pair_TK.shape[0], rows_RD.shape[1])
    for k in order:
        y_TD = y_TD + weights_TK[:, k, None] * rows_RD[places.row_of_pair_TK[:, k]]
    return y_TD


@pytest.mark.parametrize("width", [1, 7, 8, 192, 193])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_return_adds_in_the_order_of_k(width, threads):
    """Powers of two as weights make each product exact, so only the order of the sums can show."""
    generator = torch.Generator().manual_seed(width)
    tokens, top_k, experts = 300, 8, 16
    places = layout(torch.rand(tokens, experts, generator=generator).topk(top_k).indices, experts)
    rows_RD = torch.randn(tokens * top_k, width, generator=generator)
    rows_RD *= 10.0 ** torch.randint(-6, 7, rows_RD.shape, generator=generator)
    weights_TK = 2.0 ** torch.randint(-3, 4, (tokens, top_k), generator=generator).float()
    torch.set_num_threads(threads)
    y_TD = combine(rows_RD, weights_TK, places)
    assert torch.equal(y_TD, sequential(rows_RD, weights_TK, places, range(top_k)))
    assert not torch.equal(y_TD, sequential(rows_RD, weights_TK, places, reversed(range(top_k))))
    plain_TD = combine(rows_RD, None, places)
    assert torch.equal(plain_TD, sequential(rows_RD, torch.ones_like(weights_TK), places, range(top_k)))


def test_the_return_of_bfloat16_rows_is_rounded_once():
    generator = torch.Generator().manual_seed(1)
    places = layout(torch.rand(40, 8, generator=generator).topk(4).indices, 8)
    rows_RD = torch.randn(160, 24, generator=generator).bfloat16()
    weights_TK = torch.rand(40, 4, generator=generator)
    y_TD = combine(rows_RD, weights_TK, places)
    assert y_TD.dtype == torch.bfloat16
    assert torch.equal(y_TD, combine(rows_RD.float(), weights_TK, places).bfloat16())
