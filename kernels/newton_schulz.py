"""Muon's Newton-Schulz iteration on a stack of matrices, with the two symmetric products computed by half.

    X <- X / max(||X||_F, eps);   steps times:  G = X X^T,   P = b G + c G G^T,   X <- P X + a X

(Jordan et al., 2024.) G and P are symmetric: `symmetric_product`, C = alpha X X^T + beta S, computes the tiles on
and below the diagonal and stores each below it twice, once mirrored. G G^T is G G.

Layout: (N, A, B) contiguous, A <= B; bf16 (float32 in tests); products accumulate in float32, over the common axis
in order, and are rounded once. Squares of a matrix are added over a row in float32, over rows in float64.
Repeatable: a tile is one program's; a matrix's bits do not depend on the others of its stack, by construction, which
the library's batched products promise nowhere.

Floor: 3 A^2 B + A^3 FLOPs a step and matrix instead of 4 A^2 B + 2 A^3; of tiles of 128 the symmetric ones compute
the part (n + 1) / 2n for n = A / 128. Prediction for 384 x 768 (n = 3): 20% fewer FLOPs than in full; at plain
Triton's 550 TFLOP/s against the library's 650, 5% less time; for 1408 x 2048 (n = 11) 27% and 14%. The passes before
it move 10 bytes an element, 0.25 ms for 256 matrices of 384 x 768. Measured: see NOTES.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.launch import NORMALIZE_LAUNCH, SYMMETRIC_LAUNCH


def symmetric_reference(x_NAB: Tensor, alpha: float, s_NAA: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """The meaning: alpha X X^T + beta S for each matrix; any dtype."""
    out_NAA = alpha * (x_NAB @ x_NAB.mT)
    return out_NAA if s_NAA is None else out_NAA + beta * s_NAA


@triton.jit
def squares_kernel(x_ptr, square_ptr, A, B, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64)
    x_ptr += n * A * B
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    x_ptr += row[:, None] * B
    for first in range(0, B, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + c[None, :], mask=(row < A)[:, None] & (c < B)[None, :], other=0.0)
        acc += x * x
    tl.store(square_ptr + n * A + row, tl.sum(acc, axis=1), mask=row < A)


@triton.jit
def divide_kernel(x_ptr, square_ptr, out_ptr, A, B, eps, ALL: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, ALL)
    squares = tl.load(square_ptr + n * A + i, mask=i < A, other=0.0).to(tl.float64)
    norm = tl.maximum(tl.sqrt(tl.sum(squares, axis=0)).to(tl.float32), eps)
    for first in range(0, B, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        mask = (row < A)[:, None] & (c < B)[None, :]
        at = n * A * B + row[:, None] * B + c[None, :]
        x = tl.div_rn(tl.load(x_ptr + at, mask=mask, other=0.0), tl.zeros([ROWS, COLUMNS], tl.float32) + norm)
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def symmetric_kernel(x_ptr, s_ptr, out_ptr, A, B, alpha, beta, ADDED: tl.constexpr, BLOCK: tl.constexpr,
                     DEPTH: tl.constexpr):  # fmt: skip
    # Tile p of the lower triangle, row by row: i (i + 1) / 2 tiles lie before row i. The root may round up or down.
    p = tl.program_id(0)
    i = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    j = p - i * (i + 1) // 2
    n = tl.program_id(1).to(tl.int64)
    row = i * BLOCK + tl.arange(0, BLOCK)
    column = j * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    x_ptr += n * A * B
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, B, DEPTH):
        deep = first + k < B
        left_mask, right_mask = (row < A)[:, None] & deep[None, :], (column < A)[None, :] & deep[:, None]
        left = tl.load(x_ptr + row[:, None] * B + (first + k)[None, :], mask=left_mask, other=0.0)
        right = tl.load(x_ptr + column[None, :] * B + (first + k)[:, None], mask=right_mask, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    acc *= alpha
    mask = (row < A)[:, None] & (column < A)[None, :]
    at = row[:, None] * A + column[None, :]
    if ADDED:
        acc += beta * tl.load(s_ptr + n * A * A + at, mask=mask, other=0.0).to(tl.float32)
    out_ptr += n * A * A
    value = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, value, mask=mask)
    if i != j:
        mirrored = (column < A)[:, None] & (row < A)[None, :]
        tl.store(out_ptr + column[:, None] * A + row[None, :], tl.trans(value), mask=mirrored)


@triton.jit
def product_kernel(p_ptr, x_ptr, out_ptr, A, B, beta, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    across = tl.cdiv(B, BLOCK)
    row = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, DEPTH)
    p_ptr += n * A * A
    x_ptr += n * A * B
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, A, DEPTH):
        deep = first + k < A
        left_mask, right_mask = (row < A)[:, None] & deep[None, :], deep[:, None] & (column < B)[None, :]
        left = tl.load(p_ptr + row[:, None] * A + (first + k)[None, :], mask=left_mask, other=0.0)
        right = tl.load(x_ptr + (first + k)[:, None] * B + column[None, :], mask=right_mask, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    mask = (row < A)[:, None] & (column < B)[None, :]
    at = row[:, None] * B + column[None, :]
    acc += beta * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * A * B + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _require(**stacks: Tensor) -> None:
    for name, t in stacks.items():
        if t.ndim != 3 or not t.is_contiguous() or t.dtype not in (torch.bfloat16, torch.float32):
            raise fail(
                "N0721", f"`{name}` must be a contiguous stack of matrices, bf16 or float32, found {t.dtype} of "
                f"{tuple(t.shape)} with strides {t.stride()}", place="newton-schulz kernels",
            )  # fmt: skip


def normalized(x_NAB: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """x / max(||x||_F, eps) for each float32 matrix, rounded to `dtype`. Raises N0721 for another layout."""
    _require(x_NAB=x_NAB)
    matrices, rows, columns = x_NAB.shape
    square_NA = torch.empty(matrices, rows, dtype=torch.float32, device=x_NAB.device)
    out_NAB = torch.empty(x_NAB.shape, dtype=dtype, device=x_NAB.device)
    p = NORMALIZE_LAUNCH
    grid = (triton.cdiv(rows, p.rows), matrices)
    squares_kernel[grid](x_NAB, square_NA, rows, columns, p.rows, p.block, num_warps=p.warps)
    divide_kernel[grid](
        x_NAB, square_NA, out_NAB, rows, columns, eps, triton.next_power_of_2(rows), p.rows, p.block, num_warps=p.warps,
    )  # fmt: skip
    return out_NAB


def product(p_NAA: Tensor, x_NAB: Tensor, beta: float) -> Tensor:
    """P X + beta X for each matrix; both contiguous, one dtype. Raises N0721 for another layout."""
    _require(p_NAA=p_NAA, x_NAB=x_NAB)
    matrices, short, long = x_NAB.shape
    out_NAB = torch.empty_like(x_NAB)
    p = SYMMETRIC_LAUNCH
    grid = (triton.cdiv(short, p.block) * triton.cdiv(long, p.block), matrices)
    product_kernel[grid](
        p_NAA, x_NAB, out_NAB, short, long, beta, p.block, p.depth, num_warps=p.warps, num_stages=p.stages
    )
    return out_NAB


def symmetric_product(x_NAB: Tensor, alpha: float, s_NAA: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """alpha X X^T + beta S for each matrix: (N, A, A), symmetric bit for bit off the diagonal's tiles.

    x_NAB: bf16 or float32, contiguous; s_NAA: symmetric, x's dtype, contiguous. Raises N0721 for
    another dtype or layout.
    """
    _require(x_NAB=x_NAB)
    matrices, short, long = x_NAB.shape
    out_NAA = torch.empty(matrices, short, short, dtype=x_NAB.dtype, device=x_NAB.device)
    p = SYMMETRIC_LAUNCH
    n = triton.cdiv(short, p.block)
    symmetric_kernel[(n * (n + 1) // 2, matrices)](
        x_NAB, s_NAA, out_NAA, short, long, alpha, beta, s_NAA is not None, p.block, p.depth, num_warps=p.warps,
        num_stages=p.stages,
    )  # fmt: skip
    return out_NAA


def orthogonalize(
    x_NAB: Tensor, *, steps: int, coefficients: tuple[float, float, float], dtype: torch.dtype, eps: float
) -> Tensor:
    """Newton-Schulz on each matrix of a stack, A <= B; x_NAB float32, contiguous; the result in `dtype`.

    `steps` quintic iterations bring the singular values near 1; nmoe.optim.muon's function of this name, with the
    same rounding of each product.
    """
    a, b, c = coefficients
    x_NAB = normalized(x_NAB, dtype, eps)
    for _ in range(steps):
        gram_NAA = symmetric_product(x_NAB, 1.0)
        x_NAB = product(symmetric_product(gram_NAA, c, gram_NAA, b), x_NAB, a)
    return x_NAB
