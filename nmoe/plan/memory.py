"""What a plan needs of memory, for each rank, in bytes, exactly.

T is the tokens of a microbatch, M the rank's microbatches of a step, N the ranks of a node, D the hidden size, V the
vocabulary, e the bytes of a value of [model] dtype. Whole kinds:

    weights       elements * e; experts divided by N, everything else on every rank
    gradients     the same elements in float32
    optimizer     AdamW two moments, Muon one, and a master copy where dtype is not state_dtype; all in
                  state_dtype, of what the rank keeps that keeps most (`nmoe.sharding`)
    activations   what a forward keeps for backward, T times per token: the final norm's input and output
                  (2 D e, and 4 for a norm's scale), 8 where documents are masked (on a GPU also in each
                  layer's first half), and in each layer

                      first half    D e its input x, 4 + D e the norm of x, and what attention saves
                      second half   D e the stream h, 4 + D e the norm of h, the routing of a MoE layer,
                                    and what MLP or experts and shared experts save

                  (`saved_bytes` and `routing_bytes` of the specs). recompute = "attention" leaves x alone of
                  the first half; "layer" leaves x and, of a MoE layer, the norm of h and the routing. On several
                  GPUs of a node the second half of a MoE layer keeps what its experts received, with room for the
                  most, and no pre-activations of theirs
    activation_arena  on several GPUs: these, of all layers (`nmoe.plan.rdep`, which has its rows and the next)
    rdep_buffers  for N > 1, receive and return buffers of the experts' transport
    reduction     for several ranks: what all hold once more in float32, where ranks show each other gradients and
                  weights, and the sums of what the rank keeps of that. On G nodes, whose ranks do not see each other's
                  memory, also, in float32: the (G - 1) N parts of what the rank keeps, experts included, that come
                  from other nodes; the sums of its experts; and in the place of their gradients N times these,
                  each microbatch's of the node by itself. On a GPU two boxes for the norms of all ranks' rows, 4 N
                  bytes for each row of the rank that keeps most of them

They are not at their largest together: with one microbatch, activations shrink while gradients grow. The
peak is the largest, over the moments of a step, of what is alive then. Weights, optimizer and buffers
always are, and beside them

    moment                  gradients                    activations      working set
    loss, forward           none                         all              its two gradients 4 T D + 4 V D, a chunk of
                                                                          C tokens' logits 4 C V; CPU: the head in
                                                                          float32 4 V D where it is not; GPU: the
                                                                          chunk's gradient 2 C V
    loss, backward          the head's                   all              4 T D + 4 V D, T D e; GPU: 8 T D, T D e, since
                                                                          the head's is the loss's own
    layer, second half      of later layers and of its   of it and        what the half computes again; two gradients
                            MLP or MoE                   those before     of the stream 2 T D e; `working_bytes`
    layer, first half       of later layers and its      of its first     the same for this half
                            own                          half and before
    embedding               all                          none             T D (e + 4), without the 4 in float32
    norm of the gradients   all                          none             CPU: squares, 4 * 2^18, at most those of the
                                                                          largest tensor; GPU: 4 for each row
    optimizer               all                          none             what its largest group needs

with C = min(T, 1024), on a GPU the power of two that makes 6 C V at most 1.5 GiB (256 at least), and in the working
set of all of them: the batch, three int64 for each of a step's tokens on the rank, on a GPU of a microbatch's; on a
GPU two cuBLAS workspaces of 32 MiB, for forward's thread and backward's; in those of a microbatch the final norm's
output T D e, where it is not among the activations. For M > 1 the second microbatch finds all gradients there: they
are alive at all moments, and those that a moment makes are in its working set until they are added; experts add to
theirs where they are. Of several ranks it finds the experts' alone, as do the norm and the optimizer: the others have
gone to their owners' sums. A tied table's gradient is made by the loss, and waits for the embedding's through all
layers.

Of the optimizer, AdamW needs next to nothing: 24 bytes for each of at most 2^16 values that are rounded to
state_dtype bf16. Muon works on pieces of P values, all matrices of one shape up to 2^24 values, or one matrix,
A the sum of their short sides squared: 12 P + 8 A bytes iterating in float32, 8 P + 4 A in bf16; and 4 bytes for
each value of the piece's last tensor, at most the largest, with Nesterov and again where state_dtype is bf16.

With [output] cuda_graph a GPU keeps all that a microbatch needs for its recordings, so what the last two moments
need is not alive instead of it but beside it, as is what an evaluation of T' tokens needs (`beside_graphs`): the
largest of the three, and a third cuBLAS workspace where there are products in it. The evaluation's is the largest of

    attention   2 T' D e, and what attention saves of T' tokens
    MLP or MoE  3 T' D e, half as much again as it saves, and D e for each of a token's K pairs; between GPUs
                (D + F) e for the most rows, and what is received
    loss        T' D e and 4 for each logit of 1024 tokens

Not counted: what torch's own kernels take for themselves, routers' biases and counters, rotary tables, what
allocators round up and cannot use, and memory outside the allocator (context, code, libraries).
"""

