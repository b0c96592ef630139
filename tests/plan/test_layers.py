"""`extends` and `--set`: what wins, what carries over, where values come from, and what is refused."""

from pathlib import Path

import pytest

from nmoe.errors import ConfigError
from nmoe.plan.resolve import resolve

BASE = (Path(__file__).parent / "base.toml").read_text()


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text(BASE)

    def writer(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return writer


def refused(config, sets=()):
    with pytest.raises(ConfigError) as caught:
        resolve(config, sets)
    return caught.value.diagnostics


def test_a_child_overrides_key_by_key(write):
    plan = resolve(write("child.toml", 'extends = "base.toml"\n[model]\nnum_layers = 6\n'))
    base = resolve("base.toml")
    assert plan.config.model.num_layers == 6
    assert plan.tree["model"] | {"num_layers": 4} == base.tree["model"]
    assert plan.origins["model.num_layers"] == "child.toml:3"
    assert plan.origins["model.hidden_size"] == "base.toml:11"
    assert plan.origins["optimizer.router.beta1"] == "default"


def test_parents_are_relative_to_their_child(write):
    write("families/middle.toml", 'extends = "../base.toml"\n[random]\nseed = 1\n')
    plan = resolve(
        write("configs/deep/child.toml", 'extends = "../../families/middle.toml"\n[batch]\nsequences = 16\n')
    )
    assert (plan.config.random.seed, plan.config.batch.sequences, plan.config.batch.microbatch) == (1, 16, 2)
    assert plan.origins["random.seed"] == "../../families/middle.toml:3"
    assert plan.origins["batch.microbatch"].startswith("../../base.toml:")


def test_origins_do_not_depend_on_where_one_stands(write, tmp_path, monkeypatch):
    write("child.toml", 'extends = "base.toml"\n[model]\nnum_layers = 6\n')
    here = resolve("child.toml")
    monkeypatch.chdir("/")
    there = resolve(tmp_path / "child.toml")
    assert here == there


def test_another_kind_starts_the_section_afresh(write):
    """MLA's ranks, and the local layers below, mean nothing to the child's GQA."""
    child = 'extends = "base.toml"\n[model.attention]\nkind = "gqa"\nnum_heads = 4\nnum_kv_heads = 4\nhead_dim = 8\n'
    plan = resolve(write("child.toml", child))
    assert plan.tree["model"]["attention"] == {
        "kind": "gqa", "num_heads": 4, "rope_theta": 10000.0, "num_kv_heads": 4, "head_dim": 8, "qk_norm": False,
    }  # fmt: skip
    [missing] = refused(write("less.toml", 'extends = "base.toml"\n[optimizer.experts]\nkind = "adamw"\n'))
    assert (missing.code, missing.path, missing.line) == ("N0110", "less.toml", 2)
    assert "`lr`" in missing.message


def test_another_target_starts_the_platform_afresh(write):
    """The CPU's threads mean nothing to a GPU."""
    model = '[model]\ndtype = "bf16"\n[model.moe.experts]\nkind = "bf16"\nintermediate_size = 16\n'
    child = write("child.toml", f'extends = "base.toml"\n[platform]\ntarget = "sm_100a"\n{model}')
    assert resolve(child).tree["platform"] == {"target": "sm_100a"}
    assert resolve(child, ['platform.target="cpu"', "platform.threads=3"]).config.platform.threads == 3
    assert "needs the number of threads" in refused(child, ['platform.target="cpu"'])[0].message
    same = resolve(write("same.toml", 'extends = "base.toml"\n[platform]\ntarget = "cpu"\n'))
    assert same.config.platform.threads == resolve("base.toml").config.platform.threads


def test_the_same_kind_keeps_what_the_child_does_not_write(write):
    plan = resolve(write("child.toml", 'extends = "base.toml"\n[model.attention]\nkind = "mla"\nnum_heads = 4\n'))
    assert plan.config.model.attention.num_heads == 4
    assert plan.config.model.attention.q_lora_rank == 24
    assert plan.config.model.attention.local.window == 16


def test_an_implied_kind_is_no_change(write):
    plan = resolve(write("child.toml", 'extends = "base.toml"\n[schedule]\nkind = "wsd"\nwarmup_tokens = 0\n'))
    assert plan.config.schedule.stable_tokens == 4096


def test_an_array_is_replaced_whole(write):
    write("parent.toml", (Path(__file__).parent / "mixture.toml").read_text())
    plan = resolve(write("child.toml", 'extends = "parent.toml"\n[[data.stages]]\nweights = [0, 1]\n'))
    assert plan.tree["data"]["stages"] == [{"weights": [0, 1]}]
    assert plan.origins["data.stages.0.weights"] == "child.toml:3"


def test_an_error_in_the_parent_stands_in_the_parent(write):
    write("parent.toml", BASE.replace("num_layers = 4", 'num_layers = "4"'))
    [finding] = refused(write("child.toml", 'extends = "parent.toml"\n'))
    assert (finding.path, finding.line) == ("parent.toml", 12)
    write("parent.toml", BASE.replace("num_layers = 4", "num_layers = "))
    [finding] = refused("child.toml")
    assert (finding.code, finding.path, finding.line) == ("N0105", "parent.toml", 12)


def test_errors_of_both_files_come_together(write):
    write("parent.toml", BASE.replace("seed = 7", "sead = 7"))
    findings = refused(write("child.toml", 'extends = "parent.toml"\n[model]\nnum_layers = 0\n'))
    assert [(d.code, d.path, d.line) for d in findings] == [("N0115", "child.toml", 3), ("N0112", "parent.toml", 6)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends = 3", "path of one file"),
        ("extends = ''", "path of one file"),
        ('extends = ["a.toml", "b.toml"]', "path of one file"),
        ('extends = "nowhere.toml"', "cannot read"),
        ('extends = "child.toml"', "extends itself"),
        ('extends = "./x/../child.toml"', "extends itself"),
        ('extends = "loop.toml"', "extends itself"),
        ('extends = "."', "cannot read"),
    ],
)
def test_parents_that_cannot_be_followed(write, text, says):
    write("loop.toml", 'extends = "child.toml"')
    [finding] = refused(write("child.toml", f"# first line\n{text}\n"))
    assert finding.code == "N0108"
    assert says in finding.message
    if "loop" not in text:
        assert (finding.path, finding.line) == ("child.toml", 2)


