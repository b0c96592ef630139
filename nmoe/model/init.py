"""The first weights: each tensor from a stream named by its own name.

A tensor's values depend on (seed, name) and, for experts, on (seed, name, expert): not on the
order of calls, on other tensors, or on which rank holds them. Draws are float32 on the CPU, on
every target, and are rounded to the weight's dtype after scaling.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from nmoe import rng
from nmoe.errors import fail


@torch.no_grad()
def initialize(
    model: torch.nn.Module,
    parameters: Iterable[tuple[str, tuple[int, ...], str]],
    *,
    seed: int,
    init_std: float,
    residual_init_scale: float,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Draw every parameter of `model`.

    parameters: (name, shape, init) of each; init is "normal" (mean 0, std init_std), "residual"
    (std init_std * residual_init_scale) or "ones". rank, ranks: the model has the experts of this one of the
    ranks that share them. A RunError (N0701) names a parameter whose
    shape is another, or that only one side has.
    """
    weights = dict(model.named_parameters())
    for name, shape, init in parameters:
        weight = weights.pop(name, None)
        of_experts = ".experts." in name
        if of_experts:
            shape = (shape[0] // ranks, *shape[1:])
        if weight is None or tuple(weight.shape) != tuple(shape):
            found = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
            raise fail("N0701", f"parameter `{name}` of shape {tuple(shape)} is {found} in the model", place=name)
        if init == "ones":
            weight.fill_(1.0)
            continue
        std = {"normal": init_std, "residual": init_std * residual_init_scale}[init]
        if of_experts:
            for expert in range(shape[0]):
                stream = rng.stream(seed, "init", name, rank * shape[0] + expert)
                weight[expert].copy_(normal(shape[1:], std, stream))
        else:
            weight.copy_(normal(shape, std, rng.stream(seed, "init", name)))
    if weights:
        raise fail("N0701", f"parameter `{next(iter(weights))}` of the model has no initialisation", place="model")


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """std * N(0, 1), float32, on the CPU."""
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, 1.0, generator=generator).mul_(std)