from collections.abc import Iterator
from typing import TypeAlias

import attrs

from nmoe.plan.ranks import is_expert, shares_of
from nmoe.plan.rdep import (
    BYTES,
    Arena,
    arena_of,
    between_gpus,
    most_rows,
    rdep_bytes,
    received_bytes,
    row_bytes,
)
from nmoe.registry.config import Config
from nmoe.registry.optimizer import Muon

MOMENTS = {"adamw": 2, "muon": 1}

# What the parts at work are cut into; a test compares these with theirs.
LOSS_CHUNK_TOKENS = 1024
LOSS_CHUNK_BYTES = 3 << 29
ROUNDING_BLOCK = 1 << 16
MUON_PIECE = 1 << 24
NORM_VALUES = 1 << 18
DELIVERED = ("norm of the gradients", "optimizer")
"""Moments at which several ranks' gradients have gone to their owners."""
CUBLAS_WORKSPACE = 32 * 2**20


@attrs.frozen(kw_only=True)
class Memory:
    """What one rank needs, in bytes.

    whole: each kind at its largest. moment: when most is alive. at_peak: what of each kind is alive then,
    with the `working_set` and their sum `total`, the peak. arena: of several GPUs, None elsewhere.
    """

    whole: dict[str, int]
    moment: str
    at_peak: dict[str, int]
    arena: Arena | None


def size(shape: tuple[int, ...]) -> int:
    """Elements of a tensor."""
    product = 1
    for axis in shape:
        product *= axis
    return product


@attrs.frozen(kw_only=True)
class Half:
    """One half of a layer.

    gradients: of its parameters; made: those that are made before they are added; working: what its backward needs;
    kept, again: what a forward keeps, and what backward computes again; all in bytes.
    """

    name: str
    gradients: int
    made: int
    kept: int
    again: int
    working: int


