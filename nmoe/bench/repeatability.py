"""`nmoe bench repeatability CONFIG`: what it costs a step that its bits are the same every time.

On one GPU each part of CONFIG's step is timed alone, ours beside every other way that is installed here, whether its
bits repeat or not. A part's cost is what a step would save if it took the fastest of them all in each place; that of
the step is their sum over the rest of the step's time. Where ours is the fastest there is none.

    attention       cuDNN, flash, through torch.compile flex; forward and backward each by itself
    MoE layer       torch's grouped_mm, transformers' experts, compiled too; uniform routing
    norm, SwiGLU    torch, compiled too           rotary, keys    the trainer's plain layers
    loss            in chunks, compiled too       embedding       sums of a row by atomics
    AdamW, norms    torch's fused, foreach        Muon            Newton-Schulz by torch's products

Documents and sinks, which no peer takes, are left out on both sides. Dense projections are cuBLAS's in either case, at
fixed shapes and without split sums, and are not listed. Calls are recorded as CUDA graphs where they can be, and find
nothing of the last call in the L2. Optimizer work is timed on some of the parameters and counted for all.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe import platform
from nmoe.bench import attention, attention_layer, moe, moe_layer
from nmoe.bench.elementwise import peer_calls, timed
from nmoe.bench.elementwise_case import DEVICE, Case, normals
from nmoe.bench.elementwise_layers import keys_case, norm_case, rope_case, swiglu_case
from nmoe.bench.elementwise_step import adamw_case, loss_case, schulz_case, squares_case
from nmoe.bench.rows import Row
from nmoe.bench.training import WARM_UP, take
from nmoe.graph import TrainingGraph, build
from nmoe.model.gqa import Gqa
from nmoe.model.linear import Embedding, Head
from nmoe.model.mla import Mla
from nmoe.model.mlp import DenseMlp
from nmoe.model.moe import MoE
from nmoe.model.norm import RmsNorm
from nmoe.optim.muon import Muon
from nmoe.plan.plan import Plan
from nmoe.registry import attention as registry
from nmoe.train.loop import require_runnable

Calls = dict[str, Callable[[], object]]
TIMED_PARAMETERS = 5e8
TIMED_MATRICES = 64
WHOLE = ("forward", "backward", "whole", "step", "norms", "five steps")
"""Those of a case's parts that a step does; the others are parts of them."""


@attrs.frozen(kw_only=True, eq=False)
class Work:
    """What a step does so many times. make: its parts, each done by everybody by name."""

    name: str
    times: float
    make: Callable[[], dict[str, Calls]]


def rows(plan: Plan, *, steps: int, compile: bool) -> Iterator[Row]:
    """See the module: of each part ours and the fastest other, ms of a whole step's. Raises as a training does."""
    require_runnable(plan)
    platform.require(plan.config.platform.target, plan.config.platform.threads)
    graph = build(plan)
    take(graph, plan, range(1, 1 + WARM_UP), text=False)
    whole = 1e3 * take(graph, plan, range(1 + WARM_UP, 1 + WARM_UP + steps), text=False) / steps
    works = works_of(plan, graph)
    del graph
    saved = 0.0
    for work in works:
        for part in timed_parts(plan.name, work, compile):
            spent = [row.milliseconds or 0.0 for row in part]
            saved += spent[0] - min(spent)
            yield from part
    yield Row(work="repeatability", case=plan.name, part="the step", who="ours", milliseconds=whole,
              note=f"{saved:.2f} ms of it could be saved: {saved / (whole - saved):.1%}")  # fmt: skip


def timed_parts(case: str, work: Work, compile: bool) -> Iterator[list[Row]]:
    """Of each part ours and, of the others that run here, the fastest."""
    torch.cuda.empty_cache()
    with torch.cuda.stream(torch.cuda.Stream()):  # nothing is recorded on the default one
        for part, calls in work.make().items():
            spent, silent = {}, []
            for who, call in calls.items():
                if "compiled" in who and not compile:
                    continue
                try:
                    spent[who] = work.times * timed(call)[0]
                except (RuntimeError, ImportError, ValueError):  # a peer that does not take this shape
                    if who == "ours":
                        raise
                    silent.append(who)
            row = partial(Row, work="repeatability", case=case, part=" ".join(filter(None, (work.name, part))))
            found = [row(who="ours", milliseconds=spent.pop("ours"), note=f"{work.times:.4g} in a step")]
            if spent:
                fastest = min(spent, key=spent.__getitem__)
                note = f"without {', '.join(silent)}, which do not run" if silent else ""
                found.append(row(who=fastest, milliseconds=spent[fastest], note=note))
            yield found


