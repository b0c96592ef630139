"""Where each pair's row lies among N ranks that each bring a microbatch and hold L = E / N experts.

Mathematics. With C[n, e] the pairs of rank n's microbatch for expert e and U[n, o] the tokens of rank n that
have an expert at owner o = e // L, a pair of rank r and a token that goes to o lie at

    row(p)      = sum over lower experts e' of o and all n of C[n, e'] + sum over n < r of C[n, e]
                  + (r's pairs for e before p)
    place(t, o) = sum over n < r of U[n, o] + (r's tokens before t that go to o)

so an owner's rows are sorted by (expert, microbatch, token, k), and its tokens by (microbatch, token). Both
are facts of the routings: every rank computes them from the same N x (E + N) counts. All arithmetic is int32
and exact; no append, no counter, no host.

In two halves, between which the counts travel (nmoe.kernels.signals). `count`: the pairs are counted as in
layout.py; blocks of 256 tokens count which owners they go to, and each count is scanned over the blocks.
`place`: one program turns all ranks' counts into first rows; every pair then writes its row, every token its
places, every expert its tiles.

Floor: 4 bytes read and 4 written a pair, 4 N a token; the six launches cost more. Measured with the phase between
the halves 0.039 ms for 65536 pairs, 0.085 for 262144, 128 experts (2026-11-25, two H100).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.kernels.layout import BLOCK, TILE_ROWS, count_kernel, scan_kernel, write_tiles


class Counted(NamedTuple):
    """What a rank knows of its own pairs.

    counts_C: int32 (E + N), its pairs for each expert, then its tokens for each owner. before_EB, before_NB:
    those of earlier blocks. rank_P, rank_TN: int32, each pair's and token's place in its block; -1 where a token
    does not go.
    """

    counts_C: Tensor
    before_EB: Tensor
    rank_P: Tensor
    before_NB: Tensor
    rank_TN: Tensor


class Places(NamedTuple):
    """The places of one rank's pairs, and the shape of what it owns; `layer` is for messages.

    expert_TK: as routed. pairs_E: int32 (E), this rank's pairs for each of all experts. row_TK: int32 (T, K), each
    pair's row at its expert's owner. place_TN: int32 (T, N), where a token's row lies at an owner, -1 where it does not
    go. offsets_L1, segments_S1, source_N1, tile_expert, tile_row, num_tiles: of this rank's rows, as in
    `nmoe.kernels.layout.OwnerLayout`. first_row: int32 (1), where those rows begin in the arena; None until
    `nmoe.kernels.arena.reserve` has said.
    """

    layer: int
    expert_TK: Tensor
    pairs_E: Tensor
    row_TK: Tensor
    place_TN: Tensor
    offsets_L1: Tensor
    segments_S1: Tensor
    source_N1: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    num_tiles: Tensor
    first_row: Tensor | None = None


def places_reference(expert_NTK: list[Tensor], num_experts: int, rank: int, layer: int = 0) -> Places:
    """The meaning of `count` and `place`, from all ranks' routings, by one sort on any device."""
    ranks, top_k = len(expert_NTK), expert_NTK[rank].shape[1]
    local = num_experts // ranks
    expert_P = torch.cat([e.reshape(-1) for e in expert_NTK]).long()
    source_P = torch.cat([torch.full((e.numel(),), n) for n, e in enumerate(expert_NTK)]).to(expert_P.device)
    order_P = torch.sort(expert_P * ranks + source_P, stable=True).indices
    all_P = torch.empty_like(order_P)
    all_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    counts_NE = torch.stack([torch.bincount(e.reshape(-1).long(), minlength=num_experts) for e in expert_NTK])
    first_N = torch.cat([counts_NE.new_zeros(1), counts_NE.sum(0).view(ranks, local).sum(1).cumsum(0)])
    row_P = all_P - first_N[expert_P // local]
    sent_NTN = [torch.stack([(e // local == o).any(1) for o in range(ranks)], 1) for e in expert_NTK]
    before_N = sum((sent.sum(0) for sent in sent_NTN[:rank]), torch.zeros(ranks, dtype=torch.long))
    place_TN = torch.where(sent_NTN[rank], before_N.to(order_P.device) + sent_NTN[rank].cumsum(0) - 1, -1)
    segments_LN = counts_NE[:, rank * local : (rank + 1) * local].t()
    segments_S1 = torch.cat([segments_LN.new_zeros(1), segments_LN.flatten().cumsum(0)])
    tokens_N = torch.stack([sent[:, rank].sum() for sent in sent_NTN])
    tiles_L = (segments_LN.sum(1) + TILE_ROWS - 1) // TILE_ROWS
    tile_expert = torch.repeat_interleave(torch.arange(local, device=tiles_L.device), tiles_L)
    nth = torch.arange(len(tile_expert), device=tiles_L.device) - (tiles_L.cumsum(0) - tiles_L)[tile_expert]
    return Places(
        layer,
        expert_NTK[rank],
        counts_NE[rank].int(),
        row_P[source_P == rank].view(-1, top_k).int(),
        place_TN.int(),
        segments_S1[::ranks].int(),
        segments_S1.int(),
        torch.cat([tokens_N.new_zeros(1), tokens_N.cumsum(0)]).int(),
        tile_expert.int(),
        (segments_S1[::ranks][tile_expert] + nth * TILE_ROWS).int(),
        tiles_L.sum()[None].int(),
    )


@triton.jit
def sent_kernel(expert_ptr, count_ptr, rank_ptr, tokens, blocks, local, N: tl.constexpr, K: tl.constexpr,
                KP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One block of tokens: count_NB, and each token's rank among the block's that go to an owner."""
    b = tl.program_id(0)
    t = b * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, KP)
    real = t < tokens
    e = tl.load(expert_ptr + t[:, None] * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=-1).to(tl.int32)
    for o in tl.static_range(N):
        sent = tl.max(((e >= o * local) & (e < (o + 1) * local)).to(tl.int32), axis=1)
        tl.store(rank_ptr + t * N + o, tl.where(sent != 0, tl.cumsum(sent, 0) - 1, -1), mask=real)
        tl.store(count_ptr + o * blocks + b, tl.sum(sent, 0))


@triton.jit
def shape_kernel(counts_ptr, base_ptr, start_ptr, source_ptr, offsets_ptr, segments_ptr, first_tile_ptr, num_tiles_ptr,
                 rank, experts, local, N: tl.constexpr, EXPERTS: tl.constexpr, LOCAL: tl.constexpr,
                 RANKS: tl.constexpr, TILE_ROWS: tl.constexpr):  # fmt: skip
    """counts_NC to the first row of this rank's pairs of each expert, its first place at each owner, and its shape."""
    stride = experts + N
    e = tl.arange(0, EXPERTS)
    every = tl.zeros([EXPERTS], tl.int32)
    earlier = tl.zeros([EXPERTS], tl.int32)
    for n in tl.static_range(N):
        c = tl.load(counts_ptr + n * stride + e, mask=e < experts, other=0)
        every += c
        earlier += tl.where(n < rank, c, 0)
    below = tl.cumsum(every, 0) - every
    for o in tl.static_range(N):
        others = tl.sum(tl.where(e < o * local, every, 0), 0)
        earlier -= tl.where((e >= o * local) & (e < (o + 1) * local), others, 0)
    tl.store(base_ptr + e, below + earlier, mask=e < experts)

    i = tl.arange(0, LOCAL)
    here = i < local
    mine = tl.zeros([LOCAL], tl.int32)
    for n in tl.static_range(N):
        mine += tl.load(counts_ptr + n * stride + rank * local + i, mask=here, other=0)
    first = tl.cumsum(mine, 0) - mine
    tiles = (mine + TILE_ROWS - 1) // TILE_ROWS
    tl.store(offsets_ptr + i, first, mask=here)
    tl.store(offsets_ptr + local, tl.sum(mine, 0))
    tl.store(first_tile_ptr + i, tl.cumsum(tiles, 0) - tiles, mask=here)
    tl.store(num_tiles_ptr, tl.sum(tiles, 0))
    for n in tl.static_range(N):
        tl.store(segments_ptr + i * N + n, first, mask=here)
        first += tl.load(counts_ptr + n * stride + rank * local + i, mask=here, other=0)
    tl.store(segments_ptr + local * N, tl.sum(mine, 0))

    o = tl.arange(0, RANKS)
    start = tl.zeros([RANKS], tl.int32)
    received = tl.full((), 0, tl.int32)
    for n in tl.static_range(N):
        u = tl.load(counts_ptr + n * stride + experts + o, mask=o < N, other=0)
        tl.store(source_ptr + n, received)
        received += tl.sum(tl.where(o == rank, u, 0), 0)
        start += tl.where(n < rank, u, 0)
    tl.store(source_ptr + N, received)
    tl.store(start_ptr + o, start, mask=o < N)


@triton.jit
def rank_place_kernel(expert_ptr, before_ptr, rank_ptr, base_ptr, row_ptr, pairs, pair_blocks, token_before_ptr,
                      token_rank_ptr, start_ptr, place_ptr, tokens, token_blocks, offsets_ptr, first_tile_ptr,
                      tile_expert_ptr, tile_row_ptr, N: tl.constexpr, BLOCK: tl.constexpr,
                      TILE_ROWS: tl.constexpr):  # fmt: skip
    """Programs place a block of pairs, or a block of tokens, or write one expert's tiles."""
    b = tl.program_id(0)
    if b < pair_blocks:
        p = b * BLOCK + tl.arange(0, BLOCK)
        real = p < pairs
        e = tl.load(expert_ptr + p, mask=real, other=0).to(tl.int32)
        row = tl.load(base_ptr + e, mask=real, other=0) + tl.load(rank_ptr + p, mask=real, other=0)
        row += tl.load(before_ptr + e * pair_blocks + b, mask=real, other=0)
        tl.store(row_ptr + p, row, mask=real)
    elif b < pair_blocks + token_blocks:
        c = b - pair_blocks
        t = c * BLOCK + tl.arange(0, BLOCK)
        for o in tl.static_range(N):
            first = tl.load(start_ptr + o) + tl.load(token_before_ptr + o * token_blocks + c)
            rank = tl.load(token_rank_ptr + t * N + o, mask=t < tokens, other=-1)
            tl.store(place_ptr + t * N + o, tl.where(rank >= 0, first + rank, -1), mask=t < tokens)
    else:
        write_tiles(b - pair_blocks - token_blocks, offsets_ptr, first_tile_ptr, tile_expert_ptr, tile_row_ptr, BLOCK,
                    TILE_ROWS)  # fmt: skip


def most_rows(*, ranks: int, tokens: int, num_experts: int, top_k: int) -> int:
    """The most rows an owner can have: every pair of N microbatches of T tokens that its experts can take."""
    return ranks * tokens * min(top_k, num_experts // ranks)


def count(expert_TK: Tensor, *, num_experts: int, ranks: int) -> Counted:
    """This rank's pairs, counted. expert_TK: integer (T, K), contiguous, each in [0, E), E a multiple of N."""
    tokens, top_k = expert_TK.shape
    pairs, device = tokens * top_k, expert_TK.device
    blocks, token_blocks = triton.cdiv(pairs, BLOCK), triton.cdiv(tokens, BLOCK)

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    counted = Counted(
        new(num_experts + ranks), new(num_experts, blocks), new(pairs), new(ranks, token_blocks), new(tokens, ranks)
    )
    count_kernel[(blocks,)](
        expert_TK, counted.before_EB, counted.rank_P, pairs, blocks, num_experts, BLOCK, 16, num_warps=4
    )
    sent_kernel[(token_blocks,)](
        expert_TK, counted.before_NB, counted.rank_TN, tokens, token_blocks, num_experts // ranks, ranks, top_k,
        triton.next_power_of_2(top_k), BLOCK, num_warps=8,
    )  # fmt: skip
    scan_kernel[(num_experts,)](counted.before_EB, counted.counts_C, blocks, 1024, num_warps=4)
    scan_kernel[(ranks,)](counted.before_NB, counted.counts_C[num_experts:], token_blocks, 1024, num_warps=4)
    return counted


def place(
    expert_TK: Tensor, counted: Counted, counts_NC: Tensor, *, rank: int, most_tokens: int, layer: int
) -> Places:
    """The places of this rank's pairs among all, on the device, without waiting for it.

    counts_NC: int32 (N, E + N), every rank's `counts_C`. most_tokens: T, of any rank, for the size of the tile tables,
    whose entries from num_tiles on are undefined.
    """
    tokens, top_k = expert_TK.shape
    ranks = counts_NC.shape[0]
    num_experts = counts_NC.shape[1] - ranks
    local = num_experts // ranks
    pairs = tokens * top_k
    blocks, token_blocks = triton.cdiv(pairs, BLOCK), triton.cdiv(tokens, BLOCK)

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=expert_TK.device)

    most = most_rows(ranks=ranks, tokens=most_tokens, num_experts=num_experts, top_k=top_k)
    bound = most // TILE_ROWS + local
    places = Places(
        layer, expert_TK, counted.counts_C[:num_experts], new(tokens, top_k), new(tokens, ranks), new(local + 1),
        new(local * ranks + 1), new(ranks + 1), new(bound), new(bound), new(1),
    )  # fmt: skip
    base_E, start_N, first_tile_L = new(num_experts), new(ranks), new(local)
    shape_kernel[(1,)](
        counts_NC, base_E, start_N, places.source_N1, places.offsets_L1, places.segments_S1, first_tile_L,
        places.num_tiles, rank, num_experts, local, ranks, triton.next_power_of_2(num_experts),
        triton.next_power_of_2(local), triton.next_power_of_2(ranks), TILE_ROWS, num_warps=4,
    )  # fmt: skip
    rank_place_kernel[(blocks + token_blocks + local,)](
        expert_TK, counted.before_EB, counted.rank_P, base_E, places.row_TK, pairs, blocks, counted.before_NB,
        counted.rank_TN, start_N, places.place_TN, tokens, token_blocks, places.offsets_L1, first_tile_L,
        places.tile_expert, places.tile_row, ranks, BLOCK, TILE_ROWS, num_warps=4,
    )  # fmt: skip
    return places
