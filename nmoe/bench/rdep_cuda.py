"""Dispatch and return between the GPUs of a node, beside NCCL and NVSHMEM on the same rows.

`torchrun --standalone --nproc-per-node=N -m nmoe bench rdep` on GPUs. Rows of 2048 bf16, 8192 and 32768 tokens a rank,
top-8 of 128 experts; balanced, and Zipf (an expert's popularity is 1 / its place in a fixed random order).

    layout     counts exchanged, every pair's row
    dispatch   rows and lists sent, the phase, what backward needs kept
    return     each pair's output row to its slot, the phase
    layer      the experts between them too, forward and backward, beside one GPU with all experts and its own tokens

A time is the median of `--repeats` calls, each call's the slowest rank's. `GB/s` is unique payload that
one rank sends to others (for dispatch a token's row once to each owner) over the time of the kernel that sends and the
phase after it. `host_waits` counts calls of the CUDA runtime that wait, in a profiler's trace of 20 layouts, dispatches
and returns. --vdev times torch's all_to_all_vdev alone: NVSHMEM wants a process of its own.
"""

import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nmoe import platform
from nmoe.bench.rdep_peers import Nccl, NcclPairs, Vdev
from nmoe.bench.rows import Row
from nmoe.errors import fail
from nmoe.experts.bf16 import Bf16Experts
from nmoe.kernels.exchange import dispatch
from nmoe.kernels.layout_ranks import Places, most_rows
from nmoe.rdep.arena import Arena
from nmoe.rdep.cuda import CudaTransport, regions
from nmoe.rdep.cuda_node import CudaNode
from nmoe.rdep.local import LocalTransport
from nmoe.rdep.memory import Sizes
from nmoe.rdep.transport import AnyTransport

WIDTH, EXPERTS, TOP_K, INTERMEDIATE = 2048, 128, 8, 768
TOKENS = (8192, 32768)
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x, indices, weights, dy


def routed(kind: str, tokens: int, seed: int, device: torch.device) -> Tensor:
    """(T, K) int64, all different for a token: the largest of log popularity plus Gumbel noise."""
    generator = torch.Generator(device).manual_seed(seed)
    noise_TE = -torch.log(-torch.log(torch.rand(tokens, EXPERTS, generator=generator, device=device).clamp_min(1e-9)))
    if kind == "zipf":
        place_E = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(9)).to(device)
        noise_TE -= torch.log(1.0 + place_E)
    return noise_TE.topk(TOP_K, dim=1).indices


