"""A training whose microbatches are replayed without their Python has every bit of one whose are not."""

from functools import cache

import pytest
import torch

from nmoe import graph
from nmoe.model import router
from nmoe.train.gate import compare
from tests.gpu.one_step import given
from tests.model.replay import Replayed

SETS = ("batch.sequences=6", "output.checkpoint_every=4", "output.metrics_every=1")


@pytest.fixture
def recorders(monkeypatch):
    """Those of the trainings that follow, in order. Routing is given, or the splits of rows would depend on data."""
    made = []
    routing = cache(lambda shape, top_k: given(torch.empty(shape), top_k))
    monkeypatch.setattr(router, "select", lambda score_TE, top_k: routing(score_TE.shape, top_k))

    def recorder(device):
        made.append(Replayed())
        return made[-1]

    monkeypatch.setattr(graph, "recorder", recorder)
    return made


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("output.recompute='layer'", "batch.document_mask=false"),
        ("batch.microbatch=6",),
        ("model.moe.router={kind='softmax', num_experts=8, top_k=2, balance_loss=0.01, z_loss=0.001}",),
    ],
    ids=["every part", "recomputed", "one microbatch", "softmax"],
)
def test_replayed_microbatches_train_the_same_bits(runs, recorders, sets, capsys):
    """Straight on, and stopped in the middle and continued: state, losses and all else that the ledger has."""
    runs.train("python", *SETS, *sets, "output.cuda_graph=false", "output.stop_after_step=8")
    assert recorders == []
    runs.train("replayed", *SETS, *sets, "output.stop_after_step=8")
    runs.train("continued", *SETS, *sets, "output.stop_after_step=4")
    runs.train("continued", *SETS, *sets, "output.stop_after_step=8")
    assert [one.recorded for one in recorders] == [1 if "batch.microbatch=6" in sets else 2] * 3
    assert capsys.readouterr().err.count(" recordings") == 3
    assert compare(runs.directory, "python", "replayed", 8)[0] == ""
    assert compare(runs.directory, "python", "continued", 8)[0] == ""
