"""[model.moe]: router, experts and shared experts of the MoE layers."""

from collections.abc import Iterator

import attrs

from nmoe.registry.component import Component, Parameter, Problem, key, section
from nmoe.registry.experts import Experts
from nmoe.registry.router import Router

CPU_CHUNK_ROWS = 2048
"""Rows that the experts of the cpu target take at once, more where one expert has more (nmoe.experts.grouped)."""


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

    def routing_bytes(self, target: str, gpus: int = 1) -> int:
        """Bytes of one token of the routing, which is always kept: the router's, weights, and where the pairs lie.

        Kernels: three int32 a pair; between several GPUs of a node one, and one for each GPU, the others being of what
        an owner received. CPU: owner and row of a pair, int64; whether and where the token's row lies.
        """
        pair, token = (4 + 2 * 8, 1 + 8) if target == "cpu" else (4 + 3 * 4, 0)
        if gpus > 1:
            pair, token = 4 + 4, 4 * gpus
        return self.router.saved_bytes(target) + self.router.top_k * pair + token

    def saved_bytes(self, element: int, target: str, gpus: int = 1) -> int:
        """Bytes of one token kept for backward: gate and up of each chosen and shared expert.

        CPU: and of each row its token and its pair, int64. Of several GPUs the chosen experts' are in the arena.
        """
        indices = 2 * 8 * self.router.top_k if target == "cpu" else 0
        chosen = self.router.top_k * self.experts.intermediate_size if gpus == 1 else 0
        return 2 * (chosen + self.shared_size) * element + indices

    def working_bytes(self, tokens: int, rows: int, hidden_size: int, element: int, target: str, gpus: int = 1) -> int:
        """Bytes that the backward of `tokens` tokens, which have `rows` rows, needs: of the routed or shared experts.

        Kernels: the rows of the output's gradient, the gradients of gate and up and the weighted activation, all
        rows at once; between several GPUs of a node the rows of the input and of its gradient beside those of gate and
        up, where that is more; shared experts as `Mlp`. CPU: the rows of the input's gradient, all at once, which are
        added in float32, or what a chunk of neighbouring experts' rows needs beside them.
        """
        from nmoe.registry.model import swiglu_working_bytes

        width = self.experts.intermediate_size
        shared = tokens * swiglu_working_bytes(self.shared_size, element, target)
        if target != "cpu":
            values = hidden_size + 3 * width
            if gpus > 1:
                values = max(values, 2 * hidden_size + 2 * width)
            return max(shared, rows * values * element)
        chunk = max(min(rows, CPU_CHUNK_ROWS), rows // self.router.num_experts)
        in_chunk = chunk * (2 * hidden_size * element + swiglu_working_bytes(width, element, target))
        summed = rows * hidden_size * 4 if element < 4 else 0
        return max(shared, rows * hidden_size * element + max(in_chunk, summed))

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[Parameter]:
        from nmoe.registry.model import swiglu_parameters

        yield from self.router.parameters(f"{prefix}.router", hidden_size)
        yield from self.experts.parameters(f"{prefix}.experts", hidden_size, self.router.num_experts)
        if self.num_shared_experts:
            yield from swiglu_parameters(f"{prefix}.shared", hidden_size, self.shared_size)

    def build(self, hidden_size: int, *, transport, layer: int):
        from nmoe.model.mlp import DenseMlp
        from nmoe.model.moe import MoE

        shared = None
        if self.num_shared_experts:
            shared = DenseMlp(hidden_size=hidden_size, intermediate_size=self.shared_size)
        return MoE(
            router=self.router.build(hidden_size),
            experts=self.experts.build(hidden_size, self.router.num_experts // transport.ranks),
            shared=shared,
            transport=transport,
            layer=layer,
        )
