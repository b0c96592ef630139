"""Plan -> TrainingGraph: every part of a training, assembled in the order of the registry's table.

This is the one place where specs become objects. After it nothing asks the plan for a value again:
the parts hold what they were given, and the plan is frozen.
"""

from collections.abc import Iterator

import attrs
import torch

from nmoe import platform
from nmoe.data.loader import Loader
from nmoe.errors import fail
from nmoe.model.block import Block
from nmoe.model.init import initialize
from nmoe.model.router import Router
from nmoe.model.transformer import Transformer
from nmoe.optim.groups import Optimizer
from nmoe.optim.rounding import Rounding
from nmoe.optim.wsd import Wsd
from nmoe.plan.plan import Plan


@attrs.frozen(kw_only=True)
class TrainingGraph:
    """The parts of one training.

    optimizer: the groups in the plan's order; every parameter is in exactly one.
    clip_norm: largest norm of the whole gradient. microbatch: sequences of one forward pass.
    document_mask: attention stays within a document.
    tokens_per_step: the loss is a mean over these. device: where the model, its state and a step's work are.
    """

    model: Transformer
    optimizer: Optimizer
    rounding: Rounding
    schedule: Wsd
    loader: Loader
    clip_norm: float
    microbatch: int
    document_mask: bool
    tokens_per_step: int
    device: torch.device

    def routers(self) -> Iterator[tuple[int, Router]]:
        """(layer, router) of every MoE layer, first layer first."""
        for index, block in enumerate(self.model.layers):
            assert isinstance(block, Block)
            if block.moe is not None:
                yield index, block.moe.router

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that exact resume needs, by logical name, sharing memory with the parts.

        Weights appear as their masters; the weights proper follow from them (`refresh`).
        """
        tensors = self.optimizer.state()
        for layer, router in self.routers():
            if router.bias_E is not None:
                tensors[f"router.bias/layers.{layer}"] = router.bias_E
        return tensors

    def refresh(self) -> None:
        """Recompute what follows from the state: the weights from their masters."""
        self.optimizer.refresh()


def build(plan: Plan) -> TrainingGraph:
    """Assemble the parts on the plan's device and draw the initial weights.

    Draws are float32 on the CPU on every target, and copied: 8.5 s of one core for a billion weights (2026-11-24).
    RunError N0507 if the data's tokenizer has more tokens than the model has room for.
    """
    config = plan.config
    device = platform.device(config.platform.target)
    with device:
        model = config.model.build(transport=config.transport.build(), recompute=config.output.recompute)
    shapes = list(config.model.parameters())
    initialize(
        model,
        [(p.name, p.shape, p.init) for p in shapes],
        seed=config.random.seed,
        init_std=config.model.init_std,
        residual_init_scale=config.model.residual_init_scale,
    )

    rounding = Rounding(config.random.seed)
    tensors = dict(model.named_parameters())
    members: dict[str, list[tuple[str, torch.nn.Parameter]]] = {name: [] for name in config.optimizer.groups()}
    for parameter in shapes:
        members[config.optimizer.group_of(parameter)].append((parameter.name, tensors[parameter.name]))
    groups = [
        spec.build(name=name, parameters=members[name], state_dtype=config.optimizer.state_dtype, rounding=rounding)
        for name, spec in config.optimizer.groups().items()
    ]

    mixture = config.data.build(seed=config.random.seed, sequence_length=config.batch.sequence_length)
    if mixture.vocab_size > config.model.vocab_size:
        raise fail(
            "N0507",
            f"the data has {mixture.vocab_size} tokens, the model has room for {config.model.vocab_size}",
            place="[data] and model.vocab_size",
            help=f"set vocab_size to at least {mixture.vocab_size}",
        )
    graph = TrainingGraph(
        model=model,
        optimizer=Optimizer(groups),
        rounding=rounding,
        schedule=config.schedule.build(),
        loader=Loader(mixture, sequences=config.batch.sequences, microbatch=config.batch.microbatch),
        clip_norm=config.optimizer.clip_norm,
        microbatch=config.batch.microbatch,
        document_mask=config.batch.document_mask,
        tokens_per_step=config.batch.tokens_per_step,
        device=device,
    )
    for _, router in graph.routers():
        assert config.model.moe is not None
        router.balance = config.model.moe.router.build_balance(
            sequence_length=config.batch.sequence_length, tokens_per_step=config.batch.tokens_per_step
        )
    return graph
