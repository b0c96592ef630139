"""Attention forward on Hopper: out = softmax(scale q k^T + mask) v and its logarithm of sums, block by block.

    s_ij = scale <q_i, k_j> for first(i) <= j <= i;  m_i = max_j s_ij;  l_i = sum_j exp(s_ij - m_i) (+ exp(sink - m_i))
    out_i = sum_j exp(s_ij - m_i) v_j / l_i;          lse_i = m_i + log(l_i)

first(i) is the start of i's document, or i - window + 1, or the larger of both. Layout: q (B, H, S, Q),
k (B, G, S, Q), v (B, G, S, V), each with any strides and the last axis contiguous; query head h
reads key head h // (H / G). One block an SM, persistent: a producer warp brings 128 queries and then
128 keys and values at a time by TMA (rows past S and columns past the head's size come as zeros),
from the diagonal down; two warpgroups hold 64 queries each. A head of 192 is 128 + 64 columns.

The products of the next keys are in flight while a warpgroup takes exponentials: S of block n and
P V of block n + 1 are issued together, and the running maximum rescales after both.

Accumulation: float32 in wgmma, over keys from the diagonal down; P is rounded to bf16 for its product
and summed unrounded. Repeatable: every row belongs to one warpgroup, which meets the keys in one order.
A work item is a pair of query blocks, one far and one near, so that blocks of an SM carry equal work
and the keys of few heads are live at a time.

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

from nmoe.kernels.grouped import block_barrier

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def locate(s, pairs, blocks):
    """Step s of this block: (head of the batch, block of the sequence, whether it is one to do)."""
    item = gl.program_id(0) + (s // 2) * gl.num_programs(0)
    p = item % pairs
    far = blocks - 1 - p
    block = far if s % 2 == 0 else p
    return item // pairs, block, (s % 2 == 0) | (p != far)


@gluon.jit
def steps_of(items):
    """Steps of this block: two for each of its items."""
    return 2 * ((items - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0))


@gluon.jit
def key_span(q0, batch, start_ptr, S, BM: gl.constexpr, BN: gl.constexpr, WINDOW: gl.constexpr, DOCS: gl.constexpr):
    """Key blocks lo .. hi - 1 that the queries q0 .. q0 + BM - 1 meet."""
    first = 0
    if DOCS:
        first = gl.load(start_ptr + batch * S + q0)
    if WINDOW > 0:
        first = gl.maximum(first, q0 - WINDOW + 1)
    return first // BN, (gl.minimum(q0 + BM, S) + BN - 1) // BN


@gluon.jit
def fetch(desc, bar, ring, batch, head, row, col):
    """One TMA tile of (rows, columns) of a head into a shared buffer."""
    view = ring._reinterpret(desc.dtype, desc.block_shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [batch, head, row, col], bar, view)


@gluon.jit
def forward_produce(
    qa_desc, qb_desc, ka_desc, kb_desc, v_desc, start_ptr, smem_qa, smem_qb, ring_ka, ring_kb, ring_v,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, items, pairs, blocks, H, shared, S,
    QA: gl.constexpr, QB: gl.constexpr, V: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WINDOW: gl.constexpr, DOCS: gl.constexpr,
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
            mbarrier.wait(q_empty, (tile & 1) ^ 1)
            mbarrier.expect(q_full, 2 * 128 * (QA + QB))
            for w in gl.static_range(2):
                fetch(qa_desc, q_full, smem_qa.index(w), batch, head, q0 + w * 64, 0)
                if QB > 0:
                    fetch(qb_desc, q_full, smem_qb.index(w), batch, head, q0 + w * 64, QA)
            for i in range(hi - lo):
                row = (hi - 1 - i) * BN
                stage = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), 2 * BN * (QA + QB))
                fetch(ka_desc, k_full.index(stage), ring_ka.index(stage), batch, head // shared, row, 0)
                if QB > 0:
                    fetch(kb_desc, k_full.index(stage), ring_kb.index(stage), batch, head // shared, row, QA)
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), 2 * BN * V)
                fetch(v_desc, v_full.index(stage), ring_v.index(stage), batch, head // shared, row, 0)
                count += 1
            tile += 1


@gluon.jit
def scores(qa, qb, ring_ka, ring_kb, stage, zero, QB: gl.constexpr):
    """q k^T, begun and not waited for."""
    s = warpgroup_mma(qa, ring_ka.index(stage).permute([1, 0]), zero, is_async=True)
    if QB > 0:
        s = warpgroup_mma(qb, ring_kb.index(stage).permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def hide(s_MN, i_M, first_M, j_N, WINDOW: gl.constexpr, DOCS: gl.constexpr):
    """-inf where query i may not see key j."""
    seen = j_N[None, :] <= i_M[:, None]
    if WINDOW > 0 or DOCS:
        seen = seen & (j_N[None, :] >= first_M[:, None])
    return gl.where(seen, s_MN, float("-inf"))


@gluon.jit
def first_keys(i_M, batch, start_ptr, S, WINDOW: gl.constexpr, DOCS: gl.constexpr):
    """The first key that each query sees."""
    first_M = i_M * 0
    if DOCS:
        first_M = gl.load(start_ptr + batch * S + i_M, mask=i_M < S, other=0)
    if WINDOW > 0:
        first_M = gl.maximum(first_M, i_M - (WINDOW - 1))
    return first_M


@gluon.jit
def forward_consume(
    which: gl.constexpr, o_ptr, lse_ptr, sink_ptr, start_ptr, smem_qa, smem_qb, ring_ka, ring_kb, ring_v,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, items, pairs, blocks, H, S, scale2, head_v,
    QB: gl.constexpr, V: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
    DOCS: gl.constexpr, SINK: gl.constexpr,
):
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    zero = gl.zeros([64, BN], gl.float32, mma_s)
    qa = smem_qa.index(which)
    qb = smem_qb.index(which)
    count = 0
    tile = 0
    for s in range(steps_of(items)):
        bh, block, real = locate(s, pairs, blocks)
        if real:
            batch = bh // H
            q0 = block * 128
            lo, hi = key_span(q0, batch, start_ptr, S, 128, BN, WINDOW, DOCS)
            i_M = q0 + which * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma_s))
            first_M = first_keys(i_M, batch, start_ptr, S, WINDOW, DOCS)
            j_N = gl.arange(0, BN, gl.SliceLayout(0, mma_s))
            mbarrier.wait(q_full, tile & 1)

            stage = count % STAGES
            mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
            sc = warpgroup_mma_wait(0, deps=[scores(qa, qb, ring_ka, ring_kb, stage, zero, QB)])
            mbarrier.arrive(k_empty.index(stage), count=1)
            sc = hide(sc, i_M, first_M, (hi - 1) * BN + j_N, WINDOW, DOCS)
            m_M = gl.max(sc, axis=1) * scale2
            if SINK:
                sink2 = gl.load(sink_ptr + bh % H) * LOG2E
                m_M = gl.maximum(m_M, sink2)
            p = gl.exp2(sc * scale2 - m_M[:, None])
            l_M = gl.sum(p, axis=1)
            if SINK:
                l_M += gl.exp2(sink2 - m_M)
            pb = gl.convert_layout(p.to(gl.bfloat16), p_layout)
            acc = gl.zeros([64, V], gl.float32, mma_o)
            for i in range(1, hi - lo):
                stage = (count + 1) % STAGES
                before = count % STAGES
                mbarrier.wait(k_full.index(stage), ((count + 1) // STAGES) & 1)
                sc = scores(qa, qb, ring_ka, ring_kb, stage, zero, QB)
                mbarrier.wait(v_full.index(before), (count // STAGES) & 1)
                acc = warpgroup_mma(pb, ring_v.index(before), acc, is_async=True)
                sc = warpgroup_mma_wait(1, deps=[sc])
                mbarrier.arrive(k_empty.index(stage), count=1)
                if WINDOW > 0 or DOCS:
                    sc = hide(sc, i_M, first_M, (hi - 1 - i) * BN + j_N, WINDOW, DOCS)
                old_M = m_M
                m_M = gl.maximum(m_M, gl.max(sc, axis=1) * scale2)
                p = gl.exp2(sc * scale2 - m_M[:, None])
                alpha_M = gl.exp2(old_M - m_M)
                l_M = l_M * alpha_M + gl.sum(p, axis=1)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_empty.index(before), count=1)
                acc = acc * gl.convert_layout(alpha_M, gl.SliceLayout(1, mma_o))[:, None]
                pb = gl.convert_layout(p.to(gl.bfloat16), p_layout)
                count += 1
            mbarrier.arrive(q_empty, count=1)
            stage = count % STAGES
            mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)
            acc = warpgroup_mma(pb, ring_v.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(stage), count=1)
            count += 1
            tile += 1

            gl.store(lse_ptr + bh * S + i_M, (m_M + gl.log2(l_M)) * LN2, mask=i_M < S)
            acc = acc * gl.convert_layout(1.0 / l_M, gl.SliceLayout(1, mma_o))[:, None]
            row_M = q0 + which * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma_o))
            col_V = gl.arange(0, V, gl.SliceLayout(0, mma_o))
            token_M = batch.to(gl.int64) * S + row_M
            at = o_ptr + (token_M * H + bh % H)[:, None] * head_v + col_V[None, :]
            gl.store(at, acc.to(gl.bfloat16), mask=(row_M < S)[:, None] & (col_V < head_v)[None, :])


@gluon.jit
def forward_kernel(
    qa_desc, qb_desc, ka_desc, kb_desc, v_desc, o_ptr, lse_ptr, sink_ptr, start_ptr,
    items, pairs, blocks, H, shared, S, scale2, head_v,
    QA: gl.constexpr, QB: gl.constexpr, V: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WINDOW: gl.constexpr, DOCS: gl.constexpr, SINK: gl.constexpr,
):
    qa_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, QA], gl.bfloat16)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, V], gl.bfloat16)
    B_WIDTH: gl.constexpr = QB if QB > 0 else 64
    B_ROWS: gl.constexpr = BN if QB > 0 else 8
    qb_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, B_WIDTH], gl.bfloat16)
    smem_qa = gl.allocate_shared_memory(gl.bfloat16, [2, 64, QA], qa_layout)
    smem_qb = gl.allocate_shared_memory(gl.bfloat16, [2, 64 if QB > 0 else 8, B_WIDTH], qb_layout)
    ring_ka = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, QA], qa_layout)
    ring_kb = gl.allocate_shared_memory(gl.bfloat16, [STAGES, B_ROWS, B_WIDTH], qb_layout)
    ring_v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, V], v_layout)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bars.index(0), count=1)
    mbarrier.init(q_bars.index(1), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    block_barrier()
    gl.warp_specialize(
        [
            (forward_consume, (
                gl.constexpr(0), o_ptr, lse_ptr, sink_ptr, start_ptr, smem_qa, smem_qb, ring_ka, ring_kb, ring_v,
                q_bars.index(0), q_bars.index(1), k_full, k_empty, v_full, v_empty, items, pairs, blocks, H, S,
                scale2, head_v, QB, V, BN, STAGES, WINDOW, DOCS, SINK)),
            (forward_consume, (
                gl.constexpr(1), o_ptr, lse_ptr, sink_ptr, start_ptr, smem_qa, smem_qb, ring_ka, ring_kb, ring_v,
                q_bars.index(0), q_bars.index(1), k_full, k_empty, v_full, v_empty, items, pairs, blocks, H, S,
                scale2, head_v, QB, V, BN, STAGES, WINDOW, DOCS, SINK)),
            (forward_produce, (
                qa_desc, qb_desc, ka_desc, kb_desc, v_desc, start_ptr, smem_qa, smem_qb, ring_ka, ring_kb, ring_v,
                q_bars.index(0), q_bars.index(1), k_full, k_empty, v_full, v_empty, items, pairs, blocks, H, shared, S,
                QA, QB, V, BN, STAGES, WINDOW, DOCS)),
        ],
        [4, 1],
        [240, 24],
    )
