"""Saves beside the steps of a training."""

import threading

from nmoe.checkpoint import disk
from nmoe.checkpoint.format import steps_on_disk
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.train import events

STOP = 4


def test_a_slow_disk_holds_up_the_next_save_and_drops_none(runs, monkeypatch):
    """The first save comes no further than its objects until the loop stands at the second and waits for it."""
    goes_on, waited = threading.Event(), []
    write, done = disk.write_synced, CheckpointWriter.done

    def slow(path, data):
        if path.name.startswith("object"):
            goes_on.wait()
        write(path, data)

    def asked(writer, timeout_s):
        if not done(writer, 0.0) and not goes_on.is_set():
            waited.append(steps_on_disk(writer.directory))
            goes_on.set()
        return done(writer, timeout_s)

    monkeypatch.setattr(disk, "write_synced", slow)
    monkeypatch.setattr(CheckpointWriter, "done", asked)
    runs.train("run", f"output.stop_after_step={STOP}", "output.checkpoint_every=1", f"output.keep_checkpoints={STOP}")
    assert waited == [[]]
    assert steps_on_disk(runs.path("run") / "checkpoints") == [1, 2, 3, 4]
    assert [one["step"] for one in events.read(runs.path("run")).events if one["event"] == "saving"] == [1, 2, 3, 4]
    runs.train("straight", f"output.stop_after_step={STOP}")
    assert runs.head("run").state_digest == runs.head("straight").state_digest
