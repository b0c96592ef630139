"""Every family as the transformers library has it (`parity.py` says how), and Mixtral's attention in Mistral.

Mistral is Mixtral without its experts: the same attention above a dense SwiGLU, and its sliding window.
"""

import pytest
import torch

from nmoe.export import library
from nmoe.export.names import stock_tensors
from nmoe.model.loss import linear_cross_entropy
from nmoe.plan.families import MIXTRAL
from nmoe.registry.attention import Gqa
from tests.model.parity import FAMILIES, parity, relative

LOGITS, GRADIENTS = 2e-5, 1e-4  # largest error over largest value: two libraries' orders of summation


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    found = parity(FAMILIES[family], tmp_path)
    assert found.logits < LOGITS
    assert found.choices == 0
    assert found.loss < LOGITS
    assert found.gradient < GRADIENTS, found.worst


def compare(model, **sizes):
    """Logits, loss and gradients of a MistralForCausalLM of our weights."""
    ids = torch.randint(0, 64, (2, 41), generator=torch.Generator().manual_seed(3))
    inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
    with library.transformers():
        from transformers import MistralConfig, MistralForCausalLM

        config = MistralConfig(
            vocab_size=64, hidden_size=48, intermediate_size=64, num_attention_heads=4, head_dim=16, rms_norm_eps=1e-6,
            rope_theta=10000.0, attn_implementation="eager", **sizes,
        )  # fmt: skip
        theirs = MistralForCausalLM(config).float()
        state = [stock_tensors(MIXTRAL, *named) for named in model.named_parameters()]
        theirs.load_state_dict({name: part for parts in state for name, part in parts}, strict=True)
        expected = theirs(inputs).logits.flatten(0, 1)
    h_TD = model(inputs)
    assert relative(model.head(h_TD), expected) < LOGITS
    loss = linear_cross_entropy(h_TD, model.head.weight_VD, targets, chunk_tokens=32)
    wanted = torch.nn.functional.cross_entropy(expected, targets, reduction="sum")
    assert relative(loss, wanted) < LOGITS
    loss.backward()
    wanted.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        for stock, gradient in stock_tensors(MIXTRAL, name, parameter.grad):
            assert relative(gradient, gradients[stock]) < GRADIENTS, stock


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_mixtral(kv_heads, make_spec, build_model):
    attention = Gqa(num_heads=4, num_kv_heads=kv_heads, head_dim=16)
    compare(
        build_model(make_spec(attention, moe=False)), num_hidden_layers=3, num_key_value_heads=kv_heads,
        sliding_window=None,
    )  # fmt: skip


def test_sliding_window_of_mistral(make_spec, build_model):
    """A window of w tokens, itself included, means the same w there."""
    model = build_model(make_spec(Gqa(num_heads=4, num_kv_heads=2, head_dim=16), moe=False, layers=2))
    for layer in model.layers:
        layer.attention.window = 6
    compare(model, num_hidden_layers=2, num_key_value_heads=2, sliding_window=6)
