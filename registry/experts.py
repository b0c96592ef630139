"""[model.moe.experts]: the routed experts' SwiGLU, in one of four precisions."""

from collections.abc import Iterator
from typing import ClassVar

import attrs

from nmoe.registry.component import Component, Parameter, Problem, divisible, key
from nmoe.registry.hopper import expert_problems


@attrs.frozen(kw_only=True)
class Experts(Component):
    """What every precision has. The weights are stored as [model] dtype says."""

    precision: ClassVar[str]

    intermediate_size: int = key("hidden width of one expert", minimum=1, maximum=2**20)

    def parameters(self, prefix: str, hidden_size: int, num_experts: int) -> Iterator[Parameter]:
        f = self.intermediate_size
        yield Parameter(name=f"{prefix}.w_gate_up_E2FD", shape=(num_experts, 2, f, hidden_size), role="expert")
        down = (num_experts, hidden_size, f)
        yield Parameter(name=f"{prefix}.w_down_EDF", shape=down, role="expert", init="residual")

    def check(self, config, path: str) -> Iterator[Problem]:
        if self.precision != "fp32" and config.model.dtype == "fp32":
            yield Problem(
                path=f"{path}.kind",
                message=f"experts of kind `{self.precision}` need a model of dtype `bf16`, this one is `fp32`",
                help='set kind = "fp32", or dtype = "bf16" in [model]',
            )

    def build(self, hidden_size: int, num_experts: int):
        """One layer's experts on torch's current default device; a plan of a kind without kernels is not runnable."""
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class Fp32Experts(Experts):
    """float32 products on the CPU."""

    supports: ClassVar[tuple[str, ...]] = ("cpu",)
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)
    precision: ClassVar[str] = "fp32"

    def check(self, config, path: str) -> Iterator[Problem]:
        if config.model.dtype != "fp32":
            yield Problem(
                path=f"{path}.kind",
                message=f"experts of kind `fp32` need a model of dtype `fp32`, this one is `{config.model.dtype}`",
                help=f'set kind = "{config.model.dtype}"',
            )

    def build(self, hidden_size: int, num_experts: int):
        from nmoe.experts.fp32 import Fp32Experts as Run

        return Run(num_experts=num_experts, hidden_size=hidden_size, intermediate_size=self.intermediate_size)


@attrs.frozen(kw_only=True)
class Bf16Experts(Experts):
    """bf16 products with float32 accumulation."""

    runs_on: ClassVar[tuple[str, ...]] = ("cpu", "sm_90a")
    precision: ClassVar[str] = "bf16"

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from super().check(config, path)
        yield from expert_problems(config, path, self.intermediate_size)

    def build(self, hidden_size: int, num_experts: int):
        from nmoe.experts.bf16 import Bf16Experts as Run

        return Run(num_experts=num_experts, hidden_size=hidden_size, intermediate_size=self.intermediate_size)


@attrs.frozen(kw_only=True)
class Fp8Experts(Experts):
    """e4m3 products with float32 scales per block."""

    supports: ClassVar[tuple[str, ...]] = ("sm_100a", "sm_90a")
    runs_on: ClassVar[tuple[str, ...]] = ()
    precision: ClassVar[str] = "fp8"

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from super().check(config, path)
        yield from block_problems(self, config, path, 128)


@attrs.frozen(kw_only=True)
class Nvfp4Experts(Experts):
    """e2m1 products with e4m3 scales per 16 elements."""

    supports: ClassVar[tuple[str, ...]] = ("sm_100a",)
    runs_on: ClassVar[tuple[str, ...]] = ()
    precision: ClassVar[str] = "nvfp4"

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from super().check(config, path)
        yield from block_problems(self, config, path, 16)


def block_problems(experts: Experts, config, path: str, block: int) -> Iterator[Problem]:
    """Block scales need both widths of the product in whole blocks."""
    blocks = f"the block of {experts.precision} scales"
    yield from divisible(f"{path}.intermediate_size", experts.intermediate_size, "intermediate_size", block, blocks)
    yield from divisible("model.hidden_size", config.model.hidden_size, "hidden_size", block, blocks)
