"""A collapsed router in a run: a warning changes nothing, a stop can be gone on from exactly."""

import json

import pytest

from nmoe.cli.main import run as nmoe
from nmoe.errors import RunError
from nmoe.metrics.reader import read_rows

STEPS = 6
COMMON = (f"output.stop_after_step={STEPS}", "output.checkpoint_every=2")
# Loads of 64 tokens are never even, so a threshold this near to 1 is past in every step.
ALWAYS = ("output.router_collapse.max_load=1.001", "output.router_collapse.window=3")
STOP = (*ALWAYS, 'output.router_collapse.action="stop"')


@pytest.fixture(scope="module")
def straight(module_runs):
    """A run in which nothing is found."""
    module_runs.train("straight", *COMMON)
    assert found(module_runs, "straight") == []
    return module_runs


def found(runs, name):
    events = [json.loads(line) for line in (runs.path(name) / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "router_collapse"]


def test_a_warning_is_said_once_and_changes_no_bit(runs, straight, capfd):
    assert runs.train("run", *COMMON, *ALWAYS).exit_code == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "warning: " in line]
    assert len(said) == 3
    assert said[0].startswith("step 3: warning: the router of layer 1 has collapsed: one expert had ")
    events = found(runs, "run")
    assert [(event["step"], event["layer"], event["figure"]) for event in events] == [
        (3, layer, "max_load") for layer in (1, 2, 3)
    ]
    rows = read_rows(runs.metrics / "run", names=["router/load_max"])
    values = {(row.step, row.layer): row.value for row in rows}
    for event in events:
        assert (event["action"], event["threshold"], event["window"]) == ("warn", 1.001, 3)
        assert event["value"] == values[event["step"], event["layer"]] > 1.001
    assert runs.digest("run") == straight.digest("straight")
    assert runs.losses("run") == straight.losses("straight")


@pytest.mark.parametrize("way_out", [(), ("output.router_collapse.window=9",)], ids=["removed", "changed"])
def test_a_stop_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(runs, straight, way_out, tmp_path):
    with pytest.raises(RunError, match="N0508") as caught:
        runs.train("run", *COMMON, *STOP, "output.metrics_every=5")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.place == f"step 3 of {runs.path('run')}"
    assert [event["action"] for event in found(runs, "run")] == ["stop"] * 3
    assert runs.head("run").step == 2, "the step that stops is not saved"
    assert [row.step for row in read_rows(runs.metrics / "run", names=["train/loss"])] == [3], "and its rows are there"
    assert nmoe(["verify", str(runs.path("run"))]) == 0

    sets = (*COMMON, *STOP, *way_out)
    if not way_out:
        head, _, rest = runs.plan("run", *COMMON).to_toml().partition("[output.router_collapse]\n")
        runs.config = tmp_path / "without.toml"
        runs.config.write_text(head + rest.partition("\n\n")[2])
        sets = COMMON
        assert runs.plan("run", *sets).config.output.router_collapse is None
    assert runs.train("run", *sets).exit_code == 0
    assert runs.digest("run") == straight.digest("straight")
    assert runs.losses("run") == straight.losses("straight")[2:]


def test_a_stop_is_exit_1_without_a_traceback(runs, capfd):
    sets = [f'output.run_dir="{runs.path("run")}"', *STOP]
    assert nmoe(["train", str(runs.config), *(word for item in sets for word in ("--set", item))]) == 1
    error = capfd.readouterr().err
    assert "error[N0508]: the router of layer 1 has collapsed: one expert had " in error
    assert " = help: change or remove [output.router_collapse]" in error
    assert "Traceback" not in error
