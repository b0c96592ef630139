"""The rest of the step on one GPU: norms, rotary positions, SwiGLU, loss, AdamW, gradient norm, Newton-Schulz.

`python -m nmoe.bench.elementwise all --out FILE.json` does everything in one call, and writes after each case:
`check` compares results with float64 at odd sizes, into memory poisoned with NaN, and facts bit for bit (a row's bits
do not depend on the others; AdamW is the reference's to the bit; a set verdict holds every write). `repeat` runs each
case twenty times and prints digests, for comparison between processes. `time` is the median of CUDA events over a
CUDA graph, with an L2 that holds nothing of the last run, beside the floor: bytes over this run's copy bandwidth plus,
where there are products, FLOPs over its dense bf16 product of 8192^3. Peers run the same work in the same process:
torch as it is and through torch.compile, the trainer's plain layers ("model"); what cannot be captured is timed as
calls and says so.
"""

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nmoe.bench.clock import milliseconds
from nmoe.bench.elementwise_case import Case, Part, Peer
from nmoe.bench.elementwise_layers import keys_case, norm_case, rope_case, swiglu_case
from nmoe.bench.elementwise_step import adamw_case, loss_case, schulz_case, squares_case
from nmoe.bench.moe import digest, error

LAYER = [(256, 2, 384, 768), (256, 768, 384), (256, 768), (768,)]
SUPER256 = [*LAYER * 4, (50304, 768), (50304, 768)]
"""Four of bench/super256's twelve layers, embedding and head: 9.8e8 parameters."""
SCATTERED = [(3,), (7, 9), (1000, 768), (20, 1000), (16385, 8), (5, 1031), (2, 3, 40, 24)]

ODD: dict[str, Callable[[], Case]] = {
    "norm one row": partial(norm_case, 1, 72),
    "norm": partial(norm_case, 517, 200),
    "norm slice": partial(norm_case, 1003, 512, gap=64),
    "norm heads": partial(norm_case, 9001, 96),
    "norm wide": partial(norm_case, 67, 7168),
    "norm odd": partial(norm_case, 333, 1537),
    "add norm": partial(norm_case, 1001, 768, added=True),
    "add norm wide": partial(norm_case, 65, 2048, added=True),
    "swiglu one row": partial(swiglu_case, 1, 40),
    "swiglu": partial(swiglu_case, 333, 1408),
    "swiglu odd": partial(swiglu_case, 65, 37),
    "rope mla": partial(rope_case, 2, 333, 3, 128, 32, interleaved=True),
    "rope narrow": partial(rope_case, 1, 5, 2, 24, 12, interleaved=True),
    "rope halves": partial(rope_case, 2, 77, 5, 0, 48, interleaved=False),
    "rope halves 64": partial(rope_case, 1, 130, 4, 0, 32, interleaved=False),
    "keys": partial(keys_case, 2, 333, 3, 128, 128, 32),
    "keys narrow": partial(keys_case, 1, 65, 2, 24, 40, 20),
    "loss": partial(loss_case, 1000, 256, 5000, 256),
    "loss odd": partial(loss_case, 700, 128, 40001, 256),
    "loss one": partial(loss_case, 1, 64, 300, 256),
    "adamw": partial(adamw_case, SCATTERED),
    "norms": partial(squares_case, [SCATTERED, [(70000, 64), (11,)], []]),
    "schulz small": partial(schulz_case, 3, 40, 56),
    "schulz ragged": partial(schulz_case, 2, 136, 264),
    "schulz": partial(schulz_case, 5, 384, 768),
}
SHAPES: dict[str, Callable[[], Case]] = {
    "norm T32768 D768": partial(norm_case, 32768, 768),
    "add norm T32768 D768": partial(norm_case, 32768, 768, added=True),
    "norm T16384 D2048": partial(norm_case, 16384, 2048),
    "add norm T16384 D2048": partial(norm_case, 16384, 2048, added=True),
    "norm T16384 D512 of 576": partial(norm_case, 16384, 512, gap=64),
    "norm T16384 D1536": partial(norm_case, 16384, 1536),
    "norm heads T16384 H32 D128": partial(norm_case, 16384 * 32, 128),
    "swiglu T32768 F384": partial(swiglu_case, 32768, 384),
    "swiglu T16384 F2816": partial(swiglu_case, 16384, 2816),
    "swiglu T16384 F11264": partial(swiglu_case, 16384, 11264),
    "rope mla B16 S2048 H6": partial(rope_case, 16, 2048, 6, 128, 32, interleaved=True),
    "rope mla B4 S4096 H16": partial(rope_case, 4, 4096, 16, 128, 32, interleaved=True),
    "rope halves B4 S4096 H32": partial(rope_case, 4, 4096, 32, 0, 64, interleaved=False),
    "keys B16 S2048 H6": partial(keys_case, 16, 2048, 6, 128, 128, 32),
    "keys B4 S4096 H16": partial(keys_case, 4, 4096, 16, 128, 128, 32),
    "loss T32768 D768 V50304": partial(loss_case, 32768, 768, 50304),
    "loss T16384 D2048 V50304": partial(loss_case, 16384, 2048, 50304),
    "loss T16384 D2048 V201088": partial(loss_case, 16384, 2048, 201088),
    "adamw super256": partial(adamw_case, SUPER256),
    "norms super256": partial(squares_case, [SUPER256]),
    "schulz N256 384x768": partial(schulz_case, 256, 384, 768),
    "schulz N64 1408x2048": partial(schulz_case, 64, 1408, 2048),
}

