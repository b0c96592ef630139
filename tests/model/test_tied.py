"""One table for embedding and head: its gradient against float64, and the order in which its parts are added."""

import attrs
import pytest
import torch

from nmoe.model.loss import linear_cross_entropy
from nmoe.model.transformer import Transformer
from nmoe.registry.attention import Gqa

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.fixture
def pair(make_spec, build_model):
    """The same model with one table, and with the same values in two."""
    spec = make_spec(Gqa(**SIZES), softmax=True)
    tied, untied = build_model(attrs.evolve(spec, tie_embeddings=True)), build_model(spec)
    values = dict(tied.named_parameters())
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(values["embedding.weight_VD" if name == "head.weight_VD" else name])
    return tied, untied


def backward(model, ids, share):
    h_TD = model(ids[:, :-1])
    loss = linear_cross_entropy(h_TD, model.head.weight_VD, ids[:, 1:].reshape(-1), chunk_tokens=32)
    loss.backward(gradient=torch.tensor(share))
    return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64_autograd(dtype):
    """An embedding, a norm and a head: small enough to be written down in float64."""
    generator = torch.Generator().manual_seed(3)
    model = Transformer(vocab_size=40, hidden_size=24, blocks=[], norm_eps=1e-6, tie_embeddings=True, dtype=dtype)
    with torch.no_grad():
        model.embedding.weight_VD.normal_(generator=generator)
        model.norm.weight_D.normal_(1.0, 0.2, generator=generator)
    ids = torch.randint(0, 40, (3, 30), generator=generator)
    loss = backward(model, ids, 1.0)

    w = model.embedding.weight_VD.detach().double().requires_grad_()
    norm = model.norm.weight_D.detach().double().requires_grad_()
    x = w[ids[:, :-1]].flatten(0, 1)
    h = x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + 1e-6) * norm
    expected = torch.nn.functional.cross_entropy(h @ w.t(), ids[:, 1:].flatten(), reduction="sum")
    expected.backward()
    # float32: some sums of 2^-24 each. bfloat16: h is rounded, and so is what comes back through the norm, 2^-9 each.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert abs(loss.item() - expected.item()) / expected.item() < tolerance
    found = model.embedding.weight_VD.grad
    assert found.dtype == torch.float32
    assert (found - w.grad).abs().max() / w.grad.abs().max() < tolerance


def test_the_parts_of_a_microbatch_are_added_before_the_microbatches(pair):
    """Bit for bit, with three microbatches that nearly cancel, so that any other order shows."""
    tied, untied = pair
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(0, 64, (2, 41), generator=generator)
    batches = [first, first, torch.randint(0, 64, (2, 41), generator=generator)]
    shares = [3e4, -3e4 * (1 + 2.0**-11), 1.0]
    heads, lookups = [], []
    for ids, share in zip(batches, shares, strict=True):
        assert torch.equal(backward(tied, ids, share), backward(untied, ids, share))
        heads.append(untied.head.weight_VD.grad)
        lookups.append(untied.embedding.weight_VD.grad)
        untied.zero_grad()
    expected = (heads[0] + lookups[0]) + (heads[1] + lookups[1]) + (heads[2] + lookups[2])
    assert torch.equal(tied.embedding.weight_VD.grad, expected)
    assert not torch.equal((heads[0] + heads[1] + heads[2]) + (lookups[0] + lookups[1] + lookups[2]), expected)
    assert not torch.equal((heads[2] + lookups[2]) + (heads[1] + lookups[1]) + (heads[0] + lookups[0]), expected)


def test_it_is_one_parameter_drawn_as_the_embedding(pair, make_spec, build_model):
    tied, _ = pair
    assert tied.head.weight_VD is tied.embedding.weight_VD
    assert "head.weight_VD" not in dict(tied.named_parameters())
    assert torch.equal(build_model(make_spec(Gqa(**SIZES), softmax=True)).embedding.weight_VD, tied.head.weight_VD)
