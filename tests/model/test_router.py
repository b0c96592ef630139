"""Scores, selection and weights of the router, and its bias, against their definitions."""

import pytest
import torch

from nmoe.model.router import SigmoidRouter, SoftmaxRouter, select


def make(experts=8, top_k=3, scale=2.5, rate=0.01, hidden=16, limit=None, until=None):
    router = SigmoidRouter(
        hidden_size=hidden, num_experts=experts, top_k=top_k, num_groups=1, top_groups=1,
        route_scale=scale, bias_update_rate=rate, bias_limit=limit, bias_until_tokens=until,
    )  # fmt: skip
    router.weight_ED.data.normal_(generator=torch.Generator().manual_seed(0))
    return router


def x_of(tokens=200, hidden=16):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1))


def test_weights_and_their_gradient_against_float64():
    router = make()
    router.bias_E.copy_(torch.linspace(-0.5, 0.5, 8))
    x = x_of().requires_grad_()
    indices, weights = router(x)
    x64, w64 = x.detach().double().requires_grad_(), router.weight_ED.detach().double().requires_grad_()
    score = torch.sigmoid(x64 @ w64.t())
    falling = score.detach()[7] + router.bias_E
    order = sorted(range(8), key=lambda e: (-falling[e].item(), e))  # one token by the definition, in plain Python
    assert indices[7].tolist() == order[:3]
    assert torch.equal(indices, (score + router.bias_E).topk(3).indices)
    chosen = score.gather(1, indices)
    expected = 2.5 * chosen / (chosen.sum(dim=1, keepdim=True) + 1e-20)
    dy = torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(weights, (x, router.weight_ED), dy)
    wanted = torch.autograd.grad(expected, (x64, w64), dy.double())
    assert weights.dtype == torch.float32 and indices.dtype == torch.int64
    assert (weights - expected).abs().max() < 1e-6
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).abs().max() / want.abs().max() < 3e-6
    torch.testing.assert_close(weights.sum(dim=1), torch.full((200,), 2.5))


def test_the_bias_selects_and_does_not_weigh():
    router, x = make(top_k=2), x_of()
    plain, _ = router(x)
    router.bias_E[5] = 10.0
    biased, weights = router(x)
    score = torch.sigmoid(x @ router.weight_ED.t())
    chosen = score.gather(1, biased)
    assert bool((biased[:, 0] == 5).all()) and not bool((plain[:, 0] == 5).all())
    torch.testing.assert_close(weights, 2.5 * chosen / chosen.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
def test_ties_go_to_the_lower_expert(top_k):
    generator = torch.Generator().manual_seed(3)
    score = torch.randint(-3, 4, (500, 9), generator=generator).float() / 7  # negative sums exist once biases do
    expected = [sorted(range(9), key=lambda e: (-row[e], e))[:top_k] for row in score.tolist()]
    assert select(score, top_k).tolist() == expected


def test_ties_of_many_experts():
    assert select(torch.full((4, 256), 0.5), 8).tolist() == [list(range(8))] * 4


def test_loads_count_in_training_only():
    router, x = make(), x_of()
    indices, _ = router(x)
    router(x)
    expected = 2 * torch.bincount(indices.flatten(), minlength=8)
    assert router.load_E.dtype == torch.int64 and torch.equal(router.load_E, expected)
    router.eval()
    router(x)
    assert torch.equal(router.load_E, expected)
    assert set(router.state_dict()) == {"weight_ED", "bias_E"}


def test_the_bias_moves_towards_the_mean_load():
    router = make(experts=4, top_k=1, rate=0.25)
    router.load_E.copy_(torch.tensor([5, 7, 6, 6]))
    router.end_step(0)
    assert router.bias_E.tolist() == [0.25, -0.25, 0.0, 0.0]
    assert router.load_E.tolist() == [0] * 4
    router.load_E.copy_(torch.tensor([0, 0, 0, 1]))  # the mean is no integer
    router.end_step(0)
    assert router.bias_E.tolist() == [0.5, 0.0, 0.25, -0.25]


def test_equal_loads_of_any_size_leave_the_bias():
    router = make(experts=3, top_k=1)
    router.load_E.fill_(2**40 + 1)
    router.end_step(0)
    assert router.bias_E.tolist() == [0.0] * 3


def test_a_limited_bias_goes_no_further_and_comes_back():
    router = make(experts=4, top_k=1, rate=0.25, limit=0.4)
    for _ in range(3):
        router.load_E.copy_(torch.tensor([5, 7, 6, 6]))
        router.end_step(0)
    limit = torch.tensor(0.4).item()  # as float32 has it
    assert router.bias_E.tolist() == [limit, -limit, 0.0, 0.0]
    router.load_E.copy_(torch.tensor([7, 5, 6, 6]))
    router.end_step(0)
    assert router.bias_E.tolist() == pytest.approx([0.15, -0.15, 0.0, 0.0])


def test_a_bias_ends_after_its_tokens_and_loads_are_still_forgotten():
    router = make(experts=4, top_k=1, rate=0.25, until=192)
    moved = []
    for step in (1, 2, 3, 4, 5):
        before = router.bias_E.clone()
        router.load_E.copy_(torch.tensor([5, 7, 6, 6]))
        router.end_step(64 * step)
        moved.append(not torch.equal(router.bias_E, before))
        assert not router.load_E.any()
    assert moved == [True, True, True, False, False]


def test_balancing_a_skewed_router_lowers_its_largest_load():
    router, x = make(experts=8, top_k=2, rate=0.005), x_of(512) + 0.5
    router.weight_ED.data[0] += 0.3
    router(x)
    first = int(router.load_E.max())
    for _ in range(200):
        router.end_step(0)
        router(x)
    assert int(router.load_E.max()) < 0.75 * first


def test_a_softmax_router_has_no_bias_and_counts():
    router = SoftmaxRouter(hidden_size=16, num_experts=6, top_k=2, renormalize=True)
    router.weight_ED.data.normal_(generator=torch.Generator().manual_seed(0))
    indices_TK, weights_TK = router(x_of())
    assert router.bias_E is None and set(router.state_dict()) == {"weight_ED"}
    assert torch.equal(router.load_E, indices_TK.flatten().bincount(minlength=6))
    chosen = torch.softmax((x_of() @ router.weight_ED.T).double().gather(1, indices_TK), dim=1)
    assert (weights_TK - chosen).abs().max() < 1e-6  # Mixtral's words: softmax over the chosen scores
    router.end_step(0)
    assert not router.load_E.any()
