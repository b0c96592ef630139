"""What a rank does in test_cuda_gpu.py: `torchrun --standalone --nproc-per-node=N cuda_work.py WORK`.

Rank 0 prints one JSON object. Every tensor is a function of the microbatch's number and the seed, never of the rank,
so each rank computes what one rank alone gets for all of them, and compares its own part.
"""

import json
import os
import sys
import time

import torch
from torch import Tensor

from nmoe.errors import NmoeError
from nmoe.experts.bf16 import Bf16Experts
from nmoe.kernels.arena import MOST
from nmoe.kernels.layout_ranks import most_rows
from nmoe.model.mlp import DenseMlp
from nmoe.model.moe import MoE
from nmoe.model.router import SoftmaxRouter
from nmoe.rdep.arena import Arena
from nmoe.rdep.cuda import CudaTransport, regions
from nmoe.rdep.cuda_node import CudaNode
from nmoe.rdep.local import LocalTransport
from nmoe.rdep.memory import Regions, Sizes
from nmoe.rdep.transport import Transport

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
SHAPES = {  # tokens, hidden, width, experts, top_k
    "small": (256, 256, 128, 16, 4),
    "odd": (333, 264, 136, 12, 3),
    "one": (128, 128, 128, 2, 1),
    "every": (100, 128, 64, 8, 8),
    "super256": (4096, 768, 384, 256, 7),
    "qwen30b": (4096, 2048, 768, 128, 8),
}
ROUTINGS = ("uniform", "zipf", "one rank", "none to one", "own", "single")


def group() -> torch.distributed.ProcessGroup:
    return torch.distributed.group.WORLD


def node_of(regions: Regions, timeout_s: float = 20, values: int = 0) -> CudaNode:
    return CudaNode(group=group(), regions=regions, values=values, device=DEVICE, timeout_s=timeout_s)


def transport(shape: str, timeout_s: float = 20, kind: type = CudaTransport, layers: int = 1) -> CudaTransport:
    """layers: that the arena has room for, whatever their routing."""
    tokens, hidden, width, experts, top_k = SHAPES[shape]
    sizes = Sizes(
        ranks=RANKS, tokens=tokens, num_experts=experts, top_k=top_k, hidden_size=hidden, dtype=torch.bfloat16
    )
    rows = layers * most_rows(ranks=RANKS, tokens=tokens, num_experts=experts, top_k=top_k)
    arena = Arena(rows=rows, width=width, sizes=sizes, rank=RANK, device=DEVICE)
    arena.h_2AF.fill_(float("nan"))
    return kind(node=node_of(regions(sizes), timeout_s), sizes=sizes, arena=arena)


def routed(kind: str, shape: str, microbatch: int, tokens: int) -> Tensor:
    """(T, K) int64, a token's experts, all different."""
    _, _, _, experts, top_k = SHAPES[shape]
    local = experts // RANKS
    generator = torch.Generator(DEVICE).manual_seed(100 + microbatch)
    score_TE = torch.rand(tokens, experts, generator=generator, device=DEVICE)
    if kind == "zipf":
        score_TE = score_TE.log() * torch.arange(1.0, experts + 1, device=DEVICE)
    elif kind == "one rank":
        score_TE[:, local:] -= 1
    elif kind == "none to one":
        score_TE[:, :local] -= 1
    elif kind == "own":
        own = microbatch % RANKS * local
        score_TE[:, own : own + local] += 1
    elif kind == "single":
        score_TE += torch.linspace(9, 0, experts, device=DEVICE)
    return score_TE.topk(top_k, dim=1).indices


def inputs(kind: str, shape: str, microbatch: int, tokens: int | None = None) -> tuple[Tensor, ...]:
    """x, indices, weights, dy of a microbatch."""
    most, hidden, _, _, top_k = SHAPES[shape]
    tokens = most if tokens is None else tokens
    generator = torch.Generator(DEVICE).manual_seed(microbatch)
    x_TD, dy_TD = (torch.randn(tokens, hidden, generator=generator, device=DEVICE).bfloat16() for _ in range(2))
    weights_TK = torch.rand(tokens, top_k, generator=generator, device=DEVICE)
    return x_TD, routed(kind, shape, microbatch, tokens), weights_TK, dy_TD


def experts_of(shape: str, first: int, count: int) -> Bf16Experts:
    _, hidden, width, experts, _ = SHAPES[shape]
    module = Bf16Experts(num_experts=count, hidden_size=hidden, intermediate_size=width)
    generator = torch.Generator(DEVICE).manual_seed(5)
    for parameter in module.parameters():
        drawn = torch.randn(experts, *parameter.shape[1:], generator=generator, device=DEVICE) * 0.05
        parameter.data = drawn[first : first + count].bfloat16()
        parameter.grad_dtype = torch.float32
    return module


def layer(module: Bf16Experts, through: Transport, batch: tuple[Tensor, ...], experts: int, index: int = 0):
    """y and what backward then gives for x and the weights."""
    x_TD, indices_TK, weights_TK, dy_TD = batch
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    y_TD = module(x_TD, weights_TK, through.layout(indices_TK, experts, index), through)
    return y_TD, (x_TD, weights_TK), dy_TD


