"""The loss and every gradient of one step of a small config, for whatever target and dtype it is resolved.

Weights are the config's own first ones, rounded to bfloat16 everywhere, so that all see the same numbers. Routing is
given, or two experts that score alike within a rounding would make a token's gradients those of another expert;
`test_selection_is_the_cpus` looks at the selection by itself.
"""

from pathlib import Path

import pytest
import torch

from nmoe.data.loader import TokenBatch
from nmoe.graph import build
from nmoe.model import router
from nmoe.plan.resolve import resolve
from nmoe.train.step import run_step

HERE = Path(__file__).parent
CONFIGS = {"every_part": HERE / "every_part.toml", "hopper": HERE.parents[1] / "configs" / "hopper.toml"}
SCALE = "model.residual_init_scale=0.5"  # at 0, most gradients are 0

CPU = ['platform.target="cpu"', "platform.threads=2"]
# On the CPU in float32: what roundings are measured against. float32's own are 2^-15 of bfloat16's.
FLOAT32 = [*CPU, 'model.dtype="fp32"', 'optimizer.state_dtype="fp32"', 'model.moe.experts.kind="fp32"']


def sets_of(config: str, sets: list[str]) -> list[str]:
    """The sets, with the experts' width where a change of their kind takes it away."""
    if 'model.moe.experts.kind="fp32"' not in sets:
        return sets
    width = resolve(CONFIGS[config]).config.model.moe.experts.intermediate_size
    return [*sets, f"model.moe.experts.intermediate_size={width}"]


def given(score_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """A routing that is a fact of its shape; expert 1 gets nothing."""
    random_TE = torch.rand(score_TE.shape, generator=torch.Generator().manual_seed(score_TE.shape[0]))
    random_TE[:, 1] = -1.0
    return random_TE.topk(top_k, dim=1).indices.to(score_TE.device)


def one_step(config: str, sets: list[str], patch: pytest.MonkeyPatch) -> tuple[float, dict[str, torch.Tensor]]:
    """(mean loss, gradients by parameter, float64 on the CPU)."""
    plan = resolve(CONFIGS[config], [SCALE, *sets_of(config, sets)])
    graph = build(plan)
    with torch.no_grad():
        for parameter in graph.model.parameters():
            if parameter.ndim == 1:  # norms begin at one, which hides a wrong gradient
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                parameter.add_(0.1 * noise.to(parameter.device))
            parameter.copy_(parameter.bfloat16())
    shape = (plan.config.batch.sequences, plan.config.batch.sequence_length + 1)
    tokens = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3))
    tokens[:, 40], tokens[0, 9], tokens[1, 0], tokens[1, 77] = 256, 256, 256, 256
    inputs_BS, targets_BS = tokens[:, :-1], tokens[:, 1:]
    batch = TokenBatch(
        step=1, input_ids_BS=inputs_BS, targets_BS=targets_BS, document_ids_BS=(inputs_BS == 256).long().cumsum(dim=1),
        digest="", num_bytes=1,
    )  # fmt: skip
    gradients: dict[str, torch.Tensor] = {}

    def observe(step: int, phase: str) -> None:
        if phase == "optimizer":
            gradients.update((n, p.grad.to("cpu", torch.float64, copy=True)) for n, p in graph.model.named_parameters())

    with patch.context() as inside:
        inside.setattr(router, "select", given)
        inside.setattr(router.SigmoidRouter, "in_one_pass", lambda self, x_TD: False)
        result = run_step(graph, batch, step=1, tokens_seen=inputs_BS.numel(), observe=observe)
    return result.loss, gradients


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """||found - wanted|| / ||wanted|| of each gradient."""
    assert found.keys() == wanted.keys()
    return {name: float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted}
