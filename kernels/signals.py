"""Signals between the ranks of a node: who has come to which phase.

    publish p:  phase = p in this rank's flag at every peer, after everything this rank has stored before
    observe p:  wait until every peer's flag here is at least p

A phase is one exchange; all ranks run the same list of them, so a phase is a number that only grows. It is counted
on the device, so that no host and no launch order takes part. To publish p is also to say that everything of the
phases before p has been read (nmoe/rdep/signals.py says why that frees every buffer).

Order. Rows and lists are stored by earlier kernels of the same stream, words by this block itself: a block barrier,
then one release at system scope for each peer. Triton 3.6 puts no barrier of its own before a scalar release
atomic, and its default scope is the GPU: both are written here. One block polls with acquire at system scope;
whoever reads what peers wrote is a later kernel. The atomics are exchanges with one writer each: they decide no value.

A wait is bounded by the device's clock. When it ends in vain, the block writes (1, peer, phase's name, layer, seen,
expected) to host memory, sets the verdict, and goes on, and so does every later one without waiting: the data are
worthless then, every index that stands in a region is still within it, and the verdict keeps them from the state.

Measured: 8.3 us a phase when both have come (2026-11-25, two H100, NVLink).
"""

import triton
import triton.language as tl
from torch import Tensor

FLAG_WORDS = 16  # int64: a flag has 128 bytes for itself
REPORT_WORDS = 6
WORDS_BLOCK = 1024


@triton.jit
def now():
    """The device's clock in ns, the same for all threads of the block: they then leave a loop together."""
    each = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l,r", [tl.arange(0, 128)], dtype=tl.int64, is_pure=False, pack=1
    )
    return tl.max(each, 0)


@triton.jit(do_not_specialize=["words", "name", "layer", "limit_ns", "rank"])  # nothing compiles during a step
def meet_kernel(phase_ptr, flags_ptr, peers_ptr, word_ptr, boxes_ptr, words, verdict_ptr, report_ptr, name, layer,
                limit_ns, rank, PUBLISH: tl.constexpr, OBSERVE: tl.constexpr, N: tl.constexpr,
                FLAG_WORDS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    phase = tl.load(phase_ptr)
    if PUBLISH:
        phase += 1
        for first in range(0, words, BLOCK):
            i = first + tl.arange(0, BLOCK)
            word = tl.load(word_ptr + i, mask=i < words)
            for n in tl.static_range(N):
                box = tl.load(boxes_ptr + n).to(tl.pointer_type(tl.int32))
                tl.store(box + rank * words + i, word, mask=i < words)
        tl.debug_barrier()
        tl.store(phase_ptr, phase)
        for n in tl.static_range(N):
            if n != rank:
                flag = tl.load(peers_ptr + n).to(tl.pointer_type(tl.int64)) + rank * FLAG_WORDS
                tl.atomic_xchg(flag, phase, sem="release", scope="sys")
    if OBSERVE:
        broken = tl.load(verdict_ptr)
        for n in tl.static_range(N):
            if n != rank:
                flag = flags_ptr + n * FLAG_WORDS
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                if (seen < phase) & (broken == 0):
                    start = now()
                    waited = start - start
                    while (seen < phase) & (waited < limit_ns):
                        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                        waited = now() - start
                    if seen < phase:
                        broken += 1
                        tl.store(report_ptr + 1, n)
                        tl.store(report_ptr + 2, name)
                        tl.store(report_ptr + 3, layer)
                        tl.store(report_ptr + 4, seen)
                        tl.store(report_ptr + 5, phase)
                        tl.store(report_ptr, 1)
                        tl.store(verdict_ptr, 1)


def meet(
    *, phase: Tensor, flags: Tensor, peers_N: Tensor, verdict: Tensor, report: Tensor, name: int, layer: int,
    limit_ns: int, rank: int, words: Tensor | None = None, boxes_N: Tensor | None = None, publish: bool = True,
    observe: bool = True,
) -> None:  # fmt: skip
    """Come to the next phase: publish it to every peer, and wait until every peer has published it.

    phase: int64 (1), the number of the last one. flags: int64 (N * FLAG_WORDS), this rank's own; peers_N: table of the
    ranks' flags. verdict: int32 (1). report: int64 (REPORT_WORDS), pinned. name, layer: of the phase, for the report.
    words: int32, put at [rank] of every rank's box (N, words), of which boxes_N is the table.
    publish, observe: do the one without the other; a phase is published before it is observed.
    """
    count = 0 if words is None else words.numel()
    meet_kernel[(1,)](
        phase, flags, peers_N, phase if words is None else words, peers_N if boxes_N is None else boxes_N, count,
        verdict, report, name, layer, limit_ns, rank, publish, observe, len(peers_N), FLAG_WORDS, WORDS_BLOCK,
        num_warps=4,
    )  # fmt: skip
