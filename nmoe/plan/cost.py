"""What a plan costs, in exact integers: parameters, FLOPs for each token, bytes for each rank.

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

Memory, for each rank, in bytes, T the tokens of a microbatch, N the ranks of a node:

    weights       elements * dtype; experts divided by N, everything else on every rank
    gradients     the same elements in float32
    optimizer     AdamW two moments, Muon one, and a master copy where dtype is not state_dtype; all in
                  state_dtype; experts divided by N, everything else by the number of all ranks
    activations   T * (what the layers save for backward), a layer saving two residual streams and
                  two normed ones, and what its attention and its MLP or MoE say (`saved_width`),
                  in dtype; and the final norm's input and output
    rdep_buffers  for N > 1: N * T rows received and T * top_k rows returned in dtype, and 16 bytes of
                  index and weight for each of N * T * top_k pairs; on one rank nothing
"""

import attrs

from nmoe.registry.config import Config

BYTES = {"bf16": 2, "fp32": 4}
MOMENTS = {"adamw": 2, "muon": 1}


@attrs.frozen
class Cost:
    """What follows from a config for a number of ranks."""

    parameters_total: int
    parameters_active: int
    flops_per_token: int
    memory_bytes_per_rank: dict[str, int]


def size(shape: tuple[int, ...]) -> int:
    """Elements of a tensor."""
    product = 1
    for axis in shape:
        product *= axis
    return product


def visible_pairs(sequence_length: int, window: int | None) -> int:
    """Query-key pairs of one causal sequence: token i sees min(i + 1, window) tokens."""
    w = sequence_length if window is None else min(window, sequence_length)
    return w * (w + 1) // 2 + (sequence_length - w) * w


def cost_of(config: Config, kinds: dict[str, str], *, ranks: int, ranks_per_node: int) -> Cost:
    """The cost of a checked config. kinds: the kind of each optimizer group, by its name."""
    model, batch = config.model, config.batch
    total = active = multiplied = 0
    weights = gradients = optimizer = 0
    weight_bytes, state_bytes = BYTES[model.dtype], BYTES[config.optimizer.state_dtype]
    master = 0 if model.dtype == config.optimizer.state_dtype else state_bytes
    for parameter in model.parameters():
        elements = size(parameter.shape)
        used = elements
        local, owned = elements, -(-elements // ranks)
        if parameter.role == "expert":
            assert model.moe is not None
            used = elements // parameter.shape[0] * model.moe.router.top_k
            local = owned = elements // ranks_per_node
        total += elements
        active += used
        if parameter.role not in ("embedding", "norm"):
            multiplied += used
        weights += local * weight_bytes
        gradients += local * BYTES[config.optimizer.grad_dtype]
        moments = MOMENTS[kinds[config.optimizer.group_of(parameter)]]
        optimizer += owned * (moments * state_bytes + master)
    tokens = batch.microbatch * batch.sequence_length
    memory = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": tokens * saved_width(config) * weight_bytes,
        "rdep_buffers": rdep_bytes(config, tokens, ranks_per_node),
    }
    memory["total"] = sum(memory.values())
    return Cost(
        parameters_total=total,
        parameters_active=active,
        flops_per_token=6 * multiplied + attention_flops(config),
        memory_bytes_per_rank=memory,
    )


def attention_flops(config: Config) -> int:
    """6 * score_width * mean visible tokens, over all layers, to the nearest integer."""
    length = config.batch.sequence_length
    pairs = sum(
        config.model.attention_of(layer).score_width * visible_pairs(length, config.model.window_of(layer))
        for layer in range(config.model.num_layers)
    )
    return (6 * pairs + length // 2) // length


def saved_width(config: Config) -> int:
    """Elements that are kept for the backward pass of one token, over all layers."""
    model = config.model
    width = 2 * model.hidden_size
    for layer in range(model.num_layers):
        width += 4 * model.hidden_size + model.attention_of(layer).saved_width
        if layer < model.num_dense_layers:
            assert model.mlp is not None
            width += model.mlp.saved_width
        else:
            assert model.moe is not None
            width += model.moe.saved_width
    return width


def rdep_bytes(config: Config, tokens: int, ranks_per_node: int) -> int:
    """Receive and return buffers of the expert transport."""
    moe = config.model.moe
    if moe is None or ranks_per_node == 1:
        return 0
    row = config.model.hidden_size * BYTES[config.model.dtype]
    pairs = tokens * moe.router.top_k
    return ranks_per_node * tokens * row + pairs * row + ranks_per_node * pairs * 16
