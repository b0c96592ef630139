"""From our parameters to the tensors of a stock checkpoint: names, and the two axes that are cut.

A stock checkpoint stores experts one by one, and gate and up apart. Everything else differs by name
alone, and no tensor is permuted: MLA turns neighbouring pairs, which is DeepSeek's own convention
(`rope_interleave`), and grouped queries turn pairs by halves, as Qwen's and Mixtral's code does.
"""

from collections.abc import Iterator

from torch import Tensor

from nmoe.plan.families import MIXTRAL

TOP = {
    "embedding.weight_VD": "model.embed_tokens.weight",
    "norm.weight_D": "model.norm.weight",
    "head.weight_VD": "lm_head.weight",
}

# What is one tensor there too: below `layers.N.`, and below `model.layers.N.`
LAYER = {
    "attention_norm.weight_D": "input_layernorm.weight",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.k_proj.weight": "self_attn.k_proj.weight",
    "attention.v_proj.weight": "self_attn.v_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight_D": "self_attn.q_norm.weight",
    "attention.k_norm.weight_D": "self_attn.k_norm.weight",
    "attention.q_a_proj.weight": "self_attn.q_a_proj.weight",
    "attention.q_a_norm.weight_D": "self_attn.q_a_layernorm.weight",
    "attention.q_b_proj.weight": "self_attn.q_b_proj.weight",
    "attention.kv_a_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a_norm.weight_D": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b_proj.weight": "self_attn.kv_b_proj.weight",
    "ffn_norm.weight_D": "post_attention_layernorm.weight",
    "mlp.w_down_DF": "mlp.down_proj.weight",
    "moe.shared.w_down_DF": "mlp.shared_experts.down_proj.weight",
}

# Gate over up, and what the two matrices stand below.
GATE_UP = {"mlp.w_gate_up_2FD": "mlp", "moe.shared.w_gate_up_2FD": "mlp.shared_experts"}


def stock_tensors(architecture: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The stock tensors (name, view) that one of ours becomes, in a fixed order.

    architecture: of nmoe.plan.families. name: a parameter's, or `layers.N.moe.router.bias_E`, the selection
    bias. It holds for gradients as for weights. KeyError if the families have no such tensor.
    """
    if name in TOP:
        yield TOP[name], tensor
        return
    _, layer, part = name.split(".", 2)
    prefix = f"model.layers.{layer}"
    moe, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    if architecture == MIXTRAL:
        moe, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    if part == "moe.router.weight_ED":
        yield f"{prefix}.{moe}.gate.weight", tensor
    elif part == "moe.router.bias_E":
        yield f"{prefix}.{moe}.gate.e_score_correction_bias", tensor
    elif part == "moe.experts.w_gate_up_E2FD":
        for expert, w_gate_up_2FD in enumerate(tensor):
            yield f"{prefix}.{moe}.experts.{expert}.{gate}.weight", w_gate_up_2FD[0]
            yield f"{prefix}.{moe}.experts.{expert}.{up}.weight", w_gate_up_2FD[1]
    elif part == "moe.experts.w_down_EDF":
        for expert, w_down_DF in enumerate(tensor):
            yield f"{prefix}.{moe}.experts.{expert}.{down}.weight", w_down_DF
    elif part in GATE_UP:
        yield f"{prefix}.{GATE_UP[part]}.gate_proj.weight", tensor[0]
        yield f"{prefix}.{GATE_UP[part]}.up_proj.weight", tensor[1]
    else:
        yield f"{prefix}.{LAYER[part]}", tensor
