"""Which stock class of the transformers library computes exactly the model of a plan, or why none does.

    DeepseekV3ForCausalLM    MLA, sigmoid router with a selection bias and groups, shared experts
    Qwen3MoeForCausalLM      grouped queries with normed queries and keys, softmax router
    MixtralForCausalLM       grouped queries, softmax over the chosen, every layer MoE

The attention decides which of the three is meant; everything that this class does otherwise is a
reason against it. Not asked here: what belongs to training alone (document masks, bias updates,
optimizers), and the precision of the experts' products. An exported model multiplies in [model] dtype.
"""

from collections.abc import Iterator

import attrs

from nmoe.registry.attention import Gqa, Mla
from nmoe.registry.model import Model
from nmoe.registry.moe import Moe
from nmoe.registry.router import SigmoidRouter, SoftmaxRouter

DEEPSEEK_V3 = "DeepseekV3ForCausalLM"
QWEN3_MOE = "Qwen3MoeForCausalLM"
MIXTRAL = "MixtralForCausalLM"

LATENT_NORM_EPS = 1e-6  # DeepseekV3Attention builds its two inner norms without looking at rms_norm_eps
NO_MOE = "model.moe is absent: it is a MoE model"


@attrs.frozen
class StockClass:
    """nearest: the name of the class that is meant. reasons: why it is another model, each with the key at fault."""

    nearest: str
    reasons: tuple[str, ...]

    @property
    def name(self) -> str | None:
        """The class that computes the model; None where there are reasons."""
        return None if self.reasons else self.nearest


def stock_class(model: Model) -> StockClass:
    """The class for [model]; the result is the same for every plan with this section."""
    if isinstance(model.attention, Mla):
        return StockClass(DEEPSEEK_V3, tuple(_against_deepseek_v3(model)))
    assert isinstance(model.attention, Gqa)
    if model.attention.qk_norm:
        return StockClass(QWEN3_MOE, tuple(_against_qwen3_moe(model)))
    return StockClass(MIXTRAL, tuple(_against_mixtral(model)))


def _against_deepseek_v3(model: Model) -> Iterator[str]:
    yield from _local_layers(model, "it has no sliding windows")
    if model.norm_eps != LATENT_NORM_EPS:
        yield f"model.norm_eps = {model.norm_eps!r}: its latent norms have 1e-06, whatever its config says"
    if model.moe is None:
        yield NO_MOE
        return
    router = model.moe.router
    if not isinstance(router, SigmoidRouter):
        yield 'model.moe.router.kind = "softmax": it scores with a sigmoid'
    if router.num_experts < 2:
        yield f"model.moe.router.num_experts = {router.num_experts}: it adds up the two best of a group"
    if model.moe.num_shared_experts == 0:
        yield "model.moe.num_shared_experts = 0: it always has shared experts"


def _against_qwen3_moe(model: Model) -> Iterator[str]:
    yield from _local_layers(model, "it slides in every layer or in none")
    if model.moe is None:
        yield NO_MOE
        return
    yield from _other_than_softmax_alone(model.moe)


def _against_mixtral(model: Model) -> Iterator[str]:
    yield from _local_layers(model, "it slides in every layer or in none")
    if model.moe is None:
        yield NO_MOE
        return
    yield from _other_than_softmax_alone(model.moe)
    router = model.moe.router
    if isinstance(router, SoftmaxRouter) and not router.renormalize:
        yield "model.moe.router.renormalize = false: its softmax is over the chosen"
    if model.moe.num_dense_layers:
        yield f"model.moe.num_dense_layers = {model.moe.num_dense_layers}: it has no dense layers"


def _local_layers(model: Model, windows: str) -> Iterator[str]:
    """Where a plan has local layers it has global ones too: the last is always global."""
    local = model.attention.local
    if local is None:
        return
    yield f"model.attention.local.window = {local.window}: {windows}"
    if local.has_own_sizes:
        yield "model.attention.local.kind: it has one attention for all layers"
    if local.sinks:
        yield "model.attention.local.sinks = true: it has no attention sinks"


def _other_than_softmax_alone(moe: Moe) -> Iterator[str]:
    if not isinstance(moe.router, SoftmaxRouter):
        yield 'model.moe.router.kind = "sigmoid": it scores with a softmax'
    if moe.num_shared_experts:
        yield f"model.moe.num_shared_experts = {moe.num_shared_experts}: it has no shared experts"
