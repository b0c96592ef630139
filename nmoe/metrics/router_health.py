"""How evenly a router spreads its tokens, from one step's counts.

With n_e the pairs that expert e of E got in the step and p_e = n_e / sum of n:

    entropy    -sum p_e ln p_e / ln E     1 if even, 0 if one expert has everything (1 if E = 1)
    load_cv    sqrt(mean of (n_e - mean)^2) / mean
    load_max, load_min                    over the mean load, so 1 is even
    dead       experts with n_e = 0

of the selection biases b_e, where a router has them, their smallest, largest and the range between;
and its balance losses, where a training has them (`nmoe.model.balance`). The load is the one over
all microbatches and ranks: the entropy of the mean load, not a mean of entropies. All in float64,
on the host; read the counts before the router's `end_step` clears them.
"""

from collections.abc import Iterator, Mapping

import attrs
import torch

from nmoe.errors import fail


@attrs.frozen(kw_only=True)
class Health:
    """One layer's figures of one step; see the module for each.

    bias: smallest and largest, if any. losses: balance losses by name, without their coefficients.
    """

    num_experts: int
    entropy: float
    load_cv: float
    load_max: float
    load_min: float
    dead_experts: int
    bias: tuple[float, float] | None
    losses: Mapping[str, float]

    @property
    def dead_share(self) -> float:
        return self.dead_experts / self.num_experts

    @property
    def bias_range(self) -> float | None:
        return None if self.bias is None else self.bias[1] - self.bias[0]


Row = tuple[str, int | None, int | None, float]
"""A row of the ledger: (name, layer, expert, value)."""


def health(load_E: torch.Tensor, bias_E: torch.Tensor | None, losses: Mapping[str, float]) -> Health:
    """Figures of one layer. load_E: int64 counts of a step. bias_E: selection biases, if any. losses: by name.

    RunError N0406 if nothing was routed: the counts were read in evaluation or after they were cleared.
    """
    load = load_E.double().cpu()
    total = load.sum()
    if not total > 0:
        raise fail(
            "N0406",
            "a router has counted no tokens in the step",
            place=f"{load.numel()} experts",
            help="read load_E after a training forward and before end_step",
        )
    share = load / total
    mean = total / load.numel()
    nats = -torch.xlogy(share, share).sum()
    even = torch.tensor(float(load.numel()), dtype=torch.float64).log()
    return Health(
        num_experts=load.numel(),
        entropy=float(nats / even) if load.numel() > 1 else 1.0,
        load_cv=float((load - mean).square().mean().sqrt() / mean),
        load_max=float(load.max() / mean),
        load_min=float(load.min() / mean),
        dead_experts=int((load == 0).sum()),
        bias=None if bias_E is None else (float(bias_E.min()), float(bias_E.max())),
        losses=losses,
    )


def rows(layers: Mapping[int, Health]) -> Iterator[Row]:
    """Rows of all MoE layers, by layer index, and of the aggregates over them. Nothing for no layer."""
    for layer, one in layers.items():
        yield "router/entropy", layer, None, one.entropy
        yield "router/load_cv", layer, None, one.load_cv
        yield "router/load_max", layer, None, one.load_max
        yield "router/load_min", layer, None, one.load_min
        yield "router/dead_experts", layer, None, float(one.dead_experts)
        if one.bias is not None and one.bias_range is not None:
            yield "router/bias_min", layer, None, one.bias[0]
            yield "router/bias_max", layer, None, one.bias[1]
            yield "router/bias_range", layer, None, one.bias_range
        for name, value in one.losses.items():
            yield f"router/{name}", layer, None, value
    every = list(layers.values())
    if every:
        yield "router/mean_entropy", None, None, sum(one.entropy for one in every) / len(every)
        yield "router/min_entropy", None, None, min(one.entropy for one in every)
        yield "router/mean_load_cv", None, None, sum(one.load_cv for one in every) / len(every)
        yield "router/max_load", None, None, max(one.load_max for one in every)
        yield "router/min_load", None, None, min(one.load_min for one in every)
        yield "router/total_dead_experts", None, None, float(sum(one.dead_experts for one in every))
    ranges = [one.bias_range for one in every if one.bias_range is not None]
    if ranges:
        yield "router/max_bias_range", None, None, max(ranges)


def expert_rows(layer: int, load_E: torch.Tensor) -> Iterator[Row]:
    """Each expert's load over the mean, one layer: the picture behind the figures."""
    load = load_E.double().cpu()
    for expert, value in enumerate((load / load.mean()).tolist()):
        yield "router/expert_load", layer, expert, value