def finish(y_TD: Tensor, leaves: tuple[Tensor, Tensor], dy_TD: Tensor) -> list[Tensor]:
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, dy_TD)]


def equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(got, want, strict=True))


def everybody(value: bool) -> bool:
    """Whether it holds on every rank."""
    flag = torch.tensor([value], dtype=torch.int32, device=DEVICE)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


def bits() -> dict[str, object]:
    """Two passes of N microbatches: outputs, gradients, and the experts' chained gradients, for one rank and N."""
    rows = []
    for shape, (most, _, _, experts, _) in SHAPES.items():
        several, local = transport(shape), experts // RANKS
        for kind in ROUTINGS if shape in ("small", "super256") else ("uniform", "zipf"):
            sizes = [most] * (2 * RANKS)
            if shape == "odd":
                sizes[1], sizes[-1] = 0, 7  # an empty microbatch, and a short one
            batches = [inputs(kind, shape, m, t) for m, t in enumerate(sizes)]
            alone, wanted = experts_of(shape, 0, experts), []
            for batch in batches:
                wanted.append(finish(*layer(alone, LocalTransport(), batch, experts)) if len(batch[0]) else None)
            mine = slice(RANK * local, (RANK + 1) * local)
            runs = []
            for _ in range(2):
                part, found = experts_of(shape, mine.start, local), []
                for j in range(2):
                    found.append(finish(*layer(part, several, batches[j * RANKS + RANK], experts)))
                runs.append([*found, [p.grad for p in part.parameters()]])
            several.node.late.check()
            own = [wanted[j * RANKS + RANK] for j in range(2)]
            row = {"shape": shape, "routing": kind}
            row["same"] = everybody(all(w is None or equal(g, w) for g, w in zip(runs[0], own, strict=False)))
            row["same_matrices"] = everybody(equal(runs[0][2], [p.grad[mine] for p in alone.parameters()]))
            row["again"] = everybody(all(equal(a, b) for a, b in zip(*runs, strict=True)))
            rows.append(row)
            if RANK == 0:
                print(row, file=sys.stderr, flush=True)
    return {"rows": rows}


class Drilled(CudaTransport):
    """Sleeps at random before every publication, and spoils every buffer that is free."""

    drill = torch.Generator().manual_seed(RANK)

    def meet(self, phase: str, layer: int, words: Tensor | None = None, boxes_N: Tensor | None = None) -> None:
        mine, nan = self.mine, float("nan")
        if phase in ("outputs", "input gradients"):
            for name, value in (("rows_UD", nan), ("row_UK", -1), ("weight_UK", nan), ("token_U", 0)):
                mine[name].fill_(value)
        else:
            for name in ("returned_PD", "d_weight_P"):
                mine[name].fill_(nan)
        if torch.rand((), generator=self.drill) < 0.5:
            torch.cuda._sleep(int(torch.randint(200_000, (), generator=self.drill)))
        super().meet(phase, layer, words, boxes_N)


def race() -> dict[str, object]:
    """125 times eight layers forward and then backward, each with what it must give."""
    shape = "small"
    experts = SHAPES[shape][3]
    several, local = transport(shape, kind=Drilled, layers=8), experts // RANKS
    alone, part = experts_of(shape, 0, experts), experts_of(shape, RANK * local, local)
    batches = [inputs(kind, shape, n * RANKS + RANK) for n, kind in enumerate((*ROUTINGS, "uniform", "zipf"))]
    wanted = [finish(*layer(alone, LocalTransport(), batch, experts)) for batch in batches]
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    layers = 0
    for _ in range(125):
        ran = [layer(part, several, batch, experts, n) for n, batch in enumerate(batches)]
        for one, want in zip(reversed(ran), reversed(wanted), strict=True):
            for got, expected in zip(finish(*one), want, strict=True):
                wrong += (got != expected).sum()
            layers += 1
        for parameter in part.parameters():
            parameter.grad = None
    torch.cuda.synchronize()
    several.node.late.check()
    return {"layers": layers, "ok": everybody(int(wrong) == 0)}


