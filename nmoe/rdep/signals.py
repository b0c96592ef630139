"""Signals between the ranks of a node: who has come to which phase, and who failed first.

A phase is one exchange of a layer, or of the whole model. All ranks run the same list of phases, so a phase is
a number that only grows. When a rank publishes phase p to a peer it says two things: what it writes for the peer in p
is there, and whatever it had to read of the phases before p it has read, so that those buffers are free.
To observe p is to wait until every peer has published it. Hence nobody is more than one phase ahead.

Ranks wait in the kernel, in poll(2) on a Unix-domain socket to each peer: processes that spin would take
the cores from those that they wait for. A message is a system call on both sides, which orders the
stores before it and the loads after it.

A peer that dies is an end-of-file at once. A rank that fails tells its peers why before it goes, and a
rank that learns of a failure passes on the first one, so that all name the same cause. A peer that hangs
is a time-out; one that waits for somebody on another node says so again and again, and is not blamed for it.
"""

import collections
import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Mapping

import attrs

from nmoe.errors import Diagnostic, NmoeError, RunError, fail

PHASES = ("counts", "rows", "outputs", "output gradients", "input gradients")
"""Of the expert transport, in each layer."""

MODEL_PHASES = ("values", "gradients", "weights")
"""Of the whole model: small values that all ranks show each other, gradients for their owners, weights from these."""

ALL_PHASES = PHASES + MODEL_PHASES

ARRIVED, FAILED, ENDED, WAITING = range(4)
HEAD = struct.Struct("<BBIQ")  # kind; phase's index, layer, number: of a failure, the rank is in the layer's place
TEXT_BYTES = 8192
MESSAGE_BYTES = HEAD.size + TEXT_BYTES


@attrs.frozen
class Arrival:
    """A rank has come to phase `number`, which is the phase of that name in that layer, or of the whole model."""

    number: int
    phase: str
    layer: int

    def __str__(self) -> str:
        if not self.number:
            return "no phase yet"
        of_layer = f" of layer {self.layer}" if self.phase in PHASES else ""
        return f"phase {self.number}, `{self.phase}`{of_layer}"


@attrs.frozen
class Failure:
    """The first failure that a rank knows of."""

    rank: int
    text: str


class PeerFailed(RunError):
    """A failure whose cause is another rank's. first: that one."""

    def __init__(self, diagnostic: Diagnostic, first: Failure) -> None:
        super().__init__(diagnostic)
        self.first = first


