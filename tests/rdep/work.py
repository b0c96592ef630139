"""What a rank does in the tests: the routed experts of some layers over its microbatches, drilled or not, or a failure.

Every tensor is a function of the microbatch's number, the layer and the seed, never of the rank.
"""

import contextlib
import hashlib
import os
import random
import signal
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from nmoe.experts.bf16 import Bf16Experts
from nmoe.experts.fp32 import Fp32Experts
from nmoe.model.moe import MoE
from nmoe.model.router import SoftmaxRouter
from nmoe.rdep.local import LocalTransport
from nmoe.rdep.memory import Memory, Sizes
from nmoe.rdep.node import Node
from nmoe.rdep.shm import ShmTransport
from tests.rdep import talk

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
KIND = {"fp32": Fp32Experts, "bf16": Bf16Experts}
TOKENS = 40
HIDDEN, WIDTH = 37, 21  # odd, so that rows lie off every alignment


class Planned(Exception):
    """A failure that the test asked for."""


def store(directory, ranks):
    return torch.distributed.FileStore(f"{directory}/store", ranks)


def generator(*numbers):
    return torch.Generator().manual_seed(hash(numbers) % 2**62)


def routing(name, tokens, experts, top_k, microbatch, layer):
    """(T, K) experts; in no order, so that a row's k is not its expert's rank."""
    draws = torch.rand(tokens, experts, generator=generator(1, microbatch, layer))
    if name == "one expert":
        return torch.full((tokens, top_k), experts - 1)
    if name == "one rank":
        draws[:, experts // 2 :] = -1.0
    if name == "uniform":
        return (torch.arange(tokens)[:, None] + torch.arange(top_k) * 3 + microbatch) % experts
    if name == "skewed":
        draws **= torch.arange(1, experts + 1)
    return draws.topk(top_k, dim=1).indices


def tokens_of(name, microbatch):
    """Some empty: on 4 ranks, of ranks 0, 3 and 2, in different passes."""
    return 0 if name == "some empty" and microbatch in (0, 3, 6) else TOKENS - microbatch % 3


def inputs(name, experts, top_k, dtype, microbatch, layer):
    """x, indices, weights and dy. Sizes range over six decades, and microbatch 1 undoes what 0 gave each expert."""
    tokens = tokens_of(name, microbatch)
    same = 0 if microbatch == 1 and name == "cancelling" else microbatch
    if name == "cancelling":
        tokens = TOKENS
    draw = generator(2, same, layer)
    x_TD = torch.randn(tokens, HIDDEN, generator=draw)
    weights_TK = torch.randn(tokens, top_k, generator=draw)
    dy_TD = torch.randn(tokens, HIDDEN, generator=draw) * 10.0 ** torch.randint(-3, 4, (tokens, 1), generator=draw)
    if name == "cancelling":
        weights_TK *= 10.0 ** torch.randint(-3, 4, (tokens, top_k), generator=draw)
        dy_TD *= {0: 1e3, 1: -1e3}.get(microbatch, 1.0)
    return x_TD.to(dtype), routing(name, tokens, experts, top_k, same, layer), weights_TK, dy_TD.to(dtype)


def make_layers(kind, experts, ranks, rank, depth):
    """This rank's part of every layer's experts."""
    local, layers = experts // ranks, []
    for layer in range(depth):
        module = KIND[kind](num_experts=local, hidden_size=HIDDEN, intermediate_size=WIDTH)
        for number, parameter in enumerate(module.parameters()):
            shape = (experts, *parameter.shape[1:])
            drawn = torch.randn(shape, generator=generator(3, number, layer)) * shape[-1] ** -0.5
            parameter.data = drawn[rank * local : (rank + 1) * local].to(DTYPE[kind])
            parameter.grad_dtype = torch.float32
        layers.append(module)
    return layers


def digest(tensor):
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{hashlib.sha256(raw).hexdigest()[:20]} {list(tensor.shape)}"


def sizes(kind, experts, top_k, ranks):
    return Sizes(
        ranks=ranks, tokens=TOKENS, num_experts=experts, top_k=top_k, hidden_size=HIDDEN, dtype=DTYPE[kind]
    )  # fmt: skip


def node(kind, experts, top_k, *, rank, ranks, store, timeout_s, make=Node):
    """The ranks of a job, with memory for its transport."""
    needed = sizes(kind, experts, top_k, ranks)
    return make(
        store=store, rank=rank, ranks=ranks, regions=needed.regions(), sizes=str(needed), timeout_s=timeout_s
    )  # fmt: skip


def layers(
    *, rank, ranks, store, name, kind, experts, top_k, microbatches, depth, transport="shm", timeout_s=100.0,
    backwards=False, recompute=False,
):  # fmt: skip
    """Digests of everything that `depth` layers compute for this rank's microbatches, and its experts' gradients."""
    found = {}
    mine = range(rank, microbatches, ranks)
    arguments = reversed(mine) if backwards else mine, name, DTYPE[kind], experts, top_k, recompute
    stack = make_layers(kind, experts, ranks, rank, depth)
    if transport == "local":
        run_passes(LocalTransport(), stack, found, *arguments)
    else:
        make_node, make = TRANSPORTS[transport]
        where = {"rank": rank, "ranks": ranks, "store": store, "timeout_s": timeout_s, "make": make_node}
        with node(kind, experts, top_k, **where) as together:
            way = make(node=together, sizes=sizes(kind, experts, top_k, ranks))
            run_passes(way, stack, found, *arguments)
    for layer, module in enumerate(stack):
        for parameter_name, parameter in module.named_parameters():
            for index, gradient in enumerate(parameter.grad):
                expert = rank * module.num_experts + index
                found[f"layer {layer} expert {expert} {parameter_name}"] = digest(gradient)
    return found


def run_passes(transport, stack, found, microbatches, name, dtype, experts, top_k, recompute):
    """A pass: all layers forward, then all backward, last layer first, as a model does."""
    for microbatch in microbatches:
        kept = []
        for layer, module in enumerate(stack):
            x_TD, indices_TK, weights_TK, dy_TD = inputs(name, experts, top_k, dtype, microbatch, layer)
            x_TD.requires_grad_()
            weights_TK.requires_grad_()
            arguments = x_TD, weights_TK, transport.layout(indices_TK, experts, layer), transport
            if recompute:
                y_TD = checkpoint(module, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                y_TD = module(*arguments)
            kept.append((x_TD, weights_TK, y_TD, dy_TD))
        for layer, (x_TD, weights_TK, y_TD, dy_TD) in reversed(list(enumerate(kept))):
            y_TD.backward(dy_TD)
            for what, tensor in (("y", y_TD), ("dx", x_TD.grad), ("dw", weights_TK.grad)):
                found[f"layer {layer} microbatch {microbatch} {what}"] = digest(tensor)


class Drilled(Node):
    """Waits for a random time before every publication and every read, and poisons what it has given free.

    Poison: values are NaN, indices point nowhere. Received rows are free when the owner publishes outputs or
    input gradients, returned ones when their source publishes counts or output gradients, counts when
    everybody has published rows.
    """

    def __init__(self, *, rank, **more):
        super().__init__(rank=rank, **more)
        self.random = random.Random(rank)

    def delay(self):
        time.sleep(self.random.choice((0.0, 0.0, 0.0003, 0.001, 0.003)))

    def begin(self, phase, layer=0):
        super().begin(phase, layer)
        mine = Memory(**self.memory[self.rank])
        if phase in ("outputs", "input gradients"):
            free = [mine.rows_UD, mine.token_R, mine.pair_R, mine.weight_R]
        else:
            free = [mine.returned_PD, mine.d_weight_P] if phase in ("counts", "output gradients") else []
        if phase == "outputs":
            free.append(mine.counts_2C)
        for tensor in free:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**30))

    def publish(self, peer):
        self.delay()
        super().publish(peer)

    def observe(self):
        super().observe()
        self.delay()


