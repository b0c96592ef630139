"""Attention backward on Hopper, without atomics: the half over queries, for dq and what the other half needs.

    dq_i = scale sum_j ds_ij k_j     dsink_h in parts of 64 queries     stats: lse_i log2(e), delta_i

The mathematics, `stats` and the reasons are in attention_backward.py. 128 queries and their output's
gradients stay in shared memory, 64 to each of two warpgroups, whose accumulators hold dq whole; keys
and values come through the ring from the diagonal down, 64 at a time, both first products in flight at
once. Before its keys a block sums delta from rows of out, and leaves it with lse for the other half.

Accumulation: float32 over keys from the diagonal down; ds is rounded to bf16 for its product.
Repeatable: each element of dq is one accumulator's sum in one order; no atomics.

Floor and figures in NOTES.md.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nmoe.kernels.attention_backward import rounded, scaled, stage_rows, store_rows
from nmoe.kernels.attention_forward import LOG2E, fetch, first_keys, hide, key_span, locate, scores, steps_of
from nmoe.kernels.grouped import block_barrier


@gluon.jit
def queries_produce(
    qa_desc, qb_desc, ka_desc, kb_desc, v_desc, do_desc, start_ptr, smem_qa, smem_qb, smem_do, ring_ka, ring_kb,
    ring_v, q_full, q_empty, full, empty, items, pairs, blocks, H, shared, S,
    QA: gl.constexpr, QB: gl.constexpr, V: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WINDOW: gl.constexpr, DOCS: gl.constexpr, BUFFERS: gl.constexpr,
):
    count = 0
    tile = 0
    for s in range(steps_of(items)):
        bh, block, real = locate(s, pairs, blocks)
        if real:
            batch = bh // H
            head = bh % H
            q0 = block * 128
            lo, hi = key_span(q0, batch, start_ptr, S, 128, BN, WINDOW, DOCS)
            buffer = tile % BUFFERS
            mbarrier.wait(q_empty.index(buffer), ((tile // BUFFERS) & 1) ^ 1)
            bar = q_full.index(buffer)
            mbarrier.expect(bar, 2 * 128 * (QA + QB + V))
            for w in gl.static_range(2):
                fetch(qa_desc, bar, smem_qa.index(2 * buffer + w), batch, head, q0 + w * 64, 0)
                if QB > 0:
                    fetch(qb_desc, bar, smem_qb.index(2 * buffer + w), batch, head, q0 + w * 64, QA)
                fetch(do_desc, bar, smem_do.index(2 * buffer + w), batch, head, q0 + w * 64, 0)
            for i in range(hi - lo):
                row = (hi - 1 - i) * BN
                stage = count % STAGES
                mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, 2 * BN * (QA + QB + V))
                fetch(ka_desc, bar, ring_ka.index(stage), batch, head // shared, row, 0)
                if QB > 0:
                    fetch(kb_desc, bar, ring_kb.index(stage), batch, head // shared, row, QA)
                fetch(v_desc, bar, ring_v.index(stage), batch, head // shared, row, 0)
                count += 1
            tile += 1


@gluon.jit
def queries_step(
    n, count, qa, qb, do, ring_ka, ring_kb, ring_v, full, empty, zero, dqa, dqb, lse_M, delta_M, i_M, first_M,
    scale2, QB: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, p_layout: gl.constexpr, MASK: gl.constexpr,
    WINDOW: gl.constexpr, DOCS: gl.constexpr,
):
    """BN keys into dq; releases the stage."""
    layout: gl.constexpr = zero.type.layout
    stage = count % STAGES
    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
    sc = scores(qa, qb, ring_ka, ring_kb, stage, zero, QB)
    dp = warpgroup_mma(do, ring_v.index(stage).permute([1, 0]), zero - delta_M[:, None], is_async=True)
    sc = warpgroup_mma_wait(1, deps=[sc])
    if MASK:
        j_N = n * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
        sc = hide(sc, i_M, first_M, j_N, WINDOW, DOCS)
    pb = rounded(gl.convert_layout(gl.exp2(sc * scale2 - lse_M[:, None]), p_layout))
    dp = warpgroup_mma_wait(0, deps=[dp])
    dsb = scaled(pb, gl.convert_layout(dp, p_layout))
    dqa = warpgroup_mma(dsb, ring_ka.index(stage), dqa, is_async=True)
    if QB > 0:
        dqb = warpgroup_mma(dsb, ring_kb.index(stage), dqb, is_async=True)
        dqa, dqb = warpgroup_mma_wait(0, deps=[dqa, dqb])
    else:
        dqa = warpgroup_mma_wait(0, deps=[dqa])
    mbarrier.arrive(empty.index(stage), count=1)
    return dqa, dqb


@gluon.jit
def queries_consume(
    which: gl.constexpr, dqa_desc, dqb_desc, dq_ptr, o_ptr, lse_ptr, sink_ptr, stats_ptr, dsink_ptr, start_ptr,
    smem_qa, smem_qb, smem_do, ring_ka, ring_kb, ring_v, q_full, q_empty, full, empty, items, pairs,
    blocks, H, S, scale2, scale, head_q, head_v, o_b, o_h, o_s,
    QA: gl.constexpr, QB: gl.constexpr, V: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WINDOW: gl.constexpr, DOCS: gl.constexpr, SINK: gl.constexpr, BUFFERS: gl.constexpr,
):
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    mma_a: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, QA, 16])
    mma_b: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, mma_s, 2)
    o_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [4, 1], [1, 0])
    zero = gl.zeros([64, BN], gl.float32, mma_s)
    q_blocks = (S + 63) // 64
    count = 0
    tile = 0
    for s in range(steps_of(items)):
        bh, block, real = locate(s, pairs, blocks)
        if real:
            batch = bh // H
            q0 = block * 128
            lo, hi = key_span(q0, batch, start_ptr, S, 128, BN, WINDOW, DOCS)
            r_M = gl.arange(0, 64, gl.SliceLayout(1, mma_s))
            i_M = q0 + which * 64 + r_M
            first_M = first_keys(i_M, batch, start_ptr, S, WINDOW, DOCS)
            lse_M = gl.load(lse_ptr + bh.to(gl.int64) * S + i_M, mask=i_M < S, other=float("inf"))
            row_M = q0 + which * 64 + gl.arange(0, 64, gl.SliceLayout(1, o_layout))
            col_V = gl.arange(0, V, gl.SliceLayout(0, o_layout))
            at = o_ptr + (bh // H).to(gl.int64) * o_b + (bh % H).to(gl.int64) * o_h
            at = at + row_M.to(gl.int64)[:, None] * o_s + col_V[None, :]
            o = gl.load(at, mask=(row_M < S)[:, None] & (col_V < head_v)[None, :], other=0.0)
            dqa = gl.zeros([64, QA], gl.float32, mma_a)
            dqb = gl.zeros([64, 64], gl.float32, mma_b) if QB > 0 else 0
            buffer = tile % BUFFERS
            qa = smem_qa.index(2 * buffer + which)
            qb = smem_qb.index(2 * buffer + which)
            do = smem_do.index(2 * buffer + which)
            mbarrier.wait(q_full.index(buffer), (tile // BUFFERS) & 1)
            delta_M = gl.sum(o.to(gl.float32) * do.load(o_layout).to(gl.float32), axis=1)
            delta_M = gl.convert_layout(delta_M, gl.SliceLayout(1, mma_s))
            q_block = block * 2 + which
            if q_block < q_blocks:
                stats = stats_ptr + (bh * q_blocks + q_block) * 128 + r_M
                gl.store(stats, lse_M * LOG2E)
                gl.store(stats + 64, delta_M)
                if SINK:
                    p_M = gl.exp2((gl.load(sink_ptr + bh % H) - lse_M) * LOG2E)
                    gl.store(dsink_ptr + bh * q_blocks + q_block, -gl.sum(p_M * delta_M, axis=0))
            lse_M = lse_M * LOG2E
            middle = hi - lo
            if WINDOW == 0 and not DOCS:
                middle = gl.minimum(128 // BN, middle)
            for i in range(middle):
                dqa, dqb = queries_step(
                    hi - 1 - i, count, qa, qb, do, ring_ka, ring_kb, ring_v, full, empty, zero, dqa, dqb, lse_M,
                    delta_M, i_M, first_M, scale2, QB, BN, STAGES, p_layout, True, WINDOW, DOCS)
                count += 1
            if WINDOW == 0 and not DOCS:
                for i in range(middle, hi - lo):
                    dqa, dqb = queries_step(
                        hi - 1 - i, count, qa, qb, do, ring_ka, ring_kb, ring_v, full, empty, zero, dqa, dqb,
                        lse_M, delta_M, i_M, first_M, scale2, QB, BN, STAGES, p_layout, False, WINDOW, DOCS)
                    count += 1
            if BUFFERS == 2:
                stage_rows(dqa_desc, qa, dqa, scale, batch, bh % H, q0 + which * 64, 0)
                if QB > 0:
                    stage_rows(dqb_desc, qb, dqb, scale, batch, bh % H, q0 + which * 64, QA)
                tma.store_wait(0)
            mbarrier.arrive(q_empty.index(buffer), count=1)
            tile += 1
            if BUFFERS == 1:
                store_rows(dq_ptr, dqa, scale, bh, q0 + which * 64, S, head_q, 0)
                if QB > 0:
                    store_rows(dq_ptr, dqb, scale, bh, q0 + which * 64, S, head_q, QA)


@gluon.jit
def queries_kernel(
    qa_desc, qb_desc, ka_desc, kb_desc, v_desc, do_desc, dqa_desc, dqb_desc, dq_ptr, o_ptr, lse_ptr, sink_ptr,
    stats_ptr, dsink_ptr, start_ptr, items, pairs, blocks, H, shared, S, scale2, scale, head_q, head_v, o_b, o_h, o_s,
    QA: gl.constexpr, QB: gl.constexpr, V: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WINDOW: gl.constexpr, DOCS: gl.constexpr, SINK: gl.constexpr, BUFFERS: gl.constexpr,
):
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, QA], gl.bfloat16)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, V], gl.bfloat16)
    smem_qa = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, 64, QA], a_layout)
    smem_qb = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, 64 if QB > 0 else 8, 64], b_layout)
    smem_do = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, 64, V], v_layout)
    ring_ka = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, QA], a_layout)
    ring_kb = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN if QB > 0 else 8, 64], b_layout)
    ring_v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, V], v_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    block_barrier()
    gl.warp_specialize(
        [
            (queries_consume, (
                gl.constexpr(0), dqa_desc, dqb_desc, dq_ptr, o_ptr, lse_ptr, sink_ptr, stats_ptr, dsink_ptr, start_ptr,
                smem_qa, smem_qb, smem_do, ring_ka, ring_kb, ring_v, q_full, q_empty, full, empty, items,
                pairs, blocks, H, S, scale2, scale, head_q, head_v, o_b, o_h, o_s,
                QA, QB, V, BN, STAGES, WINDOW, DOCS, SINK, BUFFERS)),
            (queries_consume, (
                gl.constexpr(1), dqa_desc, dqb_desc, dq_ptr, o_ptr, lse_ptr, sink_ptr, stats_ptr, dsink_ptr, start_ptr,
                smem_qa, smem_qb, smem_do, ring_ka, ring_kb, ring_v, q_full, q_empty, full, empty, items,
                pairs, blocks, H, S, scale2, scale, head_q, head_v, o_b, o_h, o_s,
                QA, QB, V, BN, STAGES, WINDOW, DOCS, SINK, BUFFERS)),
            (queries_produce, (
                qa_desc, qb_desc, ka_desc, kb_desc, v_desc, do_desc, start_ptr, smem_qa, smem_qb, smem_do, ring_ka,
                ring_kb, ring_v, q_full, q_empty, full, empty, items, pairs, blocks, H, shared, S,
                QA, QB, V, BN, STAGES, WINDOW, DOCS, BUFFERS)),
        ],
        [4, 1],
        [240, 24],
    )
