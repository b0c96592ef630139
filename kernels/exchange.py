"""Rows between ranks: a token's row to the owners of its experts, and each pair's row back.

    dispatch:   rows[o][place(t, o)] = x[t] for every owner o that t goes to, and beside it t and for each k
                the pair's row (-1 where its expert is elsewhere) and its weight
    keep:       out of the received rows and lists what backward needs, and for every expert row its token and its pair
    give back:  slots[s][t * K + k] = y[row] for every pair here of every token t of source s; and for gradients
                the sum over n, in order, of part[n, row], which is the gradient of the pair's weight

Memory. `rows`, the lists and the slots lie in the memory of the rank that reads them; a kernel is given a table of
the N ranks' addresses, int64, of which its own is one, and stores there over NVLink as it stores at home. A token's row
leaves its registers once for each owner. A source's rows lie behind those of the sources before it, so no two ranks
write the same bytes, and nothing is added: no atomics. What another rank reads must be published afterwards
(nmoe.kernels.signals); what another rank wrote is read by a later kernel than the one that observed it.

Everything is a copy but the float32 sum of `parts`, which has the order of `combine.sum_dots`. So the bits are those
of one rank, and the order in which programs run changes nothing.

Give back goes through the owner's rows as they lie, so that it reads them in one run, none of its threads has a row of
another owner, and the rows' places are fetched beside the rows. A program takes tile after tile: how many programs
there are is free (launch.py), and few, with many warps, leave the other multiprocessors to what runs beside.

Floor (D values of 2 bytes, T tokens, u of them to each owner): dispatch sends (N - 1) u D 2 bytes and
(N - 1) u (8 K + 4) of lists, give back T K D 2 (N - 1) / N. Prediction at 360 GB/s each way, T 32768, D 2048, top-8 of
128 on two ranks: 0.39 ms and 1.5 ms; keep 0.1 ms at 3 TB/s. Measured with their phase: dispatch 0.381 ms, 351 GB/s of
unique rows (peer copy 392), keep 0.105, give back 1.491 ms, 360 GB/s (2026-11-25, two H100).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.kernels.launch import EXCHANGE_LAUNCH, RETURN_LAUNCH, ReturnLaunch
from nmoe.kernels.layout import OwnerLayout
from nmoe.kernels.layout_ranks import Places, most_rows


class Lists(NamedTuple):
    """Tables of the ranks' addresses, int64 (N): of row_UK int32, weight_UK float32 (N T, K), token_U int32 (N T)."""

    row_UK: Tensor
    weight_UK: Tensor
    token_U: Tensor


class Received(NamedTuple):
    """What an owner has of everybody's tokens, by (microbatch, token), with room for N * T; `layout.received` are real.

    x_UD: the tokens' rows. weight_UK: float32, the router's weights. token_U: int32, its number in its microbatch.
    layout: of the U tokens' pairs among this rank's experts: row_TK there is (U, K).
    """

    x_UD: Tensor
    weight_UK: Tensor
    token_U: Tensor
    layout: OwnerLayout


