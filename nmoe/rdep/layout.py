"""Where each pair lies: the one layout that dispatch, experts and return share.

A pair is p = t*K + k: token t's k-th expert. Rows are the pairs sorted by expert, and within an
expert by p. So a row's place is a fact of the routing,

    row(p) = (pairs of lower experts) + (pairs of the same expert before p),

and needs no counter that somebody increments: sorting is stable, counts give the starts. A layout
covers one microbatch; its rows of one expert are a segment, the unit in which expert products are
called, so that the same product is called at the same shape on any number of ranks.

`combine` is the return: token t's K rows, added in the order k = 0 ... K-1 in float32.
"""

import attrs
import torch
from torch import Tensor

from nmoe.errors import fail


@attrs.frozen(kw_only=True, eq=False)
class Layout:
    """The places of one microbatch's pairs.

    pair_of_row_R: (T*K,) int64, the pair t*K + k of each row. row_of_pair_TK: (T, K) int64, its
    inverse. token_of_row_R: (T*K,) int64, pair // K. rows_per_expert_E: (E,) int64.
    start_E: (E,) int64, the first row of each expert. rows: rows_per_expert_E on the host.
    """

    pair_of_row_R: Tensor
    row_of_pair_TK: Tensor
    token_of_row_R: Tensor
    rows_per_expert_E: Tensor
    start_E: Tensor
    rows: list[int]


def layout(indices_TK: Tensor, num_experts: int) -> Layout:
    """The layout of a routing.

    indices_TK: (T, K) int64, each token's experts, 0 <= index < num_experts. A RunError (N0801)
    names an index that is not.
    """
    tokens, top_k = indices_TK.shape
    expert_P = indices_TK.reshape(-1)
    rows_per_expert_E = torch.bincount(expert_P, minlength=num_experts)
    if rows_per_expert_E.numel() != num_experts:
        raise fail(
            "N0801",
            f"a pair names expert {rows_per_expert_E.numel() - 1}, and there are {num_experts}",
            place="layout of a routing",
            help="the router's number of experts must be the experts'",
        )
    pair_of_row_R = torch.sort(expert_P, stable=True).indices
    row_of_pair_P = torch.empty_like(pair_of_row_R)
    row_of_pair_P[pair_of_row_R] = torch.arange(tokens * top_k, device=indices_TK.device)
    return Layout(
        pair_of_row_R=pair_of_row_R,
        row_of_pair_TK=row_of_pair_P.view(tokens, top_k),
        token_of_row_R=pair_of_row_R // top_k,
        rows_per_expert_E=rows_per_expert_E,
        start_E=rows_per_expert_E.cumsum(0) - rows_per_expert_E,
        rows=rows_per_expert_E.tolist(),
    )


def combine(rows_RD: Tensor, weights_TK: Tensor | None, places: Layout) -> Tensor:
    """y_t = sum over k = 0 ... K-1, in this order, of w_tk * rows[row(t, k)].

    rows_RD: (T*K, D), one row a pair. weights_TK: (T, K) float32, or None for a plain sum.
    Returns (T, D) in the rows' dtype; products and sums are float32, rounded once.
    """
    # A bag of embeddings is this sum: it adds a bag's rows in order, and writes y once.
    y_TD = torch.nn.functional.embedding_bag(
        places.row_of_pair_TK, rows_RD.float(), mode="sum", per_sample_weights=weights_TK
    )
    return y_TD.to(rows_RD.dtype)