class Clock:
    """Times of calls, the slowest rank's. Before each one the ranks meet, and the device waits so long that the host,
    which does not, is ahead of it: what is timed is the device's work, and the host's where a call makes it wait.
    """

    AHEAD_CYCLES = 4_000_000

    def __init__(self, repeats: int, device: torch.device) -> None:
        self.repeats, self.device = repeats, device
        self.token = torch.zeros(1, device=device)

    def __call__(self, call: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        """ms: the median of `call`; `before` runs before each one and is not counted."""
        events = []
        for _ in range(self.repeats + 3):
            if before is not None:
                before()
            torch.cuda._sleep(self.AHEAD_CYCLES)
            dist.all_reduce(self.token)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        times = torch.tensor([b.elapsed_time(e) for b, e in events[3:]], device=self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return statistics.median(times.tolist())


def sent(several: CudaTransport, indices_TK: Tensor, places: Places) -> dict[str, float]:
    """Unique bytes that a rank sends to others in dispatch and return: the mean of the ranks."""
    away = torch.arange(several.ranks, device=indices_TK.device) != several.rank
    rows = (places.place_TN[:, away] >= 0).sum()
    pairs = (indices_TK // (EXPERTS // several.ranks) != several.rank).sum()  # others give these back to this rank
    total = torch.stack([rows, pairs]).double()
    dist.all_reduce(total)
    row = WIDTH * 2
    return dict(zip(("dispatch", "return"), (total * row / several.ranks).tolist(), strict=True))


def host_waits(call: Callable[[], object]) -> list[str]:
    """`waits_of` a trace of 20 calls."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(20):
            call()
    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as name:
        path = Path(name) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    launches = sum("LaunchKernel" in event.get("name", "") for event in events)
    return waits_of(events) if launches >= 20 * 10 else [f"the trace has {launches} launches only"]


def waits_of(events: list[dict[str, Any]]) -> list[str]:
    """The names of calls that waited for the device, and of copies from or to the host, before a trace's last launch.

    Of the threads that launch, as the system numbers them: NCCL's watchdog asks for its events whatever happens.
    """
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = [event for event in calls if "LaunchKernel" in event["name"]]
    last, threads = max(event["ts"] for event in launches), {event["tid"] for event in launches}
    waiting = [
        call
        for call in calls
        if call["tid"] in threads and any(word in call["name"] for word in ("Synchronize", "EventQuery"))
    ]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and "DtoD" not in event["name"]]
    return [event["name"] for event in waiting + copies if event["ts"] < last]


def experts_of(count: int, device: torch.device) -> Bf16Experts:
    module = Bf16Experts(num_experts=count, hidden_size=WIDTH, intermediate_size=INTERMEDIATE)
    generator = torch.Generator(device).manual_seed(2)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, device=device) * 0.02
        parameter.data = drawn.bfloat16()
        parameter.grad_dtype = torch.float32
    return module


def layer_times(clock: Clock, through: AnyTransport, batch: Batch, device: torch.device) -> dict[str, float]:
    """Forward and backward of the experts with their transport, gradients continued as in a later pass."""
    x_TD, indices_TK, weights_TK, dy_TD = batch
    module = experts_of(EXPERTS // through.ranks, device)
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = [module(x_TD, weights_TK, through.layout(indices_TK, EXPERTS, 0), through)]

    def backward() -> None:
        for y_TD in kept:
            y_TD.backward(dy_TD)
        kept.clear()

    return {"forward": clock(forward, backward), "backward": clock(backward, forward)}


def measure(repeats: int, tokens: int, kind: str, device: torch.device) -> dict[str, object]:
    """One row of the table."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    clock = Clock(repeats, device)
    sizes = Sizes(ranks=ranks, tokens=tokens, num_experts=EXPERTS, top_k=TOP_K, hidden_size=WIDTH, dtype=torch.bfloat16)
    group = dist.group.WORLD
    assert group is not None
    node = CudaNode(group=group, regions=regions(sizes), values=0, device=device, timeout_s=20)
    least = most_rows(ranks=ranks, tokens=tokens, num_experts=EXPERTS, top_k=TOP_K)
    arena = Arena(rows=least, width=INTERMEDIATE, sizes=sizes, rank=rank, device=device)
    several = CudaTransport(node=node, sizes=sizes, arena=arena)
    generator = torch.Generator(device).manual_seed(rank)
    x_TD, dy_TD = (torch.randn(tokens, WIDTH, generator=generator, device=device).bfloat16() for _ in range(2))
    weights_TK = torch.rand(tokens, TOP_K, generator=generator, device=device)
    batch = x_TD, routed(kind, tokens, 100 + rank, device), weights_TK, dy_TD
    row = {"tokens": tokens, "routing": kind, **exchange_times(clock, several, batch)}
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    row["layer"] = layer_times(clock, several, batch, device)
    row["layer_alone"] = layer_times(clock, LocalTransport(), batch, device)
    node.late.check()
    return row


def exchange_times(clock: Clock, several: CudaTransport, batch: Batch) -> dict[str, object]:
    """Ours, and NCCL's, which must bring the same rows."""
    x_TD, indices_TK, weights_TK, _ = batch
    rank, ranks = several.rank, several.ranks
    places = several.layout(indices_TK, EXPERTS, 0)
    received = several.dispatch(x_TD, weights_TK, places)
    rows_R = len(received.layout.token_R)
    y_RD = torch.randn(rows_R, WIDTH, generator=torch.Generator(x_TD.device).manual_seed(rank), device=x_TD.device)
    y_RD = y_RD.bfloat16()
    own_UD = torch.empty_like(received.x_UD)

    def send() -> None:
        dispatch(x_TD, places, several.table["rows_UD"], own_UD, rank, weights_TK, several.lists)
        several.meet("rows", 0)

    def all_three() -> None:
        now = several.layout(indices_TK, EXPERTS, 0)
        several.give_back(y_RD, several.dispatch(x_TD, weights_TK, now), now)

    payload = sent(several, indices_TK, places)
    ours = {
        "phase": clock(lambda: several.meet("nothing", 0)),
        "layout": clock(lambda: several.layout(indices_TK, EXPERTS, 0)),
        "send": clock(send),
        "dispatch": clock(lambda: several.dispatch(x_TD, weights_TK, places)),
        "return": clock(lambda: several.give_back(y_RD, received, places)),
        "all three": clock(all_three),
    }
    slots, peer = several.mine["returned_PD"], several.node.memory[(rank + 1) % ranks]["returned_PD"]
    copied = clock(lambda: peer.copy_(y_RD[: len(slots)]), lambda: several.meet("copy", 0))
    rates = {
        "dispatch": payload["dispatch"] / ours["send"] / 1e6,
        "return": payload["return"] / ours["return"] / 1e6,
        "copy": slots.numel() * 2 / copied / 1e6,
    }
    row: dict[str, object] = {"bytes": payload, "ours": ours, "GB/s": rates}
    row["host_waits"] = host_waits(all_three)
    torch.cuda.synchronize()
    several.node.late.check()
    found_PD = several.give_back(y_RD, received, places)[0][: indices_TK.numel()].clone()
    lean, pairs = Nccl(indices_TK, EXPERTS, ranks), NcclPairs(indices_TK, EXPERTS, ranks)
    x_UD, rows_RD = lean.dispatch(x_TD, weights_TK), pairs.dispatch(x_TD, weights_TK)
    y_RD = y_RD[: len(rows_RD)]
    token_R = received.layout.token_R[: len(rows_RD)].long()
    same = torch.equal(x_UD, received.x_UD[: len(x_UD)]) and torch.equal(rows_RD, received.x_UD[token_R])
    same &= torch.equal(lean.slots(y_RD), found_PD) and torch.equal(pairs.give_back(y_RD), found_PD)
    row["same_rows"] = same and torch.equal(lean.pair_R // TOP_K, token_R)
    sent_SD, came_PD = x_TD.new_empty(sum(lean.rows_there), WIDTH), torch.empty_like(found_PD)
    row["nccl_wire"] = {  # the two all-to-alls and nothing else
        "dispatch": clock(lambda: dist.all_to_all_single(x_UD, sent_SD, lean.rows_back, lean.rows_there)),
        "return": clock(lambda: dist.all_to_all_single(came_PD, y_RD, lean.pairs_there, lean.pairs_back)),
    }
    for name, peers in (("nccl", lean), ("nccl_pairs", pairs)):
        dispatched = clock(functools.partial(peers.dispatch, x_TD, weights_TK))
        row[name] = {"dispatch": dispatched, "return": clock(functools.partial(peers.give_back, y_RD))}
    return row


def measure_vdev(repeats: int, tokens: int, kind: str, device: torch.device) -> dict[str, object]:
    """The rows of dispatch, permuted and sent; the pairs' rows of return, sent."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    clock, local = Clock(repeats, device), EXPERTS // ranks
    indices_TK = routed(kind, tokens, 100 + rank, device)
    x_TD = torch.randn(tokens, WIDTH, device=device).bfloat16()
    owner_TK = indices_TK // local
    sent_TN = torch.zeros(tokens, ranks, dtype=torch.bool, device=device).scatter_(1, owner_TK, True)
    token_S = sent_TN.t().nonzero()[:, 1]
    there = Vdev(tokens * ranks, WIDTH, ranks, device)
    there.sent_N.copy_(sent_TN.sum(0))

    def forth() -> None:
        torch.index_select(x_TD, 0, token_S, out=there.rows[: len(token_S)])
        there.run()

    times = {"dispatch": clock(forth), "send": clock(there.run)}
    back = Vdev(tokens * TOP_K * 2, WIDTH, 1, device)
    back.sent_N, back.came_2N = there.sent_N, there.came_2N
    pairs_NN = torch.empty(ranks, ranks, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(pairs_NN, torch.bincount(owner_TK.view(-1), minlength=ranks)[None])
    back.sent_N.copy_(pairs_NN[:, rank])
    times["return"] = clock(back.run)
    return {"tokens": tokens, "routing": kind, "vdev": times}


def rows(repeats: int, vdev: bool) -> Iterator[Row]:
    """See the module; none on a rank that does not lead. Every rank of a launch calls it."""
    me = platform.process()
    device = torch.device("cuda", me.local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    if vdev:
        import torch.distributed._symmetric_memory as symm_mem

        if not symm_mem.is_nvshmem_available():
            raise fail("N0608", "this build of torch has no NVSHMEM, so all_to_all_vdev cannot be measured",
                       help="leave out --vdev")  # fmt: skip
        symm_mem.set_backend("NVSHMEM")
    one = measure_vdev if vdev else measure
    for tokens in TOKENS:
        for kind in ("balanced", "zipf"):
            found = one(repeats, tokens, kind, device)
            if me.rank == 0:
                yield from shown(found, f"T{tokens} D{WIDTH} E{EXPERTS} K{TOP_K} {kind}, {me.world_size} ranks")
    dist.destroy_process_group()


def shown(found: dict[str, Any], case: str) -> Iterator[Row]:
    """What `measure` or `measure_vdev` found: by who and part; `layer` and `layer_alone` are parts too."""
    notes = {}
    if "same_rows" in found:
        waits = found["host_waits"]
        bits = "the rows of NCCL" if found["same_rows"] else "OTHER ROWS than NCCL"
        notes["ours"] = f"{bits}; {f'host waits: {waits}' if waits else 'the host never waits'}"
    rates = found.get("GB/s", {})
    for who in ("ours", "nccl", "nccl_pairs", "nccl_wire", "vdev"):
        for part, spent in found.get(who, {}).items():
            rate = rates.get(part) if who == "ours" else None
            yield Row(work="rdep", case=case, part=part, who=who, milliseconds=spent, rate=rate,
                      unit="GB/s" if rate else "", note=notes.get(who, ""))  # fmt: skip
    if "copy" in rates:
        yield Row(work="rdep", case=case, part="return", who="copy", rate=rates["copy"], unit="GB/s")
    for name, who in (("layer", "ours"), ("layer_alone", "one GPU alone")):
        for part, spent in found.get(name, {}).items():
            yield Row(work="rdep", case=case, part=f"layer, {part}", who=who, milliseconds=spent)