def dispatch_reference(
    x_NTD: list[Tensor], weight_NTK: list[Tensor], places: list[Places], rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `rank` receives: rows (U, D), row_UK, weight_UK and token_U, source after source; plain torch."""
    local = len(places[rank].offsets_L1) - 1
    rows, pairs, weights, tokens = [], [], [], []
    for x_TD, weight_TK, p in zip(x_NTD, weight_NTK, places, strict=True):
        token_U = (p.place_TN[:, rank] >= 0).nonzero().view(-1)
        rows.append(x_TD[token_U])
        pairs.append(torch.where(p.expert_TK[token_U] // local == rank, p.row_TK[token_U], -1))
        weights.append(weight_TK[token_U])
        tokens.append(token_U.int())
    return torch.cat(rows), torch.cat(pairs).int(), torch.cat(weights), torch.cat(tokens)


def give_back_reference(y_NRD: list[Tensor], places: Places, owner_rows: int) -> Tensor:
    """What a source gets: (T * K, D), each pair's row at its owner of `owner_rows` experts each; plain torch."""
    row_P, owner_P = places.row_TK.reshape(-1).long(), places.expert_TK.reshape(-1).long() // owner_rows
    return torch.stack([y_NRD[o][r] for o, r in zip(owner_P.tolist(), row_P.tolist(), strict=True)])


@triton.jit
def at_rank(table_ptr, n, TYPE: tl.constexpr):
    """The address of rank n in a table, as a pointer to TYPE; regions begin at multiples of 128 bytes."""
    return tl.multiple_of(tl.load(table_ptr + n).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def dispatch_kernel(x_ptr, place_ptr, rows_ptr, own_ptr, expert_ptr, row_ptr, weight_ptr, list_row_ptr, list_weight_ptr,
                    list_token_ptr, tokens, D, pieces, local, rank, LISTS: tl.constexpr, N: tl.constexpr,
                    K: tl.constexpr, KP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    piece = tl.program_id(0) % pieces
    t = tl.program_id(0) // pieces * BLOCK_T + tl.arange(0, BLOCK_T)
    d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    real = t < tokens
    mask = real[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + t.to(tl.int64)[:, None] * D + d[None, :], mask=mask)
    for n in tl.static_range(N):
        o = (rank + 1 + n) % N  # each rank begins with another peer, and ends at home
        place = tl.load(place_ptr + t * N + o, mask=real, other=-1)
        at = place.to(tl.int64)[:, None] * D + d[None, :]
        goes = mask & (place >= 0)[:, None]
        if o == rank:
            tl.store(own_ptr + at, x, mask=goes)
        else:
            tl.store(at_rank(rows_ptr, o, own_ptr.dtype.element_ty) + at, x, mask=goes)
        if LISTS:  # noqa: SIM102 (known when compiled, and the other is not)
            if piece == 0:
                k = tl.arange(0, KP)
                p = t[:, None] * K + k[None, :]
                u = place[:, None] * K + k[None, :]
                pair = (place >= 0)[:, None] & (k < K)[None, :]
                e = tl.load(expert_ptr + p, mask=pair, other=-1).to(tl.int32)
                row = tl.load(row_ptr + p, mask=pair, other=-1)
                row = tl.where((e >= o * local) & (e < (o + 1) * local), row, -1)
                tl.store(at_rank(list_row_ptr, o, tl.int32) + u, row, mask=pair)
                weight = tl.load(weight_ptr + p, mask=pair, other=0.0)
                tl.store(at_rank(list_weight_ptr, o, tl.float32) + u, weight, mask=pair)
                tl.store(at_rank(list_token_ptr, o, tl.int32) + place, t, mask=place >= 0)


@triton.jit
def keep_kernel(rows_ptr, list_row_ptr, list_weight_ptr, list_token_ptr, source_ptr, x_ptr, row_ptr, weight_ptr,
                token_ptr, token_R_ptr, pair_R_ptr, D, pieces, rank, N: tl.constexpr, K: tl.constexpr,
                KP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    s = tl.program_id(0) % N
    piece = tl.program_id(0) // N % pieces
    i = tl.program_id(0) // (N * pieces) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = tl.load(source_ptr + s)
    u = start + i
    real = u < tl.load(source_ptr + s + 1)
    if s != rank:
        d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
        at = u.to(tl.int64)[:, None] * D + d[None, :]
        mask = real[:, None] & (d < D)[None, :]
        tl.store(x_ptr + at, tl.load(rows_ptr + at, mask=mask), mask=mask)
    if piece == 0:
        k = tl.arange(0, KP)
        at = u[:, None] * K + k[None, :]
        pair = real[:, None] & (k < K)[None, :]
        row = tl.load(list_row_ptr + at, mask=pair, other=-1)
        tl.store(row_ptr + at, row, mask=pair)
        tl.store(weight_ptr + at, tl.load(list_weight_ptr + at, mask=pair), mask=pair)
        tl.store(token_ptr + u, tl.load(list_token_ptr + u, mask=real), mask=real)
        here = pair & (row >= 0)
        tl.store(token_R_ptr + row, tl.broadcast_to(u[:, None], [BLOCK_T, KP]), mask=here)
        tl.store(pair_R_ptr + row, at, mask=here)


@triton.jit
def give_back_kernel(y_ptr, pair_ptr, token_ptr, source_ptr, end_ptr, slots_ptr, part_ptr, sums_ptr, rows, parts, D,
                     pieces, DOTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr,
                     BLOCK_D: tl.constexpr):  # fmt: skip
    end = tl.load(end_ptr)
    received = tl.load(source_ptr + N)
    for item in range(tl.program_id(0), tl.cdiv(end, BLOCK_R) * pieces, tl.num_programs(0)):
        piece = item % pieces
        r = item // pieces * BLOCK_R + tl.arange(0, BLOCK_R)
        d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
        within = (d < D)[None, :]
        y = tl.load(y_ptr + r.to(tl.int64)[:, None] * D + d[None, :], mask=(r < end)[:, None] & within)
        pair = tl.load(pair_ptr + r, mask=r < end, other=0)
        u = pair // K
        real = (r < end) & (u < received)
        s = tl.zeros_like(u)
        for source in tl.static_range(1, N):
            s += (u >= tl.load(source_ptr + source)).to(tl.int32)
        slot = tl.load(token_ptr + u, mask=real, other=0) * K + pair % K
        slots = tl.load(slots_ptr + s[:, None]).to(tl.pointer_type(y_ptr.dtype.element_ty))
        at = slot.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(tl.multiple_of(slots, [16, 16]) + at, y, mask=real[:, None] & within)
        if DOTS:  # noqa: SIM102
            if piece == 0:
                total = tl.zeros([BLOCK_R], tl.float32)
                for n in range(parts):
                    total += tl.load(part_ptr + n * rows + r, mask=real, other=0.0)
                tl.store(tl.load(sums_ptr + s).to(tl.pointer_type(tl.float32)) + slot, total, mask=real)


def _pieces(width: int, columns: int) -> tuple[int, int]:
    """How many columns a program takes at a time, and how many pieces a row has."""
    block = min(triton.next_power_of_2(width), columns)
    return block, triton.cdiv(width, block)


def dispatch(
    x_TD: Tensor, places: Places, rows_N: Tensor, own_UD: Tensor, rank: int, weight_TK: Tensor | None = None,
    lists: Lists | None = None,
) -> None:  # fmt: skip
    """Each token's row to its owners: into the regions of rows_N, and into own_UD for this rank itself.

    x_TD: contiguous, of own_UD's dtype. rows_N: the table of the ranks' received rows (N * T, D). own_UD: where this
    rank's own tokens go, (N * T, D). weight_TK: float32, and lists, both or neither: with the pairs' rows and weights.
    """
    tokens, width = x_TD.shape
    top_k, ranks = places.row_TK.shape[1], places.place_TN.shape[1]
    p = EXCHANGE_LAUNCH
    block, pieces = _pieces(width, p.columns)
    dispatch_kernel[(triton.cdiv(tokens, p.rows) * pieces,)](
        x_TD, places.place_TN, rows_N, own_UD, places.expert_TK, places.row_TK, weight_TK, *(lists or (None,) * 3),
        tokens, width, pieces, len(places.offsets_L1) - 1, rank, lists is not None, ranks, top_k,
        triton.next_power_of_2(top_k), p.rows, block, num_warps=p.warps,
    )  # fmt: skip


def received_layout(places: Places, token_R: Tensor, pair_R: Tensor, row_UK: Tensor) -> OwnerLayout:
    """The rows of what a rank has received."""
    return OwnerLayout(
        places.offsets_L1, token_R, pair_R, row_UK, places.tile_expert, places.tile_row, places.num_tiles,
        places.segments_S1, places.source_N1,
    )  # fmt: skip


def keep(
    rows_UD: Tensor, row_UK: Tensor, weight_UK: Tensor, token_U: Tensor, x_UD: Tensor, places: Places, rank: int
) -> Received:
    """Copies what arrived out of the memory that peers write, and turns the lists into expert rows.

    rows_UD, row_UK, weight_UK, token_U: this rank's own regions. x_UD: (N * T, D), in which `dispatch` has put this
    rank's own tokens; it becomes the result's.
    """
    most, width = rows_UD.shape
    ranks, top_k = len(places.source_N1) - 1, row_UK.shape[1]
    local = len(places.offsets_L1) - 1
    rows = most_rows(ranks=ranks, tokens=most // ranks, num_experts=local * ranks, top_k=top_k)
    # zeros, so that an index is within its bounds even where a peer that never came left its rows unwritten
    token_R, pair_R = torch.zeros(2, rows, dtype=torch.int32, device=rows_UD.device).unbind()
    layout = received_layout(places, token_R, pair_R, torch.empty_like(row_UK))
    received = Received(x_UD, torch.empty_like(weight_UK), torch.empty_like(token_U), layout)
    p = EXCHANGE_LAUNCH
    block, pieces = _pieces(width, p.columns)
    keep_kernel[(triton.cdiv(most // ranks, p.rows) * pieces * ranks,)](
        rows_UD, row_UK, weight_UK, token_U, places.source_N1, x_UD, layout.row_TK, received.weight_UK,
        received.token_U, token_R, layout.pair_R, width, pieces, rank, ranks, top_k, triton.next_power_of_2(top_k),
        p.rows, block, num_warps=p.warps,
    )  # fmt: skip
    return received


def give_back(
    y_RD: Tensor, received: Received, slots_N: Tensor, part_NR: Tensor | None = None, sums_N: Tensor | None = None,
    launch: ReturnLaunch = RETURN_LAUNCH,
) -> None:  # fmt: skip
    """Each pair's row of y_RD into slot t * K + k of its source; part_NR float32, summed, to the same place of sums_N.

    slots_N, sums_N: tables of the ranks' slots (T * K, D) of y's dtype, and (T * K) float32.
    """
    layout, width, top_k = received.layout, y_RD.shape[1], received.layout.row_TK.shape[1]
    block, pieces = _pieces(width, launch.columns)
    parts, rows = (0, 0) if part_NR is None else part_NR.shape
    give_back_kernel[(min(launch.blocks, triton.cdiv(len(y_RD), launch.rows) * pieces),)](
        y_RD, layout.pair_R, received.token_U, layout.source_N1, layout.offsets_E1[-1:], slots_N, part_NR,
        slots_N if sums_N is None else sums_N, rows, parts, width, pieces, part_NR is not None,
        len(layout.source_N1) - 1, top_k, launch.rows, block, num_warps=launch.warps,
    )  # fmt: skip
