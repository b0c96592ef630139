"""What a rank does in the tests of the talk between hosts: rounds of it, in which one rank goes wrong."""

import contextlib
import os
import signal
import threading
from datetime import timedelta

import torch

from nmoe.errors import fail
from nmoe.rdep.control import Control

TIMEOUT_S = 60.0  # where nobody is to be waited for in vain
ROUNDS = 40


def tcp(store, rank):
    """A client of a TCPStore that rank 0 serves, as without a launcher; `store` says where it listens."""
    if rank == 0:
        own = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port", str(own.port))
        return own
    return torch.distributed.TCPStore("127.0.0.1", int(store.get("port")), is_master=False)


@contextlib.contextmanager
def control(store, rank, ranks, timeout_s, kind="tcp"):
    """A rank's end of the talk. kind: of the store; a file outlives all ranks, as a launcher's store does."""
    if ranks == 1:
        yield Control.alone()
        return
    one = Control(tcp(store, rank) if kind == "tcp" else store, rank=rank, ranks=ranks, timeout_s=timeout_s)
    try:
        yield one
    finally:
        one.leave()


def talking(*, rank, ranks, store, kind):
    """What rounds give, that two threads do not disturb each other, and how many keys are left."""
    with control(store, rank, ranks, TIMEOUT_S, kind) as talk:
        found = [talk.gather("numbers", [rank, "é", None]), talk.gather("at first", {"r": rank}, at_first=True)]
        found += [talk.tell("a word", f"from {rank}"), talk.first("work", lambda: f"by {rank}")]
        found.append([len(one) for one in talk.gather("more than a message holds", "x" * (9 << 20))])
        other, sums = talk.clone(), []
        thread = threading.Thread(target=lambda: sums.extend(sum(other.gather("a", rank)) for _ in range(ROUNDS)))
        thread.start()
        mine = [talk.gather("b", [rank, number]) for number in range(ROUNDS)]
        thread.join()
        assert mine == [[[peer, number] for peer in range(ranks)] for number in range(ROUNDS)]
        assert sums == [sum(range(ranks))] * ROUNDS
        talk.gather("the end of the rounds", None)
        keys = talk._store.num_keys() if ranks > 1 else 0
        talk.gather("counted", None)
        return [found, keys]


def going_wrong(*, rank, ranks, store, how, timeout_s, kind="tcp"):
    """Rank 1 goes wrong in a round."""
    with control(store, rank, ranks, timeout_s, kind) as talk:
        talk.gather("before", None)
        if rank == 1 and how in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, how))
        if rank == 0 and how.startswith("server "):
            os.kill(os.getpid(), getattr(signal, how.removeprefix("server ")))
        if rank == 1 and how == "other round":
            talk.gather("another", None)
        if rank == 1 and how == "at work":
            at_work(talk)
        if rank > 1 and how == "two fail":
            talk.together("after", lambda: on_fire(rank))
        if how == "given up":
            return given_up(talk)
        return talk.gather("after", rank)


def on_fire(rank):
    raise fail("N0301", f"the disk of rank {rank} is on fire")


def at_work(talk):
    """Longer than the time-out of the others, with signs of it."""
    for _ in range(10):
        with contextlib.suppress(RuntimeError):
            talk._store.wait(["never"], timedelta(seconds=0.5))
        talk.alive()


def given_up(talk):
    """Rank 0 waits for rank 1 in a clone, and its main thread hears that rank 1 is dead."""
    if talk.rank > 0:
        talk._store.wait(["end"], timedelta(seconds=TIMEOUT_S))
        return "waited"
    clone, said = talk.clone(), []

    def wait():
        try:
            clone.gather("after", None)
        except Exception as error:
            said.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    talk._store.wait(["control.1/1/0"], timedelta(seconds=TIMEOUT_S))
    talk.abort(fail("N0802", "rank 1 failed first: ended without a word"))
    thread.join()
    talk._store.set("end", "")
    return said[0]


WORK = {"talking": talking, "going wrong": going_wrong}
