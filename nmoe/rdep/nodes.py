"""The nodes of a launch, and the bytes that travel between them.

Rank r of N = G M is rank l = r % M of node g = r // M. Inside a node ranks share memory (`nmoe.rdep.node`); between
nodes each rank speaks with its counterparts alone, the G ranks that have the same place l on their nodes and so
the same experts. What a rank gets from them its node reads in its memory.

Tensors go as they lie from one rank to another, over torch.distributed: gloo for what lies on hosts, NCCL for what
lies on GPUs. Nothing is added on the way: who receives adds, in the order that he wants.

Before their GPUs exchange anything the counterparts' hosts wait until the own one has nothing else to do, and meet.
So no GPU waits for another node, but for as long as the bytes take, and the host watches that too: it is never in
a wait that nothing can end. That costs several nodes one wait for the device in each exchange.

Whoever waits here hears within a second what is known of a failure, from the ranks of its own node by their
signals, from all others by what they have reported to the launch's store. A counterpart that is lost is blamed only
after a while in which nobody has named an earlier cause.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nmoe.errors import RunError, fail
from nmoe.rdep.node import Node
from nmoe.rdep.signals import Failure

if TYPE_CHECKING:
    from nmoe.rdep.control import Control
    from nmoe.rdep.cuda_node import CudaNode
    from nmoe.rdep.cuda_nodes import Column

SLICE_S = 0.25  # between two looks at what can end a wait
POLL_S = 0.0002  # between two looks at a GPU
BLAME_S = 3.0  # in which whoever knows the cause of a lost connection can report it
SPARE_S = 2.0  # for the group to find out by itself that its time is up

Tensors = Mapping[int, Sequence[Tensor]]
"""Contiguous tensors for or from each other node, by its number."""


class Nodes:
    """One rank's way to its counterparts. A context: leaving it ends the way.

    node: this rank's; node.first is its place g times M. count: G. store, control: of the launch, and timeout_s: how
    long a counterpart may take to come to an exchange after this rank has, in seconds; one node needs none of them.
    gpus: this node's, of which `exchange_on_gpus` takes tensors.
    rank, ranks: r of N, of the launch. moved: bytes that this rank has sent to other nodes.
    RunError N0808 if the counterparts cannot be reached.
    """

    def __init__(
        self, *, node: Node, count: int = 1, store: torch.distributed.Store | None = None,
        control: "Control | None" = None, timeout_s: float = 0.0, gpus: "CudaNode | None" = None,
    ) -> None:  # fmt: skip
        self.gpus = gpus
        self.node, self.count, self.control, self.timeout_s = node, count, control, timeout_s
        self.number = node.first // node.ranks
        self.rank, self.ranks = node.first + node.rank, count * node.ranks
        self.moved = 0
        self._group: Any = None
        self._column: Column | None = None
        self._tokens = torch.zeros(count, dtype=torch.uint8)
        if count > 1 and store is not None:
            self._calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
            self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            threading.Thread(target=_answer, args=(self._calls, self._answers), name="nodes", daemon=True).start()
            self._group = self._ask(lambda: self._meet(store), "the meeting of the nodes")
            if gpus is not None:
                device = gpus.device
                self._column = self._ask(lambda: self._meet_on_gpus(store, device), "the meeting of the nodes' GPUs")

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._column is not None:
            self._column.close(has_failed=error is not None)

    @property
    def others(self) -> list[int]:
        """The numbers of the other nodes."""
        return [number for number in range(self.count) if number != self.number]

    def exchange(self, sends: Tensors, receives: Tensors) -> None:
        """Send to the counterpart on each other node, and fill what is received from it; all do it together.

        What a rank sends to another has as many tensors as that one receives from it, of the same sizes.
        RunError N0802: a rank has failed. N0808: a counterpart has ended, cannot be reached or has not come in time.
        """
        if self._group is None:
            return
        self._ask(lambda: self._move(sends, receives), str(self.node.signals.here))
        self.moved += sum(tensor.nbytes for tensors in sends.values() for tensor in tensors)

    def exchange_on_gpus(self, what: str, sends: Tensors, receives: Tensors) -> None:
        """As `exchange`, of tensors on this rank's GPU, behind all that its current stream has been given.

        what: the name of the exchange, for messages. The tensors are there, and may be written again, when it returns.
        RunError N0803, too, if a GPU of this node did not come in time.
        """
        if self._column is None or self.gpus is None:
            return
        column, stream = self._column, torch.cuda.current_stream(self.gpus.device)
        ready = stream.record_event()
        self._watch(ready.query, math.inf, "")
        self.gpus.late.check()

        def move() -> torch.cuda.Event:
            tokens = {peer: [self._tokens[peer : peer + 1]] for peer in self.others}
            mine = [self._tokens[self.number : self.number + 1]]
            self._move(dict.fromkeys(self.others, mine), tokens)
            event: torch.cuda.Event = _blamed(None, column.move, sends, receives, stream)
            return event

        here = f"the exchange of {what}"
        done: torch.cuda.Event = self._ask(move, here)
        self._watch(done.query, self.timeout_s, here)
        self.moved += sum(tensor.nbytes for tensors in sends.values() for tensor in tensors)

    def _watch(self, is_done: Callable[[], bool], limit_s: float, what: str) -> None:
        """Until a GPU has done something; raises what is known of a failure meanwhile."""
        begun = looked = time.monotonic()
        while not is_done():
            time.sleep(POLL_S)
            now = time.monotonic()
            if now - looked > SLICE_S:
                looked = now
                self.node.signals.waiting_elsewhere()
                self._look()
                if self._column is not None and self._column.has_failed:
                    raise self._lost(None, f"has ended, or cannot be reached any more, at {what}")
            if now - begun > limit_s:
                raise self._lost(None, f"did not finish {what} within {limit_s:g} s")

    def _meet(self, store: torch.distributed.Store) -> Any:
        # A connection of its own: a wait in it would hold up whoever else uses the store.
        column = torch.distributed.PrefixStore(f"nodes/{self.node.rank}", store.clone())  # type: ignore[attr-defined]
        wait = timedelta(seconds=self.timeout_s)
        try:
            return torch.distributed.ProcessGroupGloo(column, self.number, self.count, wait)
        except RuntimeError as error:
            raise _Lost(None, error) from error

    def _meet_on_gpus(self, store: torch.distributed.Store, device: torch.device) -> "Column":
        from nmoe.rdep.cuda_nodes import Column

        column = torch.distributed.PrefixStore(f"gpus/{self.node.rank}", store.clone())  # type: ignore[attr-defined]
        column.set_timeout(timedelta(seconds=self.timeout_s))
        try:
            return Column(column, number=self.number, count=self.count, device=device)
        except RuntimeError as error:
            raise _Lost(None, error) from error

    def _move(self, sends: Tensors, receives: Tensors) -> None:
        """In the thread."""
        works = []
        for call, tensors in ((self._group.recv, receives), (self._group.send, sends)):
            for peer, several in tensors.items():
                for tag, tensor in enumerate(several):
                    if tensor.numel():
                        works.append((peer, _blamed(peer, call, [tensor], peer, tag)))
        for peer, work in works:
            _blamed(peer, work.wait)

    def _ask(self, call: Callable[[], Any], what: str) -> Any:
        """What `call` returns, which the thread does; raises what is known of a failure meanwhile."""
        self._calls.put(call)
        deadline = time.monotonic() + self.timeout_s + SPARE_S
        while True:
            try:
                answer = self._answers.get(timeout=SLICE_S)
            except queue.Empty:
                self.node.signals.waiting_elsewhere()
                self._look()
                if time.monotonic() > deadline:
                    raise self._lost(None, f"did not come to {what} within {self.timeout_s:g} s") from None
                continue
            if isinstance(answer, _Lost):
                raise self._lost(answer.peer, answer.text(what, self.timeout_s)) from answer
            if isinstance(answer, BaseException):
                raise answer
            return answer

    def _look(self) -> None:
        """RunError N0802 if it is known, here or anywhere, who has failed."""
        self.node.signals.check()
        failure = None if self.control is None else self.control.first_failure()
        if failure is not None:
            self.node.signals.learn(failure)

    def _lost(self, peer: int | None, text: str) -> RunError:
        """Who knows better has a while to say so; what then is left to say."""
        deadline = time.monotonic() + BLAME_S
        while time.monotonic() < deadline:
            self.node.signals.waiting_elsewhere()
            self._look()
            time.sleep(SLICE_S)
        names = [number * self.node.ranks + self.node.rank for number in ([peer] if peer is not None else self.others)]
        self.node.signals.failure = Failure(names[0], text)
        return fail(
            "N0808",
            f"{'rank' if len(names) == 1 else 'one of ranks'} {', '.join(map(str, names))} {text}",
            place=f"rank {self.rank} at {self.node.signals.here}",
            help="see whether it is stopped or has ended, what it wrote, and whether the nodes reach each other; "
            f"GLOO_SOCKET_IFNAME{'' if self.gpus is None else ' and NCCL_SOCKET_IFNAME'} tells the network's interface",
        )


class _Lost(Exception):
    """What torch.distributed says of a counterpart, or of some of them."""

    def __init__(self, peer: int | None, error: RuntimeError) -> None:
        super().__init__(str(error))
        self.peer = peer

    def text(self, what: str, timeout_s: float) -> str:
        said = (str(self).splitlines() or [""])[0]
        if "closed by peer" in said or "reset by peer" in said:
            return f"has ended, or cannot be reached any more, at {what}"
        if "imed out" in said or "imeout" in said:
            return f"did not come to {what} within {timeout_s:g} s"
        return f"cannot be reached at {what}: {said}"


def _blamed(peer: int | None, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except RuntimeError as error:
        raise _Lost(peer, error) from error


def _answer(calls: "queue.SimpleQueue[Callable[[], Any]]", answers: "queue.SimpleQueue[Any]") -> None:
    """Make the calls, in a thread that nobody waits for."""
    while True:
        try:
            answers.put(calls.get()())
        except BaseException as error:
            answers.put(error)
