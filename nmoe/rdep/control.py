"""The talk of all ranks of a training, on every node, between hosts: small values, in rounds, over the launch's store.

All ranks run the same list of rounds. In a round each rank gives one value, or says what went wrong with it,
and leaves when it has everybody's. The first failure of a round is raised on all ranks, with its rank; a
rank that neither comes nor shows that it is at work is named too. Rounds are for starts, saves and ends:
what ranks say to each other in a step goes by nmoe.rdep.signals. A rank that ends by a failure, wherever it was,
reports the first cause that it knows; the first report is everybody's, and ends the rounds of the others.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from nmoe.errors import Diagnostic, RunError, fail
from nmoe.rdep.signals import Failure, PeerFailed, describe

if TYPE_CHECKING:
    from torch.distributed import Store

LOOK_S = 0.02  # between two looks at the store
SLICE_S = 0.25  # between two looks at what can end a wait for its answer
SIGN_S = 1.0  # between two signs of work
LEAVE_S = 5.0
REPORT = "control/report"  # the key of the first failure that was reported
GIVEN_UP = "N0815"
PIECE_BYTES = 1 << 20  # a TCPStore drops the connection of who sends 8 MiB at once


@attrs.define
class _GivenUp:
    """Whether this process waits for nobody any more, and why."""

    cause: str = ""
    at_all: threading.Event = attrs.field(factory=threading.Event)


class Control:
    """One rank's end. One thread may use it at a time; another thread takes a `clone`.

    store: shared by all ranks of the training; None for one rank alone, which needs none. timeout_s: how
    long a rank may show no sign after this one has come to a round, in seconds. look: raises what is known by
    another way of a rank that has failed; called while this one waits, not in clones.
    """

    def __init__(
        self, store: "Store | None", *, rank: int, ranks: int, timeout_s: float,
        look: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        if (store is None) != (ranks == 1) or not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks} {'without' if store is None else 'with'} a store")
        self.rank, self.ranks, self.timeout_s = rank, ranks, timeout_s
        self._store, self.look = store, look
        self._prefix = "control"
        self._clones = 0
        self._round = 0
        self._own_keys: list[str] = []
        self._given_up = _GivenUp()
        self._signs, self._last_sign = 0, 0.0
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        if store is not None:
            threading.Thread(target=_answer, args=(store, self._calls), name="control", daemon=True).start()

    @classmethod
    def alone(cls) -> "Control":
        """That of the only rank."""
        return cls(None, rank=0, ranks=1, timeout_s=0.0)

    def clone(self) -> "Control":
        """For another thread: a connection and rounds of its own. All ranks make their clones in the same order."""
        self._clones += 1
        with self._reachable("another connection"):
            store = None if self._store is None else self._ask("clone")
        clone = Control(store, rank=self.rank, ranks=self.ranks, timeout_s=self.timeout_s)
        clone._prefix = f"{self._prefix}.{self._clones}"
        clone._given_up = self._given_up
        return clone

    def gather(self, what: str, mine: Any, *, at_first: bool = False) -> list[Any]:
        """Every rank's value of a round, in rank order; JSON values. at_first: for rank 0 alone, others get none.

        what: names the round in errors, and has to be the same on all ranks.
        RunError N0811: a rank has failed instead. N0812: one has not come. N0813: one has come to another
        round. N0814: the store is gone. N0815: this process has given up (`abort`).
        """
        text = json.dumps(mine)
        if self._store is None:
            return [json.loads(text)]
        key = self._next_round()
        with self._reachable(what):
            pieces = [text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES)]
            for number, piece in enumerate(pieces):
                self._set(f"{key}/{self.rank}/{number}", piece)
            self._set(f"{key}/{self.rank}", json.dumps([what, len(pieces)]))
            self._wait(what, key)
            answers = [json.loads(self._ask("get", f"{key}/{peer}")) for peer in range(self.ranks)]
            for peer, (theirs, _) in enumerate(answers):
                if theirs != what:
                    raise self._apart(what, peer, theirs)
            # Who has come to this round has read all of those before, so what this rank said there may go.
            while not self._own_keys[0].startswith(f"{key}/"):
                self._ask("delete_key", self._own_keys.pop(0))
            if at_first and self.rank > 0:
                return []
            return [self._value(f"{key}/{peer}", count) for peer, (_, count) in enumerate(answers)]

    def tell(self, what: str, value: Any = None) -> Any:
        """Rank 0's value, on all ranks; the others give none."""
        return self.gather(what, value if self.rank == 0 else None)[0]

    def fail(self, what: str, error: BaseException) -> None:
        """Answer the round `what` with an error, which all other ranks raise there; the caller raises it here."""
        if self._store is None:
            return
        key = self._next_round()
        with contextlib.suppress(RuntimeError, TimeoutError, RunError):  # the store is gone: whoever needs it finds out
            self._publish(key, Failure(self.rank, describe(error)))
            self._set(f"{key}/{self.rank}", json.dumps([what, 0]))

    def together(self, what: str, work: Callable[[], Any], *, at_first: bool = False) -> list[Any]:
        """gather of what `work` returns; where it raises, all ranks do."""
        try:
            mine = work()
        except BaseException as error:
            self.fail(what, error)
            raise
        return self.gather(what, mine, at_first=at_first)

    def first(self, what: str, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, which alone does it, on all ranks; where it raises, all ranks do."""
        return self.together(what, lambda: work() if self.rank == 0 else None)[0]

    def report(self, failure: Failure) -> None:
        """Name the first cause that this rank knows, before it ends; raises nothing."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError, TimeoutError, RunError):
                told = json.dumps([failure.rank, failure.text])
                self._ask("compare_set", REPORT, "", told, within_s=LEAVE_S)

    def first_failure(self) -> Failure | None:
        """What was reported first, if anything was; None too if the store does not answer."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError, TimeoutError, RunError):
                if self._ask("check", [REPORT], within_s=LEAVE_S):
                    return Failure(*json.loads(self._ask("get", REPORT, within_s=LEAVE_S)))
        return None

    def alive(self) -> None:
        """A sign that this rank is at work, for those that wait for it; to be given often, as long work goes on.

        RunError N0815 if this process has given up, and the work is for nobody any more.
        """
        if self._given_up.cause:
            raise self._stopped_waiting()
        now = time.monotonic()
        if self._store is not None and now - self._last_sign >= SIGN_S:
            self._signs, self._last_sign = self._signs + 1, now
            with self._reachable("a sign of work"):
                self._ask("set", f"{self._prefix}/alive/{self.rank}", str(self._signs))

    def abort(self, error: BaseException) -> None:
        """From any thread: all waiting of this process, in clones too, ends with N0815 within a second."""
        self._given_up.cause = describe(error)
        self._given_up.at_all.set()

    def leave(self) -> None:
        """The last call, however it ends: rank 0, which may hold the store, stays until the others have gone too.

        It waits LEAVE_S at most, in which those that wait have seen what there was, and raises nothing.
        """
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError, TimeoutError, RunError):
            self._ask("set", f"{self._prefix}/left/{self.rank}", "", within_s=LEAVE_S)
            left = [f"{self._prefix}/left/{peer}" for peer in range(self.ranks)]
            deadline = time.monotonic() + LEAVE_S
            while self.rank == 0 and not self._ask("check", left, within_s=LEAVE_S) and time.monotonic() < deadline:
                time.sleep(LOOK_S)

    def _ask(self, call: str, *arguments: Any, within_s: float | None = None) -> Any:
        """A call of the store. A server that has been stopped never answers, and then nothing ends the call itself.

        within_s: for its answer; None: as long as for a rank. TimeoutError if there is none in time, RunError N0815
        if this process has given up.
        """
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((call, arguments, answers))
        within_s = self.timeout_s if within_s is None else within_s
        deadline = time.monotonic() + within_s
        while True:
            try:
                answer = answers.get(timeout=SLICE_S)
            except queue.Empty:
                if self._given_up.cause:
                    raise self._stopped_waiting() from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it has not answered within {within_s:g} s") from None
                continue
            if isinstance(answer, BaseException):
                raise answer
            return answer

    def _next_round(self) -> str:
        self._round += 1
        return f"{self._prefix}/{self._round}"

    def _set(self, key: str, value: str) -> None:
        self._ask("set", key, value)
        self._own_keys.append(key)

    def _value(self, key: str, count: int) -> Any:
        return json.loads(b"".join(self._ask("get", f"{key}/{number}") for number in range(count)))

    def _publish(self, key: str, failure: Failure) -> None:
        """Make `failure` the round's, unless there is one before it."""
        mine = json.dumps([failure.rank, failure.text])
        if self._ask("compare_set", f"{key}/failure", "", mine) == mine.encode():
            self._own_keys.append(f"{key}/failure")

    def _wait(self, what: str, key: str) -> None:
        """Until all ranks have answered and none has failed."""
        missing = [peer for peer in range(self.ranks) if peer != self.rank]
        heard = dict.fromkeys(missing, time.monotonic())
        signs: dict[int, bytes] = {}
        while missing := [peer for peer in missing if not self._ask("check", [f"{key}/{peer}"])]:
            # The store's own wait writes two lines of its own to stderr whenever its time is up.
            if self._given_up.at_all.wait(LOOK_S):
                raise self._stopped_waiting()
            self.look()
            self._look_for_failure(what, key)
            now = time.monotonic()
            for peer in missing:
                sign = f"{self._prefix}/alive/{peer}"
                found = self._ask("get", sign) if self._ask("check", [sign]) else b""
                if found != signs.setdefault(peer, found):
                    signs[peer], heard[peer] = found, now
            late = [peer for peer in missing if now - heard[peer] > self.timeout_s]
            if late:
                first = Failure(late[0], f"did not come to `{what}` within {self.timeout_s:g} s")
                self._publish(key, first)
                raise PeerFailed(self._late(what, late), first)
        self._look_for_failure(what, key)

    def _look_for_failure(self, what: str, key: str) -> None:
        for told in (f"{key}/failure", REPORT):
            if self._ask("check", [told]):
                rank, text = json.loads(self._ask("get", told))
                raise PeerFailed(
                    Diagnostic(
                        code="N0811",
                        message=f"rank {rank} failed first: {(text.splitlines() or [''])[0]}",
                        place=f"rank {self.rank} at `{what}`",
                        help=f"look at what rank {rank} wrote",
                    ),
                    Failure(rank, text),
                )

    def _stopped_waiting(self) -> RunError:
        return fail(
            GIVEN_UP,
            f"rank {self.rank} has stopped waiting: {self._given_up.cause}",
            place=f"rank {self.rank}",
            help="look at the failure that is named",
        )

    def _late(self, what: str, late: list[int]) -> Diagnostic:
        return Diagnostic(
            code="N0812",
            message=f"{_names(late)} did not come to `{what}` within {self.timeout_s:g} s",
            place=f"rank {self.rank} at `{what}`",
            help="see whether it is stopped, or has ended, and what it wrote",
        )

    def _apart(self, what: str, peer: int, theirs: str) -> RunError:
        return fail(
            "N0813",
            f"rank {peer} has come to `{theirs}`, and rank {self.rank} to `{what}`",
            place=f"rank {self.rank} at `{what}`",
            help="all ranks must run the same plan on the same code",
        )

    @contextlib.contextmanager
    def _reachable(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, TimeoutError) as error:
            self.look()
            raise fail(
                "N0814",
                f"the store of the launch is gone: {(str(error).splitlines() or [''])[0]}",
                place=f"rank {self.rank} at `{what}`",
                help="look at what rank 0 and the launcher wrote: which of them held the store has ended, or hangs",
            ) from error


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _answer(store: "Store", calls: "queue.SimpleQueue[tuple[str, tuple[Any, ...], queue.SimpleQueue[Any]]]") -> None:
    """Make the calls of one Control, in a thread that nobody waits for."""
    while True:
        call, arguments, answers = calls.get()
        try:
            answers.put(getattr(store, call)(*arguments))
        except BaseException as error:
            answers.put(error)
