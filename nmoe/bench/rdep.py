"""A layer's routed experts on several CPU ranks, beside the same layer on each rank alone.

Where there are GPUs it is `nmoe.bench.rdep_cuda` instead.

`torchrun --standalone --nproc-per-node=2 -m nmoe bench rdep` times, in the same processes and turn by
turn, layout, dispatch, experts and return, forward and backward, at fixed tokens a rank:

    alone    every rank has all experts and its own tokens; nothing travels
    ours     each rank has its share of the experts, and rows travel over shared memory

Both do the same FLOPs for each rank, so their difference is what travelling and waiting cost. A call takes as
long as its slowest rank; each time is the least of `--repeats` calls. It needs a core for each rank that
nobody else uses. The note says whether outputs and the gradients of x and of the weights were bit for bit those
of the layer alone, on every rank. The floor is that layer's time.
"""

import json
import time
from collections.abc import Iterator

import torch

from nmoe import platform
from nmoe.bench.rows import Row
from nmoe.errors import ConfigError, Diagnostic
from nmoe.experts.fp32 import Fp32Experts
from nmoe.rdep.local import LocalTransport
from nmoe.rdep.memory import Sizes
from nmoe.rdep.node import Node
from nmoe.rdep.rendezvous import launch_store
from nmoe.rdep.shm import ShmTransport
from nmoe.rdep.transport import Transport

TIMEOUT_S = 60.0


def experts_of(count: int, first: int, hidden: int, width: int, total: int) -> Fp32Experts:
    """Experts `first` and following of `total`, the same for everybody who draws them."""
    module = Fp32Experts(num_experts=count, hidden_size=hidden, intermediate_size=width)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        drawn = torch.randn(total, *parameter.shape[1:], generator=generator) * 0.05
        parameter.data = drawn[first : first + count].clone()
    return module


def rows(*, tokens: int, hidden: int, width: int, experts: int, top_k: int, repeats: int) -> Iterator[Row]:
    """See the module; none on a rank that does not lead. Every rank of a launch calls it.

    ConfigError N0607 if there is one rank alone, or the experts cannot be shared evenly.
    """
    me = platform.process()
    if me.world_size == 1 or experts % me.world_size:
        raise ConfigError(
            Diagnostic(
                code="N0607",
                message=f"{experts} experts cannot be shared by {me.world_size} rank" + "s" * (me.world_size > 1),
                help="torchrun --standalone --nproc-per-node=2 -m nmoe bench rdep --experts 16",
            )
        )
    platform.require("cpu", threads=1)
    sizes = Sizes(
        ranks=me.world_size, tokens=tokens, num_experts=experts, top_k=top_k, hidden_size=hidden,
        dtype=torch.float32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1 + me.rank)
    x_TD = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    indices_TK = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    weights_TK = torch.rand(tokens, top_k, generator=generator).requires_grad_()
    dy_TD = torch.randn(tokens, hidden, generator=generator)
    share = experts // me.world_size

    def layer(transport: Transport, module: Fp32Experts) -> tuple[list[float], list[torch.Tensor]]:
        started = time.perf_counter()
        y_TD = module(x_TD, weights_TK, transport.layout(indices_TK, experts, 0), transport)
        between = time.perf_counter()
        gradients = torch.autograd.grad(y_TD, (x_TD, weights_TK), dy_TD)
        for parameter in module.parameters():
            parameter.grad = None
        return [between - started, time.perf_counter() - between], [y_TD.detach(), *gradients]

    store = launch_store(TIMEOUT_S)
    whole = experts_of(experts, 0, hidden, width, experts)
    part = experts_of(share, me.rank * share, hidden, width, experts)
    local = LocalTransport()
    times: dict[str, list[list[float]]] = {"alone": [], "ours": []}
    with Node(
        store=store, rank=me.rank, ranks=me.world_size, regions=sizes.regions(), sizes=str(sizes), timeout_s=TIMEOUT_S
    ) as node:
        shared = ShmTransport(node=node, sizes=sizes)
        for _ in range(repeats):
            alone, expected = layer(local, whole)
            shared.layout(indices_TK, experts, 0)  # nobody is ahead
            together, found = layer(shared, part)
            times["alone"].append(alone)
            times["ours"].append(together)
    same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    store.set(f"result/{me.rank}", json.dumps([same, times]))
    if me.rank:
        return
    results = [json.loads(store.get(f"result/{rank}")) for rank in range(me.world_size)]
    bits = "the bits of the layer alone" if all(same for same, _ in results) else "OTHER BITS than the layer alone"
    case = f"T{tokens} D{hidden} F{width} E{experts} K{top_k}, {me.world_size} ranks"
    for index, direction in enumerate(("forward", "backward")):
        slowest = {
            who: 1e3 * min(max(found[1][who][i][index] for found in results) for i in range(repeats)) for who in times
        }
        for who, spent in slowest.items():
            yield Row(
                work="rdep", case=case, part=direction, who=who, milliseconds=spent, floor=slowest["alone"],
                rate=(index + 1) * 6 * tokens * top_k * hidden * width / spent / 1e9, unit="TFLOP/s",
                note=f"a rank; {bits}" if who == "ours" else "a rank",
            )  # fmt: skip
