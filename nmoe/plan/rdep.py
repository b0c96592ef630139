"""What the experts of several ranks take, in exact integers: buffers of the transport, and the arena of several GPUs.

T is the tokens of the largest microbatch, of training or evaluation; N the ranks of a node, K the experts of a token, E
all experts, D and F the hidden sizes of a row and of an expert, e the bytes of a value of [model] dtype.

    rows of one layer   at most N T min(K, E / N), whatever the routing; T K of a training microbatch on the average
    buffers             N T rows received and T K rows returned in dtype, 12 bytes of index and weight for each of
                        N T K pairs, 4 for each weight's gradient returned, and two buffers of E + N counts of 8
                        bytes. On a GPU 8 bytes a pair and 4 a token received, and the counts of all ranks, 4
                        bytes each
    received            what an owner on a GPU copies out of them for backward, with room for the most: N T rows of D e,
                        8 K of weights and indices and 4 for each of them, 8 for each row of a layer
    arena               2 F e for each row that [output] activation_rows gives to all layers' pre-activations. Without
                        it what fits: the device's memory as `nmoe.registry.platform` names it less everything
                        else that the plan counts at the peak; at most the worst case of all layers, at least
                        the most rows of one, as where each layer's backward computes its experts again
"""

from collections.abc import Iterator

import attrs

from nmoe.registry.config import Config
from nmoe.registry.hopper import INDICES
from nmoe.registry.output import MOST_ROWS
from nmoe.registry.platform import DEVICE_BYTES

BYTES = {"bf16": 2, "fp32": 4}


@attrs.frozen(kw_only=True)
class Arena:
    """Rows of the arena of one rank, those of one layer at most, and of all layers on the average and at most."""

    rows: int
    layer: int
    average: int
    worst: int


def most_tokens(config: Config) -> int:
    """T: tokens of the largest microbatch that the transport carries."""
    sequences = config.batch.microbatch
    if config.eval.bpb is not None:
        sequences = max(sequences, config.eval.bpb.sequences)
    return sequences * config.batch.sequence_length


def between_gpus(config: Config, ranks_per_node: int) -> bool:
    """Whether tokens travel between GPUs."""
    return config.model.moe is not None and ranks_per_node > 1 and config.platform.target != "cpu"


def most_rows(config: Config, ranks_per_node: int) -> int:
    """The most rows that one layer can bring to a rank."""
    assert config.model.moe is not None
    router = config.model.moe.router
    return ranks_per_node * most_tokens(config) * min(router.top_k, router.num_experts // ranks_per_node)


def rdep_bytes(config: Config, ranks_per_node: int) -> int:
    """Receive and return buffers of the expert transport; nothing on one rank."""
    moe = config.model.moe
    if moe is None or ranks_per_node == 1:
        return 0
    tokens, row = most_tokens(config), config.model.hidden_size * BYTES[config.model.dtype]
    pairs = tokens * moe.router.top_k
    counts, index = 2 * 8 * (moe.router.num_experts + ranks_per_node), 12 * pairs
    if config.platform.target != "cpu":
        counts, index = counts // 2 * ranks_per_node, 8 * pairs + 4 * tokens
    return ranks_per_node * (tokens * row + index) + pairs * (row + 4) + counts


def received_bytes(config: Config, ranks_per_node: int) -> int:
    """What a GPU among several keeps of what it received for one layer."""
    assert config.model.moe is not None
    token = config.model.hidden_size * BYTES[config.model.dtype] + 8 * config.model.moe.router.top_k + 4
    return ranks_per_node * most_tokens(config) * token + 8 * most_rows(config, ranks_per_node)


def row_bytes(config: Config) -> int:
    """One row of the arena."""
    assert config.model.moe is not None
    return 2 * config.model.moe.experts.intermediate_size * BYTES[config.model.dtype]


def arena_of(config: Config, recompute: str, ranks_per_node: int, others: int) -> Arena:
    """The arena of each of several GPUs. others: bytes of everything else that is alive at the peak of a step."""
    model = config.model
    assert model.moe is not None
    layers, pairs = model.num_layers - model.moe.num_dense_layers, model.moe.router.top_k
    layer, tokens = most_rows(config, ranks_per_node), config.batch.microbatch * config.batch.sequence_length
    worst = max(layer, layers * layer * tokens // most_tokens(config))
    fitting = (DEVICE_BYTES[config.platform.target] - others) // row_bytes(config)
    rows = max(layer, min(fitting, worst, MOST_ROWS))
    if recompute == "layer":
        rows = layer
    elif config.output.activation_rows is not None:
        rows = config.output.activation_rows
    return Arena(rows=rows, layer=layer, average=layers * tokens * pairs, worst=worst)


def arena_problems(config: Config, ranks_per_node: int) -> Iterator[tuple[str, str]]:
    """What is wrong with the rows of one layer, and the way out: they must fit into the arena, and be counted."""
    if config.model.moe is None or not between_gpus(config, ranks_per_node):
        return
    layer, rows = most_rows(config, ranks_per_node), config.output.activation_rows
    if rows is not None and rows < layer:
        message = f"activation_rows = {rows} is too few for a layer of {ranks_per_node} GPUs, which can have {layer}"
        yield message, f"set activation_rows in [output] to at least {layer}, or remove it"
    parts = max(2, -(-config.model.moe.experts.intermediate_size // 128))  # as nmoe.registry.hopper of one GPU
    if layer > MOST_ROWS or layer * parts >= INDICES:
        message = f"one layer of {ranks_per_node} GPUs can have {layer} rows, more than the kernels' indices hold"
        yield message, "lower microbatch in [batch], or --ranks-per-node"
