"""Muon's Newton-Schulz iteration on a stack of matrices, with the two symmetric products computed by half.

    X <- X / max(||X||_F, eps);   steps times:  G = X X^T,   P = b G + c G G^T,   X <- a X + P X

(Jordan et al., 2024.) G and P are symmetric: `symmetric_product`, C = alpha X X^T + beta S, computes the tiles on
and below the diagonal and stores each below it twice, once mirrored. G G^T is G G. The last product is the
library's (baddbmm).

Layout: (N, A, B) contiguous, A <= B; bf16 (float32 in tests); products accumulate in float32, over the common axis
in order, and are rounded once. Squares of a matrix are added over a row in float32, over rows in float64.
Repeatable: a tile is one program's; its bits do not depend on the batch.

Floor: 2 A^2 B (1/2 + 1) + A^3 FLOPs a step and matrix instead of 4 A^2 B + 2 A^3; of tiles of 128 the part
(n + 1) / 2n for n = A / 128. Prediction for 768 x 384 (n = 3): 27% fewer FLOPs; at plain Triton's 550 TFLOP/s for
the symmetric products against the library's 650, 15% less time. Measured: see NOTES.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.kernels.launch import SYMMETRIC_LAUNCH


def symmetric_reference(x_NAB: Tensor, alpha: float, s_NAA: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """The meaning: alpha X X^T + beta S for each matrix; any dtype."""
    out_NAA = alpha * (x_NAB @ x_NAB.mT)
    return out_NAA if s_NAA is None else out_NAA + beta * s_NAA


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
        left = tl.load(x_ptr + row[:, None] * B + (first + k)[None, :], mask=(row < A)[:, None] & deep[None, :], other=0.0)
        right = tl.load(x_ptr + column[None, :] * B + (first + k)[:, None], mask=(column < A)[None, :] & deep[:, None],
                        other=0.0)  # fmt: skip
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


def symmetric_product(x_NAB: Tensor, alpha: float, s_NAA: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """alpha X X^T + beta S for each matrix: (N, A, A), symmetric bit for bit off the diagonal's tiles.

    x_NAB: bf16 or float32, contiguous; s_NAA: symmetric, x's dtype, contiguous.
    """
    matrices, short, long = x_NAB.shape
    out_NAA = torch.empty(matrices, short, short, dtype=x_NAB.dtype, device=x_NAB.device)
    p = SYMMETRIC_LAUNCH
    n = triton.cdiv(short, p.block)
    if out_NAA.numel():
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
    norm_N = torch.linalg.vector_norm(x_NAB, dim=-1).double().square().sum(-1).sqrt().float().clamp(min=eps)
    scaled_NAB = torch.empty(x_NAB.shape, dtype=dtype, device=x_NAB.device)
    x_NAB = torch.div(x_NAB, norm_N[:, None, None], out=scaled_NAB)
    for _ in range(steps):
        gram_NAA = symmetric_product(x_NAB, 1.0)
        polynomial_NAA = symmetric_product(gram_NAA, c, gram_NAA, b)
        x_NAB = torch.baddbmm(x_NAB, polynomial_NAA, x_NAB, beta=a)
    return x_NAB
