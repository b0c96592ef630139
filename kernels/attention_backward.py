"""Attention backward on Hopper, without atomics: the half over keys, for dk and dv.

    p_ij = exp(s_ij - lse_i)     delta_i = <dout_i, out_i>     dp_ij = <dout_i, v_j>     ds_ij = p_ij (dp_ij - delta_i)
    dv_j = sum_i p_ij dout_i     dk_j = scale sum_i ds_ij q_i     dq_i = scale sum_j ds_ij k_j
    dsink_h = - sum_i exp(sink_h - lse_i) delta_i

Seven products where five would do with dq summed across key blocks; for that each element of dk, dv and
dq is one accumulator's sum in one order, no block waits for another, and nothing but `stats` is stored
between them. attention_queries.py runs first: dq, dsink, and `stats` (B H, blocks of 64, 2, 64), float32, lse
log2(e) and delta of 64 queries at a time, +inf and 0 past S, so that p is 0 there. Layouts as in
attention_forward.py.

A block of 128 keys stays in shared memory, 64 to each of two warpgroups, whose accumulators hold dk and
dv whole; 64 queries at a time come through the ring with their output's gradients and stats, ascending,
for each query head of the group in order. s and dp are computed transposed, so that p and ds are
register operands of the next products; dp's accumulator starts from -delta. Registers decide: dk and dv
of a 192/128 head are 160 a thread, so p lives on only as the bf16 pairs that the product of dv reads.

Accumulation: float32 over queries in order; p and ds are rounded to bf16 for their products, and ds is
made from the rounded p. Repeatable: as above; no atomics, no order that depends on time.

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

from nmoe.kernels.attention_forward import fetch, locate, scores, steps_of
from nmoe.kernels.grouped import block_barrier


@gluon.jit
def rounded(x):
    """bf16, two to a register: left to itself the compiler keeps each in one of its own until it is multiplied."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def scaled(p, x):
    """bf16 p times float32 x, rounded to bf16, two at a time."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 t; .reg .f32 a, b; shl.b32 t, $1, 16; mov.b32 a, t; and.b32 t, $1, 0xffff0000; mov.b32 b, t;
        mul.f32 a, a, $2; mul.f32 b, b, $3; cvt.rn.bf16x2.f32 $0, b, a; }""",
        "=r,r,f,f", [p, x], dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def query_span(k0, batch, end_ptr, S, WINDOW: gl.constexpr, DOCS: gl.constexpr):
    """Query blocks (of 64) lo .. hi - 1 that meet the keys k0 .. k0 + 127."""
    end = S
    if WINDOW > 0:
        end = gl.minimum(end, k0 + 127 + WINDOW)
    if DOCS:
        end = gl.minimum(end, gl.load(end_ptr + batch * S + gl.minimum(k0 + 127, S - 1)))
    return k0 // 64, (end + 63) // 64


