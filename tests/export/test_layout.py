"""Names and config.json of every family: nothing of ours is left out, nothing of the class left to its defaults."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nmoe.export import library
from nmoe.export.config import config_json
from nmoe.export.names import stock_tensors
from nmoe.plan.families import stock_class
from nmoe.plan.resolve import resolve
from tests.model.parity import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
EXPORTABLE = [
    path for path in sorted((ROOT / "configs").rglob("*.toml")) if resolve(path).stock_class.name is not None
]

# Fields of the library's config classes that an export leaves at their default, and why.
NO_EFFECT = {
    "pretraining_tp": "read by nothing in the class",
    "router_aux_loss_coef": "factor of a training loss, used only with output_router_logits",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_class_is_written_and_read_back(family):
    model = FAMILIES[family]
    architecture = stock_class(model).name
    written = config_json(model, architecture, context=40, end_of_document=7)
    with library.transformers() as transformers:
        cls = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
        general = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
        config = cls(**written)
    other = {alias: name for name, alias in cls.attribute_map.items()} | cls.attribute_map
    fields = {field.name for field in dataclasses.fields(cls)} - general
    assert {name for name in fields if name not in written and other.get(name) not in written} <= NO_EFFECT.keys()
    for key, value in written.items():
        if key in ("dtype", "rope_theta"):  # another type there; and taken into rope_parameters
            continue
        assert getattr(config, key) == value, key
    assert config.rope_parameters["rope_theta"] == written["rope_theta"]


@pytest.mark.parametrize("path", EXPORTABLE, ids=lambda path: path.stem)
def test_every_parameter_of_the_configs_has_its_stock_tensors(path):
    """Against the class itself, built without memory: the same tensors and shapes as its checkpoints have."""
    model = resolve(path).config.model
    architecture = stock_class(model).name
    found = {}
    with torch.device("meta"):
        for parameter in model.parameters():
            shape = parameter.shape
            if parameter.role == "expert":
                shape = (2, *shape[1:])  # two experts speak for all of them
            found |= {n: t.shape for n, t in stock_tensors(architecture, parameter.name, torch.empty(shape))}
        with library.transformers() as transformers:
            config = config_json(model, architecture, context=4096, end_of_document=None)
            cls = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
            theirs = getattr(transformers, architecture)(cls(**config))
    expected = {}
    for name, parameter in theirs.named_parameters():
        stem, _, last = name.rpartition(".")
        if architecture == "MixtralForCausalLM":
            stem = stem.replace(".mlp", ".block_sparse_moe")
        gate, up, down = ("w1", "w3", "w2") if "block_sparse" in stem else ("gate_proj", "up_proj", "down_proj")
        if last == "gate_up_proj":
            half = torch.Size((parameter.shape[1] // 2, parameter.shape[2]))
            expected |= {f"{stem}.{e}.{part}.weight": half for e in range(2) for part in (gate, up)}
        elif last == "down_proj":
            expected |= {f"{stem}.{e}.{down}.weight": parameter.shape[1:] for e in range(2)}
        else:
            expected[f"{stem}.{last}"] = parameter.shape
    assert found == expected
