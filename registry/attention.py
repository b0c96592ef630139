"""[model.attention], [model.attention.local]: how a token sees the ones before it."""

from collections.abc import Iterator
from typing import ClassVar

import attrs

from nmoe.registry.component import Component, Parameter, Problem, divisible, key, section
from nmoe.registry.hopper import QUERY_WIDTHS, VALUE_WIDTHS, head_problems, norm_problems, width_problems
from nmoe.registry.rope import Yarn

# Queries, and heads of one sequence after the other, of a block of the cpu target (nmoe.model.attention).
CPU_QUERIES, CPU_HEADS = 64, 16


@attrs.frozen(kw_only=True)
class LocalWindow(Component):
    """Sliding-window layers with the kind and sizes of the global ones."""

    has_own_sizes: ClassVar[bool] = False

    window: int = key("tokens that a local layer attends to, itself included", minimum=1, unit="tokens")
    global_every: int = key(
        "a layer is global if (index + 1) is a multiple of this, or it is the last", minimum=2
    )
    sinks: bool = key("a learnt score for each head that takes part in the softmax and has no value", default=False)

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from window_problems(self, config, path)


def window_problems(local, config, path: str) -> Iterator[Problem]:
    if local.window >= config.batch.sequence_length:
        yield Problem(
            path=f"{path}.window",
            message=f"window of {local.window} tokens covers the whole sequence of {config.batch.sequence_length}",
            help="make it smaller, or remove [model.attention.local]",
        )
    if config.model.num_layers == 1:
        yield Problem(
            path=path,
            message="a model of one layer has no local layer: the last layer is always global",
            help="remove [model.attention.local]",
        )


@attrs.frozen(kw_only=True)
class Attention(Component):
    """What every kind has."""

    runs_on: ClassVar[tuple[str, ...]] = ("cpu", "sm_90a")

    num_heads: int = key("query heads", minimum=1, maximum=4096)
    rope_theta: float = key("base of the rotary embedding", default=10000.0, above=1.0)
    rope_scaling: Yarn | None = section("rotary positions beyond the context they were trained on", optional=True)
    local: LocalWindow | None = section("sliding-window layers between the global ones", optional=True)

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from head_problems(config, f"{path}.num_heads", self.num_heads)
        if self.rope_scaling is not None:
            yield from self.rope_scaling.owner_problems(
                f"{path}.rope_scaling", rotary_dim=self.rotary_dim, theta=self.rope_theta, mla=isinstance(self, Mla)
            )

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that turn with the position."""
        raise NotImplementedError

    @property
    def score_width(self) -> int:
        """Multiply-adds of one query-key pair: all heads' scores and values."""
        raise NotImplementedError

    def saved_bytes(self, element: int, target: str) -> int:
        """Bytes of one token kept for backward, from the projections' outputs to what the last projection reads.

        element: bytes of one value of [model] dtype. Kernels of the GPU targets also keep the float32 logarithm of
        each head's sum.
        """
        raise NotImplementedError

    def working_bytes(self, batch, window: int | None, element: int, target: str) -> int:
        """Bytes that attention's own backward of a microbatch needs: see `attention_working_bytes`."""
        raise NotImplementedError

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[Parameter]:
        """The tensors of one layer's attention."""
        raise NotImplementedError

    def build(self, *, hidden_size: int, norm_eps: float, window: int | None, sinks: bool):
        """One layer's attention on torch's current default device."""
        raise NotImplementedError

    def build_rope_scaling(self):
        """The scaling of this attention's rotary frequencies; None where it has none."""
        scaling = self.rope_scaling
        return None if scaling is None else scaling.build(rotary_dim=self.rotary_dim, theta=self.rope_theta)


def attention_working_bytes(
    batch, heads: int, widths: tuple[int, int, int], projected: int, window: int | None, element: int, target: str
) -> int:
    """Bytes of the gradients of q, k, v (their widths) and of the output, as wide as the larger of q and v, or after
    it of a projection of keys and values of the width `projected`.

    Kernels: also two float32 for each query of each head. CPU: the gradients of keys and values in float32
    before they are rounded, and for a block of queries and heads the scores and probabilities, while those of
    the block before are there with two gradients.
    """
    q, k, v = widths
    length = batch.sequence_length
    tokens = batch.microbatch * length
    gradients = tokens * (q + k + v + max(q, v, projected)) * element
    if target != "cpu":
        return gradients + tokens * heads * 8
    keys = length if window is None else min(length, window + CPU_QUERIES)
    scores = 2 * keys + 3 * min(keys, max(0, length - CPU_QUERIES))
    block = min(CPU_HEADS, batch.microbatch * heads) * min(CPU_QUERIES, length)
    return gradients + (tokens * (k + v) * 4 if element < 4 else 0) + 4 * block * scores