def halves(
    config: Config, layer: int, recompute: str, gradients: dict[str, int], made: dict[str, int], per_node: int
) -> tuple[Half, Half]:
    """The two halves of a layer: attention, and MLP or MoE. gradients, made: bytes by part, as in `Half`.

    per_node: ranks of a node.
    """
    model, target = config.model, config.platform.target
    tokens, element = config.batch.microbatch * config.batch.sequence_length, BYTES[config.model.dtype]
    stream = model.hidden_size * element
    attention = model.attention_of(layer)
    attended, received = 4 + stream + attention.saved_bytes(element, target), 0
    if config.batch.document_mask and target != "cpu":
        attended += 8
    if layer < model.num_dense_layers:
        assert model.mlp is not None
        routing, saved = 0, model.mlp.saved_bytes(element)
        working = tokens * model.mlp.working_bytes(element, target)
    else:
        assert model.moe is not None
        gpus, rows = 1, tokens * model.moe.router.top_k
        if between_gpus(config, per_node):
            gpus, rows, received = per_node, most_rows(config, per_node), received_bytes(config, per_node)
        routing, saved = model.moe.routing_bytes(target, gpus), model.moe.saved_bytes(element, target, gpus)
        working = model.moe.working_bytes(tokens, rows, model.hidden_size, element, target, gpus)
    second = stream + 4 + stream + routing + saved
    kept = {
        "none": (tokens * (stream + attended), tokens * second + received),
        "attention": (tokens * stream, tokens * second + received),
        "layer": (tokens * stream, tokens * (stream + routing) if routing else 0),
    }[recompute]
    again = {
        "none": (0, 0),
        "attention": (tokens * attended, 0),
        "layer": (tokens * (attended + stream + 4), tokens * saved + received)
        if routing
        else (tokens * attended, tokens * (attended + second)),
    }[recompute]
    work = (attention.working_bytes(config.batch, model.window_of(layer), element, target), working)
    first, second_half = (
        Half(
            name=f"backward of layer {layer}, {part}",
            gradients=gradients[f"{layer}.{part}"],
            made=made[f"{layer}.{part}"],
            kept=kept[i],
            again=again[i],
            working=tokens * 2 * stream + work[i],
        )
        for i, part in enumerate(("attention", "ffn"))
    )
    return first, second_half


