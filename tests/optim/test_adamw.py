"""AdamW bit for bit: torch's fused kernel, and where a layout must not matter. test_parity.py has its settings."""

import math

import pytest
import torch

from nmoe.errors import RunError
from nmoe.optim.adamw import AdamW
from nmoe.optim.groups import Optimizer
from nmoe.optim.rounding import Rounding

SHAPES = {"a": (64, 48), "norm": (64,), "b": (3, 40, 32), "odd": (7, 13), "one": (5,)}


def weights(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [(n, torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype))) for n, s in shapes.items()]


def group(parameters, *, state_dtype="fp32", lr=3e-3, lr_floor=0.0, weight_decay=0.1, seed=0):
    return AdamW(
        name="dense", parameters=parameters, lr=lr, lr_floor=lr_floor, weight_decay=weight_decay,
        beta1=0.9, beta2=0.95, eps=1e-8, state_dtype=state_dtype, rounding=Rounding(seed),
    )  # fmt: skip


def gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for _, parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 4 - 2)
        parameter.grad *= scale


ONE = torch.tensor(1.0)


def torchs(parameters, **mode):
    matrices = [p for _, p in parameters if p.ndim >= 2]
    vectors = [p for _, p in parameters if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95), eps=1e-8, **mode,
    )  # fmt: skip


def test_bitwise_equal_to_torchs_fused_adamw():
    # Multiples of 16 elements: there torch's kernel has no tail of other arithmetic.
    shapes = {"a": (64, 48), "norm": (64,), "b": (3, 40, 32)}
    ours, theirs = weights(shapes), weights(shapes)
    mine, reference = group(ours), torchs(theirs, fused=True)
    for step in range(1, 51):
        gradients(ours, step)
        gradients(theirs, step)
        reference.param_groups[0]["lr"] = reference.param_groups[1]["lr"] = mine.rate(step / 50)
        mine.step(step=step, scale=step / 50, grad_scale=ONE)
        reference.step()
        for (name, a), (_, b) in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), (step, name)
    for name, parameter in theirs:
        assert torch.equal(mine.state()[f"adamw.exp_avg/{name}"], reference.state[parameter]["exp_avg"])
        assert torch.equal(mine.state()[f"adamw.exp_avg_sq/{name}"], reference.state[parameter]["exp_avg_sq"])


def test_vectors_never_decay():
    parameters = weights()
    before = {n: p.detach().clone() for n, p in parameters}
    mine = group(parameters, lr=0.5)
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    mine.step(step=1, scale=1.0, grad_scale=ONE)
    for name, parameter in parameters:
        expected = before[name] * 0.95 if parameter.ndim >= 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)
        assert torch.equal(parameter.detach(), before[name]) is (parameter.ndim < 2)


@pytest.mark.parametrize("cut", [1, 3, 16, 37])
def test_bits_do_not_depend_on_how_rows_are_dealt_out(cut):
    torch.manual_seed(0)
    start, seen = torch.randn(101, 13), torch.randn(8, 101, 13)
    whole = [("w", torch.nn.Parameter(start.clone()))]
    parts = [(f"w{i}", torch.nn.Parameter(start[i : i + cut].clone())) for i in range(0, 101, cut)]
    one, many = group(whole), group(parts)
    for step in range(1, 9):
        whole[0][1].grad = seen[step - 1].clone()
        for i, (_, parameter) in enumerate(parts):
            parameter.grad = seen[step - 1, i * cut : i * cut + cut].clone()
        one.step(step=step, scale=1.0, grad_scale=torch.tensor(0.7))
        many.step(step=step, scale=1.0, grad_scale=torch.tensor(0.7))
    assert torch.equal(torch.cat([p.detach() for _, p in parts]), whole[0][1].detach())


