"""What a rank does in the tests of sums over ranks: some steps of a `Reduction` over parameters of several shapes."""

import hashlib

import torch

from nmoe.optim import reduction
from nmoe.rdep.node import Node
from nmoe.rdep.nodes import Nodes
from nmoe.sharding import Share, Tensor, deal
from tests.rdep.work import Planned as Planned  # the server of ranks asks for these here
from tests.rdep.work import store as store

SHAPES = {"table": (23, 12), "matrix": (8, 20), "gain": (12,), "square": (6, 6), "wide": (4, 30), "scale": (1,)}
MATRICES = ("matrix", "square")
STEPS = 3


def shares(ranks: int) -> list[Share]:
    rules = {name: "tensors" if name in MATRICES else "rows" for name in SHAPES}
    tensors = [Tensor(name=n, shape=s, rule=rules[n], state_dtype="float32") for n, s in SHAPES.items()]
    return deal(tensors, ranks=ranks, ranks_per_node=ranks)


def part(name: str, microbatch: int, step: int) -> torch.Tensor:
    """A microbatch's gradient: over twelve decades, and the second undoes the first, the fourth most of the third."""
    draw = torch.Generator().manual_seed(1000 * step + 10 * (microbatch - microbatch % 2) + len(name))
    shape = SHAPES[name]
    value = torch.randn(shape, generator=draw) * 10.0 ** torch.randint(-6, 7, shape, generator=draw)
    if microbatch % 2:
        value = -value * (1.0 if microbatch % 4 == 1 else 1.0 + 2**-20)
    return value


def updated(sum_Q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What an owner makes of its weights."""
    return (sum_Q.sign() * sum_Q.abs().pow(0.25)).to(dtype)


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:20]


def reducing(*, rank, ranks, store, microbatches, dtype):
    """Of each step: the sums of this rank's shares, the weights that it then has, and what everybody gathered."""
    dealt, kind = shares(ranks), getattr(torch, dtype)
    parameters = {name: torch.nn.Parameter(torch.zeros(shape, dtype=kind)) for name, shape in SHAPES.items()}
    for parameter in parameters.values():
        parameter.grad_dtype = torch.float32
    owned = {}
    for share in (share for share in dealt if share.rank == rank):
        whole = parameters[share.name].detach().view(-1)
        owned[share.name] = torch.nn.Parameter(whole[share.start : share.stop].view(share.local_shape))
        owned[share.name].grad_dtype = torch.float32
    found = {}
    with Node(
        store=store, rank=rank, ranks=ranks, regions=reduction.regions(dealt, 9), sizes="a test's", timeout_s=100.0
    ) as node:
        sums = reduction.Reduction(
            nodes=Nodes(node=node), node=node, parameters=parameters, shares=dealt, owned=owned, apart={}
        )
        for step in range(STEPS):
            sums.clear()
            for microbatch in range(rank, microbatches, ranks):
                sums.open()
                for name, parameter in parameters.items():
                    parameter.grad = part(name, microbatch, step)
                sums.show()
                sums.add()
                assert all(parameter.grad is None for parameter in parameters.values())
            sums.deliver()
            for share in (share for share in dealt if share.rank == rank):
                mine = owned[share.name]
                found[f"{step} sum {share.name} {share.start} {share.stop}"] = digest(mine.grad)
                mine.data.copy_(updated(mine.grad, kind))
            sums.share()
            for name, parameter in parameters.items():
                found[f"{step} weights {name} of {rank}"] = digest(parameter)
            told = sums.gather(torch.arange(1.0 + rank, dtype=torch.float64) + 100 * step)
            found[f"{step} gathered by {rank}"] = [vector.tolist() for vector in told]
    return found


WORK = {"reducing": reducing}
