"""Run by test_ranks_interpreted.py: the transport between GPUs, its node, and the layer over them, on the CPU.

Two processes, forked with their memory already shared, run the kernels in Triton's interpreter; the products, which
have no interpreter, are plain torch in float32. Each compares with one rank that takes all microbatches. Prints one
JSON object, name -> how many of the compared cases were wrong on either rank.
"""

import contextlib
import itertools
import json
import mmap
import os
import time
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

import nmoe.experts.hopper as hopper
import nmoe.kernels.moe as moe
import nmoe.rdep.cuda as cuda
import nmoe.rdep.cuda_node as cuda_node
from nmoe.errors import NmoeError
from nmoe.experts.grouped import Apart
from nmoe.kernels import signals
from nmoe.kernels.arena import MOST
from nmoe.kernels.layout import layout_reference
from nmoe.model.recompute import again
from nmoe.rdep.arena import Arena
from nmoe.rdep.memory import Sizes, offsets

torch.set_num_threads(1)
RANKS, TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K, LAYERS = 2, 10, 16, 8, 4, 2, 3
DEVICE = torch.device("cpu")
found: dict[str, int] = {}
order: list[str] = []  # of phases, of the streams' forks and joins, and of what runs beside


def wrong(name: str, is_right: bool) -> None:
    found[name] = found.get(name, 0) + (not is_right)


class Memory:
    """What `CudaMemory` gives, in memory that both processes have at the same addresses."""

    def __init__(self, regions, *, group, device) -> None:
        starts, size = offsets(regions)
        assert len(BLOCKS[0]) >= size
        every = [torch.frombuffer(block, dtype=torch.uint8, count=size) for block in BLOCKS]
        self.table = {name: torch.tensor([one.data_ptr() + at for one in every]) for name, at in starts.items()}
        self.ranks = [
            {
                name: one[starts[name] :][: dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)
                for name, (dtype, shape) in regions.items()
            }
            for one in every
        ]


def kept_rows(kept, layout) -> Tensor:
    """The layer's part of the two planes."""
    first = 0 if kept.first_row is None else int(kept.first_row)
    return kept.h_2AF[:, first : first + int(layout.offsets_E1[-1])]


def experts_forward(x_TD, layout, w_gate_up_E2FD, w_down_EDF, kept, table=None):
    """As the kernels', row by row, so that a row's bits do not depend on the others."""
    y_RD = torch.full((len(layout.token_R), x_TD.shape[1]), float("nan"))
    h_2RF = kept_rows(kept, layout)
    for e, (first, end) in enumerate(zip(layout.offsets_E1[:-1].tolist(), layout.offsets_E1[1:].tolist(), strict=True)):
        for r in range(first, end):
            x_D = x_TD[layout.token_R[r]]
            h_2RF[:, r] = w_gate_up_E2FD[e] @ x_D
            y_RD[r] = w_down_EDF[e] @ (torch.nn.functional.silu(h_2RF[0, r]) * h_2RF[1, r])
    return y_RD


def experts_of_rows(layout) -> list[int]:
    """The expert of each real row."""
    return torch.repeat_interleave(torch.arange(len(layout.offsets_E1) - 1), layout.offsets_E1.diff().long()).tolist()


def weight_gradient(first_RX, second_RY, layout, grad, continues) -> None:
    """As the kernels': of each segment the sum of its rows' outer products, added to the segments' before, or apart."""
    ends = layout.segments_S1.tolist()
    microbatches = (len(ends) - 1) // (len(layout.offsets_E1) - 1)
    for s, (first, end) in enumerate(itertools.pairwise(ends)):
        e, m = divmod(s, microbatches)
        value = torch.zeros(*first_RX.shape[1:], second_RY.shape[1])
        for r in range(first, end):
            value = value + first_RX[r][..., None] * second_RY[r]
        changes = first < end or (m == 0 and not continues)
        if grad.dim() > value.dim() + 1:
            grad[m, e] = value if changes else -0.0
        elif m == 0 and not continues:
            grad[e] = value
        elif changes:
            grad[e] += value


def down_backward(dout_TD, weight_TK, kept, w_down, layout, grad, continues, table=None):
    """As the kernels', row by row."""
    h_2RF, weight_R = kept_rows(kept, layout), weight_TK.view(-1)[layout.pair_R]
    rows = len(layout.token_R)
    dh_R2F, aw_RF, dot_NR = (torch.full(s, float("nan")) for s in ((rows, 2, WIDTH), (rows, WIDTH), (1, rows)))
    for r, e in enumerate(experts_of_rows(layout)):
        h_2F = h_2RF[:, r].clone().requires_grad_()
        with torch.enable_grad():
            a_F = torch.nn.functional.silu(h_2F[0]) * h_2F[1]
        d_F = dout_TD[layout.token_R[r]] @ w_down[e]
        dot_NR[0, r] = (d_F * a_F.detach()).sum()
        aw_RF[r] = weight_R[r] * a_F.detach()
        (dh_R2F[r],) = torch.autograd.grad(a_F, h_2F, weight_R[r] * d_F)
    if rows:
        weight_gradient(dout_TD[layout.token_R], aw_RF, layout, grad, continues)
    return dh_R2F.transpose(0, 1), dot_NR


