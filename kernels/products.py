"""Host side of the grouped products: descriptors, tile counts and launches for grouped.py and wgrad.py.

Nothing here waits for the device: the number of tiles is read there. Every function takes the
layout and one `Launch` of the pinned table; `x` and `dout` are tokens (T, D) where the launch
gathers, rows (R, D) where it does not. D and F must be multiples of 8 (16 bytes, for TMA).
"""

import functools

import torch
from torch import Tensor

from nmoe.kernels.arena import Kept
from nmoe.kernels.launch import Launch
from nmoe.kernels.layout import TILE_ROWS, Rows

STEP = 64  # columns of K in one stage of the ring


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _blocks() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@functools.cache
def _tile_layout(*box: int):
    """Shared memory's layout of a box of bf16; asked for a dozen times a layer."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)


def _ragged(x_RD: Tensor, rows: int, cols: int):
    """A TMA descriptor of rows that clips at any row, for coordinates (2^30, end, 2^30 - rows left, col).

    The first axis' stride wraps the address around 2^64 so that the three row coordinates together
    name row end - rows_left, while the third leaves its axis exactly at `end`: loads beyond give
    zeros and stores beyond vanish, for every expert, with one descriptor. The planes of (P, R, F)
    are reached by adding R to `end`.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = [1, 1, rows, cols]
    width = x_RD.shape[-1]
    shape = [0x7FFF0000, 0x7FFF0000, 1 << 30, width]
    return TensorDescriptor(x_RD, shape, [2**34 - width, width, width, 1], box, _tile_layout(*box))


