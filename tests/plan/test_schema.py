"""The JSON Schema accepts every config and refuses what it can see is wrong; a small validator of our own reads it."""

import json
import tomllib
from pathlib import Path

import pytest

from nmoe.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
VALID = [*sorted((ROOT / "configs").rglob("*.toml")), HERE / "base.toml", HERE / "mixture.toml"]
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool}


def accepts(schema, value, root) -> bool:
    """Draft 2020-12, the words that the schema uses; an unknown word is a fault of this test."""
    known = {
        "$schema", "$defs", "$ref", "title", "description", "default", "type", "if", "then", "else", "properties",
        "required", "additionalProperties", "anyOf", "const", "enum", "items", "minItems", "maxItems", "minLength",
        "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    }  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wanted = schema.get("type")
    if wanted == "integer" and not (number and value == int(value)):
        return False
    if wanted == "number" and not number:
        return False
    if wanted in KINDS and not isinstance(value, KINDS[wanted]):
        return False
    if "$ref" in schema and not accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root):
        return False
    if "if" in schema:
        branch = "then" if accepts(schema["if"], value, root) else "else"
        if not accepts(schema[branch], value, root):
            return False
    if "anyOf" in schema and not any(accepts(s, value, root) for s in schema["anyOf"]):
        return False
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    if number:
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        above, below = schema.get("exclusiveMinimum", value - 1), schema.get("exclusiveMaximum", value + 1)
        return low <= value <= high and above < value < below
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0)
    if isinstance(value, list):
        sized = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return sized and all(accepts(schema.get("items", {}), item, root) for item in value)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if not set(schema.get("required", ())) <= set(value):
            return False
        if schema.get("additionalProperties") is False and not set(value) <= set(properties):
            return False
        return all(accepts(properties[k], v, root) for k, v in value.items() if k in properties)
    return True


@pytest.fixture
def schema(capsys):
    assert run(["build", "--schema"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("config", VALID, ids=lambda path: path.stem)
def test_every_config_is_accepted(config, schema):
    assert accepts(schema, tomllib.loads(config.read_text()), schema)


def test_every_key_is_described(schema):
    def walk(node):
        for name, item in node.get("properties", {}).items():
            assert name in ("kind", "extends") or item.get("description"), name
            yield name
            yield from walk(item)
        if "items" in node:
            yield from walk(node["items"])
        for arm in node.get("anyOf", ()):
            yield from walk(arm)

    assert {"top_k", "ns_coefficients", "until_tokens", "path", "window"} <= set(walk(schema["$defs"]["config"]))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("num_layers = 4", 'num_layers = "4"'),
        ("num_layers = 4", "num_layers = 4.5"),
        ("num_layers = 4", "num_layers = 0"),
        ("num_layers = 4", ""),
        ("num_layers = 4", "num_layers = 4\nnum_leyers = 4"),
        ('dtype = "fp32"', 'dtype = "fp16"'),
        ('kind = "mla"', 'kind = "mle"'),
        ("kv_lora_rank = 16", "num_kv_heads = 16"),
        ("beta1 = 0.9\n", "beta1 = 1.0\n"),
        ("nesterov = true", "nesterov = 1"),
        ("[batch]", "[botch]"),
        ('run_dir = "runs/base"', 'run_dir = ""'),
    ],
)
def test_what_a_schema_can_see_is_refused(before, after, schema):
    text = (HERE / "base.toml").read_text()
    assert before in text
    assert not accepts(schema, tomllib.loads(text.replace(before, after, 1)), schema)
