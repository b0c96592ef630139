"""Held-out bits per byte.

    bpb = sum over scored tokens of -log2 p(token | what the window shows before it) / bytes of text

Every byte of the held-out text is scored exactly once: the stream is cut into windows of S tokens
whose targets do not overlap, and the last window is shorter. The first token of each document is
predicted from the end-of-document token before it. Sums are taken in float64, batch after batch, so
the figure does not depend on anything but the weights and the text, nor on how many ranks score it.

The evaluation draws no random number, leaves the routers' load counters alone (the model is in
evaluation mode) and reads nothing that training reads later.
"""

import math
from collections.abc import Callable

import attrs
import torch

from nmoe.data.heldout import HeldoutWindows
from nmoe.errors import fail
from nmoe.eval.lockstep import calls
from nmoe.model.loss import token_losses
from nmoe.model.transformer import Transformer
from nmoe.optim.reduction import Alone, Reduction

CHUNK_TOKENS = 1024
ALONE = Alone()


@attrs.frozen(kw_only=True)
class BpbResult:
    """bits_per_byte over num_bytes of text; loss in nats per scored token; num_tokens scored."""

    bits_per_byte: float
    loss: float
    num_tokens: int
    num_bytes: int


def require_text(windows: HeldoutWindows) -> None:
    """RunError N0506 if no target of any window stands for a byte: to be called before hours are spent on training."""
    if not any(windows.batch(index, 1).num_bytes for index in range(len(windows))):
        raise fail(
            "N0506", f"the held-out text has no byte to score in its first {max(windows.num_tokens - 1, 0)} targets",
            place="[eval.bpb]", help="name held-out shards with text in them, or raise max_tokens",
        )  # fmt: skip


@torch.no_grad()
def evaluate(
    model: Transformer,
    windows: HeldoutWindows,
    *,
    sequences: int,
    document_mask: bool = False,
    ranks: Alone | Reduction = ALONE,
    on_batch: Callable[[int, int], None] | None = None,
) -> BpbResult:
    """Score every held-out window, `sequences` at a time.

    document_mask: attention stays within a document, as it did in training. ranks: those that share the model;
    each scores every N-th batch, and all get the same figure.
    on_batch(done, total) is called after each forward pass. The model is left in the mode it was in.
    windows: with at least one byte (`require_text`).
    """
    was_training, device = model.training, model.head.weight_VD.device
    model.eval()
    try:
        total = -(-len(windows) // sequences)
        scored = []
        for done, index in enumerate(calls(total, ranks.rank, ranks.ranks), start=1):
            # Past the last window a batch has its shape and no target that counts.
            batch = windows.batch((total if index is None else index) * sequences, sequences)
            ids_BS, targets_BS, documents_BS = (
                t.to(device) for t in (batch.input_ids_BS, batch.targets_BS, batch.document_ids_BS)
            )
            h_TD = model(ids_BS, documents_BS if document_mask else None)
            losses_T = token_losses(h_TD, model.head.weight_VD, targets_BS.reshape(-1), chunk_tokens=CHUNK_TOKENS)
            nats = losses_T.cpu()[batch.valid_BS.reshape(-1)].double().sum()
            mine = [nats, batch.valid_BS.sum(), batch.num_bytes]
            scored.extend(ranks.gather(torch.tensor(mine, dtype=torch.float64)))
            if on_batch is not None:
                on_batch(min(done * ranks.ranks, total), total)
    finally:
        model.train(was_training)
    nats, tokens, num_bytes = (column.tolist() for column in torch.stack(scored, dim=1))
    total_nats, num_tokens, total_bytes = math.fsum(nats), int(sum(tokens)), int(sum(num_bytes))
    return BpbResult(
        bits_per_byte=total_nats / (math.log(2) * total_bytes),
        loss=total_nats / num_tokens,
        num_tokens=num_tokens,
        num_bytes=total_bytes,
    )