def test_bits_do_not_depend_on_threads():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        parameters = weights({"w": (513, 129), "v": (77,)})
        mine = group(parameters)
        for step in range(1, 4):
            gradients(parameters, step)
            mine.step(step=step, scale=1.0, grad_scale=torch.tensor(0.3))
        results.append([p.detach().clone() for _, p in parameters])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_resume_is_bit_exact(weight, state):
    straight_weights, resumed_weights = weights(dtype=weight), weights(dtype=weight)
    for parameters in (straight_weights, resumed_weights):
        for _, parameter in parameters:
            parameter.grad_dtype = torch.float32
    straight = group(straight_weights, state_dtype=state)
    for step in range(1, 5):
        gradients(straight_weights, step)
        straight.step(step=step, scale=1.0, grad_scale=ONE)
    saved = {name: tensor.clone() for name, tensor in straight.state().items()}
    counter = straight.rounding.counter
    assert counter == (4 if state == "bf16" else 0)

    resumed = group(resumed_weights, state_dtype=state)
    assert saved.keys() == resumed.state().keys()
    for name, tensor in resumed.state().items():
        tensor.copy_(saved[name])
    resumed.rounding.counter = counter
    resumed.refresh()
    for (name, a), (_, b) in zip(straight_weights, resumed_weights, strict=True):
        assert torch.equal(a, b), name
    for step in range(5, 8):
        for parameters, mine in ((straight_weights, straight), (resumed_weights, resumed)):
            gradients(parameters, step)
            mine.step(step=step, scale=1.0, grad_scale=ONE)
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    for (name, a), (_, b) in zip(straight_weights, resumed_weights, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("weight", "state", "shared"),
    [
        (torch.float32, "fp32", True),
        (torch.bfloat16, "bf16", True),
        (torch.bfloat16, "fp32", False),
        (torch.float32, "bf16", False),
    ],
)
def test_masters(weight, state, shared):
    parameters = weights(dtype=weight)
    for _, parameter in parameters:
        parameter.grad_dtype = torch.float32
    mine = group(parameters, state_dtype=state)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[state]
    assert set(mine.state()) == {
        f"{kind}/{n}" for n in SHAPES for kind in ("master", "adamw.exp_avg", "adamw.exp_avg_sq")
    }
    gradients(parameters, 1)
    mine.step(step=1, scale=1.0, grad_scale=ONE)
    for name, parameter in parameters:
        master = mine.state()[f"master/{name}"]
        assert master.dtype == dtype
        assert (master.data_ptr() == parameter.data_ptr()) is shared
        assert torch.equal(parameter.detach(), master.to(weight))
        assert all(tensor.dtype == dtype for tensor in mine.state().values())


def test_gradients_must_be_there_and_float32():
    parameters = weights()
    mine = group(parameters)
    gradients(parameters, 1)
    parameters[2][1].grad = None
    with pytest.raises(RunError, match=r"N0521.*`b` has no gradient"):
        mine.step(step=1, scale=1.0, grad_scale=ONE)
    with pytest.raises(RunError, match=r"N0523.*`a` is twice"):
        group(weights() + weights())
    with pytest.raises(RunError, match=r"N0523.*not contiguous"):
        group([("t", torch.nn.Parameter(torch.randn(4, 5).T))])


def test_the_container_is_its_groups():
    parameters = weights()
    first, second = group(parameters[:2]), group(parameters[2:], lr=1e-2, lr_floor=1e-3)
    second.name = "experts"
    whole = Optimizer([first, second])
    assert list(whole.members()) == ["dense", "experts"]
    assert whole.rates(0.5) == {"dense": 1.5e-3, "experts": pytest.approx(5.5e-3)}
    assert set(whole.state()) == set(first.state()) | set(second.state())
    alone = weights()
    for step in (1, 2):
        gradients(parameters, step)
        whole.step(step=step, scale=0.5, grad_scale=torch.tensor(0.5))
    reference = [group(alone[:2]), group(alone[2:], lr=1e-2, lr_floor=1e-3)]
    for step in (1, 2):
        gradients(alone, step, scale=0.5)
        for one in reference:
            one.step(step=step, scale=0.5, grad_scale=ONE)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(parameters, alone, strict=True))
    whole.clear_gradients()
    assert all(p.grad is None for _, p in parameters)
    with pytest.raises(RunError, match=r"N0523.*in two groups"):
        Optimizer([first, group(parameters[:1])])


def test_the_rate_is_that_of_the_formula():
    mine = group(weights(), lr=0.3, lr_floor=0.1)
    assert math.isclose(mine.rate(0.0), 0.1) and math.isclose(mine.rate(1.0), 0.3) and math.isclose(mine.rate(0.5), 0.2)
