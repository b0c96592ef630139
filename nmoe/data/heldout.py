"""Held-out text for scoring: every token after the first of the stream is a target exactly once.

Windows of S inputs follow one another; the targets of window i are the tokens iS + 1 .. iS + S, so
targets never overlap and none is left out. The last window is filled up with end-of-document
tokens that `valid` excludes, and a batch that reaches past the last window has rows without a
valid target: all batches have one shape, and the arithmetic of a window does not depend on where
the text ends. The first token of the stream opens the first document and stands for no text, so
the bytes of all valid targets together are the bytes of the text.
"""

import attrs
import numpy as np
import torch

from nmoe.data.source import TokenSource


@attrs.frozen(kw_only=True)
class HeldoutBatch:
    """count windows of S tokens.

    input_ids_BS, targets_BS, document_ids_BS: int64. valid_BS: bool, the targets that count.
    num_bytes: bytes of text that the valid targets stand for.
    """

    input_ids_BS: torch.Tensor
    targets_BS: torch.Tensor
    document_ids_BS: torch.Tensor
    valid_BS: torch.Tensor
    num_bytes: int


class HeldoutWindows:
    """The windows of `source`, in order; len() of them. max_tokens: targets from the start that count; None is all."""

    def __init__(self, source: TokenSource, *, sequence_length: int, max_tokens: int | None = None):
        self.source = source
        self.sequence_length = sequence_length
        self.num_tokens = source.num_tokens if max_tokens is None else min(source.num_tokens, max_tokens + 1)

    def __len__(self) -> int:
        return max(self.num_tokens - 2 + self.sequence_length, 0) // self.sequence_length

    def batch(self, first: int, count: int) -> HeldoutBatch:
        """Windows first .. first + count - 1, rows past the last one without a valid target."""
        length, end_of_document, num_tokens = self.sequence_length, self.source.end_of_document, self.num_tokens
        start = min(first * length, num_tokens)
        stop = min(start + count * length + 1, num_tokens)
        stream = np.full(count * length + 1, end_of_document, np.int64)
        stream[: stop - start] = self.source.read(start, stop)
        scored = max(stop - start - 1, 0)
        inputs_BS = stream[:-1].reshape(count, length)
        targets_BS = stream[1:].reshape(count, length)
        return HeldoutBatch(
            input_ids_BS=torch.from_numpy(inputs_BS.copy()),
            targets_BS=torch.from_numpy(targets_BS.copy()),
            document_ids_BS=torch.from_numpy(np.cumsum(inputs_BS == end_of_document, axis=1)),
            valid_BS=torch.from_numpy((np.arange(count * length) < scored).reshape(count, length)),
            num_bytes=int(self.source.token_bytes_V[stream[1 : 1 + scored]].sum()),
        )
