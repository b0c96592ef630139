"""The ordered sum of the ranks' gradients, beside sums that promise no order.

`torchrun --standalone --nproc-per-node=2 -m nmoe.bench.reduction` times, in the same processes and turn by turn, on
`--elements` float32 gradients that every CPU rank has:

    ordered       nmoe.optim.reduction: gradients into shared memory, each owner adds the ranks' parts in their order
                  (add), and everybody takes the new weights from their owners (share)
    all_reduce    gloo's, in an order of its own; everybody has the whole sum, and no weights need to travel
    scatter       gloo's reduce_scatter, and its all_gather for the weights

A call takes as long as its slowest rank; each time is the least of `--repeats` calls, in milliseconds. It needs a
core for each rank that nobody else uses. copy_ms: one process's copy of the gradients, for scale.
"""

import argparse
import json
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from nmoe import platform
from nmoe.optim.reduction import Reduction, regions
from nmoe.rdep.node import Node
from nmoe.rdep.nodes import Nodes
from nmoe.rdep.rendezvous import launch_store
from nmoe.sharding import Tensor, deal
from nmoe.slices import SLICE_BYTES

TIMEOUT_S = 60.0
ROW = 1024
SLICE = SLICE_BYTES // torch.float32.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 24, help="a multiple of 2^22 times the ranks")
    parser.add_argument("--repeats", type=int, default=20)
    a = parser.parse_args()
    me = platform.process()
    if a.elements < 1 or a.elements % (me.world_size * SLICE):
        parser.error(f"--elements {a.elements} is no multiple of {me.world_size} x {SLICE}, whole slices for each rank")
    platform.require("cpu", threads=1)
    shape = (a.elements // ROW, ROW)
    weight = torch.nn.Parameter(torch.zeros(shape))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(me.rank))
    tensor = Tensor(name="weight", shape=shape, rule="rows", state_dtype="float32")
    shares = deal([tensor], ranks=me.world_size, ranks_per_node=me.world_size)
    (mine,) = (share for share in shares if share.rank == me.rank)
    owned = torch.nn.Parameter(weight.detach().view(-1)[mine.start : mine.stop].view(mine.local_shape))
    whole, part = torch.empty_like(gradient), torch.empty(shape[0] // me.world_size, ROW)

    store = launch_store(TIMEOUT_S)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("gloo", store), rank=me.rank, world_size=me.world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    with Node(
        store=store, rank=me.rank, ranks=me.world_size, regions=regions(shares, 1), sizes=str(shape),
        timeout_s=TIMEOUT_S,
    ) as node:  # fmt: skip
        ranks = Reduction(
            nodes=Nodes(node=node), node=node, parameters={"weight": weight}, shares=shares, owned={"weight": owned},
            apart={},
        )  # fmt: skip

        def ordered() -> None:
            ranks.clear()
            ranks.open()
            weight.grad = gradient
            ranks.show()
            ranks.add()
            ranks.share()

        def all_reduce() -> None:
            whole.copy_(gradient)  # it adds in place
            dist.all_reduce(whole)

        def scatter() -> None:
            dist.reduce_scatter(part, list(gradient.chunk(me.world_size)))
            dist.all_gather(list(whole.chunk(me.world_size)), part)

        ways = {"ordered": ordered, "all_reduce": all_reduce, "scatter": scatter, "copy": lambda: whole.copy_(gradient)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(a.repeats):
            for name, way in ways.items():
                node.meet("values")
                started = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - started)
        store.set(f"result/{me.rank}", json.dumps(times))
        everybody = [json.loads(store.get(f"result/{rank}")) for rank in range(me.world_size)]
        node.meet("values")
    dist.destroy_process_group()
    if me.rank == 0:
        slowest = {name: [max(one[name][i] for one in everybody) for i in range(a.repeats)] for name in ways}
        found = {f"{name}_ms": round(min(values) * 1e3, 3) for name, values in slowest.items()}
        print(json.dumps({"ranks": me.world_size, **vars(a), **found}))


if __name__ == "__main__":
    main()
