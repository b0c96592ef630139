"""What a plan's training step needs, beside what the plan says: kind by kind, and the peak.

`nmoe bench memory CONFIG` takes two steps through nmoe.train.step on the plan's target, and shows for each kind the
plan's bytes, the measured ones and their ratio. A plan that reads prepared shards is given the packaged text in
bytes: how much memory a step takes does not depend on which tokens it reads. Under torchrun all ranks train together,
rank 0 speaks, and a figure is that of the rank that has most; the gradients by themselves are then left out, since
owners' sums take the place of most of them within the step.

    weights, gradients, optimizer   the tensors themselves, each storage once
    activations                     what a first microbatch's forward leaves behind, less the two gradients
                                    that the loss computes in its forward
    activation_arena                the arena of several GPUs' experts
    rdep_buffers                    on several GPUs the memory that they share, with `reduction` the sums beside it
    peak                            of the second step: on CUDA the allocator's, with that memory; on the CPU that of
                                    `Live`, and one rank's alone
    recorded                        the same peak of the step in which the microbatches are recorded, where they are
    reserved                        what the allocator has taken from the device by then
"""

import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmoe import platform
from nmoe.bench.rows import Row
from nmoe.graph import build
from nmoe.optim.reduction import Alone
from nmoe.plan.plan import Plan
from nmoe.rdep.node import Node
from nmoe.rdep.peers import Peers
from nmoe.registry.data import BytesTokenizer, Corpus
from nmoe.train.launch import launched, require_ranks
from nmoe.train.loop import require_runnable
from nmoe.train.step import run_step


class Live(TorchDispatchMode):
    """The bytes of all storages that operations under it have made and that are alive, now and at most.

    It sees what passes between operations, not what one of torch's own kernels takes for itself meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name not in self.sizes:
            self.sizes[name] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, name)

    def forget(self, name: int) -> None:
        self.now -= self.sizes.pop(name)


SHARED = "rdep_buffers + reduction"


def measure(plan: Plan) -> dict[str, int]:
    """Bytes by kind, and `peak`, of the second of two steps; see the module.

    Raises what a training of the plan would.
    """
    process = platform.process()
    require_runnable(plan)
    require_ranks(plan, process.world_size, process.local_world_size)
    platform.require(plan.config.platform.target, plan.config.platform.threads)
    with launched(plan, process) as launch:
        if plan.config.platform.target != "cpu":
            return _steps(plan, None, launch.peers)
        with Live() as live:
            return _steps(plan, live, launch.peers)


def _steps(plan: Plan, live: Live | None, peers: Peers | None) -> dict[str, int]:
    graph = build(plan, peers)
    recorder, graph.microbatch.recorder = graph.microbatch.recorder, None  # a replay has no forward to be seen
    alive: dict[str, int] = {}

    def observe(step: int, phase: str) -> None:
        alive.setdefault(f"{step} {phase}", torch.cuda.memory_allocated() if live is None else live.now)

    for step in (1, 2):
        batch = graph.loader.batch(step)
        if live is not None:
            live.peak = live.now
        else:
            torch.cuda.reset_peak_memory_stats()
        run_step(graph, batch, step=step, tokens_seen=step * plan.tokens_per_step, observe=observe)
    peak = torch.cuda.max_memory_allocated() if live is None else live.peak
    recorded = {}
    if recorder is not None:
        graph.microbatch.recorder, graph.microbatch.steps = recorder, 0
        for step in (3, 4):
            torch.cuda.reset_peak_memory_stats()
            run_step(
                graph, graph.loader.batch(step), step=step, tokens_seen=step * plan.tokens_per_step, observe=observe
            )
        recorded = {"recorded": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    head = graph.model.head.weight_VD
    tokens = plan.config.batch.microbatch * plan.config.batch.sequence_length
    of_the_loss = 4 * (tokens * head.shape[1] + head.numel())
    weights = [p for _, p in graph.model.named_parameters()]
    state = [t for name, t in graph.optimizer.state().items()]
    found = {
        "weights": _bytes(weights),
        "gradients": _bytes(p.grad for p in weights if p.grad is not None),
        "optimizer": _bytes([*weights, *state]) - _bytes(weights),
        "activations": alive["2 backward"] - alive["2 forward"] - of_the_loss,
        "peak": peak,
        **recorded,
    }
    if peers is None:
        return found
    del found["gradients"]
    if graph.arena is not None and not isinstance(graph.ranks, Alone) and not isinstance(peers.device, Node):
        shared, sums = peers.device.shared.buffer.nbytes, _bytes(graph.ranks.sums)
        found |= {"activation_arena": graph.arena.h_2AF.nbytes, SHARED: shared + sums, "peak": peak + shared}
    of_ranks = graph.ranks.gather(torch.tensor(list(found.values()), dtype=torch.float64))
    return dict(zip(found, map(int, torch.stack(of_ranks).amax(dim=0).tolist()), strict=True))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def rows(plan: Plan) -> list[dict[str, Any]]:
    """One row a kind: estimated and measured bytes, and estimated / measured."""
    memory = plan.memory[plan.config.output.recompute]
    total = memory.at_peak["total"]
    alone = total - memory.at_peak.get("beside_graphs", 0)
    estimated = {**memory.whole, "peak": alone, "recorded": alone, "reserved": total}
    estimated[SHARED] = memory.whole["rdep_buffers"] + memory.whole.get("reduction", 0)
    measured = measure(plan)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [
        {
            "config": plan.name,
            "recompute": plan.config.output.recompute,
            "kind": kind,
            "estimated": estimated[kind],
            "measured": count,
            "ratio": estimated[kind] / count if count else 1.0,
        }
        for kind, count in measured.items()
    ]


def with_data(plan: Plan) -> Plan:
    """The plan, reading the packaged text where it would read prepared data."""
    if isinstance(plan.config.data, Corpus):
        return plan
    packaged = Corpus(name="shakespeare", tokenizer=BytesTokenizer())
    return attrs.evolve(plan, config=attrs.evolve(plan.config, data=packaged))


def bench_rows(plan: Plan) -> Iterator[Row]:
    """`rows` as `nmoe bench memory` shows them, on the rank that leads."""
    found = rows(plan)
    for row in found if platform.process().rank == 0 else ():
        for who in ("estimated", "measured"):
            yield Row(
                work="memory", case=f"{row['config']}, recompute {row['recompute']}", part=row["kind"],
                who="the plan" if who == "estimated" else "ours", rate=row[who], unit="bytes",
                note=f"{row['ratio']:.3f} of what is measured" if who == "estimated" else "",
            )  # fmt: skip
