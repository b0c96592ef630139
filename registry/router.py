"""[model.moe.router]: scores, selection and weights."""

from collections.abc import Iterator
from typing import ClassVar

import attrs

from nmoe.registry.component import Component, Parameter, Problem, divisible, key


@attrs.frozen(kw_only=True)
class Router(Component):
    """What every kind has."""

    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)

    num_experts: int = key("routed experts of a layer", minimum=1, maximum=65536)
    top_k: int = key("experts that a token uses", minimum=1, maximum=65536)

    def check(self, config, path: str) -> Iterator[Problem]:
        if self.top_k > self.num_experts:
            yield Problem(
                path=f"{path}.top_k",
                message=f"top_k = {self.top_k} is more than num_experts = {self.num_experts}",
                help=f"set top_k to at most {self.num_experts}",
            )

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[Parameter]:
        yield Parameter(name=f"{prefix}.weight_ED", shape=(self.num_experts, hidden_size), role="router")

    def build(self, hidden_size: int):
        """One layer's router on torch's current default device."""
        raise NotImplementedError


def pair_problems(path: str, sequences: int, name: str, config) -> Iterator[Problem]:
    """Rows of one pass are counted in 32-bit integers: tokens, or (token, expert) pairs of a MoE model."""
    pairs = 1 if config.model.moe is None else config.model.moe.router.top_k
    rows = sequences * config.batch.sequence_length * pairs
    if rows >= 2**31:
        most = (2**31 - 1) // (config.batch.sequence_length * pairs)
        yield Problem(
            path=path,
            message=f"`{name}` = {sequences} makes {rows} rows of one pass, more than 2^31 - 1",
            help=f"set {name} to at most {most}" if most else "shorten the sequences",
        )


@attrs.frozen(kw_only=True)
class SoftmaxRouter(Router):
    """Softmax scores over all experts (Qwen3, arXiv 2505.09388; Mixtral, arXiv 2401.04088), no selection bias.

    s_E = softmax(W x); the top_k of s are chosen; their weights are s_k, divided by their sum if renormalize
    (Mixtral's softmax over the chosen is the same).
    """

    renormalize: bool = key("the chosen weights add up to 1", default=True)

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from super().check(config, path)
        if self.renormalize and self.top_k == 1:
            yield Problem(
                path=f"{path}.top_k",
                message="the one chosen weight is always 1 when renormalised, so the router never learns",
                help="set renormalize = false, or top_k to at least 2",
            )

    def build(self, hidden_size: int):
        from nmoe.model.router import SoftmaxRouter as Run

        return Run(
            hidden_size=hidden_size, num_experts=self.num_experts, top_k=self.top_k, renormalize=self.renormalize
        )


@attrs.frozen(kw_only=True)
class SigmoidRouter(Router):
    """Sigmoid scores, a bias for selection only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    s_E = sigmoid(W x); the top_k of s + bias are chosen; their weights are
    route_scale * s_k / sum over the chosen of s. After a step each expert's bias rises by
    bias_update_rate if it got fewer tokens than the mean, and falls if it got more.
    """

    num_groups: int = key("groups of neighbouring experts", default=1, minimum=1, maximum=65536)
    top_groups: int = key(
        "groups of which a token can choose experts, those whose two best s + b add up to most", default=1, minimum=1,
        maximum=65536,
    )
    route_scale: float = key(
        "factor on the weights after they are renormalised over the chosen", default=1.0, above=0.0, maximum=1e6
    )
    bias_update_rate: float = key(
        "step of the selection bias; 0 keeps it at zero", default=0.001, minimum=0.0, maximum=1.0
    )

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from super().check(config, path)
        yield from divisible(f"{path}.num_experts", self.num_experts, "num_experts", self.num_groups, "num_groups")
        size = self.num_experts // self.num_groups
        if self.top_groups > self.num_groups:
            yield Problem(
                path=f"{path}.top_groups",
                message=f"top_groups = {self.top_groups} is more than num_groups = {self.num_groups}",
                help=f"set top_groups to at most {self.num_groups}",
            )
        elif self.num_groups > 1 and size < 2:
            yield Problem(
                path=f"{path}.num_groups",
                message="a group of one expert has no two best scores to be chosen by",
                help=f"set num_groups to at most {self.num_experts // 2}",
            )
        elif self.top_groups * size < self.top_k <= self.num_experts:
            yield Problem(
                path=f"{path}.top_groups",
                message=f"{self.top_groups} groups of {size} experts hold fewer than top_k = {self.top_k}",
                help="raise top_groups or lower top_k",
            )

    def build(self, hidden_size: int):
        from nmoe.model.router import SigmoidRouter as Run

        return Run(
            hidden_size=hidden_size, num_experts=self.num_experts, top_k=self.top_k,
            num_groups=self.num_groups, top_groups=self.top_groups, route_scale=self.route_scale,
            bias_update_rate=self.bias_update_rate,
        )