class Signals:
    """One rank's end of the signals.

    sockets: a connected SOCK_SEQPACKET socket to each peer, by rank; closed by `close`. timeout_s: how
    long a peer may take to come to a phase after this rank has, in seconds.
    """

    def __init__(self, *, rank: int, sockets: Mapping[int, socket.socket], timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self.sockets = dict(sockets)
        self.here = Arrival(0, "", 0)
        self.seen = dict.fromkeys(self.sockets, self.here)
        self.waiting: dict[int, collections.deque[Arrival]] = {peer: collections.deque() for peer in self.sockets}
        self.heard = dict.fromkeys(self.sockets, 0.0)
        self.ended: set[int] = set()
        self.failure: Failure | None = None
        self.has_told = False
        self.poll = select.poll()
        self.peer_of_file = {end.fileno(): peer for peer, end in self.sockets.items()}
        for end in self.sockets.values():
            end.settimeout(timeout_s)
            self.poll.register(end, select.POLLIN)

    def begin(self, phase: str, layer: int = 0) -> None:
        """This rank comes to the next phase; layer: of a phase that is of one."""
        self.here = Arrival(self.here.number + 1, phase, layer)

    def publish(self, peer: int) -> None:
        """Tell a peer that this rank has done its part of the phase for it, and has read all of the phases before."""
        if peer == self.rank:
            return
        head = HEAD.pack(ARRIVED, ALL_PHASES.index(self.here.phase), self.here.layer, self.here.number)
        try:
            self.sockets[peer].send(head)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise self._hung([peer]) from error
            while peer not in self.ended and self.failure is None:
                self._receive(peer)
            raise self._gone(peer) from None

    def observe(self) -> None:
        """Wait until every peer has published this phase.

        RunError N0802: a peer has failed or ended. N0803: one has not come in time. N0804: one has come to
        another phase, so that the ranks do not run the same list.
        """
        began = time.monotonic()
        while missing := [peer for peer, queue in self.waiting.items() if not queue]:
            for peer in missing:
                if peer in self.ended:
                    raise self._gone(peer)
            left_s = {peer: max(began, self.heard[peer]) + self.timeout_s - time.monotonic() for peer in missing}
            events = self.poll.poll(max(0.0, min(left_s.values())) * 1000)
            if not events:
                raise self._hung([peer for peer in missing if left_s[peer] == min(left_s.values())])
            for file, _ in events:
                self._receive(self.peer_of_file[file])
                if self.failure is not None:
                    raise self._gone(self.failure.rank)
        for peer, queue in self.waiting.items():
            self.seen[peer] = queue.popleft()
            if self.seen[peer] != self.here:
                raise self._apart(peer, f"has come to {self.seen[peer]}")

    def waiting_elsewhere(self) -> None:
        """Tell the peers that this rank is not come to its phase because it waits for a rank that is no peer."""
        message = HEAD.pack(WAITING, 0, 0, self.here.number)
        for end in self.sockets.values():
            end.setblocking(False)
            with contextlib.suppress(OSError):  # whoever does not read learns of it in another way
                end.send(message)
            end.settimeout(self.timeout_s)

    def check(self) -> None:
        """RunError N0802 if a peer has failed or died since anybody looked; does not wait.

        For a rank that is busy with something else than phases. A peer that has come to its end is no failure.
        """
        for file, _ in self.poll.poll(0):
            self._receive(self.peer_of_file[file])
        if self.failure is not None:
            raise self._gone(self.failure.rank)

    def tell(self, error: BaseException) -> None:
        """Say that this rank has failed, and why; it says so once."""
        if not self.has_told:
            self.has_told = True
            where = f"\nin {self.here}" if self.here.number else ""
            first = self.failure or Failure(self.rank, describe(error) + where)
            if isinstance(error, PeerFailed):
                first = error.first
            text = first.text.encode(errors="replace")[:TEXT_BYTES]
            self._say(HEAD.pack(FAILED, 0, first.rank, self.here.number) + text)

    def learn(self, failure: Failure) -> None:
        """RunError N0802: a failure that this rank has heard of by another way."""
        self.failure = self.failure or failure
        raise self._gone(self.failure.rank)

    def close(self, error: BaseException | None = None) -> None:
        """Say why this rank ends, or that it is done, and close the sockets."""
        if error is None:
            self._say(HEAD.pack(ENDED, 0, 0, self.here.number))
        else:
            self.tell(error)
        for end in self.sockets.values():
            end.close()
        self.sockets.clear()

    def _say(self, message: bytes) -> None:
        for end in self.sockets.values():
            end.setblocking(False)
            with contextlib.suppress(OSError):  # it has gone, or hangs with a full queue: there is nobody to tell
                end.send(message)

    def _receive(self, peer: int) -> None:
        """One message of a peer, or its end."""
        end = self.sockets[peer]
        try:
            message = end.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            return  # it went without having read everything; what it had sent follows, and then its end
        if not message:
            self.poll.unregister(end)
            if peer not in self.ended:
                self.ended.add(peer)
                self.failure = self.failure or Failure(
                    peer, "ended without a word: it was killed, or crashed outside Python"
                )
            return
        kind, phase, layer, number = HEAD.unpack_from(message)
        if kind == ARRIVED:
            self.waiting[peer].append(Arrival(number, ALL_PHASES[phase], layer))
        elif kind == FAILED:
            self.failure = self.failure or Failure(layer, message[HEAD.size :].decode(errors="replace"))
        elif kind == WAITING:
            self.heard[peer] = time.monotonic()
        else:
            self.ended.add(peer)

    def _expected(self, peer: int) -> list[str]:
        return [f"seen of rank {peer}: {self.seen[peer]}", f"expected: {self.here}"]

    def _gone(self, peer: int) -> RunError:
        failure = self.failure
        if failure is None:
            return self._apart(peer, "has ended")
        first, *more = failure.text.splitlines() or [""]
        notes = [*more, *(self._expected(failure.rank) if failure.rank in self.seen and self.here.number else [])]
        return fail(
            "N0802",
            f"rank {failure.rank} failed first: {first}",
            place=f"rank {self.rank} at {self.here if self.here.number else 'the start'}",
            help=f"look at what rank {failure.rank} wrote",
            notes=notes,
        )

    def _hung(self, missing: list[int]) -> RunError:
        names = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        text = f"did not come to {self.here} within {self.timeout_s:g} s"
        self.failure = Failure(missing[0], text)
        return fail(
            "N0803",
            f"{names} {text}",
            place=f"rank {self.rank} at {self.here}",
            help="see whether it is stopped, or does something that takes longer",
            notes=[line for peer in missing for line in self._expected(peer)],
        )

    def _apart(self, peer: int, what: str) -> RunError:
        return fail(
            "N0804",
            f"rank {peer} {what}, and rank {self.rank} has come to {self.here}",
            place=f"rank {self.rank} at {self.here}",
            help="all ranks must run the same plan on the same code",
        )


def describe(error: BaseException) -> str:
    """An exception as its peers are told: the first line is what happened, and where."""
    if isinstance(error, NmoeError):
        first = error.diagnostics[0]
        where = f" at {first.place}" if first.place and first.place not in first.message else ""
        return f"{first.message} [{first.code}]{where}"
    return f"{type(error).__name__}: {error}"