def absent() -> dict[str, object]:
    """Rank 1 does not come to its second layout; the others say so, once, and never wait again."""
    several = transport("small", timeout_s=4)
    late = several.node.late
    batch = inputs("uniform", "small", RANK)
    several.layout(batch[1], SHAPES["small"][3], 4)
    torch.cuda.synchronize()
    late.check()
    result: dict[str, object] = {}
    if RANK == 0:
        for index in (5, 6):
            started = time.monotonic()
            module = experts_of("small", 0, SHAPES["small"][3] // RANKS)
            finish(*layer(module, several, batch, SHAPES["small"][3], index))
            torch.cuda.synchronize()
            result[f"seconds {index}"] = time.monotonic() - started
        result["verdict"] = int(late.verdict)
        try:
            late.check()
        except NmoeError as error:
            result["text"] = error.render()
    torch.distributed.barrier()
    return result


def node() -> dict[str, object]:
    """Gradients read where they lie and added in order, 100 times; and gatherings of 4 and 8 bytes."""
    size = 1 << 20
    shared = node_of({"gradients_P": (torch.float32, (size,))}, values=4096)
    buffers = [memory["gradients_P"] for memory in shared.memory]
    ok = torch.ones((), dtype=torch.bool, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    parts = [torch.randn(size, generator=generator, device=DEVICE) for rank in range(RANKS)]
    for turn in range(100):
        buffers[RANK].copy_(parts[RANK] * (1 + turn))
        torch.cuda._sleep(100_000 * (turn % (RANK + 2)))
        shared.meet("gradients")
        total = torch.zeros(size, device=DEVICE)
        for rank in range(RANKS):
            total.add_(buffers[rank])
        shared.meet("gradients read")
        buffers[RANK].fill_(float("nan"))
        wanted = torch.zeros(size, device=DEVICE)
        for part in parts:
            wanted.add_(part * (1 + turn))
        ok &= (total == wanted).all()
        for dtype in (torch.float32, torch.float64, torch.int64):
            mine = torch.arange(5, device=DEVICE).to(dtype) + RANK + turn
            ok &= (shared.gather(mine) == torch.stack([mine - RANK + rank for rank in range(RANKS)])).all()
    shared.late.check()
    return {"ok": everybody(bool(ok))}


def model() -> dict[str, object]:
    """A whole MoE layer with shared experts beside the routed ones; then again under a guard against host waits."""
    shape = "super256"
    _, hidden, width, experts, top_k = SHAPES[shape]
    x_TD, _, _, dy_TD = inputs("uniform", shape, RANK)
    found = []
    through: Transport
    several = transport(shape)
    for through in (LocalTransport(), several):  # type: ignore[assignment]
        local = experts // through.ranks
        torch.manual_seed(3)
        with torch.device(DEVICE):
            router = SoftmaxRouter(hidden_size=hidden, num_experts=experts, top_k=top_k, renormalize=True)
            shared = DenseMlp(hidden_size=hidden, intermediate_size=2 * width)
        for parameter in [*router.parameters(), *shared.parameters()]:
            parameter.data = (torch.randn(parameter.shape, device=DEVICE) * 0.05).bfloat16()
            parameter.grad_dtype = torch.float32
        own = experts_of(shape, RANK * local if through.ranks > 1 else 0, local)
        moe = MoE(router=router, experts=own, shared=shared, transport=through, layer=0).eval()

        def step(moe: MoE = moe, recompute: bool = False) -> list[Tensor]:
            leaf = x_TD.clone().requires_grad_()
            y_TD = moe(leaf, dy_TD, recompute=recompute)  # any other rows as the stream
            y_TD.backward(dy_TD)
            rest = [p.grad.clone() for n, p in moe.named_parameters() if not n.startswith("experts.")]
            for parameter in moe.parameters():
                parameter.grad = None
            return [y_TD.detach(), leaf.grad, *rest]

        found.append(step())
        found.append(step(recompute=True))
        if through.arena is not None:
            with through.arena.each_layer_alone():
                found.append(step())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("default")
    several.node.late.check()
    return {"ok": everybody(all(equal(found[0], other) for other in found[1:]))}


def arena() -> dict[str, object]:
    """Eight layers in an arena of any number of them: as one GPU's if they fit or are alone; if not, all ranks know."""
    shape, fits, alone_fits, verdicts = "odd", True, True, True
    experts = SHAPES[shape][3]
    local = experts // RANKS
    alone, part = experts_of(shape, 0, experts), experts_of(shape, RANK * local, local)
    batches = [inputs(kind, shape, n * RANKS + RANK) for n, kind in enumerate((*ROUTINGS, "uniform", "zipf"))]
    wanted = [finish(*layer(alone, LocalTransport(), batch, experts)) for batch in batches]
    needed: list[int] = []
    for layers in (8, 1, 3, 8):
        several = transport(shape, layers=layers)

        def pass_of_all(several: CudaTransport = several) -> bool:
            several.arena.clear()
            ran = [layer(part, several, batch, experts, n) for n, batch in enumerate(batches)]
            got = [finish(*one) for one in reversed(ran)][::-1]
            return all(equal(one, want) for one, want in zip(got, wanted, strict=True))

        right = pass_of_all()
        needs = several.arena.state_3N[MOST].tolist()
        needed = needed or needs
        fit = max(needs) <= several.arena.rows
        verdicts &= needs == needed and fit == (layers == 8)
        fits &= everybody(right) == fit
        with several.arena.each_layer_alone():
            for n, (batch, want) in enumerate(zip(batches, wanted, strict=True)):
                alone_fits &= equal(finish(*layer(part, several, batch, experts, n)), want)
    return {"fits": everybody(fits), "alone": everybody(alone_fits), "verdicts": everybody(verdicts)}


WORK = {work.__name__: work for work in (bits, race, absent, node, model, arena)}


def main() -> None:
    torch.cuda.set_device(DEVICE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.distributed.init_process_group("nccl", device_id=DEVICE)
    result = WORK[sys.argv[1]]()
    if RANK == 0:
        print(json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