def memory_of(config: Config, kinds: dict[str, str], recompute: str, *, ranks: int, ranks_per_node: int) -> Memory:
    """One rank's memory with a value of [output] recompute; kinds as in `cost_of`."""
    model, batch, state = config.model, config.batch, BYTES[config.optimizer.state_dtype]
    tokens, element = batch.microbatch * batch.sequence_length, BYTES[model.dtype]
    master = 0 if model.dtype == config.optimizer.state_dtype else state
    whole = dict.fromkeys(("weights", "gradients", "optimizer"), 0)
    gradients: dict[str, int] = {}
    kept: dict[str, int] = {}
    made: dict[str, int] = {}
    alike = apart = 0
    nodes = ranks // ranks_per_node
    for parameter in model.parameters():
        elements = size(parameter.shape)
        local = elements // ranks_per_node if parameter.role == "expert" else elements
        part = part_of(parameter.name)
        gradient = local * BYTES[config.optimizer.grad_dtype]
        if parameter.role == "expert" and nodes > 1:
            gradient, apart = 0, apart + local * ranks_per_node
        gradients[part] = gradients.get(part, 0) + gradient
        made[part] = made.get(part, 0) + (0 if parameter.role == "expert" else gradient)
        whole["weights"] += local * element
        kept[parameter.name] = MOMENTS[kinds[config.optimizer.group_of(parameter)]] * state + master
        alike += 0 if parameter.role == "expert" else elements
    whole["gradients"] = sum(gradients.values())
    whole["optimizer"], owned, rows = most_kept(config, kept, ranks, ranks_per_node)
    several, experts = batch.microbatches // ranks > 1, whole["gradients"] - sum(made.values())
    alive = made if several and ranks > 1 else gradients  # of a pass that is not the first
    layers = [halves(config, layer, recompute, alive, made, ranks_per_node) for layer in range(model.num_layers)]
    per_token = 2 * model.hidden_size * element + 4 + 8 * batch.document_mask
    whole["activations"] = tokens * per_token + sum(half.kept for layer in layers for half in layer)
    if between_gpus(config, ranks_per_node):
        whole["activation_arena"] = 0
    whole["rdep_buffers"] = rdep_bytes(config, ranks_per_node)
    if ranks > 1:
        boxes = 0 if config.platform.target == "cpu" else 2 * ranks_per_node * rows
        whole["reduction"] = 4 * (alike + owned + (nodes - 1) * ranks_per_node * owned + apart + boxes)

    on_cpu = config.platform.target == "cpu"
    always = 24 * (batch.tokens_per_step // ranks) if on_cpu else 24 * tokens + 2 * CUBLAS_WORKSPACE
    at_moments = list(moments(config, layers, alive, whole))
    beside = moments_beside(config, kinds, whole)
    if config.output.cuda_graph and not on_cpu:
        products = config.eval.bpb is not None or "muon" in kinds.values()
        needs = [evaluation_working(config, ranks_per_node), *(working for *_, working in beside)]
        whole["beside_graphs"] = max(needs) + products * CUBLAS_WORKSPACE
    else:
        at_moments += beside
    peak = {"total": 0}
    for name, own, done, activations, working in at_moments:
        if ranks == 1:
            found = whole["gradients"] if several else done
        else:
            found = experts if name in DELIVERED else done + (experts if several else 0)
        at = {**whole, "gradients": found, "activations": activations}
        at["working_set"] = always + working + (own if several and ranks == 1 else 0)
        at["total"] = sum(at.values())
        if at["total"] > peak["total"]:
            moment, peak = name, at
    arena = None
    if between_gpus(config, ranks_per_node):
        arena = arena_of(config, recompute, ranks_per_node, peak["total"])
        whole["activation_arena"] = peak["activation_arena"] = arena.rows * row_bytes(config)
        peak["total"] += whole["activation_arena"]
    return Memory(whole=whole, moment=moment, at_peak=peak, arena=arena)


def most_kept(config: Config, bytes_of: dict[str, int], ranks: int, ranks_per_node: int) -> tuple[int, int, int]:
    """Bytes of state of the rank that keeps most, elements of the one that adds most, and rows of the one with most.

    bytes_of: state of one element, by parameter.
    """
    state, sums, rows = [0] * ranks, [0] * ranks, [0] * ranks
    for share in shares_of(config, ranks, ranks_per_node):
        count = share.stop - share.start
        state[share.rank] += count * bytes_of[share.name]
        rows[share.rank] += share.rows
        sums[share.rank] += 0 if is_expert(share.name) and ranks == ranks_per_node else count
    return max(state), max(sums), max(rows)


def part_of(name: str) -> str:
    """The part of the model that a parameter's gradient comes with: "3.attention", "3.ffn", "norm", "head", ..."""
    first, _, rest = name.partition(".")
    if first != "layers":
        return first
    layer, part = rest.split(".")[:2]
    return f"{layer}.{'attention' if part.startswith('attention') else 'ffn'}"


Moment: TypeAlias = tuple[str, int, int, int, int]
"""Name, gradients made in it, and alive gradients, activations, working; of a step with one microbatch."""


def moments(
    config: Config, layers: list[tuple[Half, Half]], gradients: dict[str, int], whole: dict[str, int]
) -> Iterator[Moment]:
    """The moments of a microbatch. gradients: bytes by part. See the module."""
    model, batch = config.model, config.batch
    tokens, element = batch.microbatch * batch.sequence_length, BYTES[model.dtype]
    stream = tokens * model.hidden_size
    head, on_cpu = model.vocab_size * model.hidden_size, config.platform.target == "cpu"
    chunk = min(tokens, LOSS_CHUNK_TOKENS if on_cpu else gpu_loss_chunk(model.vocab_size))
    loss, output = 4 * (stream + head), stream * element
    logits, widened_head = (4 if on_cpu else 6) * chunk * model.vocab_size, 4 * head if on_cpu and element < 4 else 0
    yield "loss, forward", 0, 0, whole["activations"], loss + logits + widened_head
    tied = gradients["embedding"] if model.tie_embeddings else 0
    done = tied or gradients["head"]
    yield "loss, backward", done, done, whole["activations"], output + (loss if on_cpu else 8 * stream)
    done += gradients["norm"]
    alive = sum(half.kept for layer in layers for half in layer)
    for layer in reversed(layers):
        for half in reversed(layer):
            done += half.gradients
            yield half.name, half.made + tied, done, alive, output + half.again + half.working
            alive -= half.kept
    done += gradients["embedding"] - tied
    widened = 0 if element == 4 else 4 * stream
    yield "embedding, backward", gradients["embedding"], done, 0, 2 * output + widened + tied


def moments_beside(config: Config, kinds: dict[str, str], whole: dict[str, int]) -> list[Moment]:
    """The moments behind a step's microbatches. kinds: as in `cost_of`. See the module."""
    shapes, on_cpu = [parameter.shape for parameter in config.model.parameters()], config.platform.target == "cpu"
    values = min(NORM_VALUES, max(map(size, shapes))) if on_cpu else sum(size(shape[:-1]) for shape in shapes)
    working = max(optimizer_working(config, name, kinds) for name in kinds)
    done = whole["gradients"]
    return [(DELIVERED[0], 0, done, 0, 4 * values), (DELIVERED[1], 0, done, 0, working)]


def evaluation_working(config: Config, per_node: int) -> int:
    """Bytes that an evaluation on a GPU needs; 0 without one. per_node: ranks of a node. See the module."""
    model, evaluated, target = config.model, config.eval.bpb, config.platform.target
    if evaluated is None:
        return 0
    tokens, element = evaluated.sequences * config.batch.sequence_length, BYTES[model.dtype]
    stream = model.hidden_size * element
    needs = [tokens * stream + 4 * LOSS_CHUNK_TOKENS * model.vocab_size]
    for layer in range(model.num_layers):
        needs.append(tokens * (2 * stream + model.attention_of(layer).saved_bytes(element, target)))
        if layer < model.num_dense_layers:
            assert model.mlp is not None
            saved = model.mlp.saved_bytes(element)
        else:
            assert model.moe is not None
            if between_gpus(config, per_node):
                saved, width = model.moe.saved_bytes(element, target, per_node), model.moe.experts.intermediate_size
                rows = most_rows(config, per_node) * (stream + width * element)
                needs.append(rows + received_bytes(config, per_node))
            else:
                saved = model.moe.saved_bytes(element, target)
                needs.append(tokens * model.moe.router.top_k * stream)
        needs[-1] += tokens * (3 * stream + saved + saved // 2)
    return max(needs)


def gpu_loss_chunk(vocab_size: int) -> int:
    """Tokens of a chunk of the loss on a GPU, at least 256: the power of two that fills the room for a chunk."""
    return max(256, 1 << max(0, (LOSS_CHUNK_BYTES // (6 * vocab_size)).bit_length() - 1))


def optimizer_working(config: Config, group: str, kinds: dict[str, str]) -> int:
    """Bytes that the update of one group needs."""
    optimizer, rounded = config.optimizer, config.optimizer.state_dtype == "bf16"
    shapes = [p.shape for p in config.model.parameters() if optimizer.group_of(p) == group]
    if kinds[group] == "adamw":
        return 24 * min(ROUNDING_BLOCK, max(map(size, shapes), default=0)) if rounded else 0
    muon = optimizer.groups()[group]
    assert isinstance(muon, Muon)
    matrices: dict[tuple[int, int], int] = {}
    for shape in shapes:
        short, long = sorted(shape[-2:])
        matrices[short, long] = matrices.get((short, long), 0) + size(shape[:-2])
    threads = config.platform.threads or 1
    pieces = []
    for (short, long), count in matrices.items():
        together = max(min(count, max(1, MUON_PIECE // (short * long))), threads)
        values, grams = together * short * long, together * short * short
        iterated = 12 * values + 8 * grams if muon.ns_dtype == "fp32" else 8 * values + 4 * grams
        tensor = max(size(shape) for shape in shapes if sorted(shape[-2:]) == [short, long])
        pieces.append(iterated + 4 * min(values, tensor) * (muon.nesterov + rounded))
    return max(pieces, default=0)