def gate_up_gradient(x_TD, dh_2RF, layout, grad, continues, table=None, spared=0):
    order.append("dW_gate_up")
    weight_gradient(dh_2RF.transpose(0, 1), x_TD[layout.token_R], layout, grad, continues)


def input_gradient(dh_2RF, w_gate_up_E2FD, layout, table=None):
    dx_RD = torch.full((dh_2RF.shape[1], HIDDEN), float("nan"))
    for r, e in enumerate(experts_of_rows(layout)):
        dx_RD[r] = (dh_2RF[:, r, :, None] * w_gate_up_E2FD[e]).sum((0, 1))
    return dx_RD


@contextlib.contextmanager
def on_the_side(device):
    """There are no streams here: what is given to the side is done at once, and noted as the side's."""
    order.append("fork")
    yield lambda: order.append("join")
    order.append("main")


class Spoiled(cuda.CudaTransport):
    """Spoils what a phase makes free before it comes to it, so that whoever still reads it then is found out."""

    def meet(self, phase: str, layer: int, words: Tensor | None = None, boxes_N: Tensor | None = None) -> None:
        free = ("returned_PD", "d_weight_P")
        if phase in ("outputs", "input gradients"):
            free = ("rows_UD", "weight_UK")
        for name in free:
            self.mine[name].fill_(float("nan"))
        order.append(phase)
        super().meet(phase, layer, words, boxes_N)


def replaced() -> None:
    for module in (moe, hopper):
        for one in (experts_forward, down_backward, gate_up_gradient, input_gradient):
            setattr(module, one.__name__, one)
        module.require = lambda *tensors: None
    cuda.on_the_side = on_the_side
    cuda_node.CudaMemory = Memory
    signals.now = time.monotonic_ns
    torch.Tensor.pin_memory = lambda self: self
    torch.cuda.synchronize = lambda device=None: None


class Alone:
    """One rank's transport with the kernels' layout."""

    ranks, arena = 1, None

    def layout(self, indices_TK: Tensor, num_experts: int, layer: int):
        return layout_reference(indices_TK, num_experts)


def batch(microbatch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(microbatch)
    tokens = 0 if microbatch == 1 else TOKENS  # one of them is empty
    score_TE = torch.rand(tokens, EXPERTS, generator=generator)
    if microbatch == 2:
        score_TE[:, :2] += 1
    x_TD, dy_TD = (torch.randn(tokens, HIDDEN, generator=generator) for _ in range(2))
    return x_TD, score_TE.topk(TOP_K, dim=1).indices, torch.rand(tokens, TOP_K, generator=generator), dy_TD


def matrices(first: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(77)
    whole = [torch.randn(EXPERTS, *s, generator=generator) for s in ((2, WIDTH, HIDDEN), (HIDDEN, WIDTH))]
    return [w[first : first + count].clone().requires_grad_() for w in whole]


def step(transport, weights: list[Tensor], one: tuple[Tensor, ...], apart=None) -> list[Tensor]:
    x_TD, indices_TK, weights_TK, dy_TD = one
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    places = transport.layout(indices_TK, EXPERTS, 1)
    y_TD = hopper.HopperSwiglu.apply(x_TD, weights_TK, *weights, places, transport, apart, None, None, None)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, (x_TD, weights_TK), dy_TD)]