@gluon.jit
def keys_produce(
    qa_desc, qb_desc, ka_desc, kb_desc, v_desc, do_desc, stats_ptr, end_ptr, smem_ka, smem_kb, smem_v,
    ring_qa, ring_qb, ring_do, ring_stats, k_full, k_empty, full, empty, items, pairs, blocks, G, shared, S,
    QA: gl.constexpr, QB: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
    DOCS: gl.constexpr, BUFFERS: gl.constexpr,
):
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    off = gl.arange(0, 128, flat)
    q_blocks = (S + 63) // 64
    count = 0
    tile = 0
    for s in range(steps_of(items)):
        bg, block, real = locate(s, pairs, blocks)
        if real:
            batch = bg // G
            group = bg % G
            k0 = (blocks - 1 - block) * 128
            lo, hi = query_span(k0, batch, end_ptr, S, WINDOW, DOCS)
            buffer = tile % BUFFERS
            mbarrier.wait(k_empty.index(buffer), ((tile // BUFFERS) & 1) ^ 1)
            bar = k_full.index(buffer)
            mbarrier.expect(bar, 2 * 128 * (QA + QB + V))
            for w in gl.static_range(2):
                fetch(ka_desc, bar, smem_ka.index(2 * buffer + w), batch, group, k0 + w * 64, 0)
                if QB > 0:
                    fetch(kb_desc, bar, smem_kb.index(2 * buffer + w), batch, group, k0 + w * 64, QA)
                fetch(v_desc, bar, smem_v.index(2 * buffer + w), batch, group, k0 + w * 64, 0)
            for h in range(shared):
                head = group * shared + h
                stats = stats_ptr + (batch * (G * shared) + head) * q_blocks * 128 + off
                for m in range(lo, hi):
                    stage = count % STAGES
                    mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
                    bar = full.index(stage)
                    mbarrier.expect(bar, 2 * 64 * (QA + QB + V))
                    fetch(qa_desc, bar, ring_qa.index(stage), batch, head, m * 64, 0)
                    if QB > 0:
                        fetch(qb_desc, bar, ring_qb.index(stage), batch, head, m * 64, QA)
                    fetch(do_desc, bar, ring_do.index(stage), batch, head, m * 64, 0)
                    async_copy.async_copy_global_to_shared(ring_stats.index(stage), stats + m * 128)
                    async_copy.mbarrier_arrive(bar, increment_count=False)
                    count += 1
            tile += 1


@gluon.jit
def keys_step(
    m, count, ka, kb, v, ring_qa, ring_qb, ring_do, ring_stats, full, empty, zero, dka, dkb, dv,
    j_N, end_N, scale2, QB: gl.constexpr, STAGES: gl.constexpr, p_layout: gl.constexpr,
    MASK: gl.constexpr, WINDOW: gl.constexpr, DOCS: gl.constexpr,
):
    """64 queries into the accumulators; the rounded p serves for ds too, which frees registers."""
    layout: gl.constexpr = zero.type.layout
    stage = count % STAGES
    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
    st = warpgroup_mma_wait(0, deps=[scores(ka, kb, ring_qa, ring_qb, stage, zero, QB)])
    lse = ring_stats.index(stage).slice(0, 64).load(gl.SliceLayout(0, layout))
    p = gl.exp2(st * scale2 - lse[None, :])
    if MASK:
        i_M = m * 64 + gl.arange(0, 64, gl.SliceLayout(0, layout))
        seen = i_M[None, :] >= j_N[:, None]
        if WINDOW > 0 or DOCS:
            seen = seen & (i_M[None, :] < end_N[:, None])
        p = gl.where(seen, p, 0.0)
    pb = rounded(gl.convert_layout(p, p_layout))
    delta = ring_stats.index(stage).slice(64, 64).load(gl.SliceLayout(0, layout))
    dp = warpgroup_mma(v, ring_do.index(stage).permute([1, 0]), zero - delta[None, :], is_async=True)
    dv = warpgroup_mma(pb, ring_do.index(stage), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    dsb = scaled(pb, gl.convert_layout(dp, p_layout))
    dka = warpgroup_mma(dsb, ring_qa.index(stage), dka, is_async=True)
    if QB > 0:
        dkb = warpgroup_mma(dsb, ring_qb.index(stage), dkb, is_async=True)
        dka, dkb, dv = warpgroup_mma_wait(0, deps=[dka, dkb, dv])
    else:
        dka, dv = warpgroup_mma_wait(0, deps=[dka, dv])
    mbarrier.arrive(empty.index(stage), count=1)
    return dka, dkb, dv


@gluon.jit
def store_rows(ptr, acc, factor, bh, row0, S, width, col0):
    """One accumulator times a factor to rows of (heads, S, width), in bf16."""
    layout: gl.constexpr = acc.type.layout
    row_M = row0 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    col_D = col0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    at = ptr + (bh.to(gl.int64) * S + row_M)[:, None] * width + col_D[None, :]
    gl.store(at, (acc * factor).to(gl.bfloat16), mask=(row_M < S)[:, None] & (col_D < width)[None, :])


@gluon.jit
def stage_rows(desc, buffer, acc, factor, batch, head, row, col):
    """The same through a shared buffer that nobody else uses, by TMA."""
    buffer.store((acc * factor).to(gl.bfloat16))
    fence_async_shared()
    block_barrier()
    view = buffer._reinterpret(desc.dtype, desc.block_shape, desc.layout)
    tma.async_copy_shared_to_global(desc, [batch, head, row, col], view)


@gluon.jit
def keys_consume(
    which: gl.constexpr, dka_desc, dkb_desc, dv_desc, dk_ptr, dv_ptr, end_ptr, smem_ka, smem_kb, smem_v, ring_qa,
    ring_qb, ring_do, ring_stats, k_full, k_empty, full, empty, items, pairs, blocks, G, shared, S, scale2, scale,
    head_q, head_v,
    QA: gl.constexpr, QB: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
    DOCS: gl.constexpr, BUFFERS: gl.constexpr,
):
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    mma_a: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, QA, 16])
    mma_v: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, mma_s, 2)
    zero = gl.zeros([64, 64], gl.float32, mma_s)
    count = 0
    tile = 0
    for s in range(steps_of(items)):
        bg, block, real = locate(s, pairs, blocks)
        if real:
            batch = bg // G
            k0 = (blocks - 1 - block) * 128
            lo, hi = query_span(k0, batch, end_ptr, S, WINDOW, DOCS)
            j_N = k0 + which * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma_s))
            end_N = j_N * 0 + S
            if WINDOW > 0:
                end_N = gl.minimum(end_N, j_N + WINDOW)
            if DOCS:
                end_N = gl.minimum(end_N, gl.load(end_ptr + batch * S + j_N, mask=j_N < S, other=0))
            dka = gl.zeros([64, QA], gl.float32, mma_a)
            dkb = gl.zeros([64, 64], gl.float32, mma_s) if QB > 0 else 0
            dv = gl.zeros([64, V], gl.float32, mma_v)
            buffer = tile % BUFFERS
            ka = smem_ka.index(2 * buffer + which)
            kb = smem_kb.index(2 * buffer + which)
            v = smem_v.index(2 * buffer + which)
            mbarrier.wait(k_full.index(buffer), (tile // BUFFERS) & 1)
            for _h in range(shared):
                middle = hi
                if WINDOW == 0 and not DOCS:
                    middle = gl.minimum(lo + 2, hi)
                for m in range(lo, middle):
                    dka, dkb, dv = keys_step(
                        m, count, ka, kb, v, ring_qa, ring_qb, ring_do, ring_stats, full, empty, zero, dka, dkb, dv,
                        j_N, end_N, scale2, QB, STAGES, p_layout, True, WINDOW, DOCS)
                    count += 1
                if WINDOW == 0 and not DOCS:
                    for m in range(middle, hi):
                        dka, dkb, dv = keys_step(
                            m, count, ka, kb, v, ring_qa, ring_qb, ring_do, ring_stats, full, empty, zero, dka, dkb,
                            dv, j_N, end_N, scale2, QB, STAGES, p_layout, False, WINDOW, DOCS)
                        count += 1
            row0 = k0 + which * 64
            if BUFFERS == 2:  # through this warpgroup's own part of the keys, while the next ones come
                stage_rows(dv_desc, v, dv, 1.0, batch, bg % G, row0, 0)
                stage_rows(dka_desc, ka, dka, scale, batch, bg % G, row0, 0)
                if QB > 0:
                    stage_rows(dkb_desc, kb, dkb, scale, batch, bg % G, row0, QA)
                tma.store_wait(0)
            mbarrier.arrive(k_empty.index(buffer), count=1)
            tile += 1
            if BUFFERS == 1:
                store_rows(dv_ptr, dv, 1.0, bg, row0, S, head_v, 0)
                store_rows(dk_ptr, dka, scale, bg, row0, S, head_q, 0)
                if QB > 0:
                    store_rows(dk_ptr, dkb, scale, bg, row0, S, head_q, QA)


@gluon.jit
def keys_kernel(
    qa_desc, qb_desc, ka_desc, kb_desc, v_desc, do_desc, stats_ptr, end_ptr,
    dka_desc, dkb_desc, dv_desc, dk_ptr, dv_ptr, items, pairs, blocks, G, shared, S, scale2, scale, head_q, head_v,
    QA: gl.constexpr, QB: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
    DOCS: gl.constexpr, BUFFERS: gl.constexpr,
):
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, QA], gl.bfloat16)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, V], gl.bfloat16)
    B_ROWS: gl.constexpr = 64 if QB > 0 else 8
    smem_ka = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, 64, QA], a_layout)
    smem_kb = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, B_ROWS, 64], b_layout)
    smem_v = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, 64, V], v_layout)
    ring_qa = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, QA], a_layout)
    ring_qb = gl.allocate_shared_memory(gl.bfloat16, [STAGES, B_ROWS, 64], b_layout)
    ring_do = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, V], v_layout)
    ring_stats = gl.allocate_shared_memory(gl.float32, [STAGES, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=33)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    block_barrier()
    gl.warp_specialize(
        [
            (keys_consume, (
                gl.constexpr(0), dka_desc, dkb_desc, dv_desc, dk_ptr, dv_ptr, end_ptr, smem_ka, smem_kb, smem_v,
                ring_qa, ring_qb, ring_do, ring_stats, k_full, k_empty, full, empty, items, pairs, blocks, G, shared, S,
                scale2, scale, head_q, head_v, QA, QB, V, STAGES, WINDOW, DOCS, BUFFERS)),
            (keys_consume, (
                gl.constexpr(1), dka_desc, dkb_desc, dv_desc, dk_ptr, dv_ptr, end_ptr, smem_ka, smem_kb, smem_v,
                ring_qa, ring_qb, ring_do, ring_stats, k_full, k_empty, full, empty, items, pairs, blocks, G, shared, S,
                scale2, scale, head_q, head_v, QA, QB, V, STAGES, WINDOW, DOCS, BUFFERS)),
            (keys_produce, (
                qa_desc, qb_desc, ka_desc, kb_desc, v_desc, do_desc, stats_ptr, end_ptr, smem_ka, smem_kb, smem_v,
                ring_qa, ring_qb, ring_do, ring_stats, k_full, k_empty, full, empty, items, pairs,
                blocks, G, shared, S, QA, QB, V, STAGES, WINDOW, DOCS, BUFFERS)),
        ],
        [4, 1],
        [240, 24],
    )
