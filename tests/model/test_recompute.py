"""What backward computes again has the bits of what it would have kept, and a routing happens once."""

import pytest
import torch

from nmoe.model.loss import linear_cross_entropy
from nmoe.rdep.local import LocalTransport


def microbatches(documents):
    """Two microbatches of two rows: ids, document ids or None, targets."""
    generator = torch.Generator().manual_seed(11)
    for _ in range(2):
        tokens_BS = torch.randint(0, 64, (2, 41), generator=generator)
        ids_BS = (torch.rand(2, 40, generator=generator) < 0.1).long().cumsum(dim=1)
        yield tokens_BS[:, :-1], ids_BS if documents else None, tokens_BS[:, 1:].reshape(-1)


def train(model, documents):
    """Loss of each microbatch, every gradient, and every router's loads, after one step's backward."""
    losses = []
    for input_ids_BS, document_ids_BS, targets_T in microbatches(documents):
        h_TD = model(input_ids_BS, document_ids_BS)
        loss = linear_cross_entropy(h_TD, model.head.weight_VD, targets_T, chunk_tokens=32)
        (loss / 160).backward()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    loads = [layer.moe.router.load_E for layer in model.layers if layer.moe is not None]
    return losses, gradients, loads


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("recompute", ["attention", "layer"])
def test_every_gradient_bit_for_bit(any_spec, build_model, recompute, documents):
    torch.set_num_threads(2)
    losses, gradients, loads = train(build_model(any_spec), documents)
    again = train(build_model(any_spec, recompute=recompute), documents)
    assert all(torch.equal(a, b) for a, b in zip(losses, again[0], strict=True))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[1][name]), name
    assert all(torch.equal(a, b) for a, b in zip(loads, again[2], strict=True))
    assert all(int(load_E.sum()) == 2 * 80 * any_spec.moe.router.top_k for load_E in again[2])


@pytest.mark.parametrize("recompute", ["none", "attention", "layer"])
def test_routers_and_layouts_run_once_a_forward(specs, build_model, monkeypatch, recompute):
    calls = []
    inner = LocalTransport.layout
    monkeypatch.setattr(
        LocalTransport, "layout", lambda self, *given: calls.append("layout") or inner(self, *given)
    )
    model = build_model(specs["mla"], recompute=recompute)
    attention = 0
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda *_: calls.append("attention"))
        if layer.moe is not None:
            attention += 1
            layer.moe.router.register_forward_hook(lambda *_: calls.append("router"))
    train(model, documents=False)
    assert calls.count("router") == calls.count("layout") == 2 * 2
    # A hook comes at a forward's end, which a recomputation reaches only where something after it is kept.
    assert calls.count("attention") == 2 * 3 * (2 if recompute == "layer" else 1)


def test_an_evaluation_between_forward_and_backward_disturbs_nothing(specs, build_model):
    """Backward runs parts of the model again, and finds what other forwards left there."""
    model = build_model(specs["mla, compressed queries, windows"])
    expected = train(model, documents=True)[1]
    other = build_model(specs["mla, compressed queries, windows"], recompute="layer")
    losses = []
    for input_ids_BS, document_ids_BS, targets_T in microbatches(True):
        h_TD = other(input_ids_BS, document_ids_BS)
        with torch.inference_mode():
            other.eval()(input_ids_BS.flip(0))
        other.train()
        losses.append(linear_cross_entropy(h_TD, other.head.weight_VD, targets_T, chunk_tokens=32) / 160)
    for loss in losses:
        loss.backward()
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