REPEATED = {name: case for name, case in SHAPES.items() if name != "adamw super256"} | {"adamw": ODD["adamw"]}
"""All but the one whose copies do not fit beside each other."""


def check(name: str) -> dict:
    """Relative errors against float64, and the facts that do not hold."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    try:
        case = ODD[name]()
        wanted, got = case.exact(), case.ours()
        errors = {key: error(value, wanted[key]) for key, value in got.items()}
        facts = case.facts()
    finally:
        torch.use_deterministic_algorithms(False)
    bad = [key for key, limit in case.limits.items() if not errors[key] <= limit]
    row = {"case": name, **errors, "facts": facts, "bad": bad + [key for key, holds in facts.items() if not holds]}
    print("check", name, " ".join(f"{k} {v:.1e}" for k, v in errors.items()), f"facts {len(facts)} bad {row['bad']}",
          flush=True)  # fmt: skip
    return row


def repeat(name: str, times: int = 20) -> dict:
    """Which results ever differ in twenty runs, and the digest of the first."""
    case = REPEATED[name]()
    first: dict[str, torch.Tensor] = {}
    differ: set[str] = set()
    for _ in range(times):
        now = case.ours()
        first = first or {key: value.clone() for key, value in now.items()}
        differ |= {key for key, value in now.items() if not torch.equal(value, first[key])}
    found = digest([value.reshape(-1) for value in first.values()])
    row = {"case": name, "times": times, "differ": sorted(differ), "digest": found}
    print("repeat", name, row["differ"], row["digest"], flush=True)
    return row


def cold_milliseconds(call: Callable[[], object], runs: int = 15) -> float:
    """Median time of one call, after two to warm up; 256 MiB are written before each, which is five times the L2."""
    others = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(runs + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        others.zero_()
        begin.record()
        call()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times[2:])


def timed(call: Callable[[], object]) -> tuple[float, bool]:
    """Median ms of a replay of the call's graph, True; of the call itself, False, where it could not be captured.

    Captured on the current stream, since a backward runs on its forward's.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return cold_milliseconds(call), False
    return cold_milliseconds(graph.replay), True


