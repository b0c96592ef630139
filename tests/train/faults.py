"""What goes wrong on one rank of a training, and where: armed in the rank's own process before it starts.

A fault is HOW@WHERE. WHERE is one of PHASES, as `nmoe.train` names them to an observer: the first of step STEP or
later, or, where HOW begins with "stuck", each of them; or one of PLACES.
"""

import errno
import itertools
import os
import resource
import signal
from pathlib import Path

import torch

from nmoe.checkpoint import disk
from nmoe.data.loader import Loader
from nmoe.metrics.sink import Sink
from nmoe.train import attempt, launch, loop

STEP = 5
PHASES = ("batch", "forward", "backward", "optimizer", "router", "metrics", "evaluation", "save")
PLACES = ("start", "meeting", "opening", "building", "restoring", "objects", "ledger", "loader thread")


class OnFire(Exception):
    """A fault of the program, which the drill asks for."""


def act(how: str) -> None:
    """Does what goes wrong, here and now."""
    if how.startswith("SIG"):
        for one in how.split("+"):
            os.kill(os.getpid(), getattr(signal, one))
    elif how == "Ctrl-C":
        os.killpg(os.getpgid(os.getppid()), signal.SIGINT)
    elif how == "raise":
        raise OnFire("the rank is on fire")
    elif how == "memory":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (32 << 20), resource.RLIM_INFINITY))
        torch.empty(1 << 32)
    elif how in errno.errorcode.values():
        number = getattr(errno, how)
        raise disk.cannot("write", Path("a file"), OSError(number, os.strerror(number)))
    elif how == "exit":
        os._exit(7)
    else:
        raise ValueError(how)


def flip(graph, name: str) -> None:
    """The lowest bit of the last element of a tensor that all ranks hold."""
    values = graph.replicas.tensors[name].detach().view(-1)
    values[-1:].view({2: torch.int16, 4: torch.int32}[values.element_size()]).bitwise_xor_(1)


def arm(fault: str) -> None:
    """Makes this process go wrong as `fault` says when its training comes there."""
    how, _, where = fault.partition("@")
    real = loop.train

    left, graphs = [how], []

    def observe(step: int, phase: str) -> None:
        if left and step >= STEP and phase == where:
            if "flip" in how:
                flip(graphs[0], how.rpartition(" ")[2])
            if how.partition(" ")[0] != "stuck":
                left.pop()
            if "flip" not in how:
                act(how)

    def train(*given, **more):
        if where == "start":
            act(how)
        return real(*given, observe=observe, **more)

    loop.train = train
    if "flip" in how:
        build = attempt.build
        attempt.build = lambda *given: graphs.append(build(*given)) or graphs[0]
    if where == "meeting":
        _before(launch, "_together", how)
    elif where == "opening":
        _before(loop, "_open", how)
    elif where == "building":
        _before(attempt, "build", how)
    elif where == "restoring":
        _before(attempt.reader, "read_into", how)
    elif where == "objects":  # when some have been written
        names = itertools.count()
        _before(disk, "write_synced", how, when=lambda path, *_: "object" in path.name and next(names) == 3)
    elif where == "ledger":
        _before(Sink, "commit", how, when=lambda sink, step, *_: step == STEP)
    elif where == "loader thread":
        _before(Loader, "batch", how, when=lambda loader, step: step == STEP)
    elif where not in ("start", *PHASES):
        raise ValueError(where)


def _before(place, name: str, how: str, when=lambda *_: True) -> None:
    """`how` happens as that function is called, the first time that `when` says so of its arguments."""
    real, left = getattr(place, name), [how]

    def wrapped(*given, **more):
        if left and when(*given):
            act(left.pop())
        return real(*given, **more)

    setattr(place, name, wrapped)