def sums(transport, rank: int, batches: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Gradients that are kept apart, added in order as their owner does."""
    ranks, local = transport.ranks, EXPERTS // transport.ranks
    weights = matrices(rank * local, local)
    apart = tuple(Apart(weight, ranks) for weight in weights)
    totals = [torch.full(weight.shape, float("nan")) for weight in weights]
    for j in range(len(batches) // ranks):
        for one in apart:
            one.begins = j == 0
        step(transport, weights, batches[j * ranks + rank], apart)
        for total, one in zip(totals, apart, strict=True):
            for m, part in enumerate(one.parts_M):
                total.copy_(part) if j == m == 0 else total.add_(part)
    wrong("layer.apart", all(weight.grad is None for weight in weights))
    return totals


def layers_in_an_arena(several: Spoiled, rank: int) -> None:
    """A microbatch of more layers than fit at one of the ranks: both know, and alone each layer gives its bits."""
    arena = several.arena
    (_, indices_TK, _, _), batches = batch(2), [batch(4 + m) for m in range(RANKS)]  # all for the first two experts

    def run(through, microbatches: list[int], first: int, count: int, alone: bool = False) -> list[list[Tensor]]:
        drawn = [w.detach() for w in matrices(first, count)]
        layers = [[(w * (1 + layer)).requires_grad_() for w in drawn] for layer in range(LAYERS)]
        results = []
        for x_TD, _, weights_TK, dy_TD in (batches[m] for m in microbatches):
            y_TD = x_TD = x_TD.clone().requires_grad_()
            for layer, weights in enumerate(layers):
                places = through.layout(indices_TK, EXPERTS, layer)
                inputs = y_TD, weights_TK, *weights, places, through, None, None, None, None
                routed = hopper.HopperSwiglu.apply
                y_TD = y_TD + (again(routed, *inputs) if alone else routed(*inputs))
            results.append([y_TD.detach(), *torch.autograd.grad(y_TD, x_TD, dy_TD)])
        return [*results, [weight.grad for weights in layers for weight in weights]]

    part = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
    want = run(Alone(), list(range(RANKS)), 0, EXPERTS)
    arena.clear()
    got = run(several, [rank], part.start, EXPERTS // RANKS)
    needed = LAYERS * RANKS * TOKENS * TOP_K
    wrong("arena.needed", arena.state_3N[MOST].tolist() == [needed, 0] and needed > arena.rows)
    wrong("arena.forward", torch.equal(got[0][0], want[rank][0]))
    wrong("arena.overwritten", not torch.equal(got[0][1], want[rank][1]))
    arena.clear()
    with arena.each_layer_alone():
        got = run(several, [rank], part.start, EXPERTS // RANKS, alone=True)
    wrong("arena.needed", arena.needed() == (needed if rank == 0 else 0))
    wrong("arena.alone", all(torch.equal(a, b) for a, b in zip(got[0], want[rank], strict=True)))
    wrong("arena.matrices", all(torch.equal(a, b[part]) for a, b in zip(got[1], want[-1], strict=True)))


def be(rank: int) -> None:
    group = SimpleNamespace(rank=lambda: rank, size=lambda: RANKS)
    regions = {**cuda.regions(SIZES), "gradients_P": (torch.float32, (100,))}
    node = cuda_node.CudaNode(group=group, regions=regions, values=64, device=DEVICE, timeout_s=60)
    with node:
        rows = 2 * RANKS * TOKENS * TOP_K  # two of the layers below, whatever their routing
        arena = Arena(rows=rows, width=WIDTH, sizes=SIZES, rank=rank, device=DEVICE)
        several = Spoiled(node=node, sizes=SIZES, arena=arena)
        mine, alone = matrices(rank * EXPERTS // RANKS, EXPERTS // RANKS), matrices(0, EXPERTS)
        batches = [batch(m) for m in range(2 * RANKS)]
        wanted = [step(Alone(), alone, one) if len(one[0]) else None for one in batches]
        for j in range(2):
            got = step(several, mine, batches[j * RANKS + rank])
            for name, a, b in zip(("y", "dx", "dw"), got, wanted[j * RANKS + rank] or got, strict=True):
                wrong(f"layer.{name}", torch.equal(a, b) and not a.isnan().any())
        forward, beside = ["counts", "rows", "outputs"], ["fork", "input gradients", "main", "dW_gate_up", "join"]
        wrong("layer.order", order[-2 * 9 :] == [*forward, "output gradients", *beside] * 2)
        part = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        for a, b in zip(mine, alone, strict=True):
            wrong("layer.matrices", torch.equal(a.grad, b.grad[part]))
        found_apart = sums(several, rank, batches)
        wrong("layer.apart", all(torch.equal(a, b.grad[part]) for a, b in zip(found_apart, alone, strict=True)))
        if rank == 0:
            alike = [one for one in batches if len(one[0])]
            found_alone = sums(Alone(), 0, alike)
            wrong("layer.apart", all(torch.equal(a, b.grad) for a, b in zip(found_alone, alone, strict=True)))
        layers_in_an_arena(several, rank)

        buffers = [memory["gradients_P"] for memory in node.memory]
        for turn in range(3):
            buffers[rank].fill_(1.0 + rank + turn)
            node.meet("gradients")
            total_P = sum(buffers[n] for n in range(RANKS))
            wrong("node.peers", bool((total_P == sum(1.0 + n + turn for n in range(RANKS))).all()))
            node.meet("read")
            for dtype in (torch.float32, torch.float64):
                got = node.gather(torch.arange(3).to(dtype) + rank * 10 + turn)
                wrong("node.gather", got.tolist() == [[n * 10 + turn + i for i in range(3)] for n in range(RANKS)])
    phases = 4 * 5 + 5 * LAYERS + 7 * LAYERS  # what is computed again sends its rows and outputs again
    wrong("node.phase", node.phase == int(node.counter) == phases + 3 * 4 + 1)
    late = node.late
    late.timeout_s = 0.2
    if rank == 0:  # the other has gone
        node.meet("alone")
        try:
            late.check()
        except NmoeError as error:
            text = error.render()
            wrong("late.text", all(w in text for w in ("N0803", "rank 1 did not come", "`alone` of layer 0", "0.2 s")))
            wrong("late.verdict", int(late.verdict) == 1)


SIZES = Sizes(ranks=RANKS, tokens=TOKENS, num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, dtype=torch.float32)
replaced()
BLOCKS = [mmap.mmap(-1, 1 << 16) for _ in range(RANKS)]
read, write = os.pipe()
if os.fork() == 0:
    try:
        be(1)
        os.write(write, json.dumps(found).encode())
    finally:
        os._exit(0)
be(0)
os.wait()
for name, count in json.loads(os.read(read, 1 << 16)).items():
    found[name] += count
print(json.dumps(found))
