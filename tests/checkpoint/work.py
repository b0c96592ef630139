"""What a rank does in the tests: save its parts of a small state, or load them, and go wrong in one way."""

import errno
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import torch

from nmoe import slices
from nmoe.checkpoint import disk, reader
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.errors import RunError
from nmoe.part import Part
from tests.checkpoint import conftest as tool
from tests.rdep.talk import TIMEOUT_S, control
from tests.rdep.work import Planned
from tests.rdep.work import store as store  # the server of ranks asks for it here

SLICE_BYTES = 64  # so that small tensors have several slices


def part(name, tensor, rank, ranks):
    """Rank `rank`'s run of slices, in an order of the ranks that the name decides; it may have no elements."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    cuts = slices.boundaries(name, tuple(tensor.shape), dtype)
    turn = (rank + len(name)) % ranks
    first, last = turn * len(cuts) // ranks, (turn + 1) * len(cuts) // ranks
    start, stop = (0, 0) if first == last else (cuts[first][0], cuts[last - 1][1])
    return Part(tensor.reshape(-1)[start:stop], start, tuple(tensor.shape))


def parts(step, rank, ranks):
    """What a rank owns after `step` steps. Of a tensor of one slice the ranks that own nothing do not speak."""
    owned = {name: part(name, tensor, rank, ranks) for name, tensor in tool.state(step).items()}
    return {name: one for name, one in owned.items() if one.tensor.numel() or "embedding" in name or "empty" in name}


def saving(*, rank, ranks, store, directory, steps, who=-1, how="", timeout_s=TIMEOUT_S, kind="tcp"):
    """Save one step after the other; in the last, rank `who` goes wrong. What the save came to, of each step."""
    slices.SLICE_BYTES = SLICE_BYTES
    saved = []
    with control(store, rank, ranks, timeout_s, kind) as talk:
        writer = CheckpointWriter(directory, keep=2, threads=2, control=talk)
        if rank == who and how == "elsewhere":
            writer.directory = Path(elsewhere(directory))
        for step in steps:
            tensors, state, before_head = parts(step, rank, ranks), tool.counters(step), None
            if rank == who and step == steps[-1]:
                step, before_head = go_wrong(how, step, tensors, state)
            writer.save(step=step, tensors=tensors, state=state, identity=tool.identity(), before_head=before_head)
            one = writer.wait()
            saved.append([one.step, one.manifest_sha256, one.state_digest, one.objects, one.bytes, one.total_bytes])
    return saved


def go_wrong(how, step, tensors, state):
    """The step and the `before_head` with which the rank goes on."""
    if how in errno.errorcode.values():
        at_second_write(lambda path: cannot_write(path, getattr(errno, how)))
    if how in ("SIGKILL", "SIGSTOP"):
        at_second_write(lambda path: os.kill(os.getpid(), getattr(signal, how)))
    if how == "before HEAD":
        return step, lambda: os.kill(os.getpid(), signal.SIGKILL)
    if how == "ledger":
        return step, ledger_is_full
    if how == "retention":
        disk.remove_tree = lambda path: ledger_is_full()
    if how == "other state":
        state["rng"]["rounding"] = 9
    if how == "other step":
        state["step"] = step + 1
        return step + 1, None
    name = "model.frozen"
    one = tensors.get(name)
    if how == "missing":
        tensors[name] = Part(one.tensor[12:], one.start + 12, one.shape)
    if how == "unaligned":
        tensors[name] = Part(one.tensor[1:], one.start + 1, one.shape)
    if how == "twice":
        tensors[name] = Part.whole(tool.state(step)[name])
    if how == "other dtype":
        tensors[name] = Part(one.tensor.int(), one.start, one.shape)
    return step, None


def ledger_is_full():
    raise Planned("the ledger is full")


def cannot_write(path, number):
    raise disk.cannot("write", path, OSError(number, os.strerror(number)))


def at_second_write(act):
    real, count = disk.write_synced, iter(range(10**6))

    def write_synced(path, data):
        if next(count) == 1:
            act(path)
        real(path, data)

    disk.write_synced = write_synced


def going_on(*, rank, ranks, store, directory):
    """A save that fails on rank 1, and then one that does not."""
    slices.SLICE_BYTES = SLICE_BYTES
    with control(store, rank, ranks, TIMEOUT_S) as talk:
        writer = CheckpointWriter(directory, keep=2, threads=2, control=talk)
        real = disk.write_synced
        if rank == 1:
            go_wrong("EIO", 1, {}, {})
        writer.save(step=1, tensors=parts(1, rank, ranks), state=tool.counters(1), identity=tool.identity())
        try:
            writer.wait()
            said = "nothing"
        except RunError as error:
            said = error.diagnostics[0].code
        disk.write_synced = real
        writer.save(step=2, tensors=parts(2, rank, ranks), state=tool.counters(2), identity=tool.identity())
        return [said, writer.wait().step]


def loading(*, rank, ranks, store, directory, how=""):
    """Whether this rank's parts come back as the state of HEAD's step has them; one tensor whole on every rank."""
    slices.SLICE_BYTES = SLICE_BYTES
    with control(store, rank, ranks, TIMEOUT_S) as talk:
        manifest = reader.open_head(elsewhere(directory) if (how, rank) == ("elsewhere", 1) else directory, talk)
        assert manifest.state == tool.counters(manifest.step)
        state = tool.state(manifest.step)
        wanted = parts(manifest.step, rank, ranks)
        wanted["a.mask"] = Part.whole(state["a.mask"])
        held = {name: Part(torch.zeros_like(one.tensor), one.start, one.shape) for name, one in wanted.items()}
        if how == "not held" and rank == ranks - 1:
            del held["model.frozen"]
        if how == "left over" and rank == 1:
            held["more"] = Part.whole(torch.zeros(3))
        if how == "other shape" and rank == 1:
            held["a.mask"] = Part.whole(torch.zeros(4, dtype=torch.bool))
        if how == "flipped" and rank == 1:
            flip_what_lands(held["model.layers.0.moe.experts.w_down_EDF"].tensor)
        if how == "changed" and rank == 0:
            damage(directory, manifest.tensors["model.frozen"].slices[-1])
        try:
            reader.read_into(directory, manifest, held, talk)
        except RunError:
            late = how in ("changed", "flipped")
            assert late or not any(one.tensor.any() for one in held.values()), "a tensor was touched"
            raise
        return all(tool.same_bytes(held[name].tensor, wanted[name].tensor) for name in wanted)


def damage(directory, sha256):
    path = Path(directory) / "objects" / sha256[:2] / sha256
    path.write_bytes(b"\1" + path.read_bytes()[1:])


def flip_what_lands(tensor):
    """One bit of the tensor's memory is another than the one that is read into it from the file."""
    read, place = disk.read_exactly, tensor.data_ptr()

    def read_exactly(descriptor, buffer):
        read(descriptor, buffer)
        if torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() == place:
            buffer[1] ^= 4

    disk.read_exactly = read_exactly


def elsewhere(directory):
    """A directory that another node takes for this one."""
    return str(Path(directory).parent / "stale")


def room(*, rank, ranks, store, directory, free):
    """A save where the file system has `free` bytes."""
    shutil.disk_usage = lambda path: SimpleNamespace(free=free)
    return saving(rank=rank, ranks=ranks, store=store, directory=directory, steps=[1])


WORK = {"saving": saving, "room": room, "going on": going_on, "loading": loading}