@attrs.frozen(kw_only=True)
class Mla(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: int | None = key(
        "rank of the query's compression; absent: queries come straight from x", default=None, minimum=1, maximum=2**20
    )
    kv_lora_rank: int = key("rank of the joint key and value compression", minimum=1, maximum=2**20)
    qk_nope_head_dim: int = key("width of a head's query and key without position", minimum=1, maximum=2**16)
    qk_rope_head_dim: int = key("width of a head's rotary query, and of the one rotary key", minimum=2, maximum=2**16)
    v_head_dim: int = key("width of a head's value", minimum=1, maximum=2**16)

    def check(self, config, path: str) -> Iterator[Problem]:
        width = self.qk_rope_head_dim
        yield from divisible(f"{path}.qk_rope_head_dim", width, "qk_rope_head_dim", 2, "the rotary pair")
        yield from super().check(config, path)
        whole = "a head's query, qk_nope_head_dim + qk_rope_head_dim,"
        yield from width_problems(config, f"{path}.qk_nope_head_dim", self.qk_head_dim, QUERY_WIDTHS, whole)
        yield from width_problems(config, f"{path}.v_head_dim", self.v_head_dim, VALUE_WIDTHS, "a head's value")
        for name in ("q_lora_rank", "kv_lora_rank"):
            yield from norm_problems(config, f"{path}.{name}", getattr(self, name) or 0, name)
        if config.platform.target == "sm_90a":  # a head's value is read behind the part of its key
            name, copied = "qk_nope_head_dim", "the elements of a 16-byte copy"
            yield from divisible(f"{path}.{name}", self.qk_nope_head_dim, name, 8, copied)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def score_width(self) -> int:
        """Multiply-adds of one query-key pair: all heads' scores and values."""
        return self.num_heads * (self.qk_head_dim + self.v_head_dim)

    def saved_bytes(self, element: int, target: str) -> int:
        """Compressed and full queries, keys and values, and the output; a float32 for each norm of a compression.

        The kernels read the values in the projection, which is kept with its part of the keys, and keep a float32 for
        each head.
        """
        queries = (self.q_lora_rank or 0) * 2 + self.num_heads * self.qk_head_dim
        keys = self.kv_lora_rank * 2 + self.qk_rope_head_dim + self.num_heads * self.qk_head_dim
        values = 2 * self.num_heads * self.v_head_dim
        norms = 4 * (1 if self.q_lora_rank is None else 2)
        kernel = 0 if target == "cpu" else self.num_heads * (self.qk_nope_head_dim * element + 4)
        return (queries + keys + values) * element + norms + kernel

    def working_bytes(self, batch, window: int | None, element: int, target: str) -> int:
        """See `Attention.working_bytes`."""
        q, v = self.num_heads * self.qk_head_dim, self.num_heads * self.v_head_dim
        projected = 0 if target == "cpu" else self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return attention_working_bytes(batch, self.num_heads, (q, q, v), projected, window, element, target)

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[Parameter]:
        heads = self.num_heads
        q = heads * self.qk_head_dim
        if self.q_lora_rank is None:
            yield Parameter(name=f"{prefix}.q_proj.weight", shape=(q, hidden_size), role="matrix")
        else:
            yield Parameter(name=f"{prefix}.q_a_proj.weight", shape=(self.q_lora_rank, hidden_size), role="matrix")
            yield Parameter(name=f"{prefix}.q_a_norm.weight_D", shape=(self.q_lora_rank,), role="norm", init="ones")
            yield Parameter(name=f"{prefix}.q_b_proj.weight", shape=(q, self.q_lora_rank), role="matrix")
        kv_a = self.kv_lora_rank + self.qk_rope_head_dim
        yield Parameter(name=f"{prefix}.kv_a_proj.weight", shape=(kv_a, hidden_size), role="matrix")
        yield Parameter(name=f"{prefix}.kv_a_norm.weight_D", shape=(self.kv_lora_rank,), role="norm", init="ones")
        kv_b = heads * (self.qk_nope_head_dim + self.v_head_dim)
        yield Parameter(name=f"{prefix}.kv_b_proj.weight", shape=(kv_b, self.kv_lora_rank), role="matrix")
        v = heads * self.v_head_dim
        yield Parameter(name=f"{prefix}.o_proj.weight", shape=(hidden_size, v), role="matrix", init="residual")

    def build(self, *, hidden_size: int, norm_eps: float, window: int | None, sinks: bool):
        from nmoe.model import mla

        score_factor = 1.0 if self.rope_scaling is None else self.rope_scaling.score_factor
        return mla.Mla(
            hidden_size=hidden_size, num_heads=self.num_heads, q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank, qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim, v_head_dim=self.v_head_dim,
            rope_theta=self.rope_theta, rope_scaling=self.build_rope_scaling(), score_factor=score_factor,
            norm_eps=norm_eps, window=window, sinks=sinks,
        )


@attrs.frozen(kw_only=True)
class Gqa(Attention):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245); num_kv_heads = num_heads is full attention."""

    num_kv_heads: int = key(
        "key and value heads, each shared by num_heads / num_kv_heads query heads", minimum=1, maximum=4096
    )
    head_dim: int = key("width of a head", minimum=2, maximum=2**16)
    qk_norm: bool = key("RMSNorm of each head's query and key before they turn", default=False)

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from divisible(f"{path}.head_dim", self.head_dim, "head_dim", 2, "the rotary pair")
        yield from divisible(f"{path}.num_heads", self.num_heads, "num_heads", self.num_kv_heads, "num_kv_heads")
        yield from super().check(config, path)
        yield from width_problems(config, f"{path}.head_dim", self.head_dim, VALUE_WIDTHS, "a head")

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def score_width(self) -> int:
        """Multiply-adds of one query-key pair: all heads' scores and values."""
        return self.num_heads * 2 * self.head_dim

    def saved_bytes(self, element: int, target: str) -> int:
        """Queries, keys, values, the output, and what the norms of heads read, with a float32 for each.

        The CPU's attention reads keys and values spread over the query heads; the kernels share them.
        """
        heads, shared = self.num_heads, self.num_heads if target == "cpu" else self.num_kv_heads
        width = (2 * heads + 2 * shared) * self.head_dim
        normed = self.num_heads + self.num_kv_heads if self.qk_norm else 0
        kernel = 0 if target == "cpu" else heads * 4
        return width * element + normed * (self.head_dim * element + 4) + kernel

    def working_bytes(self, batch, window: int | None, element: int, target: str) -> int:
        """See `Attention.working_bytes`."""
        q = self.num_heads * self.head_dim
        kv = q if target == "cpu" else self.num_kv_heads * self.head_dim
        return attention_working_bytes(batch, self.num_heads, (q, kv, kv), 0, window, element, target)

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[Parameter]:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield Parameter(name=f"{prefix}.q_proj.weight", shape=(q, hidden_size), role="matrix")
        yield Parameter(name=f"{prefix}.k_proj.weight", shape=(kv, hidden_size), role="matrix")
        yield Parameter(name=f"{prefix}.v_proj.weight", shape=(kv, hidden_size), role="matrix")
        if self.qk_norm:
            for which in ("q_norm", "k_norm"):
                yield Parameter(name=f"{prefix}.{which}.weight_D", shape=(self.head_dim,), role="norm", init="ones")
        yield Parameter(name=f"{prefix}.o_proj.weight", shape=(hidden_size, q), role="matrix", init="residual")

    def build(self, *, hidden_size: int, norm_eps: float, window: int | None, sinks: bool):
        from nmoe.model import gqa

        return gqa.Gqa(
            hidden_size=hidden_size, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim, qk_norm=self.qk_norm, rope_theta=self.rope_theta,
            rope_scaling=self.build_rope_scaling(), norm_eps=norm_eps, window=window, sinks=sinks,
        )


@attrs.frozen(kw_only=True)
class LocalMla(Mla):
    """Sliding-window layers with sizes of their own, as MLA."""

    has_own_sizes: ClassVar[bool] = True

    window: int = key("tokens that a local layer attends to, itself included", minimum=1, unit="tokens")
    global_every: int = key("a layer is global if (index + 1) is a multiple of this, or it is the last", minimum=2)
    sinks: bool = key("a learnt score for each head that takes part in the softmax and has no value", default=False)
    local: None = attrs.field(default=None, init=False, metadata={"hidden": True})

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from super().check(config, path)
        yield from window_problems(self, config, path)


@attrs.frozen(kw_only=True)
class LocalGqa(Gqa):
    """Sliding-window layers with sizes of their own, as GQA."""

    has_own_sizes: ClassVar[bool] = True

    window: int = key("tokens that a local layer attends to, itself included", minimum=1, unit="tokens")
    global_every: int = key("a layer is global if (index + 1) is a multiple of this, or it is the last", minimum=2)
    sinks: bool = key("a learnt score for each head that takes part in the softmax and has no value", default=False)
    local: None = attrs.field(default=None, init=False, metadata={"hidden": True})

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from super().check(config, path)
        yield from window_problems(self, config, path)
