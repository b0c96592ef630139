"""`nmoe bench optimizer CONFIG`: gradient norms, AdamW and Muon over a config's parameters, beside torch's.

Gradients are random. Each group of the plan is timed by itself, and so are all norms together. The floor of AdamW is
reading weight, gradient and both moments and writing all but the gradient (28 bytes a parameter in float32, and 2 for
a bf16 weight), of the norms reading the gradients (4 bytes); of Muon the FLOPs of its Newton-Schulz iterations, where
a product with its own transpose counts half.

    torch AdamW, torch Muon     torch.optim's on float32 copies of the same shapes; fused; no bf16 weights are written
    torch clip_grad_norm_       of torch.nn.utils, on the same gradients, which it scales by 1
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from nmoe.bench.clock import device_for, measure
from nmoe.bench.rows import Row
from nmoe.graph import TrainingGraph, build
from nmoe.optim.groups import Group
from nmoe.optim.muon import Muon
from nmoe.plan.plan import Plan
from nmoe.train.loop import require_runnable


def rows(plan: Plan, *, repeats: int) -> Iterator[Row]:
    """See the module. Raises what a training of the plan would."""
    require_runnable(plan)
    device = device_for(plan.config.platform.target, plan.config.platform.threads)
    graph = build(plan)
    generator = torch.Generator(device).manual_seed(2)
    weights = list(graph.model.parameters())
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator, device=device) * 1e-3
    calls, notes, costs = _calls(graph, weights)
    times, rates = measure(calls, repeats, device)
    for name, spent in times.items():
        part, _, who = name.partition(": ")
        moved, flops = costs[part]
        yield Row(
            work="optimizer", case=plan.name, part=part, who=who, milliseconds=spent,
            floor=rates.floor(bytes=moved, flops=flops), rate=flops / spent / 1e9 if flops else moved / spent / 1e6,
            unit="TFLOP/s" if flops else "GB/s",
            note=notes.get(name, ""),
        )  # fmt: skip


def _calls(
    graph: TrainingGraph, weights: list[torch.nn.Parameter]
) -> tuple[dict[str, Callable[[], object]], dict[str, str], dict[str, tuple[float, float]]]:
    """By `part: who` what is timed and its note; by part (bytes, FLOPs)."""
    calls: dict[str, Callable[[], object]] = {
        "norms: ours": graph.norms.squared,
        "norms: torch clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(weights, 1e9),
    }
    notes = {
        "norms: ours": "of each parameter and group",
        "norms: torch clip_grad_norm_": "of the whole; scales the gradients too",
    }
    costs = {"norms": (4.0 * sum(w.numel() for w in weights), 0.0)}
    one = torch.ones((), device=graph.device)
    for group in graph.optimizer.groups:
        part = f"{group.name}, {'Muon' if isinstance(group, Muon) else 'AdamW'}"
        calls[f"{part}: ours"] = partial(group.step, step=100, scale=1.0, grad_scale=one)
        costs[part] = cost(group)
        copies = [p.detach().float().clone() for _, p in group.parameters]
        for copy, (_, parameter) in zip(copies, group.parameters, strict=True):
            assert parameter.grad is not None
            copy.grad = parameter.grad.float()
        if not isinstance(group, Muon):
            theirs: torch.optim.Optimizer = torch.optim.AdamW(copies, lr=1e-3, fused=True)
            calls[f"{part}: torch AdamW"] = theirs.step
        elif all(copy.ndim == 2 for copy in copies):
            theirs = torch.optim.Muon(copies, lr=1e-3, ns_steps=group.ns_steps)
            calls[f"{part}: torch Muon"] = theirs.step
            notes[f"{part}: torch Muon"] = "iterates in bf16"
    return calls, notes, costs


def cost(group: Group) -> tuple[float, float]:
    """(bytes, FLOPs) of one step of a group."""
    parameters = [p for _, p in group.parameters]
    state = group.state_dtype.itemsize
    count = sum(p.numel() for p in parameters)
    narrow = sum(p.numel() * p.element_size() for p in parameters if p.dtype != group.state_dtype)
    if not isinstance(group, Muon):
        return float(count * (4 + 6 * state) + narrow), 0.0
    flops = 0.0
    for parameter in parameters:
        short, long = sorted(parameter.shape[-2:])
        matrices = parameter.numel() // (short * long)
        # X X^T, its square (both symmetric), and the product with X
        flops += matrices * group.ns_steps * (short * short * long + short**3 + 2.0 * short * short * long)
    return float(count * (4 + 4 * state) + narrow), flops
