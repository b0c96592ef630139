"""Which figure of two ledgers is the first that differs, of runs that are ledgers alone."""

import pytest

from nmoe.metrics.sink import Sink
from nmoe.plan.resolve import resolve
from nmoe.report import compare as report
from nmoe.report.run import read_run
from nmoe.train.run_dir import RunDir
from tests.train.launches import TINY


def written(directory, name: str, steps: dict[int, dict]):
    """A run without checkpoints whose ledger has these rows: by step, (metric, layer, label) -> value."""
    plan = resolve(TINY, [f'output.run_dir="{directory / name}"', f'output.metrics_dir="{directory / "metrics"}"'])
    with (
        RunDir.open(plan, config_text="") as run,
        Sink(directory / "metrics", run=name, lineage=run.lineage, attempt=1) as sink,
    ):
        for number, rows in steps.items():
            for (metric, layer, label), value in rows.items():
                sink.add(metric, value, layer=layer, label=label)
            sink.commit(number, 64 * number, 0)
    return read_run(directory / name)


LOSS, CLIP, BIAS, LOAD = ("train/loss", None, None), ("grad/clip", None, None), "router/bias_max", "router/load_max"


@pytest.mark.parametrize(
    ("a", "b", "step", "what"),
    [
        ({1: {LOSS: float("nan")}}, {1: {LOSS: float("nan")}}, None, ""),
        ({1: {LOSS: 0.0}}, {1: {LOSS: -0.0}}, 1, "train/loss"),
        ({1: {LOSS: 1.0}}, {1: {LOSS: 1.0 + 2**-52}}, 1, "train/loss"),
        ({1: {CLIP: 1.0, LOSS: 2.0}}, {1: {CLIP: 0.5, LOSS: 3.0}}, 1, "train/loss"),
        ({1: {LOSS: 1.0}, 2: {LOSS: 2.0}, 3: {LOSS: 3.0}}, {1: {LOSS: 1.0}, 3: {LOSS: 4.0}}, 3, "train/loss"),
        (
            {1: {(LOAD, 1, None): 1.0, (LOAD, 2, None): 1.0, (BIAS, 2, None): 0.0}},
            {1: {(BIAS, 2, None): 0.5, (LOAD, 2, None): 2.0, (LOAD, 1, None): 1.0}},
            1, "router/bias_max",
        ),
        (
            {1: {(LOAD, 1, None): 1.0, (BIAS, 2, None): 0.0}}, {1: {(LOAD, 1, None): 2.0, (BIAS, 2, None): 0.5}},
            1, "router/load_max",
        ),
    ],
)  # fmt: skip
def test_which_figure_is_the_first(tmp_path, a, b, step, what):
    found = report.compare(written(tmp_path, "a", a), written(tmp_path, "b", b))
    assert found.step == step
    assert (found.first[1].what if found.first else "") == what
    assert found.identical is (step is None)


def test_a_metric_that_only_one_has_is_no_difference(tmp_path):
    both, one = {1: {LOSS: 1.0, CLIP: 1.0}}, {1: {LOSS: 1.0}}
    found = report.compare(written(tmp_path, "a", both), written(tmp_path, "b", one))
    assert found.identical
    assert found.lonely == {"grad/clip": "A"}
    assert "`grad/clip`: only A has it" in found.not_compared


def test_nothing_in_common_is_not_identical(tmp_path):
    found = report.compare(written(tmp_path, "a", {1: {LOSS: 1.0}}), written(tmp_path, "b", {2: {LOSS: 1.0}}))
    assert (found.step, found.identical) == (None, False)