class KeepsRows(ShmTransport):
    """A fault: what backward needs stays in the shared memory."""

    def dispatch(self, x_TD, weights_TK, places):
        received = super().dispatch(x_TD, weights_TK, places)
        return type(received)(self._received(places), received.token_R, received.weight_R, received.pair_R)


class SilentRows(Drilled):
    """Leaves the publication of rows to the transport below."""

    def publish(self, peer):
        if self.signals.here.phase not in ("rows", "output gradients"):
            super().publish(peer)


class PublishesEarly(ShmTransport):
    """A fault: rows are published before they are written."""

    def _write_rows(self, rows_TD, owner, places):
        self.node.signals.publish(owner)
        self.node.delay()
        super()._write_rows(rows_TD, owner, places)


class WritesTooSoon(ShmTransport):
    """A fault: outputs are written while the source may still read the ones before."""

    def give_back(self, y_RD, received, places):
        answer = super().give_back(y_RD, received, places)
        self.memory[(self.rank + 1) % self.ranks].returned_PD.zero_()
        return answer


TRANSPORTS = {
    "shm": (Node, ShmTransport), "drilled": (Drilled, ShmTransport), "keeps rows": (Drilled, KeepsRows),
    "publishes early": (SilentRows, PublishesEarly), "writes too soon": (Drilled, WritesTooSoon),
}  # fmt: skip


