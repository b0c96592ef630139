"""What a plan costs, exactly: parameters, and FLOPs for each token. Bytes for each rank are in `nmoe.plan.memory`.

Parameters. Total counts every element of every trained tensor, embedding and head included (router
biases are state). Active is what one token uses: the same sum with each routed expert tensor
scaled by top_k / num_experts, an exact integer because an expert tensor's first axis is the experts.

FLOPs of training, for each token (PaLM, arXiv 2204.02311, appendix B): 6 for each active parameter
of a matrix product (2 forward, 4 backward), that is of every matrix, router, expert and the head
(tied to the embedding or not), without a table that is only looked up, and norms; and for attention 6 * score_width *
visible, where score_width is the multiply-adds of one query-key pair (all heads, scores and
values) and visible the mean number of tokens that a token sees: (S + 1) / 2 when causal,
(w (w + 1) / 2 + (S - w) w) / S within a window of w. Recomputation does not count, nor do document
boundaries, which only hide more.
"""

import attrs

from nmoe.plan.memory import Memory, memory_of, size
from nmoe.registry.config import Config
from nmoe.registry.output import RECOMPUTE


@attrs.frozen
class Cost:
    """What follows from a config for a number of ranks. memory: for each value of [output] recompute."""

    parameters_total: int
    parameters_active: int
    flops_per_token: int
    memory: dict[str, Memory]


def visible_pairs(sequence_length: int, window: int | None) -> int:
    """Query-key pairs of one causal sequence: token i sees min(i + 1, window) tokens."""
    w = sequence_length if window is None else min(window, sequence_length)
    return w * (w + 1) // 2 + (sequence_length - w) * w


def cost_of(config: Config, kinds: dict[str, str], *, ranks: int, ranks_per_node: int) -> Cost:
    """The cost of a checked config. kinds: the kind of each optimizer group, by its name."""
    model = config.model
    total = active = multiplied = 0
    for parameter in model.parameters():
        elements = used = size(parameter.shape)
        if parameter.role == "expert":
            assert model.moe is not None
            used = elements // parameter.shape[0] * model.moe.router.top_k
        total += elements
        active += used
        if parameter.role not in ("embedding", "norm"):
            multiplied += used
    return Cost(
        parameters_total=total,
        parameters_active=active,
        flops_per_token=6 * multiplied + attention_flops(config),
        memory={
            recompute: memory_of(config, kinds, recompute, ranks=ranks, ranks_per_node=ranks_per_node)
            for recompute in RECOMPUTE
        },
    )


def attention_flops(config: Config) -> int:
    """6 * score_width * mean visible tokens, over all layers, to the nearest integer."""
    length = config.batch.sequence_length
    pairs = sum(
        config.model.attention_of(layer).score_width * visible_pairs(length, config.model.window_of(layer))
        for layer in range(config.model.num_layers)
    )
    return (6 * pairs + length // 2) // length
