"""One rank goes wrong: all end, all name the first cause and its rank, and the last checkpoint stands.

A sample of what `python -m tests.train.drills` goes through; and signals, which are no failure.
"""

import pytest

from nmoe.checkpoint import reader
from nmoe.data import corpus
from nmoe.data.prepare import Request, prepare
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.train import run_lock
from nmoe.train.run_dir import events
from tests.train.drills import DRILLS, LATE, SHORT_WAIT, Drill, Ground, faults_of, under_torchrun
from tests.train.faults import STEP
from tests.train.launches import FOUR

SAMPLE = (
    "SIGKILL@batch, rank 0",
    "SIGKILL@objects, rank 0, which holds the store",
    "SIGSTOP@evaluation, rank 0",
    "memory@backward, rank 0",
    "raise@loader thread, rank 2",
    "ENOSPC@objects, rank 2",
    "raise@building, rank 2",
)


@pytest.fixture(scope="module")
def ground(module_launches):
    return Ground(module_launches)


@pytest.mark.parametrize("name", SAMPLE)
def test_all_end_and_name_the_first_cause(ground, name):
    (drill,) = (one for one in DRILLS if one.name == name)
    launch = ground.hold(drill, *(SHORT_WAIT if drill.cause == LATE else ()))
    assert list(faults_of(drill, launch, ground.launches.errors(f"{name}/run"))) == []
    assert ground.whole(name)
    assert ground.go_on(name) == ground.digest


SIGNALS = (
    ("SIGINT@start", 1, 4),
    ("SIGUSR1@opening", 3, 4),
    ("SIGTERM+SIGINT@building", 2, 4),
    ("SIGUSR1@meeting", 0, 4),
    ("SIGTERM@batch", 1, 5),
    ("SIGINT@forward", 3, 6),
    ("SIGUSR1+SIGUSR1@backward", 2, 7),
    ("SIGTERM@optimizer", 0, 8),
    ("SIGTERM+SIGTERM@metrics", 3, 9),
    ("SIGTERM@evaluation", 1, 10),
    ("SIGINT@save", 0, 12),
)
"""Fault, rank, and the step after which all stop, one launch after the other; from step 5 on in each one's first."""


def test_a_signal_to_any_one_rank_stops_all_after_one_step(module_launches):
    """In any phase, a second one too; every continuation is exact."""
    keys = (*FOUR, "output.checkpoint_every=11", "eval.bpb.every_tokens=640", "eval.bpb.max_tokens=160")
    module_launches.finished("signals", 4, *keys, "output.stop_after_step=4")
    for fault, who, step in SIGNALS:
        launch = module_launches.train("signals", 4, *keys, who=who, fault=fault)
        assert launch.codes == [130] * 4, (fault, launch.ends, *launch.said)
        name = fault.partition("@")[0].partition("+")[0]
        assert f"stopped by {name} after step {step} of 20, saved; run again to continue" in launch.said[0]
        assert reader.head_step(module_launches.path("signals") / "checkpoints") == step
        assert not any(launch.said[1:]), "the others have nothing to add"
        assert not module_launches.errors("signals")
    past = events.read(module_launches.path("signals"))
    assert [one["signal"] for one in past.events if one["event"] == "stop"][1:] == [
        fault.partition("@")[0].partition("+")[0] for fault, _, _ in SIGNALS
    ]
    keys = (*keys, "output.stop_after_step=13")
    straight = module_launches.finished("without signals", 1, *keys)
    assert module_launches.finished("signals", 4, *keys) == straight


def test_a_signal_before_the_first_step_of_a_run(launches):
    launch = launches.train("run", 2, *FOUR, who=1, fault="SIGTERM@building")
    assert launch.codes == [130, 130]
    assert "stopped by SIGTERM before the first step; run again to continue" in launch.said[0]
    assert reader.head_step(launches.path("run") / "checkpoints") == 0


def test_a_signal_while_the_last_save_is_waited_for_changes_nothing(launches):
    """The run had come to its end: the save is whole, and the status says so."""
    launch = launches.train("run", 2, *FOUR, "output.stop_after_step=1", who=1, fault="SIGTERM+SIGINT@objects")
    assert launch.codes == [0, 0], launch.said
    assert reader.head_step(launches.path("run") / "checkpoints") == 1
    assert launches.finished("run", 2, *FOUR, "output.stop_after_step=2") == launches.finished(
        "straight", 1, *FOUR, "output.stop_after_step=2"
    )


def test_ctrl_c_under_torchrun_saves_on_all_ranks(ground):
    """As a terminal sends it: to the launcher and whoever is in its group. The launcher asks the ranks once more."""
    drill = Drill("Ctrl-C@forward", 1, "")
    code, _, output = under_torchrun(ground, drill)
    run = f"{drill.name}, torchrun"
    assert code
    assert f"stopped by SIGINT after step {STEP} of 20, saved; run again to continue" in output
    assert "Traceback" not in output.partition("torch/distributed")[0]
    assert not ground.launches.errors(f"{run}/run")
    assert reader.head_step(ground.launches.path(run) / "run" / "checkpoints") == STEP
    assert ground.go_on(run) == ground.digest


def test_a_mistake_of_one_rank_at_the_start_is_told_by_all(launches, tmp_path):
    """Its data is not where the plan says. The others name the rank and the cause; nobody shows a traceback."""
    text = corpus.documents("shakespeare", "heldout")[0]
    for name, part in (("out", text[:4_000]), ("held", text[4_000:5_000])):
        (tmp_path / f"{name}.txt").write_text(part)
        prepare([tmp_path / f"{name}.txt"], tmp_path / name, BytesTokenizer(), Request(shard_tokens=8192), workers=1)
    here, gone = ([f'data.train="{tmp_path}/{name}/train"'] for name in ("out", "gone"))
    keys = (*FOUR, 'data.kind="shards"', f'eval.bpb.heldout="{tmp_path}/held/train"')
    launch = launches.train("run", 2, *keys, more={"0": here, "1": gone})
    assert launch.codes == [1, 1], (launch.ends, *launch.said)
    assert "this was rank 1 of 2" in launch.said[1]
    errors = launches.errors("run")
    for rank, said in enumerate(launch.said):
        assert "gone/train" in said
        assert "Traceback" not in said
        assert "gone/train" in str(errors[rank]["errors"])
        assert rank == 1 or "rank 1 failed first" in said


def test_a_run_that_somebody_else_owns(launches):
    """All ranks end; nothing is written into a directory that is not theirs."""
    launches.finished("run", 2, *FOUR, "output.stop_after_step=1")
    with run_lock.owned(launches.path("run"), "a test"):
        launch = launches.train("run", 2, *FOUR)
    assert launch.codes == [1, 1]
    assert "error[N0311]: the run is owned by another process: a test, pid" in launch.said[0]
    assert "rank 0 failed first: the run is owned by another process: a test, pid" in launch.said[1]
    assert not launches.errors("run")
