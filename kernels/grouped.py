"""The four grouped products whose output is rows, with the SwiGLU and its gradient inside, for Hopper.

Mathematics, for the rows r of expert e (token t, weight w):

    UP     h_0 = x[t] W_gate^T,  h_1 = x[t] W_up^T,  a = silu(h_0) * h_1
    DOWN   y   = a W_down^T
    DGATE  d   = dout[t] W_down;  <d, a>;  dA = w d;
           dh_0 = dA * h_1 * silu'(h_0),  dh_1 = dA * silu(h_0),  and w * a for the weight gradient
    DX     dx  = dh_0 W_gate + dh_1 W_up

Layout. Rows are sorted by expert; a tile of 128 rows begins at its expert's first row, so a row's
place in its tile, and with it its arithmetic, depends on its expert's rows before it in whole
tiles only. dh is two planes (2, R, F), and so is h, or it lies in two of more rows, from a first one
on that the device knows (nmoe.kernels.arena). Weights are (E, 2, F, D) and (E, D, F) as stored;
where the product runs over their slow axis, wgmma reads them transposed from shared memory.

One kernel, one block an SM, persistent: block b takes tiles b, b + 132, ... A producer fills a ring
of shared-memory stages (64 columns of K each) by TMA, or row by row with cp.async where it gathers
tokens itself; two warpgroups multiply (see launch.py for how they share tiles). A descriptor made
by moe.py clips loads and stores at the expert's last row, so no mask is computed anywhere. The
epilogue's values go through shared memory to TMA stores; for DGATE the pre-activations come the
same way, in pieces of 32 columns, the first one while the products still run.

Dtypes: operands bf16; every accumulation float32, over K in order, in one accumulator. a is
computed from the rounded h, so that backward's a is forward's. <d, a> sums a tile's columns in
float32; the tiles' parts are added in order by combine.sum_dots.

Repeatable: no atomics, no split of K, a fixed tile for every output; the order in which blocks run
changes no operand. Two traps that were met: a warpgroup that skips phases of an mbarrier reads its
parity wrongly, so warpgroups that take turns pass a turn barrier; and an epilogue of 9000 unrolled
instructions ran from instruction-cache misses (sigmoid is four instructions for that reason).

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

# What a launch computes.
UP = gl.constexpr(0)
DOWN = gl.constexpr(1)
DGATE = gl.constexpr(2)
DX = gl.constexpr(3)

# The barrier of a partition's own warps; Triton 3.7 renamed it.
block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def produce(
    a_desc, x_ptr, token_ptr, b_desc, offsets_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr,
    ring_a, ring_b, full, empty, D8, rows, n_tiles, k_tiles,
    KIND: gl.constexpr, GATHER: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the ring: for each tile of this block, every K step's piece of A and of B."""
    total = gl.load(num_tiles_ptr) * n_tiles
    count = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        m = tile // n_tiles
        n = tile % n_tiles
        e = gl.load(tile_expert_ptr + m)
        row = gl.load(tile_row_ptr + m)
        end = gl.load(offsets_ptr + e + 1)
        if GATHER:
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            r_M = row + gl.arange(0, BM, gl.SliceLayout(1, layout))
            token_M = gl.load(token_ptr + gl.minimum(r_M, end - 1))
            col_K = gl.arange(0, BK, gl.SliceLayout(0, layout))
            a_MK = x_ptr + token_M.to(gl.int64)[:, None] * (D8 * 8) + col_K[None, :]
        for k in range(k_tiles):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * BK * (BN + (0 if GATHER else BM)))
            half = 0
            step = k
            if KIND == DX:
                half = k // (k_tiles // 2)
                step = k - half * (k_tiles // 2)
            b = ring_b.index(stage)
            if KIND == UP:
                tma.async_copy_global_to_shared(b_desc, [2 * e, n * (BN // 2), step * BK], bar, b)
            elif KIND == DOWN:
                tma.async_copy_global_to_shared(b_desc, [e, n * BN, step * BK], bar, b)
            elif KIND == DGATE:
                tma.async_copy_global_to_shared(b_desc, [e, step * BK, n * BN], bar, b)
            else:
                tma.async_copy_global_to_shared(b_desc, [2 * e + half, step * BK, n * BN], bar, b)
            if GATHER:
                mask_MK = (k * BK + col_K < D8 * 8)[None, :]
                async_copy.async_copy_global_to_shared(ring_a.index(stage), a_MK + k * BK, mask=mask_MK)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                a = ring_a.index(stage)._reinterpret(a_desc.dtype, a_desc.block_shape, a_desc.layout)
                at = [1 << 30, end + half * rows, (1 << 30) - (end - row), step * BK]
                tma.async_copy_global_to_shared(a_desc, at, bar, a)
            count += 1


@gluon.jit
def sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) in four instructions; both approximations are within 2 ulp of float32."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t; }""",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def store_rows(c_desc, stage, value, end, x0, col):
    """One staged tile to its rows; the descriptor clips what lies beyond the expert's last row."""
    tma.store_wait(0)
    block_barrier()
    stage.store(value)
    fence_async_shared()
    block_barrier()
    view = stage._reinterpret(c_desc.dtype, c_desc.block_shape, c_desc.layout)
    tma.async_copy_shared_to_global(c_desc, [1 << 30, end, x0, col], view)


@gluon.jit
def fetch_pair(h_desc, staging, loaded, buffer, h_rows, h_end, x0, col, SIZE: gl.constexpr):
    """Both planes' piece of the pre-activations into two of the staging buffers."""
    mbarrier.expect(loaded, 2 * 2 * SIZE)
    gate = staging.index(buffer)._reinterpret(h_desc.dtype, h_desc.block_shape, h_desc.layout)
    up = staging.index(buffer + 1)._reinterpret(h_desc.dtype, h_desc.block_shape, h_desc.layout)
    tma.async_copy_global_to_shared(h_desc, [1 << 30, h_end, x0, col], loaded, gate)
    tma.async_copy_global_to_shared(h_desc, [1 << 30, h_end + h_rows, x0, col], loaded, up)


@gluon.jit
def halves(x):
    """The left and the right columns of a tile; each thread keeps its own, nothing moves."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def gate_columns(
    q: gl.constexpr, d, w_M, c_desc, h_desc, aw_desc, staging, loaded, rows, end, h_rows, h_end, x0, first_col,
    WM: gl.constexpr, PIECES: gl.constexpr, SETS: gl.constexpr,
):
    """The SwiGLU gradient of the columns of d, from piece q of PIECES on; returns their part of <dA', A>."""
    if d.shape[1] > 32:
        left, right = halves(d)
        dot_M = gate_columns(
            q, left, w_M, c_desc, h_desc, aw_desc, staging, loaded, rows, end, h_rows, h_end, x0, first_col,
            WM, PIECES, SETS,
        )
        rest_M = gate_columns(
            q + d.shape[1] // 64, right, w_M, c_desc, h_desc, aw_desc, staging, loaded, rows, end, h_rows, h_end, x0,
            first_col, WM, PIECES, SETS,
        )
        out_M = dot_M + gl.convert_layout(rest_M, dot_M.type.layout)
    else:
        out_M = gate_piece(
            q, d, w_M, c_desc, h_desc, aw_desc, staging, loaded, rows, end, h_rows, h_end, x0, first_col,
            WM, PIECES, SETS,
        )
    return out_M


@gluon.jit
def gate_piece(
    q: gl.constexpr, d, w_M, c_desc, h_desc, aw_desc, staging, loaded, rows, end, h_rows, h_end, x0, first_col,
    WM: gl.constexpr, PIECES: gl.constexpr, SETS: gl.constexpr,
):
    """32 columns of the SwiGLU gradient; returns its part of <dA', A>."""
    layout: gl.constexpr = d.type.layout
    base: gl.constexpr = 3 * (q % SETS)
    col = first_col + q * 32
    mbarrier.wait(loaded, q & 1)
    if q < PIECES - 1 and SETS == 2:  # the other three buffers, once their stores have been read
        tma.store_wait(0)
        block_barrier()
        fetch_pair(h_desc, staging, loaded, 3 - base, h_rows, h_end, x0, col + 32, 32 * WM)
    g = staging.index(base).load(layout).to(gl.float32)
    u = staging.index(base + 1).load(layout).to(gl.float32)
    sig = sigmoid(g)
    silu = g * sig
    a = (silu * u).to(gl.bfloat16).to(gl.float32)
    dot_M = gl.sum(d * a, axis=1)
    w_M = gl.convert_layout(w_M, gl.SliceLayout(1, layout))
    da = d * w_M[:, None]
    dg = (da * u * (sig + silu * (1.0 - sig))).to(gl.bfloat16)
    du = (da * silu).to(gl.bfloat16)
    aw = (a * w_M[:, None]).to(gl.bfloat16)
    block_barrier()
    staging.index(base).store(dg)
    staging.index(base + 1).store(du)
    staging.index(base + 2).store(aw)
    fence_async_shared()
    block_barrier()
    s0 = staging.index(base)._reinterpret(c_desc.dtype, c_desc.block_shape, c_desc.layout)
    s1 = staging.index(base + 1)._reinterpret(c_desc.dtype, c_desc.block_shape, c_desc.layout)
    s2 = staging.index(base + 2)._reinterpret(c_desc.dtype, c_desc.block_shape, c_desc.layout)
    tma.async_copy_shared_to_global(c_desc, [1 << 30, end, x0, col], s0)
    tma.async_copy_shared_to_global(c_desc, [1 << 30, end + rows, x0, col], s1)
    tma.async_copy_shared_to_global(aw_desc, [1 << 30, end, x0, col], s2)
    if q < PIECES - 1 and SETS == 1:
        tma.store_wait(0)
        block_barrier()
        fetch_pair(h_desc, staging, loaded, 0, h_rows, h_end, x0, col + 32, 32 * WM)
    return dot_M


@gluon.jit
def consume(
    which: gl.constexpr,
    c_desc, h_desc, aw_desc, weight_ptr, dot_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr,
    ring_a, ring_b, full, empty, order, staging, loaded, rows, h_rows, h_first_ptr, n_tiles, k_tiles,
    KIND: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    SHARE: gl.constexpr, SETS: gl.constexpr, GATHER: gl.constexpr,
):
    """One warpgroup: every other tile of this block (or its half of every one), products then epilogue."""
    HALF: gl.constexpr = BN // 2
    WM: gl.constexpr = BM // SHARE
    part: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WM, BK], gl.bfloat16)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    total = gl.load(num_tiles_ptr) * n_tiles
    h_first = 0
    if (KIND == UP or KIND == DGATE) and h_first_ptr is not None:  # noqa: SIM109
        h_first = gl.load(h_first_ptr)
    first_tile = gl.program_id(0)
    step = gl.num_programs(0)
    count = 0
    if SHARE == 1:
        first_tile += which * step
        step *= 2
        count = which * k_tiles
    turn = 0
    for tile in range(first_tile, total, step):
        m = tile // n_tiles
        n = tile % n_tiles
        e = gl.load(tile_expert_ptr + m)
        row = gl.load(tile_row_ptr + m)
        end = gl.load(offsets_ptr + e + 1)
        row += (which * WM) % BM
        x0 = (1 << 30) - (end - row)

        if KIND == DGATE:  # the first piece of the pre-activations is fetched while the products run
            tma.store_wait(0)
            block_barrier()
            fetch_pair(h_desc, staging, loaded, 0, h_rows, end + h_first, x0, n * BN, 32 * WM)

        acc = gl.zeros([WM, BN], gl.float32, mma)
        if SHARE == 1:
            mbarrier.wait(order.index(which), (turn & 1) ^ (1 - which))
            turn += 1
        for k in range(k_tiles):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), (count // STAGES) & 1)
            if GATHER:  # rows came by cp.async, through another proxy than wgmma reads by
                fence_async_shared()
            a = ring_a.index(stage)._reinterpret(gl.bfloat16, [SHARE, WM, BK], part).index(which % SHARE)
            b = ring_b.index(stage)
            if KIND == UP or KIND == DOWN:  # noqa: SIM109 (the compiler knows no tuples of constants)
                b = b.reshape([BN, BK]).permute([1, 0])
            else:
                b = b.reshape([BK, BN])
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if k > 0:
                mbarrier.arrive(empty.index((count - 1) % STAGES), count=1)
            count += 1
        if SHARE == 1:
            mbarrier.arrive(order.index(1 - which), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((count - 1) % STAGES), count=1)
        if SHARE == 1:
            count += k_tiles

        if KIND == UP:
            gate, up = halves(acc.to(gl.bfloat16))
            g = gate.to(gl.float32)
            a = (g * sigmoid(g) * up.to(gl.float32)).to(gl.bfloat16)
            store_rows(h_desc, staging.index(0), gate, end + h_first, x0, n * HALF)
            store_rows(h_desc, staging.index(1 % SETS), up, end + h_first + h_rows, x0, n * HALF)
            store_rows(aw_desc, staging.index(0), a, end, x0, n * HALF)
        elif KIND == DGATE:
            r_M = row + gl.arange(0, WM, gl.SliceLayout(1, mma))
            w_M = gl.load(weight_ptr + r_M, mask=r_M < end, other=0.0)
            dot_M = gate_columns(
                0, acc, w_M, c_desc, h_desc, aw_desc, staging, loaded, rows, end, h_rows, end + h_first, x0, n * BN,
                WM, BN // 32, SETS,
            )
            gl.store(dot_ptr + n * rows + r_M, gl.convert_layout(dot_M, gl.SliceLayout(1, mma)), mask=r_M < end)
        else:
            left, right = halves(acc.to(gl.bfloat16))
            store_rows(c_desc, staging.index(0), left, end, x0, n * BN)
            store_rows(c_desc, staging.index(1 % SETS), right, end, x0, n * BN + HALF)
    tma.store_wait(0)


@gluon.jit
def rows_kernel(
    a_desc, x_ptr, token_ptr, b_desc, c_desc, h_desc, aw_desc, weight_ptr, dot_ptr,
    offsets_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, D8, rows, h_rows, h_first_ptr, n_tiles, k_tiles,
    KIND: gl.constexpr, GATHER: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, SHARE: gl.constexpr, SETS: gl.constexpr, REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.bfloat16)
    ring_a = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], tile_layout)
    ring_b = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + b_desc.block_shape, b_desc.layout)  # noqa: RUF005
    BUFFERS: gl.constexpr = 3 * SETS if KIND == DGATE else SETS
    WIDTH: gl.constexpr = 32 if KIND == DGATE else BN // 2
    WM: gl.constexpr = BM // SHARE
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WM, WIDTH], gl.bfloat16)
    staging0 = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, WM, WIDTH], out_layout)
    staging1 = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, WM, WIDTH], out_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129 if GATHER else 1)
        mbarrier.init(empty.index(i), count=SHARE)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(order.index(0), count=1)
    mbarrier.init(order.index(1), count=1)
    mbarrier.init(loaded.index(0), count=1)
    mbarrier.init(loaded.index(1), count=1)
    fence_async_shared()
    block_barrier()
    gl.warp_specialize(
        [
            (consume, (
                gl.constexpr(0), c_desc, h_desc, aw_desc, weight_ptr, dot_ptr, offsets_ptr, tile_expert_ptr,
                tile_row_ptr, num_tiles_ptr, ring_a, ring_b, full, empty, order, staging0, loaded.index(0), rows,
                h_rows, h_first_ptr, n_tiles, k_tiles, KIND, BM, BN, BK, STAGES, SHARE, SETS, GATHER)),
            (consume, (
                gl.constexpr(1), c_desc, h_desc, aw_desc, weight_ptr, dot_ptr, offsets_ptr, tile_expert_ptr,
                tile_row_ptr, num_tiles_ptr, ring_a, ring_b, full, empty, order, staging1, loaded.index(1), rows,
                h_rows, h_first_ptr, n_tiles, k_tiles, KIND, BM, BN, BK, STAGES, SHARE, SETS, GATHER)),
            (produce, (
                a_desc, x_ptr, token_ptr, b_desc, offsets_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr,
                ring_a, ring_b, full, empty, D8, rows, n_tiles, k_tiles, KIND, GATHER, BM, BN, BK, STAGES)),
        ],
        [4, 4 if GATHER else 1],
        [REGS, PRODUCER_REGS],
    )
