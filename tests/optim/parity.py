"""How near the optimizers come to torch's own: `python -m tests.optim.parity` prints the table.

Each row trains the same weights with the same gradients twice, once with groups built from their specs
and once with `torch.optim`, a schedule on, and takes the largest over the tensors of

    ||ours - reference||_F / ||reference - start||_F      Muon: in parts of the way that the reference went
    ||ours - reference||_F / ||reference||_F              AdamW: in parts of the weights

(A float32 weight near 1 is rounded by 6e-8 a step, which is much beside the short way of an AdamW group
whose epsilon holds it back.) Every matrix of a stack, an expert's gate, its up, its down, is a parameter
of its own for torch.

torch.optim.Muon (2.13) casts to bfloat16 with `Tensor.bfloat16` and has no option to iterate otherwise.
Within `iterating_in` that method casts to another dtype, and the rest is torch's code as it stands: with
weights and gradients in float64, a float64 reference for the whole rule.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import torch

from nmoe.optim.groups import Group, Optimizer
from nmoe.optim.rounding import Rounding
from nmoe.optim.wsd import Wsd
from nmoe.registry.optimizer import AdamW, Muon

# What the rows may differ by, and why.
ADAMW = 1e-6
"""Fifty steps, each with a few roundings of 2^-24 of a weight: 50 * 2 * 6e-8 if all went one way."""
FLOAT32_ITERATION = 1e-5
"""About fifty dependent operations of 2^-24, and roundings of weights near 1 over ways of 0.05 and more."""
BF16_ITERATION = 0.015
"""Both iterate in bfloat16 (2^-9 a rounding) from norms that are added in another order."""

ADAMW_SHAPES = {"matrix": (48, 40), "experts": (3, 2, 24, 16), "norm": (48,), "odd": (7, 13)}
MUON_SHAPES = {
    "square": (32, 32), "tall": (96, 24), "wide": (24, 80),
    "gate_up": (2, 48, 32), "experts_gate_up": (4, 2, 48, 32), "experts_down": (4, 32, 48),
}  # fmt: skip

ADAMW_SETTINGS: dict[str, dict[str, AdamW]] = {
    "one group": {"dense": AdamW(lr=3e-3)},
    "three groups, each its own": {
        "dense": AdamW(lr=3e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8),
        "router": AdamW(lr=1e-3, lr_floor=1e-4, weight_decay=0.0, beta1=0.8, beta2=0.9, eps=1e-3),
        "experts": AdamW(lr=1e-2, weight_decay=0.01, beta1=0.95, beta2=0.999, eps=1e-5),
    },
}
MUON_SETTINGS: dict[str, Muon] = {
    "defaults": Muon(lr=0.02),
    "nesterov = false": Muon(lr=0.02, lr_floor=0.002, nesterov=False),
    'adjust_lr = "original"': Muon(lr=0.02, adjust_lr="original"),
    "momentum = 0.8, no decay": Muon(lr=0.02, momentum=0.8, weight_decay=0.0),
    "ns_steps = 3": Muon(lr=0.03, ns_steps=3),
    "ns_coefficients = 2, -1.5, 0.5": Muon(lr=0.02, ns_coefficients=(2.0, -1.5, 0.5)),
    "eps = 1, above the norm": Muon(lr=0.02, eps=1.0),
}
ADAMW_STEPS, MUON_STEPS = 50, 10

Weights = dict[str, torch.Tensor]


@attrs.frozen(kw_only=True)
class Row:
    """One line of the table: the largest relative difference, and what it may be."""

    optimizer: str
    setting: str
    reference: str
    difference: float
    bound: float


def start(shapes: dict[str, tuple[int, ...]], group: str) -> Weights:
    """The first weights of one group, float32, exact in bfloat16."""
    generator = torch.Generator().manual_seed(len(group))
    return {f"{group}.{n}": torch.randn(s, generator=generator).bfloat16().float() for n, s in shapes.items()}


def gradient(shape: tuple[int, ...], step: int, place: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + place)
    return torch.randn(shape, generator=generator) * scale


def schedule(steps: int) -> tuple[Wsd, Any]:
    """A schedule of 1000 tokens a step, and the same curve as points: up in a fifth, level, down in two fifths."""
    up, level, down = steps // 5, steps * 2 // 5, steps * 2 // 5
    ours = Wsd(warmup_tokens=up * 1000, stable_tokens=level * 1000, decay_tokens=down * 1000, decay_shape="linear")
    return ours, lambda step: float(np.interp(step, [0, up, up + level, steps], [0.0, 1.0, 1.0, 0.0]))


def train_ours(
    specs: dict[str, AdamW | Muon], first: dict[str, Weights], *, steps: int, clip: float, scale: float,
    weight_dtype: torch.dtype = torch.float32,
) -> tuple[list[Group], Weights]:
    """The groups after `steps` updates, and their masters by name."""
    rounding = Rounding(0)
    groups = []
    for name, spec in specs.items():
        parameters = [(n, torch.nn.Parameter(w.to(weight_dtype, copy=True))) for n, w in first[name].items()]
        for _, parameter in parameters:
            parameter.grad_dtype = torch.float32
        groups.append(spec.build(name=name, parameters=parameters, state_dtype="fp32", rounding=rounding, places={}))
    optimizer, (rates, _) = Optimizer(groups), schedule(steps)
    for step in range(1, steps + 1):
        for group in groups:
            for place, (_, parameter) in enumerate(group.parameters):
                parameter.grad = gradient(tuple(parameter.shape), step, place, scale)
        optimizer.step(step=step, scale=rates.scale(step * 1000), grad_scale=torch.tensor(clip))
    return groups, {n: master for group in groups for n, master in group.masters.items()}


def train_adamw(
    specs: dict[str, AdamW], first: dict[str, Weights], *, dtype: torch.dtype, fused: bool, clip: float, scale: float
) -> Weights:
    """torch.optim.AdamW on the same; vectors are groups without decay."""
    weights = {n: torch.nn.Parameter(w.to(dtype, copy=True)) for group in first.values() for n, w in group.items()}
    torchs, peaks = [], []
    for name, spec in specs.items():
        for decays in (True, False):
            torchs.append({
                "params": [weights[n] for n, w in first[name].items() if (w.ndim >= 2) is decays],
                "lr": spec.lr, "betas": (spec.beta1, spec.beta2), "eps": spec.eps,
                "weight_decay": spec.weight_decay if decays else 0.0,
            })  # fmt: skip
            peaks.append((spec.lr, spec.lr_floor))
    reference = torch.optim.AdamW(torchs, fused=fused, foreach=False)
    _, factor = schedule(ADAMW_STEPS)
    for step in range(1, ADAMW_STEPS + 1):
        for group, (peak, floor) in zip(reference.param_groups, peaks, strict=True):
            group["lr"] = floor + (peak - floor) * factor(step)
        for group in first.values():
            for place, n in enumerate(group):
                g = gradient(tuple(weights[n].shape), step, place, scale)
                weights[n].grad = g.to(dtype) * float(torch.tensor(clip))
        reference.step()
    return {n: w.detach() for n, w in weights.items()}


@contextmanager
def iterating_in(dtype: torch.dtype) -> Iterator[None]:
    """Within this, torch.optim.Muon iterates in `dtype`."""
    own = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda tensor: tensor.to(dtype, copy=True)
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = own


def train_muon(spec: Muon, first: Weights, *, dtype: torch.dtype, clip: float, scale: float) -> Weights:
    """torch.optim.Muon on the same, every matrix a parameter of its own."""
    apart = {n: [torch.nn.Parameter(m.to(dtype, copy=True)) for m in w.reshape(-1, *w.shape[-2:])]
             for n, w in first.items()}  # fmt: skip
    reference = torch.optim.Muon(
        [m for matrices in apart.values() for m in matrices], lr=spec.lr, weight_decay=spec.weight_decay,
        momentum=spec.momentum, nesterov=spec.nesterov, ns_coefficients=spec.ns_coefficients, eps=spec.eps,
        ns_steps=spec.ns_steps, adjust_lr_fn=spec.adjust_lr,
    )  # fmt: skip
    _, factor = schedule(MUON_STEPS)
    for step in range(1, MUON_STEPS + 1):
        reference.param_groups[0]["lr"] = spec.lr_floor + (spec.lr - spec.lr_floor) * factor(step)
        for place, (n, matrices) in enumerate(apart.items()):
            whole = gradient(tuple(first[n].shape), step, place, scale).to(dtype) * float(torch.tensor(clip))
            for matrix, g in zip(matrices, whole.reshape(-1, *whole.shape[-2:]), strict=True):
                matrix.grad = g.clone()
        reference.step()
    return {n: torch.stack([m.detach() for m in matrices]).reshape(first[n].shape) for n, matrices in apart.items()}


def of_weights(ours: Weights, reference: Weights) -> float:
    """The largest difference in parts of the weights."""
    assert ours.keys() == reference.keys()
    return max(float((ours[n].double() - r.double()).norm() / r.double().norm()) for n, r in reference.items())


def of_way(ours: Weights, reference: Weights, first: Weights) -> float:
    """The largest difference in parts of the way that the reference went."""
    assert ours.keys() == reference.keys() == first.keys()
    return max(
        float((ours[n].double() - r.double()).norm() / (r.double() - first[n].double()).norm())
        for n, r in reference.items()
    )


def adamw_rows() -> Iterator[Row]:
    """Gradients of 1e-4, scaled by 0.7: the larger epsilons are then as large as the second moment's root."""
    facts = {"clip": 0.7, "scale": 1e-4}
    for setting, specs in ADAMW_SETTINGS.items():
        first = {name: start(ADAMW_SHAPES, name) for name in specs}
        ours = {
            "": train_ours(specs, first, steps=ADAMW_STEPS, **facts)[1],
            ", bf16 weights": train_ours(specs, first, steps=ADAMW_STEPS, weight_dtype=torch.bfloat16, **facts)[1],
        }
        references = {
            "float32": train_adamw(specs, first, dtype=torch.float32, fused=False, **facts),
            "float32 fused": train_adamw(specs, first, dtype=torch.float32, fused=True, **facts),
            "float64": train_adamw(specs, first, dtype=torch.float64, fused=False, **facts),
        }
        for extra, masters in ours.items():
            for name, reference in references.items():
                yield Row(
                    optimizer="adamw", setting=setting + extra, reference=f"torch.optim.AdamW, {name}",
                    difference=of_weights(masters, reference), bound=ADAMW,
                )  # fmt: skip


