"""Run by test_ranks_interpreted.py in a process of its own: Triton reads TRITON_INTERPRET when kernels are defined.

N ranks in one process: a peer's memory is another tensor, and each phase's kernels run for one rank after the other.
Prints one JSON object, name -> how many of the compared cases were wrong.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from nmoe.kernels import arena, signals
from nmoe.kernels.combine import combine, combine_reference, gather_rows, sum_dots
from nmoe.kernels.exchange import (
    Lists,
    Received,
    dispatch,
    dispatch_reference,
    give_back,
    give_back_reference,
    keep,
)
from nmoe.kernels.launch import RETURN_BESIDE_LAUNCH, RETURN_LAUNCH, ReturnLaunch
from nmoe.kernels.layout import layout_reference
from nmoe.kernels.layout_ranks import Places, count, place, places_reference
from nmoe.rdep import layout as cpu

torch.set_num_threads(1)
found: dict[str, int] = {}
HIDDEN = 24
# The two pinned ones; and few programs, which take many tiles each, with tiles that no size here is a multiple of.
RETURNS = (RETURN_LAUNCH, RETURN_BESIDE_LAUNCH, ReturnLaunch(3, 16, 16, 4))


def same(name: str, got: Tensor, want: Tensor) -> None:
    found[name] = found.get(name, 0) + (not torch.equal(got, want.to(got.dtype)))


class Rank:
    """One rank's regions, poisoned."""

    def __init__(self, ranks: int, tokens: int, top_k: int, experts: int) -> None:
        most, nan = ranks * tokens, float("nan")
        self.phase = torch.zeros(1, dtype=torch.int64)
        self.flags = torch.zeros(ranks * signals.FLAG_WORDS, dtype=torch.int64)
        self.verdict = torch.zeros(1, dtype=torch.int32)
        self.report = torch.zeros(signals.REPORT_WORDS, dtype=torch.int64)
        self.counts_NC = torch.full((ranks, experts + ranks), -7, dtype=torch.int32)
        self.rows_UD = torch.full((most, HIDDEN), nan)
        self.row_UK = torch.full((most, top_k), 1 << 30, dtype=torch.int32)
        self.weight_UK = torch.full((most, top_k), nan)
        self.token_U = torch.full((most,), 1 << 30, dtype=torch.int32)
        self.returned_PD = torch.full((tokens * top_k, HIDDEN), nan)
        self.sums_P = torch.full((tokens * top_k,), nan)


def table(all_ranks: list[Rank], name: str) -> Tensor:
    return torch.tensor([getattr(one, name).data_ptr() for one in all_ranks])


def routing(kind: str, ranks: int, tokens: list[int], top_k: int, experts: int, seed: int) -> list[Tensor]:
    """Each rank's experts (T, K). Only `repeated` names an expert twice for one token, which a router does not."""
    generator = torch.Generator().manual_seed(seed)
    local, routed = experts // ranks, []
    for rank, count_T in enumerate(tokens):
        score_TE = torch.rand(count_T, experts, generator=generator)
        if kind == "zipf":
            score_TE = score_TE.log() / torch.arange(1.0, experts + 1).reciprocal()
        elif kind == "one rank":
            score_TE[:, local:] -= 1
        elif kind == "none to one":
            score_TE[:, (ranks - 1) * local :] -= 1
        elif kind == "own":
            score_TE[:, rank * local : (rank + 1) * local] += 1
        indices_TK = score_TE.topk(top_k, dim=1).indices
        routed.append(torch.full_like(indices_TK, experts - 1) if kind == "repeated" else indices_TK)
    return routed


def rowwise(rows_RD: Tensor, expert_R: Tensor) -> Tensor:
    """An expert that needs no product: the same bits wherever a row lies."""
    return rows_RD * (1.0 + expert_R[:, None].float() * 0.37) + expert_R[:, None].float()


