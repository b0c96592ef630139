"""Where each pair lies: the one layout that dispatch, experts and return share, for any number of ranks.

A pair is p = t*K + k: token t's k-th expert. N ranks each bring one microbatch, and expert e belongs
to rank e // L, its owner, L = E / N. An owner's rows are the pairs of its experts sorted by (expert,
microbatch, token, k). So a row's place is a fact of the routings: with C[n, e] the pairs of rank n's
microbatch for expert e, and rank r's pairs sorted by (expert, token, k),

    row(p) = (pairs of the owner's lower experts) + (sum over n < r of C[n, e]) + (r's pairs for e before p)

A token's row travels once to each owner that has one of its experts. There it lies behind those of
earlier microbatches and those of earlier tokens,

    place(t, o) = (sum over n < r of U[n, o]) + (r's tokens before t that go to o)

with U[n, o] the tokens that rank n sends to o. Counts and sums of counts need no counter that somebody
increments, and no host: every rank computes the same from the same C and U. One rank is N = 1: every
token goes to owner 0, and its place is its index.

The rows of an expert and one microbatch are a segment, the unit in which expert products are called,
so that the same product is called at the same shape on any number of ranks.

`combine` is the return: token t's K rows, added in the order k = 0 ... K-1 in float32.
"""

import attrs
import torch
from torch import Tensor


@attrs.frozen(kw_only=True, eq=False)
class Routing:
    """What a rank knows of its own pairs, before it has heard of anybody else's.

    indices_TK: (T, K) int64. position_TK: (T, K) int64, each pair's place among this rank's pairs
    sorted by (expert, token, k). sent_TN: (T, N) bool, whether a token has an expert on a rank.
    pairs_E: (E,) int64, this rank's row of C. tokens_N: (N,) int64, its row of U.
    """

    indices_TK: Tensor
    position_TK: Tensor
    sent_TN: Tensor
    pairs_E: Tensor
    tokens_N: Tensor


@attrs.frozen(kw_only=True, eq=False)
class Layout:
    """The places of one microbatch's pairs, and the shape of what this rank owns.

    layer: of the model, for messages. owner_TK, row_TK: (T, K) int64, each pair's owner and its row there.
    sent_TN: (T, N) bool, and place_TN: (T, N) int64, whether and where a token's row lies at a rank.
    segments_LN: (L, N) int64, the pairs of each of this rank's experts, by microbatch.
    tokens_NN: (N, N) int64, U[source, owner].
    """

    layer: int
    owner_TK: Tensor
    row_TK: Tensor
    sent_TN: Tensor
    place_TN: Tensor
    segments_LN: Tensor
    tokens_NN: Tensor


def route(indices_TK: Tensor, *, num_experts: int, ranks: int) -> Routing:
    """A rank's own pairs, sorted and counted. indices_TK: (T, K) int64, 0 <= index < num_experts."""
    expert_P = indices_TK.reshape(-1)
    sorted_P, pair_P = torch.sort(expert_P, stable=True)
    position_P = torch.empty_like(pair_P).scatter_(0, pair_P, torch.arange(pair_P.numel(), device=pair_P.device))
    expert_E = torch.arange(num_experts, device=indices_TK.device)
    pairs_E = torch.searchsorted(sorted_P, expert_E, right=True) - torch.searchsorted(sorted_P, expert_E)
    owner_TK = indices_TK // (num_experts // ranks)
    sent_TN = torch.zeros(indices_TK.shape[0], ranks, dtype=torch.bool, device=indices_TK.device)
    sent_TN.scatter_(1, owner_TK, True)
    return Routing(
        indices_TK=indices_TK,
        position_TK=position_P.view(indices_TK.shape),
        sent_TN=sent_TN,
        pairs_E=pairs_E,
        tokens_N=sent_TN.sum(0),
    )


def layout(routing: Routing, pairs_NE: Tensor, tokens_NN: Tensor, *, rank: int, layer: int) -> Layout:
    """The layout of this rank's routing among all.

    pairs_NE: (N, E) int64 and tokens_NN: (N, N) int64: every rank's `pairs_E` and `tokens_N`, rank 0's first.
    """
    ranks, num_experts = pairs_NE.shape
    local = num_experts // ranks
    all_E = pairs_NE.sum(0)
    below_NL = all_E.view(ranks, local).cumsum(1) - all_E.view(ranks, local)
    first_E = below_NL.view(-1) + pairs_NE[:rank].sum(0)
    first_here_E = pairs_NE[rank].cumsum(0) - pairs_NE[rank]
    return Layout(
        layer=layer,
        owner_TK=routing.indices_TK // local,
        row_TK=routing.position_TK + (first_E - first_here_E)[routing.indices_TK],
        sent_TN=routing.sent_TN,
        place_TN=tokens_NN[:rank].sum(0) + routing.sent_TN.cumsum(0) - 1,
        segments_LN=pairs_NE[:, rank * local : (rank + 1) * local].t(),
        tokens_NN=tokens_NN,
    )


def combine(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """y_t = sum over k = 0 ... K-1, in this order, of w_tk * rows[row_tk].

    rows_RD: (R, D). row_TK: (T, K) int64. weights_TK: (T, K) float32, or None for a plain sum.
    Returns (T, D) in the rows' dtype; products and sums are float32, rounded once.
    """
    # A bag of embeddings is this sum: it adds a bag's rows in order, and writes y once.
    y_TD = torch.nn.functional.embedding_bag(row_TK, rows_RD.float(), mode="sum", per_sample_weights=weights_TK)
    return y_TD.to(rows_RD.dtype)
