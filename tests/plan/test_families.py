"""Which stock class a plan is, and every reason why not, with the key at fault."""

import json
from pathlib import Path

import attrs
import pytest

from nmoe.cli.main import run
from nmoe.plan.families import DEEPSEEK_V3, MIXTRAL, QWEN3_MOE, stock_class
from nmoe.plan.resolve import resolve

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FAMILIES = {DEEPSEEK_V3: "deepseek_v3.toml", QWEN3_MOE: "qwen3_30b_a3b.toml", MIXTRAL: "mixtral_8x7b.toml"}


@pytest.mark.parametrize(("name", "config"), FAMILIES.items())
def test_the_published_families(name, config):
    assert resolve(CONFIGS / config).stock_class.name == name


SIGMOID = 'model.moe.router={ kind = "sigmoid", num_experts = 8, top_k = 2 }'
SOFTMAX = 'model.moe.router={ kind = "softmax", num_experts = 256, top_k = 8 }'
WINDOW = ["model.attention.local.window=128", "model.attention.local.global_every=4"]
YARN = '{ kind = "yarn", factor = 40.0, original_context = 4096, mscale = 1.0, mscale_all_dim = 1.0 }'
OWN = 'kind = "gqa", window = 128, global_every = 4, num_heads = 4, num_kv_heads = 2, head_dim = 64'


@pytest.mark.parametrize(
    ("family", "sets", "keys"),
    [
        (DEEPSEEK_V3, [SOFTMAX], ['model.moe.router.kind = "softmax"']),
        (DEEPSEEK_V3, ["model.norm_eps=1e-5"], ["model.norm_eps = 1e-05"]),
        (DEEPSEEK_V3, ["model.moe.num_shared_experts=0"], ["model.moe.num_shared_experts = 0"]),
        (DEEPSEEK_V3, WINDOW, ["model.attention.local.window = 128"]),
        (
            DEEPSEEK_V3,
            [f"model.attention.local={{ {OWN}, sinks = true }}"],
            ["model.attention.local.window = 128", "model.attention.local.kind", "model.attention.local.sinks = true"],
        ),
        (QWEN3_MOE, [SIGMOID], ['model.moe.router.kind = "sigmoid"']),
        (QWEN3_MOE, ["model.moe.num_shared_experts=1"], ["model.moe.num_shared_experts = 1"]),
        (QWEN3_MOE, WINDOW, ["model.attention.local.window = 128"]),
        (MIXTRAL, [SIGMOID], ['model.moe.router.kind = "sigmoid"']),
        (MIXTRAL, ["model.moe.router.renormalize=false"], ["model.moe.router.renormalize = false"]),
        (
            MIXTRAL,
            ["model.moe.num_dense_layers=1", "model.mlp.intermediate_size=4096", "model.moe.num_shared_experts=1"],
            ["model.moe.num_shared_experts = 1", "model.moe.num_dense_layers = 1"],
        ),
        (MIXTRAL, [*WINDOW, "model.attention.local.sinks=true"],
         ["model.attention.local.window = 128", "model.attention.local.sinks = true"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].split("=")[0],
)  # fmt: skip
def test_every_reason_names_its_key(family, sets, keys):
    stock = resolve(CONFIGS / FAMILIES[family], sets).stock_class
    assert (stock.name, stock.nearest) == (None, family)
    assert [reason.split(": ")[0] for reason in stock.reasons] == keys


@pytest.mark.parametrize(
    ("family", "sets"),
    [
        (DEEPSEEK_V3, ["model.attention.q_lora_rank=64", "model.moe.num_dense_layers=1", "batch.document_mask=true"]),
        (QWEN3_MOE, ["model.moe.num_dense_layers=3", "model.mlp.intermediate_size=512", "model.norm_eps=1e-5"]),
        (QWEN3_MOE, ["model.moe.router.renormalize=false", "batch.document_mask=false"]),
        (DEEPSEEK_V3, ["model.tie_embeddings=true", f"model.attention.rope_scaling={YARN}"]),
        (MIXTRAL, ["model.attention.num_kv_heads=1", "model.attention.rope_theta=1e4"]),
    ],
)
def test_what_a_class_can_be_told(family, sets):
    assert resolve(CONFIGS / FAMILIES[family], sets).stock_class.name == family


def test_a_group_of_one_expert():
    model = resolve(CONFIGS / "deepseek_v3.toml").config.model
    router = attrs.evolve(model.moe.router, num_experts=1, top_k=1, num_groups=1, top_groups=1)
    stock = stock_class(attrs.evolve(model, moe=attrs.evolve(model.moe, router=router)))
    assert stock.reasons == ("model.moe.router.num_experts = 1: it adds up the two best of a group",)


def test_a_dense_model_is_none_of_them():
    for family, config in FAMILIES.items():
        model = resolve(CONFIGS / config).config.model
        stock = stock_class(attrs.evolve(model, moe=None))
        assert (stock.name, stock.nearest) == (None, family)
        assert [reason for reason in stock.reasons if reason.startswith("model.moe is absent")]


def test_build_says_it_to_people_and_programs(capsys):
    assert run(["build", str(CONFIGS / "deepseek_v3.toml")]) == 0
    assert "\n  export    as DeepseekV3ForCausalLM\n" in capsys.readouterr().out
    assert run(["build", str(CONFIGS / "quickstart.toml")]) == 0
    shown = capsys.readouterr().out
    assert "\n  export    no: DeepseekV3ForCausalLM is the nearest\n" in shown
    assert "\n            model.attention.local.window = 64: it has no sliding windows\n" in shown
    assert run(["build", str(CONFIGS / "mixtral_8x7b.toml"), "--json"]) == 0
    expected = {"as": "MixtralForCausalLM", "nearest": "MixtralForCausalLM", "reasons": []}
    assert json.loads(capsys.readouterr().out)["export"] == expected
