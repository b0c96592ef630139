"""Weight gradients of the experts: for each expert a sum over its rows, in float32, in row order.

    dW_gate[e] = sum over rows r of e of dh_0[r]^T x[token(r)],  dW_up[e] the same with dh_1
    dW_down[e] = sum over rows r of e of dout[token(r)]^T (w a)[r]

Layout: rows sorted by expert; K of the product is the rows, in pieces of 64 from the expert's first
row on; both operands are read transposed by wgmma. The last piece is short: TMA fills the expert
rows beyond the end with zeros, and rows that the producer gathers itself repeat the last token.
Output (E, 2, F, D) and (E, D, F), float32. Where the rows are those of M ranks' microbatches, an expert
has M segments, one after the other, and each one's pieces begin at its own first row. Each segment's
gradient is a sum of its own, from zero, and is added to the memory in the order of the segments:

    g = ((g_0 + g_1) + g_2) + ...

whoever of M ranks or M calls has taken the microbatches. The step's first is stored as it is, zeros where the
expert has no rows; any other one without rows changes nothing. CONTINUES: segment 0 is not the step's first.
APART: nothing is added, and each segment's gradient lies in a part of its own, (M, E, ...), -0 where one changes
nothing: for several nodes, whose gradients meet elsewhere.

One block an SM, persistent, as in grouped.py; a 256 x 128 tile, half for each of two warpgroups;
float32 accumulators in registers. A gradient that is not read again soon is stored past the cache (.cs), since
it is as large as all that it is computed from; between two segments the cache holds the tile (128 KiB a block).

Repeatable: each element is its segments' sums over rows in order, added in order; no split, no atomics.
Floor and figures in NOTES.md.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nmoe.kernels.grouped import block_barrier


@gluon.jit
def locate(tile, g_tiles, r_tiles):
    """tile -> (plane, tile along D, tile along F); planes are experts, or an expert's gate and up."""
    per = g_tiles * r_tiles
    plane = tile // per
    inside = tile - plane * per
    r = inside // g_tiles
    return plane, inside - r * g_tiles, r