def layer(kind: str, ranks: int, tokens: list[int], top_k: int, experts: int, seed: int = 0) -> None:
    most, local = max(tokens), experts // ranks
    expert_NTK = routing(kind, ranks, tokens, top_k, experts, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x_NTD = [torch.randn(t, HIDDEN, generator=generator) for t in tokens]
    weight_NTK = [torch.rand(t, top_k, generator=generator) for t in tokens]
    every = [Rank(ranks, most, top_k, experts) for _ in range(ranks)]
    flags, boxes = table(every, "flags"), table(every, "counts_NC")

    def meet(rank: int, name: int, publish: bool, words: Tensor | None = None) -> None:
        one = every[rank]
        signals.meet(
            phase=one.phase, flags=one.flags, peers_N=flags, verdict=one.verdict, report=one.report, name=name, layer=3,
            limit_ns=0, rank=rank, words=words, boxes_N=boxes, publish=publish, observe=not publish,
        )  # fmt: skip

    # the layout: this module's, beside one sort of all pairs and beside the CPU ranks'
    counted = [count(e, num_experts=experts, ranks=ranks) for e in expert_NTK]
    routings = [cpu.route(e, num_experts=experts, ranks=ranks) for e in expert_NTK]
    for rank in range(ranks):
        same("counts", counted[rank].counts_C, torch.cat([routings[rank].pairs_E, routings[rank].tokens_N]))
        meet(rank, 0, True, counted[rank].counts_C)
    places: list[Places] = []
    for rank in range(ranks):
        meet(rank, 0, False)
        made = place(expert_NTK[rank], counted[rank], every[rank].counts_NC, rank=rank, most_tokens=most, layer=3)
        want = places_reference(expert_NTK, experts, rank, 3)
        for name, got, wanted in zip(Places._fields[1:-1], made[1:-1], want[1:-1], strict=True):
            tiles = int(want.num_tiles)
            same(f"places.{name}", got[:tiles] if name in ("tile_expert", "tile_row") else got, wanted)
        pairs_NE, tokens_NN = (torch.stack([getattr(r, n) for r in routings]) for n in ("pairs_E", "tokens_N"))
        theirs = cpu.layout(routings[rank], pairs_NE, tokens_NN, rank=rank, layer=3)
        same("cpu.row_TK", made.row_TK, theirs.row_TK)
        same("cpu.place_TN", made.place_TN, torch.where(theirs.sent_TN, theirs.place_TN, -1))
        same("cpu.segments", made.segments_S1.diff(), theirs.segments_LN.flatten())
        same("cpu.sources", made.source_N1.diff(), theirs.tokens_NN[:, rank])
        places.append(made)

    # rows and lists
    rows_N = table(every, "rows_UD")
    lists = Lists(*(table(every, name) for name in Lists._fields))
    x_NUD = [torch.full_like(one.rows_UD, float("nan")) for one in every]
    for rank in range(ranks):
        dispatch(x_NTD[rank], places[rank], rows_N, x_NUD[rank], rank, weight_NTK[rank], lists)
    received: list[Received] = []
    for rank, one in enumerate(every):
        got = keep(one.rows_UD, one.row_UK, one.weight_UK, one.token_U, x_NUD[rank], places[rank], rank)
        wanted = dispatch_reference(x_NTD, weight_NTK, places, rank)
        count_U, count_R = int(places[rank].source_N1[-1]), int(places[rank].offsets_L1[-1])
        mine = (got.x_UD, got.layout.row_TK, got.weight_UK, got.token_U)
        for name, a, b in zip(("rows", "row_UK", "weight_UK", "token_U"), mine, wanted, strict=True):
            same(f"received.{name}", a[:count_U], b)
        row_UK, at_R = got.layout.row_TK[:count_U], torch.arange(count_R)
        at_UK = torch.arange(count_U * top_k).view(count_U, top_k)
        pair_R = torch.empty(count_R, dtype=torch.long).scatter_(0, row_UK[row_UK >= 0].long(), at_UK[row_UK >= 0])
        same("received.pair_R", got.layout.pair_R[:count_R], pair_R)
        same("received.token_R", got.layout.token_R[:count_R], pair_R // top_k)
        beyond = torch.cat([got.layout.pair_R[count_R:], got.layout.token_R[count_R:]])
        same("received.safe", (beyond == 0).all(), torch.tensor(True))
        rows_RD = gather_rows(got.x_UD, got.layout)
        same("gather", rows_RD[at_R], got.x_UD[got.layout.token_R[at_R].long()])
        received.append(got)

    # the way back, and the sum over k, beside one rank that takes each microbatch alone with all experts
    parts = 3
    part_NPR, y_NRD = [], []
    for rank, got in enumerate(received):
        rows_R = int(places[rank].offsets_L1[-1])
        expert_R = torch.repeat_interleave(torch.arange(local), places[rank].offsets_L1.diff().long()) + rank * local
        y_RD = torch.full((len(got.layout.token_R), HIDDEN), float("nan"))
        y_RD[:rows_R] = rowwise(gather_rows(got.x_UD, got.layout)[:rows_R], expert_R)
        part_PR = torch.full((parts, len(y_RD)), float("nan"))
        part_PR[:, :rows_R] = y_RD[:rows_R, :parts].t()
        y_NRD.append(y_RD)
        part_NPR.append(part_PR)
    for launch in RETURNS:
        for one in every:
            one.returned_PD.fill_(float("nan"))
            one.sums_P.fill_(float("nan"))
        for got, y_RD, part_PR in zip(received, y_NRD, part_NPR, strict=True):
            give_back(y_RD, got, table(every, "returned_PD"), part_PR, table(every, "sums_P"), launch)
        for rank, one in enumerate(every):
            pairs = tokens[rank] * top_k
            if pairs:
                added_NR = [sum(part_PR, torch.zeros(part_PR.shape[1])) for part_PR in part_NPR]
                same("slots", one.returned_PD[:pairs], give_back_reference(y_NRD, places[rank], local))
                same("slots.sums", one.sums_P[:pairs], give_back_reference(added_NR, places[rank], local))
            same("slots.beyond", one.returned_PD[pairs:].isnan().all(), torch.tensor(True))
    for rank, one in enumerate(every):
        pairs = tokens[rank] * top_k
        alone = layout_reference(expert_NTK[rank], experts)
        expert_R = expert_NTK[rank].reshape(-1)[alone.pair_R.long()]
        y_RD = rowwise(gather_rows(x_NTD[rank], alone), expert_R)
        slot_TK = torch.arange(pairs, dtype=torch.int32).view(tokens[rank], top_k)
        for weight in (weight_NTK[rank], None):
            same("one rank.out", combine(one.returned_PD, slot_TK, weight), combine(y_RD, alone.row_TK, weight))
        wide = combine_reference(y_RD.double(), alone.row_TK, weight_NTK[rank].double())
        near = combine(one.returned_PD, slot_TK, weight_NTK[rank])
        found["float64"] = found.get("float64", 0) + (not torch.allclose(near.double(), wide, rtol=1e-5, atol=1e-5))
        sums_TK = sum_dots(y_RD[:, :parts].t().contiguous(), alone.row_TK)
        same("one rank.sums", one.sums_P[:pairs].view(sums_TK.shape), sums_TK)

    # gradients go the same way without the lists, this rank's own into its region too
    for one in every:
        one.rows_UD.fill_(float("nan"))
    for rank in range(ranks):
        dispatch(x_NTD[rank], places[rank], rows_N, every[rank].rows_UD, rank)
    for rank, one in enumerate(every):
        wanted = dispatch_reference(x_NTD, weight_NTK, places, rank)[0]
        same("gradients.rows", one.rows_UD[: len(wanted)], wanted)


def reservations(ranks: int, experts: int, rows: int, layers_of: list[list[str]], seed: int) -> None:
    """Microbatches of layers with all sorts of routings: every owner's rows in an arena, as every rank computes them.

    Beside the reference: rows that fit overlap nowhere, and an owner's verdict is whether a layer was overwritten.
    """
    local, state_3N = experts // ranks, torch.zeros(3, ranks, dtype=torch.int64)
    most_N, overwritten_N = [0] * ranks, [False] * ranks
    for number, kinds in enumerate(layers_of):
        counts_LNC, rows_LN = [], []
        for layer_number, kind in enumerate(kinds):
            routed = routing(kind, ranks, [9] * ranks, 3, experts, seed + 10 * number + layer_number)
            counts_LNC.append(torch.stack([count(e, num_experts=experts, ranks=ranks).counts_C for e in routed]))
            pairs_P = torch.cat([e.reshape(-1) for e in routed])
            rows_LN.append(torch.bincount(pairs_P // local, minlength=ranks).tolist())
        first_LN, needed_N, overwritten = arena.reserve_reference(rows_LN, rows)
        taken: list[set[int]] = [set() for _ in range(ranks)]
        for layer_number, counts_NC in enumerate(counts_LNC):
            got = arena.reserve(counts_NC, state_3N, rows=rows, begins=layer_number == 0, alone=False)
            same("arena.first", got, torch.tensor(first_LN[layer_number]))
            for o, (first, own) in enumerate(zip(got.tolist(), rows_LN[layer_number], strict=True)):
                mine = set(range(first, first + own))
                same("arena.within", torch.tensor(not mine or max(mine) < rows), torch.tensor(True))
                overwritten_N[o] |= bool(taken[o] & mine)
                taken[o] |= mine
        most_N = [max(most, needed) for most, needed in zip(most_N, needed_N, strict=True)]
        same("arena.needed", state_3N[arena.NEEDED], torch.tensor(needed_N))
        same("arena.most", state_3N[arena.MOST], torch.tensor(most_N))
        same("arena.verdict", state_3N[arena.MOST] > rows, torch.tensor(overwritten_N))
        same("arena.reference", torch.tensor(overwritten), torch.tensor(max(needed_N) > rows))
    for counts_NC in counts_LNC:
        got = arena.reserve(counts_NC, state_3N, rows=rows, begins=counts_NC is counts_LNC[0], alone=True)
        same("arena.alone", got, torch.zeros(ranks))
    same("arena.alone needed", state_3N[arena.NEEDED], torch.tensor(needed_N))


MANY = ["uniform", "zipf", "one rank", "none to one", "own", "repeated"]
for ranks, experts in ((2, 6), (4, 12), (3, 33)):
    most = ranks * 9 * 3  # of one layer: `repeated` sends every pair to the last rank
    for seed, rows in enumerate((most, most + 1, 2 * most, 6 * most)):
        reservations(ranks, experts, rows, [MANY, MANY[::-1], ["uniform"], ["repeated"] * 7, ["none to one"] * 2], seed)

for kinds, ranks, tokens, top_k, experts in (
    ("uniform", 2, [270, 260], 2, 6),  # two blocks of tokens, three of pairs
    ("uniform", 2, [17, 5], 4, 4),  # every expert for every token; microbatches of other sizes
    ("uniform/zipf/one rank/none to one/own/repeated", 4, [9, 9, 9, 9], 3, 12),
    ("uniform/one rank/none to one", 3, [9, 0, 14], 2, 33),  # an empty one
    ("uniform", 1, [12], 2, 5),
    ("uniform", 2, [0, 0], 2, 4),
):
    for number, kind in enumerate(kinds.split("/")):
        layer(kind, ranks, tokens, top_k, experts, 10 * number)

# A peer that never comes: what is said, of the first one alone, and that nobody waits again.
clock = [0]


def now() -> int:
    clock[0] += 500
    return clock[0]


signals.now = now
one = Rank(3, 1, 1, 3)
one.flags[signals.FLAG_WORDS] = 2  # rank 1 is there; rank 0 is not
for name in (4, 5):
    signals.meet(
        phase=one.phase, flags=one.flags, peers_N=table([Rank(3, 1, 1, 3), Rank(3, 1, 1, 3), one], "flags"),
        verdict=one.verdict, report=one.report, name=name, layer=7, limit_ns=10_000, rank=2,
    )  # fmt: skip
    if name == 4:
        waited = clock[0]
same("late.report", one.report, torch.tensor([1, 0, 4, 7, 0, 1]))
same("late.verdict", one.verdict, torch.tensor([1]))
same("late.phase", one.phase, torch.tensor([2]))
found["late.waited"] = (not 10_000 <= waited <= 11_000) + (clock[0] != waited)
print(json.dumps(found))
