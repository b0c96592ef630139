"""Plan -> TrainingGraph: every part of a training, assembled in the order of the registry's table.

This is the one place where specs become objects. After it nothing asks the plan for a value again:
the parts hold what they were given, and the plan is frozen.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
import torch

from nmoe import platform
from nmoe.data.loader import Loader
from nmoe.errors import fail
from nmoe.experts.grouped import Apart, GroupedExperts
from nmoe.model.init import initialize
from nmoe.model.microbatch import Microbatch, Recorder
from nmoe.model.router import Router
from nmoe.model.transformer import Transformer, routers_of
from nmoe.optim import reduction
from nmoe.optim.gradient_norms import GradientNorms
from nmoe.optim.groups import DTYPES, Optimizer
from nmoe.optim.reduction import Alone, Reduction
from nmoe.optim.replicas import Replicas
from nmoe.optim.rounding import Rounding
from nmoe.optim.wsd import Wsd
from nmoe.part import Part
from nmoe.plan.memory import memory_of
from nmoe.plan.plan import Plan
from nmoe.plan.ranks import is_expert, shares_of
from nmoe.plan.rdep import between_gpus, most_tokens
from nmoe.rdep.memory import Regions, Sizes
from nmoe.rdep.peers import Peers
from nmoe.sharding import Share

if TYPE_CHECKING:
    from nmoe.rdep.arena import Arena


@attrs.frozen(kw_only=True)
class TrainingGraph:
    """The parts of one training, as one rank has them.

    optimizer: the groups in the plan's order; every parameter is in exactly one, and every share of it on one rank.
    groups: the names of all parameters, by group. norms: of all gradients. ranks: the others. shares: who keeps
    what, of all ranks. replicas: what this rank holds as others do.
    clip_norm: largest norm of the whole gradient. microbatch: forward and backward of each of this rank's.
    document_mask: attention stays within a document.
    tokens_per_step: the loss is a mean over these. device: where the model, its state and a step's work are.
    arena: of the experts of several GPUs, None elsewhere.
    """

    model: Transformer
    optimizer: Optimizer
    groups: dict[str, list[str]]
    norms: GradientNorms
    ranks: Alone | Reduction
    shares: tuple[Share, ...]
    replicas: Replicas
    rounding: Rounding
    schedule: Wsd
    loader: Loader
    clip_norm: float
    microbatch: Microbatch
    document_mask: bool
    tokens_per_step: int
    device: torch.device
    arena: "Arena | None"

    def routers(self) -> Iterator[tuple[int, Router]]:
        """(layer, router) of every MoE layer, first layer first."""
        return routers_of(self.model)

    def state(self) -> dict[str, Part]:
        """Every tensor that exact resume needs, by logical name, sharing memory with the parts: this rank's shares.

        Weights appear as their masters; the weights proper follow from them (`refresh`). What all ranks have alike
        is whole here, and kept by rank 0 (`kept`).
        """
        return self.optimizer.parts() | self._alike()

    def kept(self) -> dict[str, Part]:
        """Of `state`, what this rank saves: over all ranks, every element once."""
        return self.optimizer.parts() | (self._alike() if self.ranks.rank == 0 else {})

    def _alike(self) -> dict[str, Part]:
        return {name: Part.whole(bias_E) for name, bias_E in biases_of(self.model).items()}

    def refresh(self) -> None:
        """Recompute what follows from the state: the weights from their masters."""
        self.optimizer.refresh()
        self.ranks.share()


def biases_of(model: Transformer) -> dict[str, torch.Tensor]:
    """The selection biases of the routers that have one, by logical name."""
    return {
        f"router.bias/layers.{layer}": router.bias_E
        for layer, router in routers_of(model)
        if router.bias_E is not None
    }


def transport_sizes(plan: Plan, ranks: int) -> Sizes | None:
    """What the expert transport's buffers are for: the largest microbatch, of training or evaluation.

    ranks: of a node. None where no token leaves its rank.
    """
    config = plan.config
    if config.model.moe is None or ranks == 1:
        return None
    return Sizes(
        ranks=ranks,
        tokens=most_tokens(config),
        num_experts=config.model.moe.router.num_experts,
        top_k=config.model.moe.router.top_k,
        hidden_size=config.model.hidden_size,
        dtype=DTYPES[config.model.dtype],
    )


def arena_numbers(plan: Plan, ranks: int, ranks_per_node: int) -> dict[str, Any] | None:
    """The size of the experts' arena, by `nmoe.rdep.arena.Arena`'s names; None where there is none."""
    config, recompute = plan.config, plan.config.output.recompute
    if config.model.moe is None or not between_gpus(config, ranks_per_node):
        return None
    memory = memory_of(config, plan.optimizer_kinds, recompute, ranks=ranks, ranks_per_node=ranks_per_node)
    assert memory.arena is not None
    width = config.model.moe.experts.intermediate_size
    return {"rows": memory.arena.rows, "width": width, "alone": recompute == "layer"}


def regions_of(plan: Plan, ranks: int, ranks_per_node: int, *, values: int) -> tuple[Regions, Regions]:
    """The memory that each rank of a node shares with the others: the processes', and the GPUs', if it has any.

    values: as `reduction.regions`.
    """
    sizes = transport_sizes(plan, ranks_per_node)
    alike = [share for share in shares_of(plan.config, ranks, ranks_per_node) if not is_expert(share.name)]
    summed = reduction.regions(alike, values, ranks // ranks_per_node)
    if plan.config.platform.target == "cpu":
        return {**({} if sizes is None else sizes.regions()), **summed}, {}
    from nmoe.rdep.cuda import regions

    told = {"values_2GX": summed.pop("values_2GX")}
    return told, {**({} if sizes is None else regions(sizes)), **summed}


def build(plan: Plan, peers: Peers | None = None) -> TrainingGraph:
    """Assemble the parts on the plan's device and draw the initial weights.

    peers: the ranks of which this is one, with the memory of `regions_of`; None is one rank alone.
    Draws are float32 on the CPU on every target, and copied: 8.5 s of one core for a billion weights (2026-11-24).
    RunError N0507 if the data's tokenizer has more tokens than the model has room for.
    """
    config = plan.config
    device = platform.device(config.platform.target)
    rank, ranks = (0, 1) if peers is None else (peers.nodes.rank, peers.nodes.ranks)
    local_rank, per_node = (0, 1) if peers is None else (peers.host.rank, peers.host.ranks)
    with device:
        node = None if peers is None else peers.device
        transport = config.transport.build(
            node=node, sizes=transport_sizes(plan, per_node), arena_of=arena_numbers(plan, ranks, per_node)
        )
        model = config.model.build(transport=transport, recompute=config.output.recompute)
    shapes = list(config.model.parameters())
    initialize(
        model,
        [(p.name, p.shape, p.init) for p in shapes],
        seed=config.random.seed,
        init_std=config.model.init_std,
        residual_init_scale=config.model.residual_init_scale,
        rank=local_rank,
        ranks=per_node,
    )

    shares = shares_of(plan.config, ranks, per_node)
    tensors = dict(model.named_parameters())
    mine = [share for share in shares if share.rank == rank]
    owned = tensors if peers is None else shards(tensors, mine, local_rank)
    places = {share.name: (share.start, share.shape) for share in mine}
    rounding = Rounding(config.random.seed)
    names: dict[str, list[str]] = {name: [] for name in config.optimizer.groups()}
    for parameter in shapes:
        names[config.optimizer.group_of(parameter)].append(parameter.name)
    groups = [
        spec.build(
            name=name,
            parameters=[(logical, owned[logical]) for logical in names[name] if logical in owned],
            state_dtype=config.optimizer.state_dtype,
            rounding=rounding,
            places=places,
        )
        for name, spec in config.optimizer.groups().items()
    ]
    together: Alone | Reduction = Alone()
    apart: dict[str, Apart] = {}
    if peers is not None:
        if peers.nodes.count > 1:
            apart = keep_apart(model, per_node)
        together = Reduction(
            nodes=peers.nodes,
            node=peers.device,
            parameters={name: tensor for name, tensor in tensors.items() if not is_expert(name) or name in apart},
            shares=[
                share
                for share in shares
                if not is_expert(share.name) or (share.name in apart and share.rank % per_node == local_rank)
            ],
            owned=owned,
            apart=apart,
        )

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
        groups=names,
        norms=GradientNorms(groups=names, shares=shares, owned=owned, ranks=together, device=device),
        ranks=together,
        shares=shares,
        replicas=Replicas(
            alike={name: tensor for name, tensor in tensors.items() if not is_expert(name)} | biases_of(model),
            experts={name: tensors[name] for name in apart},
            ranks_per_node=per_node,
            every=config.output.divergence_every,
        ),
        rounding=rounding,
        schedule=config.schedule.build(),
        loader=Loader(mixture, sequences=config.batch.sequences, microbatch=config.batch.microbatch),
        clip_norm=config.optimizer.clip_norm,
        microbatch=Microbatch(
            model=model,
            ranks=together,
            sequences=config.batch.microbatch,
            sequence_length=config.batch.sequence_length,
            tokens_per_step=config.batch.tokens_per_step,
            document_mask=config.batch.document_mask,
            device=device,
            recorder=recorder(device) if config.output.cuda_graph else None,
        ),
        document_mask=config.batch.document_mask,
        tokens_per_step=config.batch.tokens_per_step,
        device=device,
        arena=transport.arena,
    )
    for _, router in graph.routers():
        assert config.model.moe is not None
        router.balance = config.model.moe.router.build_balance(
            sequence_length=config.batch.sequence_length, tokens_per_step=config.batch.tokens_per_step
        )
    return graph


def recorder(device: torch.device) -> Recorder | None:
    """What records microbatches on a device; the CPU has nothing that could."""
    if device.type != "cuda":
        return None
    from nmoe.model.cuda_graph import CudaGraphs

    return CudaGraphs(device)


def keep_apart(model: Transformer, microbatches: int) -> dict[str, Apart]:
    """Have all experts keep the gradients of a pass's microbatches apart: by parameter, where."""
    return {
        f"{name}.{parameter}": apart
        for name, module in model.named_modules()
        if isinstance(module, GroupedExperts)
        for parameter, apart in module.keep_apart(microbatches).items()
    }


def shards(
    tensors: dict[str, torch.nn.Parameter], shares: list[Share], local_rank: int
) -> dict[str, torch.nn.Parameter]:
    """Shares of parameters as parameters of their own that share their memory; all of a tensor that is here as itself.

    local_rank: whose experts are here.
    """
    found = {}
    for share in shares:
        whole = tensors[share.name]
        first = local_rank * whole.numel() if is_expert(share.name) else 0
        if is_expert(share.name) and share.stop - share.start == whole.numel():
            found[share.name] = whole
            continue
        piece = whole.detach().view(-1)[share.start - first : share.stop - first]
        shard = torch.nn.Parameter(piece.view(share.local_shape))
        shard.grad_dtype = torch.float32
        found[share.name] = shard
    return found