def failing(*, rank, ranks, store, who, how, at_layer, timeout_s):
    """Ten layers; rank `who` fails in one of them. The others return what their transport raised."""
    stack = make_layers("fp32", 12, ranks, rank, 10)
    with node("fp32", 12, 2, rank=rank, ranks=ranks, store=store, timeout_s=timeout_s) as together:
        transport = ShmTransport(node=together, sizes=sizes("fp32", 12, 2, ranks))
        for layer, module in enumerate(stack):
            x_TD, indices_TK, weights_TK, _ = inputs("spread", 12, 2, torch.float32, rank, layer)
            if rank == who and layer == at_layer:
                if how == "raise":
                    raise Planned("the disk is on fire")
                if how in ("kill", "stop"):
                    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
                if how == "exit":
                    os._exit(7)
                if how == "return":
                    return "early"
                if how == "skip":
                    continue
                if how == "grow":
                    indices_TK = indices_TK.repeat(2, 1)
            module(x_TD, weights_TK, transport.layout(indices_TK, 12, layer), transport)
    return "whole"


def meeting(*, rank, ranks, store, who, timeout_s):
    """Rank `who` has another model, or does not come at all (-1: the last one)."""
    if who == -1 and rank == ranks - 1:
        return "absent"
    with node("fp32", 12, 2 + (rank == who), rank=rank, ranks=ranks, store=store, timeout_s=timeout_s):
        return "met"


def files(*, rank, ranks, store):
    """The names of what is mapped and open of shared memory while the transport is at work."""
    with node("fp32", 12, 2, rank=rank, ranks=ranks, store=store, timeout_s=100.0):
        names = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that read the directory
                names.add(str(link.readlink()))
        return sorted(name for name in names if "memfd" in name or "/dev/shm" in name)


def moe(*, rank, ranks, store, microbatches):
    """The MoE layer with its router, over this rank's microbatches."""
    (experts,) = make_layers("fp32", 8, ranks, rank, 1)
    router = SoftmaxRouter(hidden_size=HIDDEN, num_experts=8, top_k=3, renormalize=True)
    router.weight_ED.data = torch.randn(8, HIDDEN, generator=generator(4))
    found = {}
    with node("fp32", 8, 3, rank=rank, ranks=ranks, store=store, timeout_s=100.0) as together:
        transport = ShmTransport(node=together, sizes=sizes("fp32", 8, 3, ranks)) if ranks > 1 else LocalTransport()
        layer = MoE(router=router, experts=experts, shared=None, transport=transport, layer=0)
        for microbatch in range(rank, microbatches, ranks):
            x_TD, _, _, dy_TD = inputs("spread", 8, 3, torch.float32, microbatch, 0)
            x_TD.requires_grad_()
            y_TD = layer(x_TD, torch.zeros_like(x_TD))
            y_TD.backward(dy_TD)
            for what, tensor in (("y", y_TD), ("dx", x_TD.grad), ("d router", router.weight_ED.grad)):
                found[f"microbatch {microbatch} {what}"] = digest(tensor)
            router.weight_ED.grad = None
    for name, parameter in experts.named_parameters():
        for index, gradient in enumerate(parameter.grad):
            found[f"expert {rank * experts.num_experts + index} {name}"] = digest(gradient)
    return found


WORK = {
    "layers": layers, "moe": moe, "failing": failing, "meeting": meeting, "files": files, **talk.WORK,
}  # fmt: skip
