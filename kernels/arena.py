"""Rows of one arena for layer after layer: the pre-activations that a microbatch keeps for its backward.

Mathematics. With R[l, o] the rows that layer l brings to owner o of N, and A the arena's rows, layer l lies at o in

    rows [first, first + R)    first[l, o] = at[l, o] if at[l, o] + R[l, o] <= A else 0
                               at[l + 1, o] = first[l, o] + R[l, o],  at[0, o] = 0

A layer that does not fit begins again at row 0, over what an earlier one keeps: nothing is ever outside the arena if A
is at least the most rows of one layer, and what backward then makes of the earlier layer is worth nothing. Whether
that has happened to any owner is a fact of the routings which every rank computes for all owners:

    needed[o] = sum over l of R[l, o],   most[o] = the largest needed[o] of any microbatch;   overflow: most[o] > A

since the sums agree until the first layer that does not fit. A layer that is alone (its backward computes it again
first) begins at row 0 always, and `needed` counts it all the same.

All arithmetic is integer and exact, of the counts that all ranks have (nmoe.kernels.layout_ranks): no atomics, no host.
One program; 4 bytes for each of N (E + N) counts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

AT, NEEDED, MOST = 0, 1, 2
"""Rows of `state_3N`."""


class Kept(NamedTuple):
    """Where a layer's pre-activations lie.

    h_2AF: two planes, gate and up, of A rows. first_row: int32 (1), on the device, the layer's first; None for 0.
    """

    h_2AF: Tensor
    first_row: Tensor | None


def reserve_reference(
    rows_LN: list[list[int]], rows: int, *, alone: bool = False
) -> tuple[list[list[int]], list[int], bool]:
    """The meaning of one microbatch's calls of `reserve`: first_LN, needed_N, and whether a layer overwrote another."""
    first_LN, ends_N, overwritten = [], [0] * len(rows_LN[0]), False
    for layer_N in rows_LN:
        fits = [not alone and end + own <= rows for end, own in zip(ends_N, layer_N, strict=True)]
        overwritten |= not alone and not all(fits)
        first_LN.append([end if fit else 0 for end, fit in zip(ends_N, fits, strict=True)])
        ends_N = [first + own for first, own in zip(first_LN[-1], layer_N, strict=True)]
    return first_LN, [sum(column) for column in zip(*rows_LN, strict=True)], overwritten


@triton.jit
def reserve_kernel(counts_ptr, state_ptr, first_ptr, rows, experts, local, BEGINS: tl.constexpr, ALONE: tl.constexpr,
                   N: tl.constexpr, EXPERTS: tl.constexpr):  # fmt: skip
    e = tl.arange(0, EXPERTS)
    every = tl.zeros([EXPERTS], tl.int32)
    for n in tl.static_range(N):
        every += tl.load(counts_ptr + n * (experts + N) + e, mask=e < experts, other=0)
    for o in tl.static_range(N):
        own = tl.sum(tl.where((e >= o * local) & (e < (o + 1) * local), every, 0), 0)
        at = tl.load(state_ptr + o)
        needed = tl.load(state_ptr + N + o)
        if BEGINS:
            at = tl.zeros_like(at)
            needed = tl.zeros_like(needed)
        if ALONE:
            at = tl.zeros_like(at)
        first = tl.where(at + own <= rows, at, 0)
        needed += own
        tl.store(first_ptr + o, first.to(tl.int32))
        tl.store(state_ptr + o, first + own)
        tl.store(state_ptr + N + o, needed)
        tl.store(state_ptr + 2 * N + o, tl.maximum(needed, tl.load(state_ptr + 2 * N + o)))


def reserve(counts_NC: Tensor, state_3N: Tensor, *, rows: int, begins: bool, alone: bool) -> Tensor:
    """first_N, int32: the first row of the next layer in the arena of each of N owners.

    counts_NC: int32 (N, E + N), every rank's pairs for each expert, and more. state_3N: int64, at, needed and most of
    each owner, continued in place. rows: A. begins: the layer is a microbatch's first. alone: see the module.
    """
    ranks = counts_NC.shape[0]
    experts = counts_NC.shape[1] - ranks
    first_N = torch.empty(ranks, dtype=torch.int32, device=counts_NC.device)
    reserve_kernel[(1,)](
        counts_NC, state_3N, first_N, rows, experts, experts // ranks, begins, alone, ranks,
        triton.next_power_of_2(experts), num_warps=4,
    )  # fmt: skip
    return first_N
