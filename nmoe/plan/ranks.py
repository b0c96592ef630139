"""What a number of ranks makes of a config: who keeps which state, and how tokens travel.

The same deal is what training uses (`nmoe.graph`), so that what the plan prints is what happens.
"""

import attrs

from nmoe.registry.config import Config
from nmoe.registry.optimizer import Muon
from nmoe.sharding import Share, Tensor, deal

STATE_DTYPE = {"fp32": "float32", "bf16": "bfloat16"}


@attrs.frozen(kw_only=True)
class Balance:
    """What one rank keeps: elements of each rule of `nmoe.sharding`."""

    rank: int
    rows: int
    matrices: int
    experts: int


@attrs.frozen(kw_only=True)
class Traffic:
    """Bytes that a rank sends to other nodes, at most: of gradients in each of a step's passes, and of weights."""

    passes: int
    parts: int
    weights: int


def traffic_of(config: Config, ranks: int, ranks_per_node: int) -> Traffic:
    """Of M ranks a node, rank l sends M float32 parts of what its counterparts own, and what it owns itself to each."""
    kept = [0] * ranks
    for share in shares_of(config, ranks, ranks_per_node):
        kept[share.rank] += share.stop - share.start
    width = {"bf16": 2, "fp32": 4}[config.model.dtype]
    theirs = [sum(kept[rank % ranks_per_node :: ranks_per_node]) - kept[rank] for rank in range(ranks)]
    return Traffic(
        passes=config.batch.microbatches // ranks,
        parts=4 * ranks_per_node * max(theirs),
        weights=(ranks // ranks_per_node - 1) * width * max(kept),
    )


def shares_of(config: Config, ranks: int, ranks_per_node: int) -> tuple[Share, ...]:
    """Every rank's share of every parameter, in the parameters' order."""
    return tuple(deal(_tensors(config), ranks=ranks, ranks_per_node=ranks_per_node))


def balance_of(config: Config, ranks: int, ranks_per_node: int) -> tuple[Balance, ...]:
    """How much each rank keeps."""
    rules = {tensor.name: tensor.rule for tensor in _tensors(config)}
    kept = [dict.fromkeys(("rows", "tensors", "experts"), 0) for _ in range(ranks)]
    for share in shares_of(config, ranks, ranks_per_node):
        kept[share.rank][rules[share.name]] += share.stop - share.start
    return tuple(
        Balance(rank=rank, rows=one["rows"], matrices=one["tensors"], experts=one["experts"])
        for rank, one in enumerate(kept)
    )


def transport_of(config: Config, ranks_per_node: int) -> str:
    """How tokens reach their experts: "local" on one rank, else "shm" between processes, "cuda" between GPUs."""
    if ranks_per_node == 1:
        return "local"
    return "shm" if config.platform.target == "cpu" else "cuda"


def is_expert(name: str) -> bool:
    """Whether a parameter is of the routed experts, of which each rank of a node has its own."""
    return ".experts." in name


def _tensors(config: Config) -> list[Tensor]:
    groups, found = config.optimizer.groups(), []
    for parameter in config.model.parameters():
        rule = "tensors" if isinstance(groups[config.optimizer.group_of(parameter)], Muon) else "rows"
        if parameter.role == "expert":
            rule = "experts"
        state_dtype = STATE_DTYPE[config.optimizer.state_dtype]
        found.append(Tensor(name=parameter.name, shape=parameter.shape, rule=rule, state_dtype=state_dtype))
    return found
