"""Squared norms of all gradients, the clip factor and the step's verdict, in few launches and without a wait.

    row r of a tensor: q_r = sum over columns of g^2, float32
    a tensor, a group, everything: sums in float64 over blocks of 1024, then over the blocks' sums, and so on
    clip = min(1, clip_norm / (sqrt(total) + 1e-6))       verdict = total or a loss is not finite

in the order of nmoe.optim.norm: a row is a slice along the last dimension (a vector is one row), tensors are
added within their group in the list's order, groups in theirs.

Layout: contiguous float32 gradients; a table on the device holds addresses and sizes. A program takes 32 rows,
128 columns at a time: a row belongs to one warp, lane by lane, so its bits depend on its length alone, not on the
row's place, the tensor or who holds it. Where the length is a multiple of 4 loads are 16 bytes wide.

Repeatable: no atomics; fixed blocks, fixed trees. The order within a row and within a block is the kernel's, not
torch's, so figures equal the reference's to float32 rounding of one row (about 1e-7).

Floor: 4 bytes a parameter read; the float64 levels are thousandths of that. Prediction for 9.8e8 parameters at
2.8 TB/s: 1.4 ms in 6 to 8 launches. Measured: see NOTES.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.launch import SQUARES_LAUNCH
from nmoe.kernels.table import Addresses, pieces, rows

BLOCK = 1024
"""Numbers added in one go in float64."""

Table = list[tuple[int, int]]


class SquaredNorms(NamedTuple):
    """float64, on the gradients' device: of each tensor (N,), of each group (G,), of everything (0-dimensional)."""

    tensor_N: Tensor
    group_G: Tensor
    total: Tensor


def squared_norms_reference(groups: Sequence[Sequence[Tensor]]) -> SquaredNorms:
    """The meaning, in float64 throughout."""
    squares = [[g.double().square().sum() for g in group] for group in groups]
    group_G = torch.stack([torch.stack(group).sum() if group else torch.zeros(()).double() for group in squares])
    return SquaredNorms(torch.stack([q for group in squares for q in group]), group_G, group_G.sum())


def levels(counts: Sequence[int]) -> list[Table]:
    """(start, count) of each block at each level, for segments of so many numbers that lie one after the other.

    Level after level each segment is cut from its own start into blocks of 1024, until it is one number.
    """
    result: list[Table] = []
    while not result or any(count != 1 for count in counts):
        table, start, made = [], 0, []
        for count in counts:
            cuts = range(0, max(1, count), BLOCK)
            table += [(start + cut, min(BLOCK, count - cut)) for cut in cuts]
            start += count
            made.append(len(cuts))
        result.append(table)
        counts = made
    return result


