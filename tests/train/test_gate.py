"""The gate: what it kills where, what it compares, and that it finds what is not identical."""

import re
import shutil

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.checkpoint.format import object_path
from nmoe.errors import ConfigError, RunError
from nmoe.metrics.reader import read_rows
from nmoe.report.run import Run, read_run
from nmoe.train import gate
from nmoe.train.drill import PHASES
from nmoe.train.drill import main as drill
from tests.train.launches import GROUPS
from tests.train.test_mutation import reseal

STEPS = 4


@st.composite
def gates(draw):
    steps = draw(st.integers(1, 60))
    kills = draw(st.lists(st.integers(1, steps), min_size=1, max_size=8, unique=True))
    return steps, kills


@given(gates())
@settings(max_examples=400, deadline=None)
def test_cadences_do_not_divide_a_kill_and_differ(wanted):
    steps, kills = wanted
    straight, killed = gate.cadences(steps, kills)
    assert straight >= 1
    assert killed >= 2
    assert straight != killed
    assert all(step % killed for step in kills)


def test_the_killed_run_saves_before_and_between_its_kills():
    """Else every continuation would begin at the beginning, and nothing would be restored."""
    straight, killed = gate.cadences(30, [7, 13, 22])
    assert killed < 7
    assert straight < 30
    assert len({step // killed for step in (7, 13, 22)}) == 3


def test_kills_go_round_the_phases_that_follow_the_batch():
    points = gate.kill_points([3, 5, 8, 9, 11, 12])
    assert [int(point.split(":")[0]) for point in points] == [3, 5, 8, 9, 11, 12]
    assert [point.split(":")[1] for point in points] == [*PHASES[1:], PHASES[1]]


@pytest.fixture(scope="module")
def pair(module_runs):
    """Two runs of the same four steps, saved at other steps."""
    for name, every in (("a", 3), ("b", 2)):
        module_runs.train(name, f"output.stop_after_step={STEPS}", f"output.checkpoint_every={every}")
    return module_runs


def test_equal_runs_are_equal(pair):
    difference, compared, digest = gate.compare(pair.directory, "a", "b", STEPS)
    assert difference == ""
    assert digest == pair.digest("a") == pair.digest("b")
    head = pair.head("a")
    rows = [row for row in read_rows(pair.metrics / "a") if row.step == STEPS and row.name.startswith(GROUPS)]
    assert compared == {
        "steps": STEPS, "figures": len(rows) + 1, "tensors": len(head.tensors), "counters": len(head.state)
    }, "and the tokens seen"  # fmt: skip


def changed(pair, directory, **changes):
    """Copies of both runs, the second with another end; the gate's word on them."""
    for name in ("a", "b"):
        pair.copy(name, directory)
    reseal(directory / "b", attrs.evolve(pair.head("b"), **changes))
    return gate.compare(directory, "a", "b", STEPS)


@pytest.mark.parametrize("section, name", [("schedule", "tokens_seen"), ("loader", "next_batch"), ("rng", "rounding")])
def test_a_counter_that_differs_is_named(pair, tmp_path, section, name):
    state = pair.head("b").state
    value = state[section][name]
    difference, compared, digest = changed(pair, tmp_path, state={**state, section: {name: value + 1}})
    assert difference == f"step {STEPS}, weights: counter {section}.{name} is {value} in `a` and {value + 1} in `b`"
    assert (compared, digest) == ({}, "")


def test_the_first_tensor_that_differs_is_named(pair, tmp_path):
    """In the order in which a step makes them; also one that only one of them has."""
    tensors = pair.head("b").tensors
    early, late = "master/embedding.weight_VD", "router.bias/layers.3"
    swapped = attrs.evolve(tensors[early], slices=tensors["adamw.exp_avg/embedding.weight_VD"].slices)
    for index, (other, expected) in enumerate((
        ({**tensors, early: swapped}, early),
        ({name: record for name, record in tensors.items() if name != late}, late),
        ({**tensors, "zz.more": swapped}, "zz.more"),
    )):  # fmt: skip
        difference, _, _ = changed(pair, tmp_path / str(index), tensors=other)
        assert difference.startswith(f"step {STEPS}, weights: {expected} is ")


@pytest.mark.parametrize("name", ["train/loss", "grad/norm", "data/batch_digest"])
def test_the_first_step_that_differs_is_named(pair, monkeypatch, name):
    """A loss that differs in its last bit only, another batch."""
    rows = Run.rows
    (key,) = (one for one in rows(read_run(pair.path("b")), 2).values if one[0] == name)

    def read(self, step):
        found = rows(self, step)
        value = found.values[key]
        other = f"{value}x" if isinstance(value, str) else value * (1 + 2**-52)
        assert other != value
        return attrs.evolve(found, values=found.values | ({key: other} if self.path.name == "b" and step > 1 else {}))

    monkeypatch.setattr(Run, "rows", read)
    difference = gate.compare(pair.directory, "a", "b", STEPS)[0]
    assert re.match(rf"step 2, \w+: {name} is ", difference)


def test_a_missing_step_is_a_difference(pair, tmp_path):
    for name in ("a", "b"):
        pair.copy(name, tmp_path)
    (tmp_path / "metrics" / "b" / "step_00000003.parquet").unlink()
    assert gate.compare(tmp_path, "a", "b", STEPS)[0] == "step 3: not both have its rows"
    (tmp_path / "metrics" / "a" / "step_00000003.parquet").unlink()
    assert gate.compare(tmp_path, "a", "b", STEPS)[0] == "step 3: not both have its rows", "in neither"


def test_a_metric_that_only_one_has_is_a_difference(pair, monkeypatch):
    rows = Run.rows

    def read(self, step):
        found = rows(self, step)
        left = {key: value for key, value in found.values.items() if key[0] != "grad/clip" or self.path.name == "a"}
        return attrs.evolve(found, values=left)

    monkeypatch.setattr(Run, "rows", read)
    assert gate.compare(pair.directory, "a", "b", STEPS)[0] == "grad/clip: only `a` has it"


def test_another_end_is_a_difference(pair):
    assert gate.compare(pair.directory, "a", "b", STEPS - 1)[0] == f"step {STEPS - 1}: not both end with its checkpoint"


def test_a_damaged_end_is_no_verdict(pair, tmp_path):
    for name in ("a", "b"):
        pair.copy(name, tmp_path)
    victim = object_path(tmp_path / "b" / "checkpoints", max(pair.head("b").objects))
    victim.write_bytes(bytes(victim.stat().st_size))
    with pytest.raises(RunError, match="damaged"):
        gate.compare(tmp_path, "a", "b", STEPS)


def arguments(runs, name: str, *sets: str) -> list[str]:
    keys = [f'output.run_dir="{runs.path(name)}"', f'output.metrics_dir="{runs.metrics}"', *sets]
    return [str(runs.config), *(word for item in keys for word in ("--set", item))]


class Killed(BaseException):
    """Stands for the kill, which this process must survive."""


def test_every_phase_is_reached_and_killed_in(pair, runs, monkeypatch):
    """In this process: a kill that is an exception no handler catches; each continuation goes on to the same bits."""

    def kill(pid: int, number: int) -> None:
        raise Killed

    monkeypatch.setattr("nmoe.train.drill.os.kill", kill)
    sets = (f"output.stop_after_step={STEPS}", "output.checkpoint_every=2")
    for phase in PHASES:
        with pytest.raises(Killed):
            drill([*arguments(runs, "killed", *sets), "--kill", f"3:{phase}"])
        assert runs.head("killed").step == 2
    runs.train("killed", *sets)
    shutil.copytree(pair.path("a"), runs.path("a"))
    shutil.copytree(pair.metrics / "a", runs.metrics / "a")
    assert gate.compare(runs.directory, "a", "killed", STEPS)[0] == ""


def test_a_drill_that_is_not_killed_says_so(runs, capfd):
    assert drill([*arguments(runs, "run", "output.stop_after_step=1"), "--kill", "2:forward"]) == 1
    assert "the run ended before step 2 reached its phase `forward`" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["3", "3:", "x:forward", "3:lunch", "-1:forward"])
def test_a_drill_takes_a_step_and_a_phase(text, capfd):
    with pytest.raises(SystemExit) as caught:
        drill(["config.toml", f"--kill={text}"])
    assert caught.value.code == 2
    assert "STEP:PHASE" in capfd.readouterr().err


@pytest.mark.parametrize(
    "steps, kills, sets, message",
    [
        (0, [1], [], "--steps 0 does not fit the plan's 20 steps"),
        (21, [1], [], "--steps 21 does not fit"),
        (5, [], [], "--kill names no step"),
        (5, [3, 6], [], "--kill 6 is not one of the steps 1 to 5"),
        (5, [0], [], "--kill 0 is not one"),
        (5, [3, 3], [], "--kill names a step twice"),
        (5, [3], ['output.run_dir="x"'], "--set output.run_dir is the gate's own"),
        (5, [3], ["random.seed=1", " output.stop_after_step = 2"], "--set output.stop_after_step is the gate's own"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(runs, tmp_path, steps, kills, sets, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        gate.run_gate(
            runs.plan("any"), str(runs.config), sets, steps=steps, kills=kills, directory=tmp_path / "gate", say=print
        )
    assert not (tmp_path / "gate").exists()


def test_a_directory_of_somebody_else_is_left_alone(runs, tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "precious.parquet").write_text("rows of other runs")
    with pytest.raises(ConfigError, match="is not an empty or new directory"):
        gate.run_gate(runs.plan("any"), str(runs.config), [], steps=3, kills=[2], directory=tmp_path, say=print)
    assert (tmp_path / "metrics" / "precious.parquet").read_text() == "rows of other runs"


def test_an_attempt_that_ends_otherwise_is_named(runs, tmp_path, monkeypatch):
    """A straight run that fails: its own diagnostic is in the gate's."""
    plan = runs.plan("any")
    with pytest.raises(RunError) as caught:
        gate.run_gate(
            plan, str(tmp_path / "gone.toml"), [], steps=3, kills=[2], directory=tmp_path / "gate", say=print
        )
    (finding,) = caught.value.diagnostics
    assert finding.code == "N0511"
    assert "ended with status 2, not 0" in finding.message
    assert any("gone.toml" in note for note in finding.notes)
    assert "gone.toml" in (tmp_path / "gate" / "attempt.log").read_text()
