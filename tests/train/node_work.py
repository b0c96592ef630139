"""What a rank of several "nodes" on this machine does in the tests: `nmoe train`, or a reduction alone."""

import os
from functools import cache
from pathlib import Path

from nmoe import platform
from nmoe.checkpoint import environment
from nmoe.cli.main import run
from nmoe.data import corpus
from nmoe.graph import build
from nmoe.model.loss import linear_cross_entropy
from nmoe.plan.resolve import resolve
from nmoe.rdep import rendezvous
from nmoe.train.launch import launched
from tests.rdep.work import Planned as Planned  # the server of ranks asks for these here
from tests.rdep.work import store as store
from tests.train import faults, node_sums

# What a process reads at each start is read once, before the ranks are forked: the packaged text, the sources.
corpus.documents = cache(corpus.documents)
for _part in ("train", "heldout"):
    corpus.documents("shakespeare", _part)
_hashes = environment.source_hashes()
environment.source_hashes = lambda: _hashes

def training(*, rank, ranks, store, per_node, config, sets, log, who=None, fault="", sizes=None):
    """The exit status of `nmoe train`. who, fault: the rank that goes wrong, and how.

    sizes: what each rank takes for its node's size, if they differ.
    """
    speak_into(Path(log) / f"{rank}.txt")
    if ranks > 1:
        found = {"RANK": rank, "LOCAL_RANK": rank % per_node, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": per_node}
        if sizes:
            found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"] = sizes[rank]
        os.environ.update({name: str(value) for name, value in found.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        rendezvous.launch_store = lambda timeout_s: store
    if rank == who:
        faults.arm(fault)
    return run(["train", config, *(word for item in sets for word in ("--set", item))])


def speak_into(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def counted(*, rank, ranks, store, per_node, config, sets):
    """Bytes that the sums take on this rank, and that it sends to other nodes in a pass and for the weights."""
    plan = resolve(config, sets, ranks=ranks, ranks_per_node=per_node)
    platform.require("cpu", threads=1)
    rendezvous.launch_store = lambda timeout_s: store
    process = platform.Process(
        rank=rank, local_rank=rank % per_node, world_size=ranks, local_world_size=per_node, master_address="",
        master_port=0,
    )  # fmt: skip
    with launched(plan, process) as launch:
        graph = build(plan, launch.peers)
        together, nodes = graph.ranks, launch.peers.nodes
        kept = [together.node.memory[rank % per_node]["gradients_P"], *together.sums]
        kept += [tensor for tensors in together.receives.values() for tensor in tensors]
        kept += [apart.parts_M for apart in together.apart.values()]
        batch = graph.loader.batch(1)
        before = nodes.moved
        together.share()
        weights = nodes.moved - before
        together.open()
        h_TD, head_VD = graph.model(batch.input_ids_BS[:1]), graph.model.head.weight_VD
        linear_cross_entropy(h_TD, head_VD, batch.targets_BS[0], chunk_tokens=64).backward()
        before = nodes.moved
        together.show()
        together.add()
        parts = nodes.moved - before
        launch.control.gather("the end", None)
    return [sum(tensor.nbytes for tensor in kept), parts, weights]


WORK = {"training": training, "counted": counted, **node_sums.WORK}