@triton.jit
def rows_kernel(table_ptr, gradient_ptr, owner_ptr, out_ptr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    p = tl.program_id(0)
    n = tl.load(owner_ptr + p)
    row = table_ptr + n * 4
    count = tl.load(row)
    width = tl.load(row + 1)
    g_ptr = tl.load(gradient_ptr + n).to(tl.pointer_type(tl.float32))
    if ALIGNED:  # a length that vectors divide, said so that the compiler sees it
        width = width // 4 * 4
        g_ptr = tl.multiple_of(g_ptr, 16)
    r = (p - tl.load(row + 2)) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        mask = (r < count)[:, None] & (c < width)[None, :]
        g = tl.load(g_ptr + r[:, None] * width + c[None, :], mask=mask, other=0.0)
        acc += g * g
    tl.store(out_ptr + tl.load(row + 3) + r, tl.sum(acc, axis=1), mask=r < count)


@triton.jit
def blocks_kernel(in_ptr, table_ptr, out_ptr, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    values = tl.load(in_ptr + tl.load(table_ptr + p * 2) + i, mask=i < tl.load(table_ptr + p * 2 + 1), other=0.0)
    tl.store(out_ptr + p, tl.sum(values.to(tl.float64), axis=0))


@triton.jit
def verdict_kernel(total_ptr, clip_norm_ptr, loss_ptr, clip_ptr, verdict_ptr, losses, BLOCK: tl.constexpr):
    total = tl.load(total_ptr)
    clip = tl.load(clip_norm_ptr) / (tl.sqrt(total) + 1e-6)
    tl.store(clip_ptr, tl.where(clip < 1.0, clip, 1.0).to(tl.float32))
    bad = tl.where(tl.abs(total) < float("inf"), 0, 1)
    for first in range(0, losses, BLOCK):
        i = first + tl.arange(0, BLOCK)
        loss = tl.load(loss_ptr + i, mask=i < losses, other=0.0)
        bad = tl.maximum(bad, tl.max(tl.where(tl.abs(loss) < float("inf"), 0, 1), axis=0))
    tl.store(verdict_ptr, bad)


class GradNorm:
    """Squared norms of gradients of fixed shapes; the tables are made here.

    groups: the shapes of each group's tensors, groups and tensors in the order of addition.
    """

    def __init__(self, groups: Sequence[Sequence[Sequence[int]]], device: torch.device):
        self.device = device
        self.shapes = [tuple(shape) for group in groups for shape in group]
        sizes = [(torch.Size(shape[:-1]).numel() if len(shape) > 1 else 1, shape[-1]) for shape in self.shapes]
        self.rows = sum(count for count, _ in sizes)
        out, place = 0, []
        for count, _ in sizes:
            place.append(out)
            out += count
        self.classes = []
        for aligned in (True, False):
            chosen = [n for n, (_, width) in enumerate(sizes) if (width % 4 == 0) is aligned]
            owner_P, first = pieces([triton.cdiv(sizes[n][0], SQUARES_LAUNCH.rows) for n in chosen], device)
            table = [(*sizes[n], at, place[n]) for n, at in zip(chosen, first, strict=True)]
            if table:
                self.classes.append((aligned, chosen, owner_P, rows(table, device), Addresses(device)))
        self.tensors = [rows(level, device) for level in levels([count for count, _ in sizes])]
        self.groups = [rows(level, device) for level in levels([len(group) for group in groups])]
        self.total = [rows(level, device) for level in levels([len(groups)])]

    def squared(self, gradients: Sequence[Tensor]) -> SquaredNorms:
        """Squared 2-norms of gradients as `sums` takes them."""
        return self.norms(self.sums(gradients))

    def sums(self, gradients: Sequence[Tensor]) -> Tensor:
        """q of every row, float32. gradients: float32, contiguous, in the order of the shapes; N0720 for others."""
        for shape, g in zip(self.shapes, gradients, strict=True):
            if g.dtype != torch.float32 or not g.is_contiguous() or g.shape != shape or g.data_ptr() % 16:
                raise fail(
                    "N0720", f"a gradient must be contiguous float32 of {shape} at a 16-byte address, found {g.dtype} "
                    f"of {tuple(g.shape)}", place="gradient norm kernels",
                )  # fmt: skip
        sums_R = torch.empty(self.rows, dtype=torch.float32, device=self.device)
        for aligned, chosen, owner_P, table, addresses in self.classes:
            rows_kernel[(len(owner_P),)](
                table, addresses.of([gradients[n] for n in chosen]), owner_P, sums_R, aligned, SQUARES_LAUNCH.rows,
                SQUARES_LAUNCH.block, num_warps=SQUARES_LAUNCH.warps,
            )  # fmt: skip
        return sums_R

    def norms(self, sums_R: Tensor) -> SquaredNorms:
        """Squared 2-norms from q of every row, whoever has made them."""
        tensor_N = _added(sums_R, self.tensors)
        group_G = _added(tensor_N, self.groups)
        return SquaredNorms(tensor_N, group_G, _added(group_G, self.total)[0])


def _added(values: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The levels one after the other; float64."""
    for table in tables:
        sums = torch.empty(len(table), dtype=torch.float64, device=values.device)
        blocks_kernel[(len(table),)](values, table, sums, BLOCK, num_warps=4)
        values = sums
    return values


def verdict(total: Tensor, clip_norm: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """(clip, verdict) on the device: the factor, float32, and 1 if the total or a loss is not finite, int32.

    total, clip_norm: float64, 0-dimensional. losses: float32 (V,), the microbatches'.
    """
    clip = torch.empty((), dtype=torch.float32, device=total.device)
    bad = torch.empty((), dtype=torch.int32, device=total.device)
    verdict_kernel[(1,)](total, clip_norm, losses, clip, bad, losses.numel(), 128, num_warps=1)
    return clip, bad
