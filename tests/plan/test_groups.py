"""Every parameter has one optimizer group, and the plan's table says which and how: for every config."""

import re
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.graph import build
from nmoe.optim.groups import Optimizer
from nmoe.optim.rounding import Rounding
from nmoe.plan.resolve import resolve
from nmoe.registry.experts import Bf16Experts, Fp32Experts

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


def model_of(config):
    """The built model on the meta device; a precision without kernels stores the same tensors as bf16."""
    spec = config.model
    if spec.moe is not None and not isinstance(spec.moe.experts, Bf16Experts | Fp32Experts):
        experts = Bf16Experts(intermediate_size=spec.moe.experts.intermediate_size)
        spec = attrs.evolve(spec, moe=attrs.evolve(spec.moe, experts=experts))
    with torch.device("meta"):
        return spec.build(transport=config.transport.build())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_groups_cover_every_parameter_once(path):
    plan = resolve(path)
    config = plan.config
    model = model_of(config)
    tensors = dict(model.named_parameters())
    members = {name: [] for name in config.optimizer.groups()}
    for parameter in config.model.parameters():
        members[config.optimizer.group_of(parameter)].append((parameter.name, tensors[parameter.name]))
    with torch.device("meta"):
        optimizer = Optimizer([  # refuses a parameter that is in two groups, or twice in one
            spec.build(name=name, parameters=members[name], state_dtype="fp32", rounding=Rounding(0), places={})
            for name, spec in config.optimizer.groups().items()
        ])  # fmt: skip
    held = {n: (group.name, p) for group in optimizer.groups for n, p in group.parameters}
    assert held.keys() == tensors.keys()
    assert all(held[n][1] is p for n, p in model.named_parameters())
    assert all(group.parameters for group in optimizer.groups if group.name != "matrices")

    # Each parameter has one line of the table, which says what the group does.
    groups = {group.name: group for group in optimizer.groups}
    kinds = {"adamw": "AdamW", "muon": "Muon"}
    counts = dict.fromkeys(plan.groups, 0)
    for name, (group, parameter) in held.items():
        pattern, shape = re.sub(r"^layers\.\d+\.", "layers.*.", name), tuple(parameter.shape)
        (row,) = [row for row in plan.groups if (row.pattern, row.shape) == (pattern, shape)]
        counts[row] += 1
        assert (row.group, kinds[row.kind]) == (group, type(groups[group]).__name__)
        assert (row.rate, row.floor) == (groups[group].rate(1.0), groups[group].rate(0.0))
        assert row.decay == (groups[group].weight_decay if parameter.ndim >= 2 else 0.0)
    assert all(counts[row] == row.count for row in plan.groups)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_norms_never_decay_and_muon_takes_matrices_of_its_roles_only(path):
    config = resolve(path).config
    for parameter in config.model.parameters():
        assert (parameter.role == "norm") == (len(parameter.shape) == 1), parameter.name
        kind = type(config.optimizer.groups()[config.optimizer.group_of(parameter)]).__name__
        assert kind == "AdamW" or parameter.role in ("matrix", "expert"), parameter.name
    assert all((row.decay == 0.0) for row in resolve(path).groups if len(row.shape) == 1)


@pytest.mark.parametrize(("name", "width"), [("debug", 16), ("quickstart", 64)])
def test_a_step_without_gradients_decays_as_the_table_says(name, width):
    sets = ['optimizer.state_dtype="fp32"', 'model.dtype="fp32"', "platform.threads=1"]
    sets += ['model.moe.experts.kind="fp32"', f"model.moe.experts.intermediate_size={width}"]
    plan = resolve(ROOT / "configs" / f"{name}.toml", sets)
    graph = build(plan)
    before = {n: p.detach().clone() for n, p in graph.model.named_parameters()}
    for parameter in graph.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    graph.optimizer.step(step=1, scale=1.0, grad_scale=torch.tensor(1.0))
    rows = {(row.pattern, row.shape): row for row in plan.groups}
    for n, parameter in graph.model.named_parameters():
        row = rows[re.sub(r"^layers\.\d+\.", "layers.*.", n), tuple(parameter.shape)]
        if row.decay == 0.0:
            assert torch.equal(parameter.detach(), before[n]), n
        else:
            expected = before[n].double() * (1 - row.rate * row.decay)
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=2.0**-22, atol=0.0)
