"""[model.moe]: router, experts and shared experts of the MoE layers."""

from collections.abc import Iterator

import attrs

from nmoe.registry.component import Component, Parameter, Problem, key, section
from nmoe.registry.experts import Experts
from nmoe.registry.router import Router


@attrs.frozen(kw_only=True)
class Moe(Component):
    """y = sum over the chosen k of w_k expert_k(x), plus the shared experts' y."""

    num_dense_layers: int = key("first layers that are dense", default=0, minimum=0)
    num_shared_experts: int = key(
        "experts that every token uses, computed as one SwiGLU of that many times the experts' width",
        default=0, minimum=0, maximum=1024,
    )
    router: Router = section("which experts a token uses, and with which weights")
    experts: Experts = section("the routed experts")

    def check(self, config, path: str) -> Iterator[Problem]:
        if self.num_dense_layers >= config.model.num_layers:
            yield Problem(
                path=f"{path}.num_dense_layers",
                message=f"{self.num_dense_layers} dense layers leave no MoE layer among {config.model.num_layers}",
                help="lower it, or remove [model.moe] and its sections for a dense model",
            )

    @property
    def shared_size(self) -> int:
        return self.num_shared_experts * self.experts.intermediate_size

    @property
    def saved_width(self) -> int:
        """Elements of one token kept for backward: gate, up and their product, of each chosen and shared expert."""
        return 3 * (self.router.top_k * self.experts.intermediate_size + self.shared_size)

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[Parameter]:
        from nmoe.registry.model import swiglu_parameters

        yield from self.router.parameters(f"{prefix}.router", hidden_size)
        yield from self.experts.parameters(f"{prefix}.experts", hidden_size, self.router.num_experts)
        if self.num_shared_experts:
            yield from swiglu_parameters(f"{prefix}.shared", hidden_size, self.shared_size)

    def build(self, hidden_size: int, *, transport):
        from nmoe.model.mlp import DenseMlp
        from nmoe.model.moe import MoE

        shared = None
        if self.num_shared_experts:
            shared = DenseMlp(hidden_size=hidden_size, intermediate_size=self.shared_size)
        return MoE(
            router=self.router.build(hidden_size),
            experts=self.experts.build(hidden_size, self.router.num_experts),
            shared=shared,
            transport=transport,
        )
