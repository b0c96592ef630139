"""nmoe bench: every subject gives rows, programs and people can read them, and the peers do the same work as ours."""

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.bench import attention_layer, moe_layer
from nmoe.bench.attention import Shape as AttentionShape
from nmoe.bench.attention import make_inputs as attention_inputs
from nmoe.bench.clock import Rates
from nmoe.bench.moe import Inputs, Shape, make_inputs
from nmoe.bench.rows import Row, to_table
from nmoe.cli.main import run
from nmoe.kernels.attention import attention_reference
from nmoe.kernels.moe import moe_reference

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests" / "train" / "tiny.toml")
DEEPSEEK = str(ROOT / "tests" / "export" / "deepseek.toml")
SMALL_MOE = ["--tokens", "40", "--hidden", "24", "--width", "16", "--experts", "5", "--top-k", "2", "--repeats", "1"]
SMALL_ATTENTION = ["--batch", "2", "--heads", "4", "--groups", "2", "--length", "70", "--qk-dim", "16", "--v-dim", "16",
                   "--repeats", "1"]  # fmt: skip
SUBJECTS = {
    "moe": SMALL_MOE,
    "moe of a config": [TINY, "--repeats", "1", "--routing", "zipf"],
    "attention": SMALL_ATTENTION,
    "attention window": [*SMALL_ATTENTION, "--window", "20"],
    "attention of a config": [TINY, "--repeats", "1"],
    "optimizer": [TINY, "--repeats", "1"],
    "step": [DEEPSEEK, "--steps", "1"],
    "loader": [TINY, "--repeats", "1"],
    "checkpoint": [TINY, "--repeats", "1", "--steps", "1"],
    "checkpoint of no model": ["--parameters", "5000", "--repeats", "1"],
    "memory": [TINY],
}


@pytest.fixture(autouse=True)
def _switches_back():
    """A bench sets torch's switches for its process, as a training does."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_gives_rows_and_a_picture(name, capsys, tmp_path):
    plot = tmp_path / "rows.svg"
    assert run(["bench", name.split()[0], *SUBJECTS[name], "--json", "--plot", str(plot)]) == 0
    rows = [Row(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert "ours" in {row.who for row in rows}
    if name == "step":
        assert {row.who for row in rows} == {"ours", "transformers eager", "transformers grouped_mm"}
    assert {row.work for row in rows} == {name.split()[0]}
    assert all(row.milliseconds is None or row.milliseconds > 0 for row in rows)
    text = "".join(ET.parse(plot).getroot().itertext())
    assert all(row.who in text and row.part in text for row in rows if row.milliseconds)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["moe", "--set", "a=1"], "there is no CONFIG"),
        (["moe", "--experts", "2", "--top-k", "3"], "--top-k 3 of 2 experts"),
        (["moe", str(ROOT / "tests" / "train" / "dense.toml")], "no MoE layer"),
        (["attention", "--heads", "3", "--groups", "2"], "no multiple of --groups"),
        (["rdep"], "cannot be shared by 1 rank"),
        (["rdep", "--vdev"], "needs GPUs"),
        (["step", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_is_not_valid_is_refused_with_status_2(arguments, words, capsys):
    assert run(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("routing", moe_layer.ROUTINGS)
def test_all_layers_compute_the_float64_layer(routing):
    """Output and the gradients of x and of the router, of ours and of every peer."""
    shape = Shape(50, 24, 16, 6, 3)
    x = Inputs(*(t.float() if t.is_floating_point() else t for t in make_inputs(shape, routing, "cpu")))
    x_TD, router_ED = (t.double().requires_grad_() for t in (x.x_TD, x.router_ED))
    score_TK = torch.sigmoid(x_TD @ router_ED.T).gather(1, x.expert_TK.long())
    weight_TK = score_TK / score_TK.sum(1, keepdim=True)
    want = moe_reference(x_TD, x.expert_TK, weight_TK, x.w_gate_up_E2FD.double(), x.w_down_EDF.double())
    gradients = torch.autograd.grad(want, (x_TD, router_ED), x.dout_TD.double())
    layers = {"ours": moe_layer.ours_on_cpu(x), **moe_layer.autograd_peers(x, shape.K, compile=False)}
    assert set(layers) == {"ours", "torch grouped_mm", "transformers eager", "transformers grouped_mm"}
    for who, layer in layers.items():
        out = layer.forward()
        torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4, msg=who)
        for found, expected in zip(layer.backward(out), gradients, strict=False):
            torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4, msg=who)


@pytest.mark.parametrize("window", [None, 9])
def test_all_attentions_compute_the_float64_attention(window):
    shape = AttentionShape(2, 4, 2, 40, 16, 16, window)
    x = attention_inputs(shape, "cpu")
    x = x._replace(q=x.q.float(), k=x.k.float(), v=x.v.float(), dout=x.dout.float())
    leaves = [t.double().requires_grad_() for t in (x.q, x.k, x.v)]
    want, _ = attention_reference(*leaves, window=window)
    gradients = torch.autograd.grad(want, leaves, x.dout.double())
    for who, layer in attention_layer.layers(x, shape, compile=False).items():
        out = layer.forward()
        torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5, msg=who)
        for found, expected in zip(layer.backward(out), gradients, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4, msg=who)


def test_the_floor_is_the_longer_of_moving_and_multiplying():
    rates = Rates(copy=10.0, dense=100.0)
    assert rates.floor(bytes=50.0) == 5.0
    assert rates.floor(bytes=50.0, flops=1000.0) == 10.0


def test_a_table_shows_every_row_under_its_case():
    row = Row(work="moe", case="T8", part="forward", who="ours", milliseconds=4.0, floor=1.0, rate=0.5, unit="TFLOP/s")
    peer = attrs.evolve(row, who="a peer", milliseconds=None, floor=None, rate=None, note="does not run")
    other = attrs.evolve(row, case="T9")
    first, second = to_table([row, peer, other]).split("\n\n")
    assert first.splitlines()[0] == "moe T8"
    assert "25% of the floor" in first
    assert "500 GFLOP/s" in first
    assert "does not run" in first
    assert second.splitlines()[0] == "moe T9"
    assert math.isclose(row.of_floor, 0.25)
