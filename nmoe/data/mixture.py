"""The order of training: which tokens the q-th sequence holds, as a pure function of q.

Sequence q counts from 0 over the whole run. Three steps lead from it to tokens, and each is closed
form, so that a run can begin anywhere and the only state is one integer.

1. *Source.* A stage [first, end) has integer weights w_j, divided by their common factor, and goes
   through blocks of B = sum(w_j) sequences. The block is one fixed list in which source j stands w_j
   times: position i takes the source whose share w_j (i + 1) / B is furthest ahead of what it has
   got (largest remainder, ties to the lower index). So after any number of sequences each source
   is within one sequence (two sources) or a few (many) of its share, and exact after each block. The
   count of earlier sequences of source j is w_j * blocks + its place within the block + what
   earlier stages took.
2. *Window.* A source of N tokens, read again from its start whenever it ends, is an endless row. It
   is cut every S tokens; window g holds the S + 1 tokens from gS (inputs and targets overlap by all
   but one). An epoch is W = N // S consecutive windows. Epoch e begins exactly where epoch e - 1
   stopped, so nothing is dropped: after any number of whole epochs the visits of any two tokens as
   targets differ by at most one, and the cuts fall elsewhere in each epoch unless S divides N. A
   window over the end of the row is valid text, since the row begins with an end-of-document token.
3. *Order.* The n-th sequence of source j is window eW + P(n mod W) of epoch e = n // W, where P is
   the permutation named by (seed, "data", j, e).
"""

import hashlib
import math
from collections.abc import Sequence

import attrs
import numpy as np

from nmoe.data.permutation import Permutation
from nmoe.data.source import TokenSource
from nmoe.errors import fail
from nmoe.rng import key

MAX_BLOCK = 2**20


@attrs.frozen(kw_only=True)
class MixtureStage:
    """Weights of the sources until global sequence `end_sequence` (not included; None: for ever)."""

    end_sequence: int | None
    weights: tuple[int, ...]


