"""Held-out text for scoring: every token after the first of the stream is a target exactly once.

Windows of S inputs advance by S - C tokens. A window's first C targets have been scored by the window
before it, so they do not count: every scored token sees at least C tokens before it, where the text has
them, and none is scored twice. C = 0 lets windows follow one another. The last window is filled up
with end-of-document tokens that `valid` excludes, and a batch that reaches past the last window has
rows without a valid target: all batches have one shape, and the arithmetic of a window does not
depend on where the text ends. The first token of the stream opens the first document and stands
for no text, so the bytes of all valid targets together are the bytes of the text.
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
    """The windows of `source`, in order; len() of them.

    context: C of the module, below sequence_length. max_tokens: targets from the start that count; None is all.
    """

    def __init__(
        self, source: TokenSource, *, sequence_length: int, context: int = 0, max_tokens: int | None = None
    ):
        if not 0 <= context < sequence_length:
            raise ValueError(f"a context of {context} in windows of {sequence_length}")
        self.source = source
        self.sequence_length = sequence_length
        self.context = context
        self.num_tokens = source.num_tokens if max_tokens is None else min(source.num_tokens, max_tokens + 1)

    def __len__(self) -> int:
        # The first window scores S targets, each later one S - C.
        targets, length = self.num_tokens - 1, self.sequence_length
        return 0 if targets < 1 else 1 + -(-max(targets - length, 0) // (length - self.context))

    def batch(self, first: int, count: int) -> HeldoutBatch:
        """Windows first .. first + count - 1, rows past the last one without a valid target."""
        length, end_of_document = self.sequence_length, self.source.end_of_document
        windows = np.full((count, length + 1), end_of_document, np.int64)
        valid_BS = np.zeros((count, length), dtype=bool)
        for row in range(min(count, len(self) - first)):
            start = (first + row) * (length - self.context)
            stop = min(start + length + 1, self.num_tokens)
            windows[row, : stop - start] = self.source.read(start, stop)
            valid_BS[row, self.context if start else 0 : stop - start - 1] = True
        inputs_BS, targets_BS = windows[:, :-1], windows[:, 1:]
        return HeldoutBatch(
            input_ids_BS=torch.from_numpy(inputs_BS.copy()),
            targets_BS=torch.from_numpy(targets_BS.copy()),
            document_ids_BS=torch.from_numpy(np.cumsum(inputs_BS == end_of_document, axis=1)),
            valid_BS=torch.from_numpy(valid_BS),
            num_bytes=int(self.source.token_bytes_V[targets_BS[valid_BS]].sum()),
        )
