"""Muon's iteration against float64, and bit for bit where a batch must not matter. test_parity.py has its settings."""

import pytest
import torch

from nmoe.errors import RunError
from nmoe.optim import muon
from nmoe.optim.muon import Muon, orthogonalize, pieces
from nmoe.optim.rounding import Rounding

COEFFICIENTS = (3.4445, -4.775, 2.0315)
ONE = torch.tensor(1.0)


def group(parameters, *, state_dtype="fp32"):
    return Muon(
        name="matrices", parameters=parameters, lr=0.02, lr_floor=0.0, weight_decay=0.1, momentum=0.95,
        nesterov=True, ns_steps=5, ns_coefficients=COEFFICIENTS, ns_dtype="fp32", eps=1e-7,
        adjust_lr="match_rms_adamw", state_dtype=state_dtype, rounding=Rounding(0),
    )  # fmt: skip


def weights(shapes):
    generator = torch.Generator().manual_seed(3)
    return [(n, torch.nn.Parameter(torch.randn(s, generator=generator))) for n, s in shapes.items()]


def gradients(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    for _, parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def published(update, steps=5, eps=1e-7):
    """The iteration as Jordan et al. print it, in float64, one matrix."""
    a, b, c = COEFFICIENTS
    x = update.double()
    x = x / max(float(x.norm()), eps)
    if update.shape[0] > update.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if update.shape[0] > update.shape[1] else x


def test_the_iteration_alone_against_float64():
    torch.manual_seed(0)
    x = torch.randn(3, 40, 64)
    ours = orthogonalize(x.clone(), steps=5, coefficients=COEFFICIENTS, dtype=torch.float32, eps=1e-7)
    for i in range(3):
        expected = published(x[i])
        assert float((ours[i].double() - expected).norm() / expected.norm()) < 1e-5
        values = torch.linalg.svdvals(ours[i].double())
        assert float(values.min()) > 0.6 and float(values.max()) < 1.25


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_matrix_does_not_see_the_others(threads, monkeypatch):
    """Alone, in one stack, in a batch of every tensor, in small pieces: the same bits."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for short, long in ((24, 24), (16, 40), (64, 96), (17, 33)):
        start = torch.randn(6, short, long)
        seen = torch.randn(2, 6, short, long)

        def run(split, start=start, seen=seen):
            parts = [(f"w{i}", torch.nn.Parameter(t.clone())) for i, t in enumerate(split(start))]
            mine = group(parts)
            for step in (1, 2):
                for (_, parameter), g in zip(parts, split(seen[step - 1]), strict=True):
                    parameter.grad = g.clone()
                mine.step(step=step, scale=1.0, grad_scale=torch.tensor(0.9))
            return torch.cat([p.detach().reshape(-1, *start.shape[1:]) for _, p in parts])

        whole = run(lambda t: [t])
        assert torch.equal(whole, run(list))
        assert torch.equal(whole, run(lambda t: [t[:1], t[1:3], t[3], t[4:]]))
        with monkeypatch.context() as context:
            context.setattr(muon, "PIECE", 2 * short * long)
            assert torch.equal(whole, run(lambda t: [t[:5], t[5:]]))
        alone = group([("w", torch.nn.Parameter(start[4].clone()))])
        for step in (1, 2):
            alone.parameters[0][1].grad = seen[step - 1, 4].clone()
            alone.step(step=step, scale=1.0, grad_scale=torch.tensor(0.9))
        assert torch.equal(alone.parameters[0][1].detach(), whole[4])
    torch.set_num_threads(1)


def test_pieces_cover_every_matrix_once(monkeypatch):
    monkeypatch.setattr(muon, "PIECE", 5 * 6 * 4)
    shapes = [("a", (6, 4)), ("b", (7, 4, 6)), ("c", (3, 3)), ("d", (2, 3, 6, 4)), ("huge", (2, 100, 100))]
    covered = {}
    for (short, long), piece in pieces(shapes):
        count = sum(stop - start for _, start, stop in piece)
        assert count == 1 or count * short * long <= 120
        for name, start, stop in piece:
            assert covered.get(name, 0) == start < stop
            covered[name] = stop
    assert covered == {"a": 1, "b": 7, "c": 1, "d": 6, "huge": 2}
    assert len(pieces(shapes)) == 3 + 1 + 2


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_resume_is_bit_exact(state):
    shapes = {"w": (24, 16), "gate_up": (2, 24, 16), "down": (3, 16, 24)}
    straight_weights, resumed_weights = weights(shapes), weights(shapes)
    straight = group(straight_weights, state_dtype=state)
    for step in range(1, 4):
        gradients(straight_weights, step)
        straight.step(step=step, scale=1.0, grad_scale=ONE)
    resumed = group(resumed_weights, state_dtype=state)
    assert {n.split("/")[0] for n in resumed.state()} == {"master", "muon.momentum"}
    for name, tensor in resumed.state().items():
        tensor.copy_(straight.state()[name])
    resumed.rounding.counter = straight.rounding.counter
    resumed.refresh()
    for step in range(4, 6):
        for parameters, mine in ((straight_weights, straight), (resumed_weights, resumed)):
            gradients(parameters, step)
            mine.step(step=step, scale=1.0, grad_scale=ONE)
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
        assert torch.equal(*(dict(p)[name.split("/")[1]] for p in (straight_weights, resumed_weights)))


def test_a_zero_gradient_only_decays():
    parameters = weights({"w": (8, 8)})
    before = parameters[0][1].detach().clone()
    parameters[0][1].grad = torch.zeros(8, 8)
    group(parameters).step(step=1, scale=1.0, grad_scale=ONE)
    torch.testing.assert_close(parameters[0][1].detach(), before * (1 - 0.02 * 0.1), rtol=1e-6, atol=0)


def test_vectors_are_refused():
    with pytest.raises(RunError, match=r"N0523.*`norm` has 1 dimension(.|\n)*AdamW"):
        group(weights({"norm": (8,)}))
