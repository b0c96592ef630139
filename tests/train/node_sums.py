"""A reduction alone, by the ranks of several "nodes" on this machine, and the chain that it has to be."""

import torch

from nmoe.experts.grouped import Apart, chunks
from nmoe.graph import shards
from nmoe.optim import reduction
from nmoe.optim.reduction import Reduction
from nmoe.rdep.control import Control
from nmoe.rdep.node import Node
from nmoe.rdep.nodes import Nodes
from nmoe.sharding import Tensor, deal

TIMEOUT_S = 60.0  # where nobody is to be waited for in vain
EXPERTS = 6
EXPERT = Tensor(name="layers.0.experts.w_EDF", shape=(EXPERTS, 3, 4), rule="experts", state_dtype="float32")
DENSE = [
    Tensor(name="table", shape=(40, 3), rule="rows", state_dtype="float32"),
    Tensor(name="matrix", shape=(5, 7), rule="tensors", state_dtype="float32"),
    Tensor(name="other", shape=(6, 4), rule="tensors", state_dtype="float32"),
    Tensor(name="scale", shape=(11,), rule="rows", state_dtype="float32"),
]


def drawn(shape, *numbers):
    """Values over nine decades."""
    draw = torch.Generator().manual_seed(hash(numbers) % 2**62)
    return torch.randn(shape, generator=draw) * 10.0 ** torch.randint(-4, 5, shape, generator=draw)


def dense(tensor, microbatch):
    """The gradient of a microbatch; those of 0 and 1 are large, and cancel."""
    size = {0: 1e3, 1: -1e3}.get(microbatch, 1.0)
    return size * drawn(tensor.shape, 1, DENSE.index(tensor), max(microbatch, 1))


def segment(expert, microbatch):
    """a, b of the rows of an expert and a microbatch, whose gradient is a^T b.

    Of experts 0 and 1, which have rows in one microbatch only, every product vanishes: their gradient is -0. Of the
    others some segments are empty, and microbatches 0 and 1 cancel.
    """
    if expert < 2:
        rows = int(microbatch == expert)
        return torch.full((rows, 3), 1e-30), torch.full((rows, 4), -1e-30)
    same = max(microbatch, 1)
    rows = (5 * expert + 3 * same) % 4
    a_RM, b_RN = drawn((rows, 3), 2, expert, same), drawn((rows, 4), 3, expert, same)
    return a_RM, -b_RN if microbatch == 1 else b_RN


def chain(order):
    """All gradients as one rank adds them, microbatch after microbatch."""
    found = {}
    for tensor in DENSE:
        found[tensor.name] = dense(tensor, order[0])
        for microbatch in order[1:]:
            found[tensor.name] += dense(tensor, microbatch)
    experts = []
    for expert in range(EXPERTS):
        a_RM, b_RN = segment(expert, order[0])
        experts.append(a_RM.t() @ b_RN)
        for microbatch in order[1:]:
            a_RM, b_RN = segment(expert, microbatch)
            if len(a_RM):
                experts[-1] += a_RM.t() @ b_RN
    return {**found, EXPERT.name: torch.stack(experts)}


def backward(gradient, experts, microbatches):
    """What the experts' backward does with its rows."""
    pairs = [[segment(expert, microbatch) for microbatch in microbatches] for expert in experts]
    a_RM, b_RN = (torch.cat([pair[side] for row in pairs for pair in row]) for side in (0, 1))
    for chunk in chunks(torch.tensor([[len(pair[0]) for pair in row] for row in pairs])):
        gradient.add(a_RM[chunk.rows], b_RN[chunk.rows], chunk)
    gradient.store()


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex()


def summing(*, rank, ranks, store, per_node, microbatches):
    """The sums of this rank's shares, in two orders; the weights once they have become the second; what all said."""
    local, place, first = EXPERTS // per_node, rank % per_node, rank - rank % per_node
    shares = deal([*DENSE, EXPERT], ranks=ranks, ranks_per_node=per_node)
    alike = [share for share in shares if share.name != EXPERT.name]
    column = [share for share in shares if share.name == EXPERT.name and share.rank % per_node == place]
    shapes = {**{tensor.name: tensor.shape for tensor in DENSE}, EXPERT.name: (local, *EXPERT.shape[1:])}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    owned = shards(parameters, [share for share in shares if share.rank == rank], place)
    control = Control(store, rank=rank, ranks=ranks, timeout_s=TIMEOUT_S)
    with Node(
        store=torch.distributed.PrefixStore(f"node/{first}", store), rank=place, ranks=per_node, first=first,
        regions=reduction.regions(alike, ranks, ranks // per_node), sizes="a test's", timeout_s=TIMEOUT_S,
    ) as node:  # fmt: skip
        nodes = Nodes(node=node, count=ranks // per_node, store=store, control=control, timeout_s=TIMEOUT_S)
        apart = Apart(parameters[EXPERT.name], per_node)
        together = Reduction(
            nodes=nodes, node=node, parameters=parameters, shares=[*alike, *column], owned=owned,
            apart={EXPERT.name: apart},
        )  # fmt: skip
        sums = []
        for order in orders(microbatches):
            together.clear()
            for start in range(0, microbatches, ranks):
                together.open()
                for tensor in DENSE:
                    parameters[tensor.name].grad = dense(tensor, order[start + rank])
                ours = order[start + first : start + first + per_node]
                backward(apart, range(place * local, (place + 1) * local), ours)
                together.show()
                together.add()
            together.deliver()
            mine = [share for share in shares if share.rank == rank]
            sums.append([(share.name, share.start, bits(owned[share.name].grad)) for share in mine])
        for parameter in owned.values():
            parameter.data.copy_(parameter.grad)
        together.share()
        weights = {name: bits(parameter) for name, parameter in parameters.items()}
        told = together.gather(torch.arange(1 + rank, dtype=torch.float64))
        control.gather("the end", None)
    control.leave()
    return [sums, weights, [vector.tolist() for vector in told]]


def orders(microbatches):
    """As they are numbered, and backwards."""
    return [list(range(microbatches)), list(reversed(range(microbatches)))]


WORK = {"summing": summing}