def peer_calls(part: Part) -> dict[str, Callable[[], object]]:
    """Calls of a part's peers, or of their gradients, by name; those that compile, compiled too."""
    calls: dict[str, Callable[[], object]] = {}
    for who, peer in part.peers.items():
        calls[who] = peer_call(peer, peer.function)
        if peer.compiles:
            calls[f"{who} compiled"] = peer_call(peer, torch.compile(peer.function, dynamic=False))
    return calls


def peer_call(peer: Peer, function: Callable) -> Callable[[], object]:
    """A gradient's forward is done when it is first called."""
    made: list[Any] = []

    def gradient() -> object:
        if not made:
            made.append(function(*peer.leaves))
        return torch.autograd.grad(made[0], peer.leaves, peer.given, retain_graph=True)

    return partial(function, *peer.leaves) if peer.given is None else gradient


def time_case(name: str, case: Case, copy: float, dense: float, peers: bool) -> list[dict]:
    """Ours beside the floor and the peers. copy: bytes/ms read and written. dense: FLOPs/ms."""
    report = []
    for part in case.parts():
        ms, captured = timed(part.call)
        floor = part.bytes / copy + part.flops / dense
        row: dict = {"case": name, "part": part.name, "ms": ms, "floor": floor, "GB/s": part.bytes / ms / 1e6,
                     "TFLOP/s": part.flops / ms / 1e9}  # fmt: skip
        calls = [] if captured else ["ours"]
        for label, call in (peer_calls(part) if peers else {}).items():
            row[label], captured = timed(call)
            calls += [] if captured else [label]
        if calls:
            row["timed as calls"] = calls
        report.append(row)
        rest = " ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in list(row.items())[6:])
        print(f"time {name:28} {part.name:13} {ms:8.4f} ms | floor {floor:8.4f} {floor / ms:4.0%} | {rest}", flush=True)
    return report


def ceilings() -> tuple[float, float]:
    """Bytes/ms of a copy of 2 GiB (read and written), and FLOPs/ms of a dense bf16 product."""
    source, target = (torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dense = 2 * 8192**3 / milliseconds(lambda: torch.mm(a, b.T))
    print(f"copy {copy / 1e9:.2f} TB/s, dense {dense / 1e9:.0f} TFLOP/s", flush=True)
    return copy, dense


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m nmoe.bench.elementwise", description=__doc__)
    parser.add_argument("what", choices=("check", "repeat", "time", "all"))
    parser.add_argument("--only", default="", help="run the cases whose names begin so")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", default="")
    args = parser.parse_args(argv)
    report: dict[str, list] = {"check": [], "repeat": [], "time": [], "failed": []}

    def each(what: str, names: dict, work: Callable[[str], object]) -> None:
        for name in names:
            if not name.startswith(args.only) or args.what not in (what, "all"):
                continue
            try:
                found = work(name)
                report[what] += found if isinstance(found, list) else [found]
            except Exception as problem:  # the other cases are worth having; the exit status tells
                traceback.print_exc()
                report["failed"].append({"what": what, "case": name, "error": repr(problem)[:500]})
            torch.cuda.empty_cache()
            if args.out:
                Path(args.out).write_text(json.dumps(report, indent=1))

    with torch.cuda.stream(torch.cuda.Stream()):
        each("check", ODD, check)
        each("repeat", REPEATED, repeat)
        for peers in (False, True) if args.what in ("time", "all") else ():
            if peers and args.no_peers:
                continue
            copy, dense = ceilings()
            report["time"].append({"copy GB/s": copy / 1e6, "dense TFLOP/s": dense / 1e9, "peers": peers})
            each("time", SHAPES, lambda name: time_case(name, SHAPES[name](), copy, dense, peers))  # noqa: B023
    bad = [row["case"] for row in report["check"] if row["bad"]]
    differ = [row["case"] for row in report["repeat"] if row["differ"]]
    print(f"check: {len(report['check'])} cases, bad {bad}; repeat: {len(report['repeat'])} cases, differ {differ}; "
          f"failed {[(row['what'], row['case']) for row in report['failed']]}")  # fmt: skip
    return 1 if bad or differ or report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
