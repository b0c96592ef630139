"""A layer's routed experts on several CPU ranks, beside the same layer on each rank alone.

Where there are GPUs it is `nmoe.bench.rdep_cuda` instead, unless --cpu says otherwise.

`torchrun --standalone --nproc-per-node=2 -m nmoe.bench.rdep` times, in the same processes and turn by
turn, layout, dispatch, experts and return, forward and backward, at fixed tokens a rank:

    local    every rank has all experts and its own tokens; nothing travels
    ranks    each rank has its share of the experts, and rows travel over shared memory

Both do the same FLOPs for each rank, so their difference is what travelling and waiting cost. A call takes as
long as its slowest rank; each time is the least of `--repeats` calls. It needs a core for each rank that
nobody else uses. `same_bits`: whether outputs and the gradients of x and of the weights were those of the
local layer, on every rank. `bytes`: of one rank's shared memory.
"""

import argparse
import json
import sys
import time

import torch

from nmoe import platform
from nmoe.experts.fp32 import Fp32Experts
from nmoe.rdep.local import LocalTransport
from nmoe.rdep.memory import Sizes, offsets
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 2048), ("hidden", 256), ("width", 256), ("experts", 16), ("top-k", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cpu", action="store_true", help="the CPU ranks, also where there are GPUs")
    a = parser.parse_args()
    me = platform.process()
    platform.require("cpu", threads=1)
    sizes = Sizes(
        ranks=me.world_size, tokens=a.tokens, num_experts=a.experts, top_k=a.top_k, hidden_size=a.hidden,
        dtype=torch.float32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1 + me.rank)
    x_TD = torch.randn(a.tokens, a.hidden, generator=generator).requires_grad_()
    indices_TK = torch.rand(a.tokens, a.experts, generator=generator).topk(a.top_k, dim=1).indices
    weights_TK = torch.rand(a.tokens, a.top_k, generator=generator).requires_grad_()
    dy_TD = torch.randn(a.tokens, a.hidden, generator=generator)
    share = a.experts // me.world_size

    def layer(transport: Transport, module: Fp32Experts) -> tuple[list[float], list[torch.Tensor]]:
        started = time.perf_counter()
        y_TD = module(x_TD, weights_TK, transport.layout(indices_TK, a.experts, 0), transport)
        between = time.perf_counter()
        gradients = torch.autograd.grad(y_TD, (x_TD, weights_TK), dy_TD)
        for parameter in module.parameters():
            parameter.grad = None
        return [between - started, time.perf_counter() - between], [y_TD.detach(), *gradients]

    store = launch_store(TIMEOUT_S)
    whole = experts_of(a.experts, 0, a.hidden, a.width, a.experts)
    part = experts_of(share, me.rank * share, a.hidden, a.width, a.experts)
    local = LocalTransport()
    times: dict[str, list[list[float]]] = {"local": [], "ranks": []}
    with Node(
        store=store, rank=me.rank, ranks=me.world_size, regions=sizes.regions(), sizes=str(sizes), timeout_s=TIMEOUT_S
    ) as node:
        shared = ShmTransport(node=node, sizes=sizes)
        for _ in range(a.repeats):
            alone, expected = layer(local, whole)
            shared.layout(indices_TK, a.experts, 0)  # nobody is ahead
            together, found = layer(shared, part)
            times["local"].append(alone)
            times["ranks"].append(together)
    same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    store.set(f"result/{me.rank}", json.dumps([same, times]))
    if me.rank == 0:
        results = [json.loads(store.get(f"result/{rank}")) for rank in range(me.world_size)]
        answer: dict[str, object] = {"ranks": me.world_size, "bytes": offsets(sizes.regions())[1]}
        answer["same_bits"] = all(same for same, _ in results)
        for name in times:
            for index, what in enumerate(("forward", "backward")):
                slowest = [max(r[1][name][i][index] for r in results) for i in range(a.repeats)]
                answer[f"{name}_{what}_ms"] = round(min(slowest) * 1e3, 3)
        print(json.dumps({**vars(a), **answer}))


if __name__ == "__main__":
    if "--cpu" in sys.argv or not torch.cuda.is_available():
        main()
    else:
        from nmoe.bench import rdep_cuda

        rdep_cuda.main(sys.argv[1:])