def works_of(plan: Plan, graph: TrainingGraph) -> list[Work]:
    """Everything but the dense projections; what has the same sizes together."""
    batch, model = plan.config.batch, plan.config.model
    B, S = batch.microbatch, batch.sequence_length
    T, passes = B * S, batch.sequences // batch.microbatch
    found: Counter[tuple[str, Callable[..., dict[str, Calls]], tuple[Any, ...]]] = Counter()

    def add(name: str, make: Callable[..., dict[str, Calls]], *sizes: Any) -> None:
        found[name, make, sizes] += passes

    for name, module in graph.model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, RmsNorm):
            D = module.weight_D.numel()
            if isinstance(model.attention, registry.Gqa) and leaf in ("q_norm", "k_norm"):
                heads = model.attention.num_heads if leaf == "q_norm" else model.attention.num_kv_heads
                add(f"norm T{T * heads} D{D}", norm_calls, T * heads, D, False)
            elif leaf == "ffn_norm":
                add(f"sum and norm T{T} D{D}", norm_calls, T, D, True)
            else:
                add(f"norm T{T} D{D}", norm_calls, T, D, False)
        elif isinstance(module, DenseMlp):
            F = module.w_down_DF.shape[1]
            add(f"SwiGLU T{T} F{F}", swiglu_calls, T, F)
        elif isinstance(module, Mla):
            H, (N, R), V = module.num_heads, module.query_sizes, module.key_value_sizes[1]
            add(f"rotary T{T} H{H}", rope_calls, B, S, H, N, R // 2, True)
            add(f"keys T{T} H{H}", keys_calls, B, S, H, N, V, R // 2)
            add_attention(add, attention.Shape(B, H, H, S, N + R, V, module.window))
        elif isinstance(module, Gqa):
            H, G = (proj.weight.shape[0] // module.head_dim for proj in (module.q_proj, module.k_proj))
            for heads in (H, G):
                add(f"rotary T{T} H{heads}", rope_calls, B, S, heads, 0, module.head_dim // 2, False)
            add_attention(add, attention.Shape(B, H, G, S, module.head_dim, module.head_dim, module.window))
        elif isinstance(module, MoE) and model.moe is not None:
            router, F = model.moe.router, model.moe.experts.intermediate_size
            shape = moe.Shape(T, model.hidden_size, F, router.num_experts, router.top_k)
            add(f"MoE layer {shape}", moe_calls, shape)
        elif isinstance(module, (Embedding, Head)):
            V, D = module.weight_VD.shape
            what, make = ("loss", loss_calls) if isinstance(module, Head) else ("embedding", embedding_calls)
            add(f"{what} T{T} D{D} V{V}", make, T, D, V)
    works = [Work(name=name, times=count, make=partial(make, *sizes)) for (name, make, sizes), count in found.items()]
    return works + optimizer_works(graph)


def add_attention(add: Callable[..., None], shape: attention.Shape) -> None:
    sizes = " ".join(f"{axis}{size}" for axis, size in zip("BHGSQV", shape, strict=False))
    add(f"attention {sizes}" + (f" window {shape.window}" if shape.window else ""), attention_calls, shape)


def optimizer_works(graph: TrainingGraph) -> list[Work]:
    """Gradient norms and AdamW over some of the parameters; Newton-Schulz of each size of matrix."""
    shapes = [tuple(p.shape) for group in graph.optimizer.groups for _, p in group.parameters]
    works = [part_of("gradient norms", squares_calls, shapes)]
    adam = [tuple(p.shape) for g in graph.optimizer.groups if not isinstance(g, Muon) for _, p in g.parameters]
    if adam:
        works.append(part_of("AdamW", adamw_calls, adam))
    matrices: Counter[tuple[int, int]] = Counter()
    for group in graph.optimizer.groups:
        for _, parameter in group.parameters if isinstance(group, Muon) else ():
            short, long = sorted(parameter.shape[-2:])
            matrices[short, long] += parameter.numel() // (short * long)
    for (short, long), count in matrices.items():
        N = min(count, TIMED_MATRICES)
        name = f"Newton-Schulz {N}x{short}x{long}"
        works.append(Work(name=name, times=count / N, make=partial(schulz_calls, N, short, long)))
    return works


def part_of(name: str, make: Callable[..., dict[str, Calls]], shapes: list[tuple[int, ...]]) -> Work:
    """Of the first shapes, one at least, that have so many parameters at most; counted for all."""
    sizes = [math.prod(shape) for shape in shapes]
    count = next((n for n in range(1, len(sizes)) if sum(sizes[: n + 1]) > TIMED_PARAMETERS), len(sizes))
    return Work(name=name, times=sum(sizes) / sum(sizes[:count]), make=partial(make, shapes[:count]))


def of_case(case: Case) -> dict[str, Calls]:
    return {
        part.name if part.name in ("forward", "backward") else "": {"ours": part.call, **peer_calls(part)}
        for part in case.parts()
        if part.name in WHOLE
    }


def norm_calls(T: int, D: int, added: bool) -> dict[str, Calls]:
    return of_case(norm_case(T, D, added=added))


def swiglu_calls(T: int, F: int) -> dict[str, Calls]:
    return of_case(swiglu_case(T, F))


def rope_calls(B: int, S: int, H: int, N: int, J: int, interleaved: bool) -> dict[str, Calls]:
    return of_case(rope_case(B, S, H, N, J, interleaved=interleaved))


def keys_calls(B: int, S: int, H: int, N: int, V: int, J: int) -> dict[str, Calls]:
    return of_case(keys_case(B, S, H, N, V, J))


def loss_calls(T: int, D: int, V: int) -> dict[str, Calls]:
    return of_case(loss_case(T, D, V))


def adamw_calls(shapes: list[tuple[int, ...]]) -> dict[str, Calls]:
    return of_case(adamw_case(shapes))


def squares_calls(shapes: list[tuple[int, ...]]) -> dict[str, Calls]:
    return of_case(squares_case([shapes]))


def schulz_calls(N: int, A: int, B: int) -> dict[str, Calls]:
    return of_case(schulz_case(N, A, B))


def embedding_calls(T: int, D: int, V: int) -> dict[str, Calls]:
    """The gradient of the table, float32."""
    dy_TD = normals()(T, D)
    ids_T = torch.randint(0, V, (T,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(2))

    def ours() -> Tensor:
        return torch.ops.aten.embedding_dense_backward(dy_TD.float(), ids_T, V, -1, False)

    def atomics() -> Tensor:
        return torch.zeros(V, D, device=DEVICE).index_add_(0, ids_T, dy_TD.float())

    return {"backward": {"ours": ours, "index_add": atomics}}


def attention_calls(shape: attention.Shape) -> dict[str, Calls]:
    layers = attention_layer.layers(attention.make_inputs(shape, DEVICE), shape, compile=True)
    return {
        "forward": {who: layer.forward for who, layer in layers.items()},
        "backward": {who: backward_of(layer) for who, layer in layers.items()},
    }


def moe_calls(shape: moe.Shape) -> dict[str, Calls]:
    x = moe.make_inputs(shape, "uniform", DEVICE)
    layers = {"ours": moe_layer.ours(x, shape.K), **moe_layer.autograd_peers(x, shape.K, compile=True)}
    return {"": {who: partial(moe_layer.both, layer) for who, layer in layers.items()}}


def backward_of(layer: moe_layer.Layer) -> Callable[[], object]:
    """Of a forward that is done when it is first called."""
    states: list[object] = []

    def call() -> object:
        if not states:
            states.append(layer.forward())
        return layer.backward(states[0])

    return call
