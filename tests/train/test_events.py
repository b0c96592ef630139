"""A run's events: a line each, durable, nothing taken on trust, and what they prove of HEAD."""

import json
import os
from pathlib import Path

import pytest

from nmoe.checkpoint.manifest import Head
from nmoe.errors import RunError
from nmoe.train import events
from tests.train.directories import open_run


def event(name, attempt, **fields):
    return {"event": name, "attempt": attempt, "lineage": "x", **fields}


def start(attempt):
    return event("start", attempt)


def stop(attempt, step):
    return event("stop", attempt, step=step)


def saving(attempt, step):
    return event("saving", attempt, step=step)


@pytest.mark.parametrize(
    ("history", "saved"),
    [
        ([start(1)], 0),
        ([start(1), saving(1, 2)], 0),  # it may have been killed before that was whole
        ([start(1), saving(1, 2), saving(1, 4)], 2),
        ([start(1), saving(1, 2), start(2), saving(2, 2)], 0),
        ([start(1), saving(1, 2), saving(1, 4), stop(1, 4)], 4),
        ([start(1), saving(1, 2), stop(1, 2), start(2), saving(2, 4)], 2),
        ([start(1), saving(1, 2), saving(1, 4), stop(1, 4), event("rewind", 1, step=2)], 2),
        ([start(1), stop(1, 0)], 0),
    ],
)
def test_what_the_events_prove_to_have_been_saved(history, saved):
    assert events.Past(lineage="x", attempt=1, events=tuple(history)).saved == saved


@pytest.mark.parametrize("step", [None, "3", 3.0, True])
def test_an_event_that_lacks_its_step_is_refused(tmp_path, step):
    with open_run(tmp_path / "run") as run:
        run.event("stop", **({} if step is None else {"step": step}))
    with pytest.raises(RunError, match=r"N0316.*line 2") as caught:
        open_run(tmp_path / "run")
    assert "remove the line" in caught.value.render()


@pytest.mark.parametrize("head", [None, Head(step=0, manifest=None), Head(step=2, manifest="a" * 64)])
def test_a_run_never_goes_back_in_silence(tmp_path, head):
    """Its events tell of a checkpoint of step 4: an older HEAD, one that names nothing, or none is refused."""
    with open_run(tmp_path / "run") as run:
        run.event("stop", step=4, signal=None)
        run.checkpoints.mkdir()
        if head is not None:
            (run.checkpoints / "HEAD").write_bytes(head.encode())
    with pytest.raises(RunError, match=r"N0314.*`HEAD` .*tell that step 4 has been saved") as caught:
        open_run(tmp_path / "run")
    assert f"nmoe verify {tmp_path / 'run'} --rewind goes on openly" in caught.value.render()
    with pytest.raises(RunError, match="N0314"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("torn", [b'{"time": "2026', b"{", b'{"event": "x", "note": "\xc3', b"\0\0\0"])
def test_a_torn_last_line_is_cut_off_openly(tmp_path, torn):
    open_run(tmp_path / "run").close()
    path = tmp_path / "run" / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with open_run(tmp_path / "run") as run:
        assert run.attempt == 2
    assert path.read_bytes().startswith(whole + b'{"time"')
    repair = events.read(tmp_path / "run").events[-1]
    assert (repair["event"], repair["removed"]) == ("repair", torn.decode(errors="replace"))


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"event": "x"}', b'{"event": 1, "lineage": "l", "attempt": 1}'])
def test_a_broken_line_in_the_middle_is_no_tear(tmp_path, line):
    open_run(tmp_path / "run").close()
    path = tmp_path / "run" / "events.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(RunError, match=r"N0316.*line 1 of"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attempt", 0), ("attempt", 2**31 - 1), ("attempt", True), ("attempt", "1"), ("lineage", "a" * 31),
        ("lineage", "\ud800" * 32), ("lineage", "A" * 32), ("event", None), ("time", 1), ("step", -1), ("step", "3"),
        ("step", None), ("note", float("nan")), ("note", "\ud800"),
    ],
)  # fmt: skip
def test_an_event_that_no_writer_leaves_is_refused(tmp_path, key, value):
    open_run(tmp_path / "run").close()
    path = tmp_path / "run" / "events.jsonl"
    event = json.loads(path.read_bytes().splitlines()[0]) | {"event": "saving", "step": 1}
    path.write_text(json.dumps(event) + "\n")
    assert events.read(tmp_path / "run").attempt == 1
    path.write_text(json.dumps(event | {key: value}) + "\n")
    with pytest.raises(RunError, match=r"N0316.*line 1 of"):
        open_run(tmp_path / "run")


def test_a_stop_without_its_step_is_refused(tmp_path):
    open_run(tmp_path / "run").close()
    path = tmp_path / "run" / "events.jsonl"
    event = json.loads(path.read_bytes().splitlines()[0]) | {"event": "stop"}
    path.write_text(json.dumps(event) + "\n")
    with pytest.raises(RunError, match=r"N0316.*a step is a count"):
        open_run(tmp_path / "run")


def test_an_event_is_one_durable_line(tmp_path, monkeypatch):
    synced = []
    with open_run(tmp_path / "run") as run:
        monkeypatch.setattr(os, "fsync", lambda number: synced.append(str(Path(f"/proc/self/fd/{number}").readlink())))
        run.event("note", text="two\nlines", value=0.1)
        assert synced == [str(run.path / "events.jsonl")]
        last = events.read(run.path).events[-1]
        assert (last["text"], last["value"], last["attempt"], last["lineage"]) == ("two\nlines", 0.1, 1, run.lineage)
        with pytest.raises(ValueError, match="Out of range float"):
            run.event("note", value=float("nan"))
