"""Balance losses against transformers' functions and float64 loops written from the papers, and their one way in."""

import sys
from pathlib import Path

import pytest
import torch

from nmoe.model.balance import Balance, SequenceBalance, SwitchBalance, ZLoss

T, E, K, S = 48, 8, 3, 12


@pytest.fixture(autouse=True)
def _no_other_kernels(monkeypatch):
    """The library looks for a distribution called kernels, and must not find the folder of that name."""
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != root])


def logits_of(seed=0, spread=2.0):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * spread


def best_of(score_TE):
    return score_TE.topk(K, dim=1).indices


def paper_switch(logits):
    """Equations 4-6 token by token, the K chosen of each counted."""
    probability = torch.softmax(logits, dim=1)
    f, p = [0.0] * E, [0.0] * E
    for row in probability:
        order = sorted(range(E), key=lambda e: -row[e].item())
        for e in range(E):
            f[e] += (e in order[:K]) / len(logits)
            p[e] = p[e] + row[e] / len(logits)
    return E * sum(f[e] * p[e] for e in range(E))


def paper_sequence(logits):
    """Equations 17-20 with alpha = 1 for each sequence, then the mean over the sequences."""
    losses = []
    for sequence in torch.sigmoid(logits).split(S):
        f, p = [0.0] * E, [0.0] * E
        for row in sequence:
            order = sorted(range(E), key=lambda e: -row[e].item())
            for e in range(E):
                f[e] += E / (K * S) * (e in order[:K])
                p[e] = p[e] + row[e] / row.sum() / S
        losses.append(sum(f[e] * p[e] for e in range(E)))
    return sum(losses) / len(losses)


def paper_z(logits):
    """Equation 5."""
    return sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits) / len(logits)


CASES = {
    "balance": (SwitchBalance(), paper_switch, lambda z: torch.softmax(z, dim=1)),
    "sequence": (SequenceBalance(sequence_length=S), paper_sequence, torch.sigmoid),
    "z": (ZLoss(), paper_z, lambda z: torch.softmax(z, dim=1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_against_the_paper(name, seed):
    """The gradient against float64 autograd of the loop."""
    loss, paper, scores = CASES[name]
    logits = logits_of(seed)
    mean, gradient = loss(logits, scores(logits), best_of(scores(logits)))
    z = logits.double().requires_grad_()
    expected = paper(z)
    (wanted,) = torch.autograd.grad(T * expected, z)
    assert mean.dtype == torch.float64 and gradient.dtype == torch.float32
    # A few roundings of float32 to a token, a mean over them.
    assert abs(mean.item() - expected.item()) < 1e-6 * expected.item()
    assert (gradient - wanted).abs().max() < 3e-6 * wanted.abs().max()


def test_transformers_has_the_same_values():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as of_mixtral
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as of_qwen3
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    logits = logits_of(4)
    score = torch.softmax(logits, dim=1)
    for loss, function in (
        (SwitchBalance(), lambda z: of_mixtral((z,), num_experts=E, top_k=K)),
        (SwitchBalance(), lambda z: of_qwen3((z,), num_experts=E, top_k=K)),
        (ZLoss(), lambda z: router_z_loss_func(z.view(T // S, S, E))),
    ):
        mean, gradient = loss(logits, score, best_of(score))
        z = logits.clone().requires_grad_()
        expected = function(z)
        (wanted,) = torch.autograd.grad(T * expected, z)
        assert mean.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (gradient - wanted).abs().max() < 3e-6 * wanted.abs().max()


def test_even_routing_is_the_value_that_the_names_promise():
    """K for the one of Switch, 1 within sequences; and E / K times as much where K experts have everything."""
    even = torch.stack([torch.arange(t, t + K) % E for t in range(T)])
    flat = torch.zeros(T, E)
    assert SwitchBalance()(flat, torch.softmax(flat, dim=1), even)[0].item() == pytest.approx(K, rel=1e-6)
    sequence = SequenceBalance(sequence_length=24)  # a multiple of E: each sequence is even too
    assert sequence(flat, torch.sigmoid(flat), even)[0].item() == pytest.approx(1.0, rel=1e-6)
    one_sided = flat + 40.0 * (torch.arange(E) < K) - 20.0
    same = torch.arange(K).repeat(T, 1)
    assert SwitchBalance()(one_sided, torch.softmax(one_sided, dim=1), same)[0].item() == pytest.approx(E, rel=1e-6)
    got = sequence(one_sided, torch.sigmoid(one_sided), same)[0].item()
    assert got == pytest.approx(E / K, rel=1e-6)


def test_scores_that_vanish_give_no_nan():
    logits = torch.full((S, E), -200.0)  # a sigmoid of exactly 0 in float32
    mean, gradient = SequenceBalance(sequence_length=S)(logits, torch.sigmoid(logits), best_of(logits))
    assert mean.item() == 0.0 and not gradient.any()


def test_weights_pass_through_and_both_gradients_arrive():
    """d/dz of (sum of w dw) + c T L / T_step, and the weights' own values bit for bit."""
    balance = Balance([(0.3, SwitchBalance()), (0.07, ZLoss())], tokens_per_step=4 * T)
    logits = logits_of(5).requires_grad_()
    score = torch.softmax(logits, dim=1)
    best = best_of(score.detach())
    weights = score.gather(1, best)
    dw = torch.randn(T, K, generator=torch.Generator().manual_seed(6))
    out = balance.inject(weights, logits, score.detach(), best)
    assert torch.equal(out, weights)
    assert balance.means() == {}, "nothing counts before it has gone backward"
    out.backward(dw)
    z = logits.detach().double().requires_grad_()
    switch, squared = paper_switch(z), paper_z(z)
    whole = (torch.softmax(z, dim=1).gather(1, best) * dw).sum() + (0.3 * switch + 0.07 * squared) * T / (4 * T)
    (wanted,) = torch.autograd.grad(whole, z)
    assert (logits.grad - wanted).abs().max() < 3e-6 * wanted.abs().max()
    found = balance.means()
    assert found == {
        "balance_loss": pytest.approx(switch.item(), rel=1e-6), "z_loss": pytest.approx(squared.item(), rel=1e-6),
    }  # fmt: skip
    balance.record(3 * T, [torch.tensor(0.0), torch.tensor(1.0)])
    assert balance.means()["balance_loss"] == pytest.approx(found["balance_loss"] / 4)
    balance.clear()
    assert balance.means() == {}
