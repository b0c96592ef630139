"""DeepSeek-V3 and Mistral (grouped queries, sliding window) as the transformers library has them, with our weights.

Float32, every one-dimensional tensor random. The library's rotary angles are float32, ours float64,
which the short sequences here keep within the tolerance.
"""

import sys
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.model.loss import linear_cross_entropy
from nmoe.registry.attention import Gqa, Mla
from nmoe.registry.rope import Yarn

LOGITS, GRADIENTS = 2e-5, 1e-4  # largest error over largest value: two libraries' orders of summation


@pytest.fixture(autouse=True)
def _no_other_kernels(monkeypatch):
    """The library looks for a distribution called kernels, and must not find the folder of that name."""
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != root])


def renamed(ours: str) -> str:
    """The library's name of one of our parameters that has a counterpart of the same shape."""
    for old, new in (
        ("embedding.weight_VD", "model.embed_tokens.weight"), ("head.weight_VD", "lm_head.weight"),
        ("layers.", "model.layers."), ("norm.weight_D", "norm.weight"), ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"), (".attention.", ".self_attn."), ("_a_norm", "_a_layernorm"),
        ("kv_a_proj", "kv_a_proj_with_mqa"), ("moe.router.weight_ED", "mlp.gate.weight"),
        ("moe.router.bias_E", "mlp.gate.e_score_correction_bias"),
        ("moe.experts.w_gate_up_E2FD", "mlp.experts.gate_up_proj"),
        ("moe.experts.w_down_EDF", "mlp.experts.down_proj"), ("moe.shared.", "mlp.shared_experts."),
        ("w_down_DF", "down_proj.weight"), ("_norm.weight_D", "_norm.weight"),
    ):  # fmt: skip
        ours = ours.replace(old, new)
    return "model.norm.weight" if ours == "norm.weight" else ours


def pieces(name, tensor):
    """(the library's name, our tensor in its shape): gate and up are two tensors there in dense SwiGLUs."""
    if name.endswith("w_gate_up_2FD"):
        stem = renamed(name).removesuffix("w_gate_up_2FD")
        yield f"{stem}gate_proj.weight", tensor[0]
        yield f"{stem}up_proj.weight", tensor[1]
    else:
        yield renamed(name), tensor.flatten(1, 2) if name.endswith("w_gate_up_E2FD") else tensor


def compare(model, library, length=40):
    """Logits, loss and every gradient, after our weights have been copied into the library's model."""
    target = {**dict(library.named_parameters()), **dict(library.named_buffers())}
    used = set()
    state = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("bias_E"))]
    with torch.no_grad():
        for name, tensor in state:
            for other, part in pieces(name, tensor):
                target[other].copy_(part)
                used.add(other)
    assert {name for name, _ in library.named_parameters()} <= used
    ids = torch.randint(0, 64, (2, length + 1), generator=torch.Generator().manual_seed(3))
    inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
    h_TD = model(inputs)
    logits = model.head(h_TD)
    expected = library(inputs).logits.flatten(0, 1)
    assert (logits - expected).abs().max() / expected.abs().max() < LOGITS
    loss = linear_cross_entropy(h_TD, model.head.weight_VD, targets, chunk_tokens=32)
    wanted = torch.nn.functional.cross_entropy(expected, targets, reduction="sum")
    assert abs(loss.item() - wanted.item()) / wanted.item() < LOGITS
    loss.backward()
    wanted.backward()
    for name, parameter in model.named_parameters():
        for other, gradient in pieces(name, parameter.grad):
            reference = target[other].grad
            error = (gradient - reference).abs().max() / reference.abs().max()
            assert error < GRADIENTS, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("q_lora_rank", "groups", "chosen"), [(20, 1, 1), (None, 1, 1), (20, 4, 2)])
def test_deepseek_v3(q_lora_rank, groups, chosen, make_spec, build_model):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=48, intermediate_size=64, moe_intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, n_shared_experts=2, n_routed_experts=8, num_experts_per_tok=3,
        n_group=groups, topk_group=chosen, first_k_dense_replace=1, q_lora_rank=q_lora_rank, routed_scaling_factor=1.5,
        norm_topk_prob=True, rms_norm_eps=1e-6, attn_implementation="eager", **sizes,
    )  # fmt: skip
    attention = Mla(num_heads=3, q_lora_rank=q_lora_rank, **sizes)
    ours = make_spec(attention, top_k=3)
    router = attrs.evolve(ours.moe.router, num_groups=groups, top_groups=chosen)
    ours = attrs.evolve(ours, moe=attrs.evolve(ours.moe, router=router))
    compare(build_model(ours), DeepseekV3ForCausalLM(config).float())


