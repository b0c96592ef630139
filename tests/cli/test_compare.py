"""`nmoe compare` as a user runs it: what it prints, and what it exits with."""

import json

import pytest

from nmoe.cli.main import run as nmoe
from nmoe.metrics.sink import Sink
from nmoe.plan.resolve import resolve
from nmoe.train.run_dir import RunDir
from tests.train.launches import TINY


def run(directory, name, losses, *sets):
    """A run whose ledger has a loss for each step."""
    keys = [f'output.run_dir="{directory / name}"', f'output.metrics_dir="{directory / "metrics"}"', *sets]
    with (
        RunDir.open(resolve(TINY, keys), config_text="") as made,
        Sink(directory / "metrics", run=name, lineage=made.lineage, attempt=1) as sink,
    ):
        for step, loss in enumerate(losses, start=1):
            sink.add("train/loss", loss)
            sink.commit(step, 64 * step, 0)
    return str(directory / name)


def test_identical_runs_are_status_0(tmp_path, capsys):
    a, b = (run(tmp_path, name, [3.0, 2.0, 1.0]) for name in "ab")
    assert nmoe(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert out.startswith("identical in what both have: rows of steps 1 to 3\n")
    assert "weights: there is no step of which both keep a checkpoint" in out


def test_runs_that_part_are_status_1_and_the_line_says_where(tmp_path, capsys):
    a, b = run(tmp_path, "a", [3.0, 2.0, 1.0]), run(tmp_path, "b", [3.0, 2.5, 1.0], "random.seed=7")
    assert nmoe(["compare", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "they part at step 2, in the loss: train/loss", "  A 2.0, B 2.5", "  equal before: rows up to step 1"
    ]  # fmt: skip
    assert "checkpoint of step 1: its update may be what parts them" in lines[3]
    assert any(line.split() == ["loss", "0", "1", "train/loss", "2.0", "2.5", "2.0e-01"] for line in lines)
    assert any(line.split()[:2] == ["plan", "random.seed"] for line in lines)
    assert max(map(len, lines)) < 160


def test_where_nothing_explains_it_the_machine_is_suspected(tmp_path, capsys):
    a, b = run(tmp_path, "a", [3.0]), run(tmp_path, "b", [2.0])
    assert nmoe(["compare", a, b]) == 1
    assert "look for a machine that errs" in capsys.readouterr().out


def test_nothing_in_common_is_status_1(tmp_path, capsys):
    a, b = run(tmp_path, "a", [3.0]), run(tmp_path, "b", [])
    assert nmoe(["compare", a, b]) == 1
    assert capsys.readouterr().out.startswith("nothing to compare: there is no step that both have\n")


def test_json_has_it_all(tmp_path, capsys):
    a, b = run(tmp_path, "a", [3.0, 2.0]), run(tmp_path, "b", [3.0, float("inf")], "random.seed=7")
    assert nmoe(["compare", a, b, "--json"]) == 1

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (found["identical"], found["step"], found["rows"]) == (False, 2, [1])
    (loss,) = (stage for stage in found["stages"] if stage["name"] == "loss")
    assert loss["differences"] == [
        {"what": "train/loss", "layer": None, "where": "", "a": 2.0, "b": "inf"}
    ]  # fmt: skip
    assert [cause["what"] for cause in found["causes"] if cause["counts"]] == ["random.seed"]


@pytest.mark.parametrize("arguments", [["nowhere", "nowhere"], ["."], []])
def test_bad_arguments_are_status_2(tmp_path, capsys, arguments):
    assert nmoe(["compare", *(str(tmp_path / one) for one in arguments)]) == 2
    assert capsys.readouterr().out == ""


def test_a_damaged_ledger_is_status_1_with_its_file(tmp_path, capsys):
    a, b = (run(tmp_path, name, [3.0, 2.0]) for name in "ab")
    (tmp_path / "metrics" / "b" / "step_00000002.parquet").write_bytes(b"PAR1")
    assert nmoe(["compare", a, b]) == 1
    assert "error[N0403]: the metrics file `step_00000002.parquet`" in capsys.readouterr().err


def test_help_teaches(capsys):
    assert nmoe(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    for words in ("--json", "bit for bit", "nmoe compare runs/monday runs/tuesday", "Exit", "could not be compared"):
        assert words in text
