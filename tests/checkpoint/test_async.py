"""The save beside the training: what a slow disk does to it, and the room that is asked for before the first step."""

import threading

import pytest
import torch

from nmoe import slices
from nmoe.checkpoint import disk, writer
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.objects import require_finite
from nmoe.checkpoint.verify import read_manifest, verify
from nmoe.errors import RunError
from nmoe.rdep.control import Control


def test_a_slow_disk_holds_the_next_save_up_and_drops_none(directory, tool, monkeypatch):
    one = writer.CheckpointWriter(directory, keep=3, control=Control.alone())
    written, goes_on, waiting = threading.Event(), threading.Event(), threading.Event()
    write, wait = disk.write_synced, one.wait

    def slow(path, data):
        written.set()
        goes_on.wait()
        write(path, data)

    def seen():
        if written.is_set():
            waiting.set()
        return wait()

    monkeypatch.setattr(disk, "write_synced", slow)
    monkeypatch.setattr(one, "wait", seen)

    def save(step):
        one.save(step=step, tensors=tool.whole(tool.state(step)), state=tool.counters(step), identity=tool.identity())

    save(1)  # returns, although nothing is on the disk
    written.wait()
    assert not one.done(0.0)
    steps = threading.Thread(target=lambda: [save(2), save(3)])
    steps.start()
    waiting.wait()
    assert steps.is_alive()
    assert layout.steps_on_disk(directory) == []
    assert tool.holds(directory, 0)
    goes_on.set()
    steps.join()
    assert one.wait().step == 3
    assert layout.steps_on_disk(directory) == [1, 2, 3]
    assert [read_manifest(directory, step)[0].parent.step for step in (2, 3)] == [1, 2]
    assert tool.holds(directory, 3)
    assert not verify(directory).faults


def test_there_has_to_be_room_for_two_checkpoints_before_the_first_step(directory, tool, monkeypatch):
    """To the byte; one that stands has its room already."""
    tensors = tool.state(1)
    room = 0
    for name, tensor in tensors.items():
        count = slices.slice_count(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        room += tensor.numel() * tensor.element_size() + count * writer.BLOCK_BYTES
    free = 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free})())

    def require():
        writer.CheckpointWriter(directory, keep=2, control=Control.alone()).prepare(tool.whole(tensors))

    for count, words in ((2, "two checkpoints, the least that a run has, need"), (1, "a checkpoint needs")):
        free = writer.SPARE_BYTES + count * room
        require()
        free -= 1
        with pytest.raises(RunError, match=f"N0308.*{words} "):
            require()
        free = 2**40
        if count == 2:
            tool.save(directory, 1)


NAN, INF = float("nan"), float("inf")
NOT_FINITE = [
    *((dtype, value) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
      for value in (NAN, -NAN, INF, -INF)),
    (torch.float8_e4m3fn, NAN), (torch.float8_e4m3fn, -NAN),  # it has no infinities
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE)
@pytest.mark.parametrize("place", [0, 1234, 4098])
def test_one_value_that_is_not_finite_is_found(dtype, value, place):
    values = torch.linspace(-3, 3, 4099).to(dtype)
    require_finite("w", 0, values)
    values[place] = value
    with pytest.raises(RunError, match=f"N0317.*`w` is not finite: {value} at element {10 + place}"):
        require_finite("w", 10, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_exponent_is_told_from_those_that_are_not_finite(dtype):
    """As torch does, with the least and the largest mantissas of both signs."""
    for bits in (high | low for high in range(0, 1 << 16, 1 << 6) for low in (0, 1, 63)):
        value = torch.tensor([bits - (1 << 16) * (bits >> 15)], dtype=torch.int16).view(dtype)
        try:
            require_finite("w", 0, value)
            finite = True
        except RunError:
            finite = False
        assert finite == bool(torch.isfinite(value)), hex(bits)
