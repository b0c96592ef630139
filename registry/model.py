"""[model], [model.mlp]: the transformer that holds the parts of the other sections."""

from collections.abc import Iterator

import attrs

from nmoe.registry.attention import Attention
from nmoe.registry.component import Component, Parameter, Problem, key, section
from nmoe.registry.hopper import norm_problems
from nmoe.registry.moe import Moe


@attrs.frozen(kw_only=True)
class Mlp(Component):
    """SwiGLU: y = W_down (silu(W_gate x) * W_up x)."""

    intermediate_size: int = key("hidden width of the dense SwiGLU layers", minimum=1, maximum=2**20)

    def check(self, config, path: str) -> Iterator[Problem]:
        if config.model.num_dense_layers == 0:
            yield Problem(
                path=path,
                message=f"`{path}` describes dense layers, but every layer is a MoE layer",
                help="remove the section, or set model.moe.num_dense_layers",
            )

    def saved_bytes(self, element: int) -> int:
        """Bytes of one token kept for backward: gate and up before the activation."""
        return 2 * self.intermediate_size * element

    def working_bytes(self, element: int, target: str) -> int:
        """Bytes of one token that backward needs: see `swiglu_working_bytes`."""
        return swiglu_working_bytes(self.intermediate_size, element, target)

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[Parameter]:
        yield from swiglu_parameters(prefix, hidden_size, self.intermediate_size)

    def build(self, hidden_size: int):
        from nmoe.model.mlp import DenseMlp

        return DenseMlp(hidden_size=hidden_size, intermediate_size=self.intermediate_size)


def swiglu_working_bytes(width: int, element: int, target: str) -> int:
    """Bytes of one row that the backward of a SwiGLU needs at most.

    CPU: in float32 the activation and its gradient, sigmoid and silu of the gate; the gradients of gate and up in
    the model's dtype, and both read as float32 where that is another. Kernel: the activation's gradient in float32,
    the activation and the gradients of gate and up in the model's dtype.
    """
    if target != "cpu":
        return width * (4 + 3 * element)
    widened = 2 * 4 if element < 4 else 0
    return width * (4 * 4 + 2 * element + widened)


def swiglu_parameters(prefix: str, hidden_size: int, intermediate_size: int) -> Iterator[Parameter]:
    """The two tensors of a dense SwiGLU: gate over up, and down."""
    yield Parameter(name=f"{prefix}.w_gate_up_2FD", shape=(2, intermediate_size, hidden_size), role="matrix")
    yield Parameter(
        name=f"{prefix}.w_down_DF", shape=(hidden_size, intermediate_size), role="matrix", init="residual"
    )