class _Stage:
    """A stage with its block laid out, and what each source had given before it."""

    def __init__(self, weights: Sequence[int], first: int, before_N: np.ndarray):
        divisor = math.gcd(*weights)
        self.weights_N = np.array([w // divisor for w in weights], np.int64)
        self.block = int(self.weights_N.sum())
        if self.block > MAX_BLOCK:
            raise fail(
                "N0211",
                f"the weights of a stage sum to {self.block} after division by their common factor",
                help=f"use smaller integers; the sum may be {MAX_BLOCK}",
            )
        self.first = first
        self.before_N = before_N
        self.source_B, self.place_B = _lay_out(self.weights_N.tolist())

    def counts(self, length: int) -> np.ndarray:
        """How many of the stage's first `length` sequences each source gives."""
        blocks, rest = divmod(length, self.block)
        tail = np.bincount(self.source_B[:rest], minlength=len(self.weights_N))
        return blocks * self.weights_N + tail


def _lay_out(weights: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One block: the source at each position, and its how-manieth it is."""
    block = sum(weights)
    sources, places = np.empty(block, np.int64), np.empty(block, np.int64)
    given = [0] * len(weights)
    ahead = [0] * len(weights)
    for position in range(block):
        ahead = [a + w for a, w in zip(ahead, weights, strict=True)]
        best = ahead.index(max(ahead))
        ahead[best] -= block
        sources[position], places[position] = best, given[best]
        given[best] += 1
    return sources, places


class Mixture:
    """Sources, stages and a seed: the order of training.

    sequence_length: S, inputs of a sequence. Raises RunError where the sources do not share one
    tokenizer or a source is shorter than one window.
    """

    def __init__(
        self, sources: Sequence[TokenSource], stages: Sequence[MixtureStage], *, seed: int, sequence_length: int
    ):
        self.sources = tuple(sources)
        self.seed = seed
        self.sequence_length = sequence_length
        first = self.sources[0]
        for index, source in enumerate(self.sources):
            if source.tokenizer_digest != first.tokenizer_digest:
                raise fail(
                    "N0210",
                    f"source {index} was made by another tokenizer than source 0",
                    help="prepare all sources of a mixture with one tokenizer",
                    notes=(f"source 0: {first.tokenizer_digest}", f"source {index}: {source.tokenizer_digest}"),
                )
            if source.num_tokens < sequence_length + 1:
                raise fail(
                    "N0212",
                    f"source {index} has {source.num_tokens} tokens, less than one window of {sequence_length + 1}",
                    help="lower `batch.sequence_length` or give more text",
                )
        self.vocab_size = first.vocab_size
        self.end_of_document = first.end_of_document
        self.token_bytes_V = first.token_bytes_V
        self.tokenizer_digest = first.tokenizer_digest
        names = [source.digest for source in self.sources]
        self.digest = hashlib.sha256("\n".join(["nmoe data 1", *names]).encode("ascii")).hexdigest()
        self._stages = self._make_stages(stages)
        self._permutations: dict[tuple[int, int], Permutation] = {}

    @classmethod
    def single(cls, source: TokenSource, *, seed: int, sequence_length: int) -> "Mixture":
        """One source, for ever."""
        for_ever = MixtureStage(end_sequence=None, weights=(1,))
        return cls([source], [for_ever], seed=seed, sequence_length=sequence_length)

    def _make_stages(self, stages: Sequence[MixtureStage]) -> list[_Stage]:
        made: list[_Stage] = []
        first, before_N = 0, np.zeros(len(self.sources), np.int64)
        for index, stage in enumerate(stages):
            end = stage.end_sequence
            last = index == len(stages) - 1
            if len(stage.weights) != len(self.sources) or min(stage.weights) < 0 or not any(stage.weights):
                raise ValueError(f"weights {stage.weights} for {len(self.sources)} sources")
            if (end is None) != last or (end is not None and end <= first):
                raise ValueError(f"stage {index} ends at {end}; ends ascend from above 0, and the last has none")
            laid_out = _Stage(stage.weights, first, before_N)
            made.append(laid_out)
            if end is not None:
                before_N = before_N + laid_out.counts(end - first)
                first = end
        if not made:
            raise ValueError("a mixture needs a stage")
        return made

    def windows_per_epoch(self, source: int) -> int:
        """W: windows of one epoch of a source."""
        return self.sources[source].num_tokens // self.sequence_length

    def counts(self, sequences: int) -> np.ndarray:
        """How many of the run's first `sequences` sequences each source gives (int64); closed form."""
        stage = self._stages[self._stage_of(np.array([sequences]))[0]]
        return stage.before_N + stage.counts(sequences - stage.first)

    def epochs(self, sequences: int) -> list[float]:
        """How often each source has been gone through after the run's first `sequences` sequences."""
        return [int(n) / self.windows_per_epoch(j) for j, n in enumerate(self.counts(sequences))]

    def _stage_of(self, sequence: np.ndarray) -> np.ndarray:
        firsts = np.array([stage.first for stage in self._stages], np.int64)
        return np.searchsorted(firsts, sequence, side="right") - 1

    def locate(self, first_sequence: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, start) of `count` sequences from `first_sequence` on, int64 each.

        start is the position in the source's tokens where the window begins.
        """
        if first_sequence < 0 or count < 0:
            raise ValueError(f"{count} sequences from sequence {first_sequence} on")
        sequence = np.arange(first_sequence, first_sequence + count, dtype=np.int64)
        source, nth = np.empty(count, np.int64), np.empty(count, np.int64)
        stage_of = self._stage_of(sequence)
        for index in np.unique(stage_of):
            stage, rows = self._stages[index], stage_of == index
            blocks, position = np.divmod(sequence[rows] - stage.first, stage.block)
            chosen = stage.source_B[position]
            source[rows] = chosen
            nth[rows] = stage.before_N[chosen] + blocks * stage.weights_N[chosen] + stage.place_B[position]
        start = np.empty(count, np.int64)
        for j in np.unique(source):
            rows = source == j
            start[rows] = self._starts(int(j), nth[rows])
        return source, start

    def _starts(self, source: int, nth: np.ndarray) -> np.ndarray:
        windows, num_tokens = self.windows_per_epoch(source), self.sources[source].num_tokens
        epoch, index = np.divmod(nth, windows)
        start = np.empty(len(nth), np.int64)
        for e in np.unique(epoch):
            rows = epoch == e
            # Python's integers: e * W * S passes 2^63 before a run of a very long epoch count would.
            origin = int(e) * windows * self.sequence_length % num_tokens
            start[rows] = (origin + self._permutation(source, int(e))(index[rows]) * self.sequence_length) % num_tokens
        return start

    def _permutation(self, source: int, epoch: int) -> Permutation:
        name = (source, epoch)
        if name not in self._permutations:
            if len(self._permutations) >= 64:
                self._permutations.clear()
            self._permutations[name] = Permutation(self.windows_per_epoch(source), key(self.seed, "data", *name))
        return self._permutations[name]

    def windows(self, first_sequence: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens (count, S + 1), source (count,)), int64, of the sequences from `first_sequence` on."""
        source, start = self.locate(first_sequence, count)
        tokens = np.empty((count, self.sequence_length + 1), np.int64)
        for row in range(count):
            tokens[row] = self._read(self.sources[source[row]], int(start[row]))
        return tokens, source

    def _read(self, source: TokenSource, start: int) -> np.ndarray:
        stop = start + self.sequence_length + 1
        if stop <= source.num_tokens:
            return source.read(start, stop)
        return np.concatenate([source.read(start, source.num_tokens), source.read(0, stop - source.num_tokens)])