def test_too_many_parents(write):
    for number in range(12):
        write(f"p{number}.toml", f'extends = "p{number + 1}.toml"')
    [finding] = refused("p0.toml")
    assert (finding.code, finding.path) == ("N0108", "p8.toml")


def test_extends_below_a_section_is_an_unknown_key(write):
    [finding] = refused(write("child.toml", BASE + 'extends = "base.toml"\n'))
    assert (finding.code, finding.line) == ("N0112", BASE.count("\n") + 1)


def test_set_wins_and_says_so(write):
    plan = resolve("base.toml", ["model.num_layers=6", 'output.run_dir = "runs/x"', "optimizer.dense={lr=1e-3}"])
    assert plan.config.model.num_layers == 6
    assert plan.config.output.run_dir == "runs/x"
    assert plan.config.optimizer.dense.lr == 1e-3
    assert plan.config.optimizer.dense.lr_floor == 3e-4
    assert {k for k, v in plan.origins.items() if v == "--set"} == {
        "model.num_layers", "output.run_dir", "optimizer.dense.lr",
    }  # fmt: skip
    assert plan.fingerprint != resolve("base.toml").fingerprint


def test_set_passes_the_same_checks(write):
    findings = refused("base.toml", ["random.seed=3", "model.num_layers=4.9", "model.moe.router.top_k=9"])
    assert [(d.code, d.path, d.line, d.source) for d in findings] == [
        ("N0114", "--set", 2, "model.num_layers=4.9"), ("N0117", "--set", 3, "model.moe.router.top_k=9"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ("model.num_layers", "N0109"), ("", "N0109"), ("=3", "N0109"), ("model.num_layers=", "N0109"),
        ("output.run_dir=runs/x", "N0109"), ("random.seed=1 2", "N0109"), ("[random]\nseed=1", "N0109"),
        ("[random]=1", "N0109"), ("random.seed=1\nmodel.num_layers=3", "N0109"), ("random.seed=1\0", "N0109"),
        ('extends="base.toml"', "N0109"), ("random.seed=nan", "N0107"), ("random.seed=1979-05-27", "N0107"),
        ("random.seed=9007199254740992", "N0107"), ("random.sead=3", "N0112"), ("random=3", "N0114"),
        ("a." * 40 + "b=1", "N0104"), ("random.seed=" + "[" * 40, "N0104"), ("random.seed='1\udcff'", "N0109"),
        ("random..seed=1", "N0109"), ("random.seed==1", "N0109"),
    ],
)  # fmt: skip
def test_sets_that_are_refused_at_their_argument(write, argument, code):
    findings = refused("base.toml", [argument])
    assert [(d.code, d.path, d.line) for d in findings] == [(code, "--set", 1)]
    assert findings[0].help


def test_a_key_set_twice_is_refused(write):
    [finding] = refused("base.toml", ["random.seed=1", "random.seed=2"])
    assert (finding.code, finding.line) == ("N0109", 2)


def test_a_string_without_quotes_is_shown_with_them(write):
    [finding] = refused("base.toml", ["output.run_dir=runs/x"])
    assert """--set 'output.run_dir="runs/x"'""" in finding.help