@attrs.frozen(kw_only=True)
class Model(Component):
    dtype: str = key("dtype of weights and activations: bf16, or fp32 on the cpu target", choices=("bf16", "fp32"))
    vocab_size: int = key("rows of the embedding and of the head", minimum=2, maximum=2**24)
    hidden_size: int = key("width of the residual stream", minimum=1, maximum=2**20)
    num_layers: int = key("blocks", minimum=1, maximum=4096)
    norm_eps: float = key("epsilon of every RMSNorm", default=1e-6, above=0.0, maximum=1.0)
    init_std: float = key("standard deviation of the normal initialisation", default=0.02, above=0.0, maximum=10.0)
    residual_init_scale: float = key(
        "factor on init_std for the matrices that write into the residual stream; 0 starts every block as identity",
        default=1.0, minimum=0.0, maximum=10.0,
    )
    tie_embeddings: bool = key("the head is the embedding's table: one tensor, trained as both", default=False)
    attention: Attention = section("attention of every layer")
    mlp: Mlp | None = section("the dense layers' SwiGLU", optional=True)
    moe: Moe | None = section("the MoE layers; without it every layer is dense", optional=True)

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers if self.moe is None else min(self.moe.num_dense_layers, self.num_layers)

    def is_global(self, layer: int) -> bool:
        """Whether layer (from 0) attends to the whole sequence; the last one always does."""
        local = self.attention.local
        return local is None or (layer + 1) % local.global_every == 0 or layer == self.num_layers - 1

    def attention_of(self, layer: int) -> Attention:
        """The spec of one layer's attention: the global one's, or the local one's where it names its own sizes."""
        local = self.attention.local
        if self.is_global(layer) or local is None or not local.has_own_sizes:
            return self.attention
        assert isinstance(local, Attention)
        return local

    def window_of(self, layer: int) -> int | None:
        """Tokens a layer attends to, itself included; None is all before it."""
        local = self.attention.local
        return None if local is None or self.is_global(layer) else local.window

    def sinks_of(self, layer: int) -> bool:
        """Whether a layer's heads have sinks."""
        local = self.attention.local
        return local is not None and local.sinks and not self.is_global(layer)

    def check(self, config, path: str) -> Iterator[Problem]:
        if config.platform.target != "cpu" and self.dtype == "fp32":
            yield Problem(
                path=f"{path}.dtype",
                message=f"dtype `fp32` is for the cpu target; the plan's is `{config.platform.target}`",
                help='set dtype = "bf16"',
            )
        yield from norm_problems(config, f"{path}.hidden_size", self.hidden_size, "hidden_size")
        if self.num_dense_layers > 0 and self.mlp is None:
            yield Problem(
                path=f"{path}.moe.num_dense_layers" if self.moe else path,
                message=f"{self.num_dense_layers} dense layers, but no [{path}.mlp] says how wide they are",
                help=f"add [{path}.mlp] with intermediate_size",
            )

    def parameters(self) -> Iterator[Parameter]:
        """Every trainable tensor, in the order of the model."""
        table = (self.vocab_size, self.hidden_size)
        role = "tied" if self.tie_embeddings else "embedding"
        yield Parameter(name="embedding.weight_VD", shape=table, role=role)
        for layer in range(self.num_layers):
            prefix = f"layers.{layer}"
            norm = (self.hidden_size,)
            yield Parameter(name=f"{prefix}.attention_norm.weight_D", shape=norm, role="norm", init="ones")
            attention = self.attention_of(layer)
            if self.sinks_of(layer):
                yield Parameter(name=f"{prefix}.attention.sink_H", shape=(attention.num_heads,), role="norm")
            yield from attention.parameters(f"{prefix}.attention", self.hidden_size)
            yield Parameter(name=f"{prefix}.ffn_norm.weight_D", shape=norm, role="norm", init="ones")
            if layer < self.num_dense_layers:
                assert self.mlp is not None
                yield from self.mlp.parameters(f"{prefix}.mlp", self.hidden_size)
            else:
                assert self.moe is not None
                yield from self.moe.parameters(f"{prefix}.moe", self.hidden_size)
        yield Parameter(name="norm.weight_D", shape=(self.hidden_size,), role="norm", init="ones")
        if not self.tie_embeddings:
            yield Parameter(name="head.weight_VD", shape=table, role="head")

    def build(self, *, transport, recompute="none"):
        """The model on torch's current default device (meta for counting), weights not yet drawn.

        recompute: as in [output]; a model that is not trained has nothing to compute again.
        """
        import torch

        from nmoe.model.block import Block
        from nmoe.model.transformer import Transformer

        blocks = []
        for layer in range(self.num_layers):
            attention = self.attention_of(layer).build(
                hidden_size=self.hidden_size, norm_eps=self.norm_eps, window=self.window_of(layer),
                sinks=self.sinks_of(layer),
            )
            if layer < self.num_dense_layers:
                name, ffn = "mlp", self.mlp.build(self.hidden_size)
            else:
                name, ffn = "moe", self.moe.build(self.hidden_size, transport=transport, layer=layer)
            blocks.append(
                Block(
                    attention=attention, **{name: ffn}, hidden_size=self.hidden_size, norm_eps=self.norm_eps,
                    recompute=recompute,
                )
            )
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]
        return Transformer(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, blocks=blocks,
            norm_eps=self.norm_eps, tie_embeddings=self.tie_embeddings, dtype=dtype,
        )
