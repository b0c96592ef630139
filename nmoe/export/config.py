"""config.json and generation_config.json: the model's sizes in the words of its stock class.

Every key that takes part in what the class computes is written, also where the class's default would do:
a default is the installed library's, and the next version may have another.
"""

import math
from typing import Any

from nmoe.plan.families import DEEPSEEK_V3, MIXTRAL, QWEN3_MOE
from nmoe.registry.attention import Attention, Gqa, Mla
from nmoe.registry.model import Model
from nmoe.registry.moe import Moe
from nmoe.registry.router import SigmoidRouter, SoftmaxRouter

MODEL_TYPES = {DEEPSEEK_V3: "deepseek_v3", QWEN3_MOE: "qwen3_moe", MIXTRAL: "mixtral"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def config_json(model: Model, architecture: str, *, context: int, end_of_document: int | None) -> dict[str, Any]:
    """The content of config.json for a model that `architecture` computes (nmoe.plan.families).

    context: tokens of a training sequence. end_of_document: the id that opens and ends a document, so it is
    both the first token of a text and the one that ends a generation; None where it is not known.
    """
    moe = model.moe
    assert moe is not None
    attention = model.attention
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "dtype": DTYPES[model.dtype],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "max_position_embeddings": longest_context(attention, context),
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "output_router_logits": False,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
        "num_attention_heads": attention.num_heads,
        "num_experts_per_tok": moe.router.top_k,
        **_rope(attention),
        **{DEEPSEEK_V3: _deepseek_v3, QWEN3_MOE: _qwen3_moe, MIXTRAL: _mixtral}[architecture](model, moe),
    }


def generation_config_json(end_of_document: int | None) -> dict[str, Any]:
    """The content of generation_config.json: how a generation begins and ends, sampling as the caller says."""
    return {} if end_of_document is None else {"bos_token_id": end_of_document, "eos_token_id": end_of_document}


def longest_context(attention: Attention, context: int) -> int:
    """The tokens that positions are meant for: those of a training sequence, or the stretched context."""
    yarn = attention.rope_scaling
    return context if yarn is None else math.floor(yarn.factor * yarn.original_context)


def _rope(attention: Attention) -> dict[str, Any]:
    """Both spellings: readers older than `rope_parameters` look for `rope_theta` and `rope_scaling`."""
    theta, yarn = {"rope_theta": attention.rope_theta}, attention.rope_scaling
    if yarn is None:
        return {**theta, "rope_parameters": {"rope_type": "default", **theta}}
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
    }
    optional = {
        "attention_factor": yarn.attention_factor, "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim
    }  # fmt: skip
    scaling |= {key: value for key, value in optional.items() if value is not None}
    return {**theta, "rope_scaling": scaling, "rope_parameters": {**scaling, **theta}}


def _deepseek_v3(model: Model, moe: Moe) -> dict[str, Any]:
    attention, router = model.attention, moe.router
    assert isinstance(attention, Mla)
    assert isinstance(router, SigmoidRouter)
    return {
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rope_interleave": True,
        "attention_bias": False,
        "intermediate_size": _dense_size(model, moe),
        "first_k_dense_replace": moe.num_dense_layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": moe.experts.intermediate_size,
        "n_routed_experts": router.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": router.route_scale,
        "num_nextn_predict_layers": 0,
    }


def _qwen3_moe(model: Model, moe: Moe) -> dict[str, Any]:
    attention, router = model.attention, moe.router
    assert isinstance(attention, Gqa)
    assert isinstance(router, SoftmaxRouter)
    return {
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "intermediate_size": _dense_size(model, moe),
        "mlp_only_layers": list(range(moe.num_dense_layers)),
        "decoder_sparse_step": 1,
        "moe_intermediate_size": moe.experts.intermediate_size,
        "num_experts": router.num_experts,
        "norm_topk_prob": router.renormalize,
    }


def _mixtral(model: Model, moe: Moe) -> dict[str, Any]:
    attention, router = model.attention, moe.router
    assert isinstance(attention, Gqa)
    return {
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "sliding_window": None,
        "intermediate_size": moe.experts.intermediate_size,
        "num_local_experts": router.num_experts,
        "router_jitter_noise": 0.0,
    }


def _dense_size(model: Model, moe: Moe) -> int:
    """Width of the dense layers; where there is none the key has no effect and is the experts'."""
    return moe.experts.intermediate_size if model.mlp is None else model.mlp.intermediate_size