def _weights(w: Tensor, *box: int):
    """A TMA descriptor of (planes, rows, columns); w_gate_up counts two planes an expert."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(w.view(-1, *w.shape[-2:]), list(box), _tile_layout(*box))


def _launch_rows(
    kind: str, a: Tensor, b, c, h, aw, weight_R: Tensor, dot_NR: Tensor, layout: Rows, D: int, tiles: int, steps: int,
    p: Launch, kept: Kept | None = None,
) -> None:  # fmt: skip
    from nmoe.kernels import grouped

    number = {"up": grouped.UP, "down": grouped.DOWN, "dgate": grouped.DGATE, "dx": grouped.DX}[kind].value
    gather = p.gather and kind in ("up", "dgate")
    grouped.rows_kernel[(_blocks(),)](
        _ragged(a, TILE_ROWS, STEP), a, layout.token_R, b, c, h, aw, weight_R, dot_NR,
        layout.offsets_E1, layout.tile_expert, layout.tile_row, layout.num_tiles, D // 8, len(layout.token_R),
        0 if kept is None else kept.h_2AF.shape[1], None if kept is None else kept.first_row, tiles,
        steps, number, gather, TILE_ROWS, 128 * p.share, STEP, p.stages, p.share, p.sets, *p.registers, num_warps=4,
    )  # fmt: skip


def up_product(x: Tensor, w_gate_up_E2FD: Tensor, layout: Rows, kept: Kept, p: Launch) -> Tensor:
    """h = x W_gate^T and x W_up^T, rounded to bf16, to the rows that are kept, and a_RF = silu(h_0) * h_1."""
    F, D = w_gate_up_E2FD.shape[2:]
    a_RF = torch.empty(len(layout.token_R), F, dtype=x.dtype, device=x.device)
    box = (TILE_ROWS // p.share, 64 * p.share)
    w = _weights(w_gate_up_E2FD, 2, 64 * p.share, STEP)
    h, a = _ragged(kept.h_2AF, *box), _ragged(a_RF, *box)
    none = layout.token_R
    _launch_rows("up", x, w, h, h, a, none, none, layout, D, _cdiv(F, 64 * p.share), _cdiv(D, STEP), p, kept)
    return a_RF


def down_product(a_RF: Tensor, w_down_EDF: Tensor, layout: Rows, p: Launch) -> Tensor:
    """y_RD = a W_down^T, the experts' rows before the router's weight."""
    D, F = w_down_EDF.shape[1:]
    y_RD = torch.empty(len(a_RF), D, dtype=a_RF.dtype, device=a_RF.device)
    y = _ragged(y_RD, TILE_ROWS // p.share, 64 * p.share)
    w = _weights(w_down_EDF, 1, 128 * p.share, STEP)
    none = layout.token_R
    _launch_rows("down", a_RF, w, y, y, y, none, none, layout, D, _cdiv(D, 128 * p.share), _cdiv(F, STEP), p)
    return y_RD


def dgate_product(
    dout: Tensor, w_down_EDF: Tensor, kept: Kept, weight_R: Tensor, layout: Rows, p: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """dh_2RF, the weighted a_RF, and <dout W_down, a> in parts, float32 (N, R)."""
    D, F = w_down_EDF.shape[1:]
    R = len(weight_R)
    dh_2RF = torch.empty(2, R, F, dtype=dout.dtype, device=dout.device)
    aw_RF = torch.empty(R, F, dtype=dout.dtype, device=dout.device)
    tiles = _cdiv(F, 128 * p.share)
    dot_NR = torch.empty(tiles, R, dtype=torch.float32, device=dout.device)
    dh, h, aw = (_ragged(t, TILE_ROWS // p.share, 32) for t in (dh_2RF, kept.h_2AF, aw_RF))
    w = _weights(w_down_EDF, 1, STEP, 128 * p.share)
    _launch_rows("dgate", dout, w, dh, h, aw, weight_R, dot_NR, layout, D, tiles, _cdiv(D, STEP), p, kept)
    return dh_2RF, aw_RF, dot_NR


def dx_product(dh_2RF: Tensor, w_gate_up_E2FD: Tensor, layout: Rows, p: Launch) -> Tensor:
    """dx_RD = dh_0 W_gate + dh_1 W_up."""
    F, D = w_gate_up_E2FD.shape[2:]
    dx_RD = torch.empty(dh_2RF.shape[1], D, dtype=dh_2RF.dtype, device=dh_2RF.device)
    dx = _ragged(dx_RD, TILE_ROWS // p.share, 64 * p.share)
    w = _weights(w_gate_up_E2FD, 1, STEP, 128 * p.share)
    none = layout.token_R
    _launch_rows("dx", dh_2RF, w, dx, dx, dx, none, none, layout, D, _cdiv(D, 128 * p.share), 2 * _cdiv(F, STEP), p)
    return dx_RD


def weight_gradient(
    tokens: Tensor, rows_PRF: Tensor, layout: Rows, out: Tensor, continues: bool, tokens_first: bool, p: Launch,
    spared: int = 0,
) -> None:  # fmt: skip
    """out[e] += a product for each of e's segments, in their order; the step's first is stored.

    The sum over the segment's rows r, in order, of the outer product of rows[r] and tokens[token(r)].

    tokens_first False: rows_PRF is dh_2RF, out is (E, 2, F, D). True: rows_PRF is the weighted a as
    (1, R, F), out is (E, D, F). out is float32; continues: it holds the gradients of earlier microbatches.

    With one axis more, (M, ...), out gets each microbatch's gradients by themselves; continues: the step has earlier
    microbatches than these. One without rows for e then has -0; but 0 if it is the step's first.

    spared: how many multiprocessors are left to what runs beside. A tile is one block's from its first row to its last,
    whichever block that is, so no bit depends on it.
    """
    from nmoe.kernels.wgrad import wgrad_kernel

    planes, R, F = rows_PRF.shape
    D = tokens.shape[1]
    experts = len(layout.offsets_E1) - 1
    segments = layout.segments_S1
    bg, br = (128, 256) if F % 256 == 0 else (256, 128)  # the wide side lies along F unless that would waste it
    g_tiles, r_tiles = _cdiv(D, bg), _cdiv(F, br)
    whole = D % bg == 0 and F % br == 0
    apart = out.dim() > (3 if tokens_first else 4)
    wgrad_kernel[(_blocks() - spared,)](
        _ragged(tokens, STEP, bg), tokens, layout.token_R, _ragged(rows_PRF, STEP, br), out, segments,
        D // 8, F // 8, R, g_tiles, r_tiles, experts * planes * g_tiles * r_tiles, (len(segments) - 1) // experts,
        planes, tokens_first, p.gather, continues, apart, whole, bg, br, STEP, p.stages, *p.registers, num_warps=4,
    )  # fmt: skip
