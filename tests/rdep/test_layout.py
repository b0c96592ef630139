"""The layout against a sort in plain Python: every pair has one place, every token's row is sent once to each owner.

And the return adds in the order of k.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.rdep.layout import combine, layout, route


def layouts(routings, experts):
    """Every rank's layout, as the ranks make them from what all of them tell."""
    told = [route(indices_TK, num_experts=experts, ranks=len(routings)) for indices_TK in routings]
    pairs_NE, tokens_NN = torch.stack([r.pairs_E for r in told]), torch.stack([r.tokens_N for r in told])
    return [layout(own, pairs_NE, tokens_NN, rank=rank, layer=0) for rank, own in enumerate(told)]


def check(routings, experts):
    """routings: a (T, K) tensor of experts for each rank, T its own."""
    ranks, local = len(routings), experts // len(routings)
    found = layouts(routings, experts)
    pairs = sorted(
        (int(e), rank, t, k)
        for rank, indices_TK in enumerate(routings)
        for t, row in enumerate(indices_TK)
        for k, e in enumerate(row)
    )
    for owner in range(ranks):
        mine = [pair for pair in pairs if pair[0] // local == owner]
        for row, (_, rank, t, k) in enumerate(mine):
            assert int(found[rank].owner_TK[t, k]) == owner
            assert int(found[rank].row_TK[t, k]) == row
        sent = sorted({(rank, t) for _, rank, t, _ in mine})
        for place, (rank, t) in enumerate(sent):
            assert int(found[rank].place_TN[t, owner]) == place
        assert sent == [
            (rank, t) for rank in range(ranks) for t in found[rank].sent_TN[:, owner].nonzero().view(-1).tolist()
        ]
        expected = [
            [sum(1 for e, r, _, _ in mine if (e, r) == (expert, rank)) for rank in range(ranks)]
            for expert in range(owner * local, (owner + 1) * local)
        ]
        assert found[owner].segments_LN.tolist() == expected
        assert all(
            places.tokens_NN[:, owner].tolist() == [sum(1 for r, _ in sent if r == rank) for rank in range(ranks)]
            for places in found
        )
    for places in found:
        assert {places.row_TK.dtype, places.place_TN.dtype, places.segments_LN.dtype} == {torch.int64}


def routing(data, tokens, top_k, experts):
    rows = [data.draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    return torch.tensor(rows, dtype=torch.int64).reshape(tokens, top_k)


@given(st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_routing(data):
    ranks = data.draw(st.integers(1, 4))
    experts = ranks * data.draw(st.integers(1, 3))
    top_k = data.draw(st.integers(1, experts))
    check([routing(data, data.draw(st.integers(0, 6)), top_k, experts) for _ in range(ranks)], experts)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("expert", [0, 3, 7])
def test_all_to_one_expert(ranks, expert):
    check([torch.full((12, 1), expert)] * ranks, 8)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_to_one_rank_and_none_to_another(ranks):
    local = 8 // ranks
    for owner in range(ranks):
        check([torch.arange(local).repeat(9, 1) + owner * local] * ranks, 8)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_every_token_uses_every_expert(ranks):
    rising, falling = torch.arange(6).repeat(5, 1), torch.arange(5, -1, -1).repeat(7, 1)
    check([(rising, falling)[rank % 2] for rank in range(ranks)], 6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_uniform(ranks):
    """Each expert gets as many pairs as the others, from every rank."""
    check([(torch.arange(16)[:, None] + torch.arange(2) * 3 + rank) % 8 for rank in range(ranks)], 8)


def test_the_same_expert_twice_keeps_both_pairs():
    check([torch.tensor([[2, 2], [0, 2], [2, 0]]), torch.tensor([[3, 3], [2, 2]])], 4)


def test_empty_microbatches():
    nothing = torch.empty(0, 2, dtype=torch.int64)
    check([nothing], 4)
    check([nothing, nothing], 4)
    check([nothing, torch.tensor([[0, 3], [1, 2]]), nothing, nothing], 4)


def sequential(rows_RD, row_TK, weights_TK, order):
    y_TD = torch.zeros(row_TK.shape[0], rows_RD.shape[1])
    for k in order:
        y_TD = y_TD + weights_TK[:, k, None] * rows_RD[row_TK[:, k]]
    return y_TD


@pytest.mark.parametrize("width", [1, 7, 8, 192, 193])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_return_adds_in_the_order_of_k(width, threads):
    """Powers of two as weights make each product exact, so only the order of the sums can show."""
    generator = torch.Generator().manual_seed(width)
    tokens, top_k = 300, 8
    row_TK = torch.randperm(tokens * top_k, generator=generator).view(tokens, top_k)
    rows_RD = torch.randn(tokens * top_k, width, generator=generator)
    rows_RD *= 10.0 ** torch.randint(-6, 7, rows_RD.shape, generator=generator)
    weights_TK = 2.0 ** torch.randint(-3, 4, (tokens, top_k), generator=generator).float()
    torch.set_num_threads(threads)
    y_TD = combine(rows_RD, row_TK, weights_TK)
    assert torch.equal(y_TD, sequential(rows_RD, row_TK, weights_TK, range(top_k)))
    assert not torch.equal(y_TD, sequential(rows_RD, row_TK, weights_TK, reversed(range(top_k))))
    plain_TD = combine(rows_RD, row_TK, None)
    assert torch.equal(plain_TD, sequential(rows_RD, row_TK, torch.ones_like(weights_TK), range(top_k)))


def test_the_return_of_bfloat16_rows_is_rounded_once():
    generator = torch.Generator().manual_seed(1)
    row_TK = torch.randperm(160, generator=generator).view(40, 4)
    rows_RD = torch.randn(160, 24, generator=generator).bfloat16()
    weights_TK = torch.rand(40, 4, generator=generator)
    y_TD = combine(rows_RD, row_TK, weights_TK)
    assert y_TD.dtype == torch.bfloat16
    assert torch.equal(y_TD, combine(rows_RD.float(), row_TK, weights_TK).bfloat16())