def muon_rows() -> Iterator[Row]:
    """Gradients of 1e-2, scaled by 0.7: a matrix's norm is then below 1."""
    facts = {"clip": 0.7, "scale": 1e-2}
    for setting, spec in MUON_SETTINGS.items():
        first = start(MUON_SHAPES, "matrices")
        ours = {
            ns_dtype: train_ours(
                {"matrices": attrs.evolve(spec, ns_dtype=ns_dtype)}, {"matrices": first}, steps=MUON_STEPS, **facts
            )[1]
            for ns_dtype in ("fp32", "bf16")
        }
        own = train_muon(spec, first, dtype=torch.float32, **facts)
        with iterating_in(torch.float32):
            single = train_muon(spec, first, dtype=torch.float32, **facts)
        with iterating_in(torch.float64):
            double = train_muon(spec, first, dtype=torch.float64, **facts)
        for optimizer, weights, name, reference, bound in (
            ("muon, bf16", ours["bf16"], "bf16", own, BF16_ITERATION),
            ("muon, fp32", ours["fp32"], "iterating in float32", single, FLOAT32_ITERATION),
            ("muon, fp32", ours["fp32"], "all in float64", double, FLOAT32_ITERATION),
        ):
            yield Row(
                optimizer=optimizer, setting=setting, reference=f"torch.optim.Muon, {name}",
                difference=of_way(weights, reference, first), bound=bound,
            )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'optimizer':<12}{'setting':<44}{'reference':<40}{'difference':>10}  bound")
    for row in [*adamw_rows(), *muon_rows()]:
        print(f"{row.optimizer:<12}{row.setting:<44}{row.reference:<40}{row.difference:>10.1e}  {row.bound:g}")


if __name__ == "__main__":
    main()
