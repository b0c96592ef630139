"""`nmoe bench repeatability` times as much of each part as a step of the plan's model calls."""

from collections import Counter

import pytest

from nmoe.bench.memory import with_data
from nmoe.bench.repeatability import works_of
from nmoe.bench.training import take
from nmoe.cli.main import run
from nmoe.graph import build
from nmoe.model import gqa, mla
from nmoe.model.mlp import DenseMlp
from nmoe.model.moe import MoE
from nmoe.model.norm import RmsNorm
from nmoe.plan.resolve import resolve
from tests.train.launches import SOFTMAX, TINY

GQA = ('model.attention.kind="gqa"', "model.attention.num_heads=4", "model.attention.num_kv_heads=2",
       "model.attention.head_dim=8", "model.attention.qk_norm=true")  # fmt: skip


@pytest.mark.parametrize("sets", [(), (*GQA, *SOFTMAX)], ids=["latent", "grouped"])
def test_counts_are_those_of_a_step(sets, monkeypatch):
    plan = with_data(resolve(TINY, [*sets, "platform.threads=1"]))
    graph = build(plan)
    works: Counter[str] = Counter()
    for work in works_of(plan, graph):
        works[work.name.split()[0]] += work.times
    called: Counter[str] = Counter()

    def counting(kind, owner, name):
        plain = getattr(owner, name)

        def wrapped(*given, **named):
            called[kind] += 1
            return plain(*given, **named)

        monkeypatch.setattr(owner, name, wrapped)

    for kind, owner, name in (
        ("norm", RmsNorm, "forward"), ("sum", RmsNorm, "after"), ("SwiGLU", DenseMlp, "forward"),
        ("MoE", MoE, "forward"), ("attention", gqa, "attend"), ("attention", mla, "attend"),
        ("keys", mla.Mla, "turned"), ("rotary", gqa, "rotate_halves"),
    ):  # fmt: skip
        counting(kind, owner, name)
    take(graph, plan, range(1, 2), text=True)
    called["norm"] -= called["sum"]  # on a CPU the sum calls the norm
    called["rotary"] += called["keys"]  # latent attention's queries
    passes = plan.config.batch.sequences // plan.config.batch.microbatch
    called["embedding"] = called["loss"] = passes
    matrices = {name: works.pop(name) for name in ("gradient", "AdamW", "Newton-Schulz")}
    assert works == called
    assert all(matrices.values())


def test_a_config_for_cpus_is_refused(capsys):
    assert run(["bench", "repeatability", str(TINY)]) == 2
    assert "for CPUs" in capsys.readouterr().err
