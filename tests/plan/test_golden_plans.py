"""The resolved plan of every config is the one that was last agreed to; `make goldens` rewrites them."""

from pathlib import Path

import pytest

from nmoe.plan.render import WIDTH, render
from nmoe.plan.resolve import resolve, resolve_text

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
PLANS = ROOT / "tests" / "golden" / "plans"


def golden_of(config: Path) -> Path:
    return PLANS / ("-".join(config.relative_to(ROOT / "configs").with_suffix("").parts) + ".txt")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_plan_is_the_golden_one(config):
    text = render(resolve(config))
    assert text == golden_of(config).read_text(encoding="ascii"), (
        "the plan has changed; if it should: make goldens"
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_page_of_ascii_that_tells_no_place(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = render(resolve(config))
    assert text.isascii()
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_resolved_text_is_the_same_plan(config):
    plan = resolve(config)
    again = resolve_text(plan.to_toml(), "resolved.toml")
    assert (again.fingerprint, again.tree_digest, again.sections) == (plan.fingerprint, plan.tree_digest, plan.sections)
    assert again.config == plan.config


def test_no_golden_is_left_over():
    assert {golden_of(config) for config in CONFIGS} == set(PLANS.glob("*.txt"))


def test_the_model_families():
    assert resolve(ROOT / "configs" / "moonlet.toml").parameters_total == 7_358_851_072
    moonlet, moonlight = (resolve(ROOT / "configs" / f"{n}.toml").config for n in ("moonlet", "moonlight"))
    assert moonlight.model.num_layers == 27
    assert moonlight.batch.sequences == 64
    assert moonlight.model.attention == moonlet.model.attention
    assert moonlight.model.moe == moonlet.model.moe