@gluon.jit
def produce(
    g_desc, x_ptr, token_ptr, r_desc, segments_ptr, ring_g, ring_r, full, empty, D8, rows, g_tiles, r_tiles, tiles,
    M: gl.constexpr, PLANES: gl.constexpr, GATHER: gl.constexpr, BG: gl.constexpr, BR: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the ring with pieces of BK rows, of the token rows and of the expert rows."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        plane, g, r = locate(tile, g_tiles, r_tiles)
        e = plane // PLANES
        half = plane - e * PLANES
        for s in range(M):
            start = gl.load(segments_ptr + e * M + s)
            end = gl.load(segments_ptr + e * M + s + 1)
            if GATHER:
                r_K = start + gl.arange(0, BK, gl.SliceLayout(1, layout))
                token_K = gl.load(token_ptr + gl.maximum(gl.minimum(r_K, end - 1), 0))
            for k in range((end - start + BK - 1) // BK):
                stage = count % STAGES
                mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, 2 * BK * (BR + (0 if GATHER else BG)))
                row = start + k * BK
                x0 = (1 << 30) - (end - row)
                r_view = ring_r.index(stage)._reinterpret(r_desc.dtype, r_desc.block_shape, r_desc.layout)
                tma.async_copy_global_to_shared(r_desc, [1 << 30, end + half * rows, x0, r * BR], bar, r_view)
                col = g * BG
                g_view = ring_g.index(stage)
                if GATHER:
                    col_G = col + gl.arange(0, BG, gl.SliceLayout(0, layout))
                    at_KG = x_ptr + token_K.to(gl.int64)[:, None] * (D8 * 8) + col_G[None, :]
                    async_copy.async_copy_global_to_shared(g_view, at_KG, mask=(col_G < D8 * 8)[None, :])
                else:
                    g_view = g_view._reinterpret(g_desc.dtype, g_desc.block_shape, g_desc.layout)
                    tma.async_copy_global_to_shared(g_desc, [1 << 30, end, x0, col], bar, g_view)
                if GATHER:
                    async_copy.mbarrier_arrive(bar, increment_count=False)
                    r_K += BK  # the next piece's indices are on their way while the ring is full
                    token_K = gl.load(token_ptr + gl.minimum(r_K, end - 1))
                count += 1


@gluon.jit
def store(at_MN, value_MN, inside_MN, WHOLE: gl.constexpr, STREAMED: gl.constexpr):
    """A float32 tile to memory; STREAMED: past the cache."""
    if not WHOLE:
        gl.store(at_MN, value_MN, mask=inside_MN)
    elif STREAMED:
        gl.store(at_MN, value_MN, cache_modifier=".cs")
    else:
        gl.store(at_MN, value_MN)


@gluon.jit
def consume(
    which: gl.constexpr, out_ptr, segments_ptr, ring_g, ring_r, full, empty, D8, F8, g_tiles, r_tiles, tiles,
    M: gl.constexpr, PLANES: gl.constexpr, TOKENS_FIRST: gl.constexpr, GATHER: gl.constexpr, CONTINUES: gl.constexpr,
    APART: gl.constexpr, WHOLE: gl.constexpr, BG: gl.constexpr, BR: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One warpgroup: its half of every tile's rows, the products and then the float32 tile to memory."""
    WM: gl.constexpr = (BG if TOKENS_FIRST else BR) // 2
    BN: gl.constexpr = BR if TOKENS_FIRST else BG
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    part: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, WM], gl.bfloat16)
    D = D8 * 8
    F = F8 * 8
    planes = tiles // (g_tiles * r_tiles)
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        plane, g, r = locate(tile, g_tiles, r_tiles)
        e = plane // PLANES
        if TOKENS_FIRST:  # out is (E, D, F)
            m0 = g * BG + which * WM
            n0 = r * BR
            height = D
            width = F
        else:  # out is (E, 2, F, D)
            m0 = r * BR + which * WM
            n0 = g * BG
            height = F
            width = D
        m_M = m0 + gl.arange(0, WM, gl.SliceLayout(1, mma))
        n_N = n0 + gl.arange(0, BN, gl.SliceLayout(0, mma))
        out_MN = out_ptr + plane.to(gl.int64) * D * F + m_M[:, None] * width + n_N[None, :]
        inside_MN = (m_M < height)[:, None] & (n_N < width)[None, :]
        for s in range(M):
            first = gl.load(segments_ptr + e * M + s)
            steps = (gl.load(segments_ptr + e * M + s + 1) - first + BK - 1) // BK
            acc = gl.zeros([WM, BN], gl.float32, mma)
            for k in range(steps):
                stage = count % STAGES
                mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                if GATHER:
                    fence_async_shared()
                a = (ring_g if TOKENS_FIRST else ring_r).index(stage)
                b = (ring_r if TOKENS_FIRST else ring_g).index(stage)
                a = a._reinterpret(gl.bfloat16, [2, BK, WM], part).index(which).permute([1, 0])
                acc = warpgroup_mma(a, b, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                if k > 0:
                    mbarrier.arrive(empty.index((count - 1) % STAGES), count=1)
                count += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            if steps > 0:
                mbarrier.arrive(empty.index((count - 1) % STAGES), count=1)
            is_first = s == 0 and not CONTINUES
            if APART:
                if steps == 0 and not is_first:
                    acc = acc * -1.0  # -0, which a literal is not: Triton makes 0 of it, and 0 - 0 of a minus
                store(out_MN + s * planes.to(gl.int64) * D * F, acc, inside_MN, WHOLE, True)
            elif is_first:
                store(out_MN, acc, inside_MN, WHOLE, M == 1)
            elif steps > 0:
                if WHOLE:
                    acc += gl.load(out_MN)
                else:
                    acc += gl.load(out_MN, mask=inside_MN, other=0.0)
                store(out_MN, acc, inside_MN, WHOLE, M == 1)


@gluon.jit
def wgrad_kernel(
    g_desc, x_ptr, token_ptr, r_desc, out_ptr, segments_ptr, D8, F8, rows, g_tiles, r_tiles, tiles,
    M: gl.constexpr, PLANES: gl.constexpr, TOKENS_FIRST: gl.constexpr, GATHER: gl.constexpr, CONTINUES: gl.constexpr,
    APART: gl.constexpr, WHOLE: gl.constexpr, BG: gl.constexpr, BR: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):
    g_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BG], gl.bfloat16)
    r_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BR], gl.bfloat16)
    ring_g = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, BG], g_layout)
    ring_r = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, BR], r_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129 if GATHER else 1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    block_barrier()
    gl.warp_specialize(
        [
            (consume, (
                gl.constexpr(0), out_ptr, segments_ptr, ring_g, ring_r, full, empty, D8, F8, g_tiles, r_tiles, tiles,
                M, PLANES, TOKENS_FIRST, GATHER, CONTINUES, APART, WHOLE, BG, BR, BK, STAGES)),
            (consume, (
                gl.constexpr(1), out_ptr, segments_ptr, ring_g, ring_r, full, empty, D8, F8, g_tiles, r_tiles, tiles,
                M, PLANES, TOKENS_FIRST, GATHER, CONTINUES, APART, WHOLE, BG, BR, BK, STAGES)),
            (produce, (
                g_desc, x_ptr, token_ptr, r_desc, segments_ptr, ring_g, ring_r, full, empty, D8, rows, g_tiles, r_tiles,
                tiles, M, PLANES, GATHER, BG, BR, BK, STAGES)),
        ],
        [4, 4 if GATHER else 1],
        [REGS, PRODUCER_REGS],
    )