@pytest.mark.parametrize("renormalize", [True, False])
def test_qwen3_moe(renormalize, make_spec, build_model):
    """Normed queries and keys, softmax router, renormalised or not."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, moe_intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3,
        norm_topk_prob=renormalize, decoder_sparse_step=1, mlp_only_layers=[0], rms_norm_eps=1e-6,
        rope_theta=10000.0, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    attention = Gqa(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True)
    ours = make_spec(attention, top_k=3, shared=0, softmax=True)
    ours = attrs.evolve(ours, moe=attrs.evolve(ours.moe, router=attrs.evolve(ours.moe.router, renormalize=renormalize)))
    compare(build_model(ours), Qwen3MoeForCausalLM(config).float())


def test_mixtral(make_spec, build_model):
    """Softmax over the chosen; no dense layer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=8, num_experts_per_tok=2, rms_norm_eps=1e-6,
        rope_theta=10000.0, sliding_window=None, attn_implementation="eager",
    )  # fmt: skip
    ours = make_spec(Gqa(num_heads=4, num_kv_heads=2, head_dim=16), dense=0, shared=0, softmax=True)
    compare(build_model(ours), MixtralForCausalLM(config).float())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_mixtral(kv_heads, make_spec, build_model):
    """Mistral is Mixtral without its experts: the same attention above a dense SwiGLU."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=None,
        attn_implementation="eager",
    )  # fmt: skip
    attention = Gqa(num_heads=4, num_kv_heads=kv_heads, head_dim=16)
    compare(build_model(make_spec(attention, moe=False)), MistralForCausalLM(config).float())


def test_sliding_window_of_mistral(make_spec, build_model):
    """A window of w tokens, itself included, means the same w there."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=6,
        attn_implementation="eager",
    )  # fmt: skip
    model = build_model(make_spec(Gqa(num_heads=4, num_kv_heads=2, head_dim=16), moe=False, layers=2))
    for layer in model.layers:
        layer.attention.window = 6
    compare(model, MistralForCausalLM(config).float())


YARN = {"factor": 8.0, "beta_fast": 4.0, "beta_slow": 1.0}  # and a theta of 100: the ramp lies between the pairs


@pytest.mark.parametrize(
    "scales",
    [
        {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.707, "mscale_all_dim": 1.3}, {},
        {"attention_factor": 0.9}, {"truncate": False},
    ],
    ids=str,
)  # fmt: skip
def test_yarn_of_deepseek_v3(scales, make_spec, build_model):
    """256 tokens, frequencies of 32; the softmax's scale and that of cosines and sines."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=48, intermediate_size=64, moe_intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, n_shared_experts=2, n_routed_experts=8, num_experts_per_tok=3,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=20, routed_scaling_factor=1.5,
        norm_topk_prob=True, rms_norm_eps=1e-6, attn_implementation="eager", max_position_embeddings=256,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 100.0, "original_max_position_embeddings": 32, **YARN, **scales
        }, **sizes,
    )  # fmt: skip
    attention = Mla(
        num_heads=3, q_lora_rank=20, rope_theta=100.0, rope_scaling=Yarn(original_context=32, **YARN, **scales), **sizes
    )
    compare(build_model(make_spec(attention, top_k=3)), DeepseekV3ForCausalLM(config).float(), length=256)


@pytest.mark.parametrize(
    ("scales", "tied"), [({}, True), ({"attention_factor": 1.5}, False), ({"truncate": False}, False)], ids=str
)
def test_yarn_and_tied_embeddings_of_qwen3_moe(scales, tied, make_spec, build_model):
    """As above, for whole heads; and one table for embedding and head."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, moe_intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[0], rms_norm_eps=1e-6, tie_word_embeddings=tied,
        attn_implementation="eager", max_position_embeddings=256,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 100.0, "original_max_position_embeddings": 32, **YARN, **scales
        },
    )  # fmt: skip
    scaling = Yarn(original_context=32, **YARN, **scales)
    attention = Gqa(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True, rope_theta=100.0, rope_scaling=scaling)
    ours = attrs.evolve(make_spec(attention, top_k=3, shared=0, softmax=True), tie_embeddings=tied)
    library = Qwen3MoeForCausalLM(config).float()
    assert (library.lm_head.weight is library.model.embed_tokens.weight) == tied
    compare(build_model(ours), library, length=256)
