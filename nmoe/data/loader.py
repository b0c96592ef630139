"""From a step's number to its batch, and the thread that works ahead.

    batch(step) = windows of sequences (step - 1) * sequences .. step * sequences - 1

Steps count from 1. A batch depends on the mixture and the step alone, so prefetching cannot move
the stream of tokens: the prefetcher's queue holds finished batches with their steps and digests,
`next` refuses any step but the one due, and what a stopped run had not consumed is computed again
by the run that continues. Nothing of the queue is ever saved.
"""

import hashlib
import queue
import threading

import attrs
import numpy as np
import torch

from nmoe.data.mixture import Mixture
from nmoe.errors import NmoeError, fail


@attrs.frozen(kw_only=True)
class TokenBatch:
    """One step's tokens, over all ranks, B = sequences.

    input_ids_BS, targets_BS: int64; targets are the inputs one place further.
    document_ids_BS: int64; grows by one at each end-of-document token of the inputs, so equal ids in
        a row are one document.
    digest: SHA-256 (hex) of the (B, S + 1) windows as little-endian uint32: inputs and targets.
    num_bytes: bytes of text that the targets stand for.
    """

    step: int
    input_ids_BS: torch.Tensor
    targets_BS: torch.Tensor
    document_ids_BS: torch.Tensor
    digest: str
    num_bytes: int


class Loader:
    """loader.batch(step): a pure function. microbatch divides sequences."""

    def __init__(self, mixture: Mixture, *, sequences: int, microbatch: int):
        if sequences < 1 or microbatch < 1 or sequences % microbatch:
            raise ValueError(f"{sequences} sequences in microbatches of {microbatch}")
        self.mixture = mixture
        self.sequences = sequences
        self.microbatch = microbatch

    @property
    def digest(self) -> str:
        """Names the data: the sources' content and order."""
        return self.mixture.digest

    def batch(self, step: int) -> TokenBatch:
        """The batch of `step` (from 1). Raises what reading the sources raises."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        tokens, _ = self.mixture.windows((step - 1) * self.sequences, self.sequences)
        inputs_BS, targets_BS = tokens[:, :-1], tokens[:, 1:]
        return TokenBatch(
            step=step,
            input_ids_BS=torch.from_numpy(inputs_BS.copy()),
            targets_BS=torch.from_numpy(targets_BS.copy()),
            document_ids_BS=torch.from_numpy(np.cumsum(inputs_BS == self.mixture.end_of_document, axis=1)),
            digest=hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest(),
            num_bytes=int(self.mixture.token_bytes_V[targets_BS].sum()),
        )


class Prefetcher:
    """Batches from `first_step` on, in order, at most `depth` of them made ahead by one thread.

    depth 0 computes each batch when it is asked for. Use it as a context manager, or call close().
    """

    def __init__(self, loader: Loader, *, depth: int, first_step: int):
        if depth < 0 or first_step < 1:
            raise ValueError(f"prefetch depth {depth} from step {first_step}")
        self._loader = loader
        self._due = first_step
        self._stop = threading.Event()
        self._queue: queue.Queue[TokenBatch | BaseException] = queue.Queue(maxsize=depth)
        self._thread: threading.Thread | None = None
        if depth:
            self._thread = threading.Thread(target=self._work, args=(first_step,), name="nmoe-prefetch", daemon=True)
            self._thread.start()

    def next(self) -> TokenBatch:
        """The batch of the next step. Raises the thread's failure, or RunError where it has died."""
        if self._stop.is_set():
            raise ValueError("the prefetcher is closed")
        entry = self._loader.batch(self._due) if self._thread is None else self._take(self._thread)
        if isinstance(entry, NmoeError):
            raise entry
        if isinstance(entry, BaseException):
            raise fail(
                "N0221",
                f"making the batch failed: {type(entry).__name__}: {entry}",
                place=f"step {self._due}, prefetch thread",
                help="the failure above is the cause; the run can be continued when it is gone",
            ) from entry
        if entry.step != self._due:
            raise fail(
                "N0222",
                f"the prefetch queue gave the batch of step {entry.step} where step {self._due} was due",
                place=f"step {self._due}",
                help="continue the run from its last checkpoint, and report this: it is a fault of nmoe",
            )
        self._due += 1
        return entry

    def _take(self, thread: threading.Thread) -> TokenBatch | BaseException:
        while True:
            alive = thread.is_alive()
            try:
                return self._queue.get(timeout=1.0 if alive else 0.0)
            except queue.Empty:
                if not alive:
                    raise fail(
                        "N0220",
                        "the prefetch thread is dead and left no cause",
                        place=f"step {self._due}",
                        help="continue the run from its last checkpoint",
                    ) from None

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                entry: TokenBatch | BaseException = self._loader.batch(step)
            except BaseException as error:  # handed to next(), which raises it in the thread of the run
                entry = error
            while not self._stop.is_set():
                try:
                    self._queue.put(entry, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(entry, BaseException):
                return
            step += 1

    def close(self) -> None:
        """Stop the thread and wait for its end; may be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
