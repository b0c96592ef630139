"""The collapse detector against a plain look at every window of a random history, and what it says."""

import pytest
import torch

from nmoe.errors import RunError
from nmoe.metrics.router_collapse import CollapseDetector, stopped
from nmoe.metrics.router_health import health

EVEN, HALF_DEAD, ONE_HEAVY = (torch.tensor(load) for load in ([4, 4, 4, 4], [8, 8, 0, 0], [13, 1, 1, 1]))


def looked(detector, loads):
    """The findings of each step; loads: a step's counts by layer."""
    return [
        detector.look(step, {layer: health(load, None, {}) for layer, load in layers.items()})
        for step, layers in enumerate(loads, start=1)
    ]


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_a_finding_is_the_first_whole_window_past_a_threshold(window):
    """By brute force: a step is found if the window up to it is past, and the window up to the step before is not."""
    generator = torch.Generator().manual_seed(window)
    history = [
        {layer: torch.randint(0, 3, (6,), generator=generator) + torch.tensor([1, 0, 0, 0, 0, 0]) for layer in (1, 4)}
        for _ in range(1000)
    ]
    found = looked(CollapseDetector(dead_share=1 / 3, max_load=1.6, window=window), history)
    for layer in (1, 4):
        for figure, past in (
            ("dead_share", [int((step[layer] == 0).sum()) >= 2 for step in history]),
            ("max_load", [step[layer].max().item() * 6 >= 1.6 * step[layer].sum().item() for step in history]),
        ):
            whole = [end >= window and all(past[end - window : end]) for end in range(len(past) + 1)]
            expected = [end for end in range(1, len(past) + 1) if whole[end] and not whole[end - 1]]
            mine = [one for step in found for one in step if (one.layer, one.figure) == (layer, figure)]
            assert [one.step for one in mine] == expected
            assert expected


def test_a_threshold_counts_from_its_own_value_on_and_an_absent_one_never():
    detector = CollapseDetector(dead_share=0.5, max_load=None, window=1)
    assert [len(step) for step in looked(detector, [{0: EVEN}, {0: ONE_HEAVY}, {0: HALF_DEAD}])] == [0, 0, 1]
    detector = CollapseDetector(dead_share=None, max_load=3.25, window=1)
    assert [len(step) for step in looked(detector, [{0: EVEN}, {0: ONE_HEAVY}, {0: HALF_DEAD}])] == [0, 1, 0]


def test_what_stops_a_run_names_layer_step_figures_and_the_way_out():
    detector = CollapseDetector(dead_share=0.5, max_load=3.0, window=2)
    first, second = looked(detector, [{2: HALF_DEAD, 5: ONE_HEAVY}] * 2)
    assert first == []
    error = stopped(second, run="runs/mine")
    assert isinstance(error, RunError)
    (diagnostic,) = error.diagnostics
    assert diagnostic.code == "N0508"
    assert diagnostic.message == (
        "the router of layer 2 has collapsed: 0.5 of its experts had no token, at least 0.5 for 2 steps"
    )
    assert diagnostic.place == "step 2 of runs/mine"
    assert "change or remove [output.router_collapse]" in diagnostic.help
    assert diagnostic.notes == (
        "the router of layer 5 has collapsed: one expert had 3.25 times the mean load, at least 3 for 2 steps",
    )
