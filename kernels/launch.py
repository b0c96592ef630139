"""Launch parameters of the kernels, pinned: read by target and shape class, never tuned at run time.

First the grouped products.

`share` = 1: two warpgroups take turns, each with its own 128 x 128 tile, so that one's epilogue
runs under the other's products. `share` = 2: both work on one 128 x 256 tile, 64 rows each.
`gather` says who brings token rows: True, the producer copies them row by row (cp.async) into the
ring; False, a pass before the product gathers them and the ring is filled by TMA. `sets` is how
many tiles' pieces the epilogue stages. The figures behind each choice are in NOTES.md.

Two things decide: a deeper ring is not always faster (beyond about 160 KiB in flight with taking
turns, or three stages where the epilogue moves much, blocks drift apart and lose the L2), and
shared memory ends at 227 KiB: stages * (16 + 16 * share) + staging, in KiB, where staging is
32 * sets, or 48 / share * sets for the gated product, or nothing for weight gradients.
"""

from typing import NamedTuple


class Launch(NamedTuple):
    stages: int
    share: int
    gather: bool
    sets: int = 1

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread in the second product warpgroup and in the producer."""
        return (224, 56) if self.gather else (232, 40)


Table = dict[str, Launch]

SM_90A_DEEP: Table = {
    "up": Launch(4, 2, True),
    "down": Launch(4, 2, False),
    "dgate": Launch(5, 1, False),
    "dx": Launch(3, 2, False),
    "dw_up": Launch(4, 2, False),
    "dw_down": Launch(4, 2, False),
}
SM_90A_SHALLOW: Table = SM_90A_DEEP | {"dgate": Launch(3, 1, False, 2)}


def launches(hidden_size: int) -> Table:
    """The table of a shape class: a product over less than 1024 hides little of its epilogue."""
    return SM_90A_DEEP if hidden_size >= 1024 else SM_90A_SHALLOW


QUERY_WIDTHS = (64, 96, 128, 192)
"""Head sizes of queries and keys that the attention kernels take."""

VALUE_WIDTHS = (64, 96, 128)
"""Head sizes of values."""


class AttentionLaunch(NamedTuple):
    """Ring stages of each attention kernel; tiles are fixed: 128 x 128 forward, 128 x 64 backward.

    buffers = 2: backward fetches the next block's keys (queries) while this one ends, and stores
    through shared memory: 5% of a causal backward of 4096 tokens, 18% of a window's.
    """

    forward_stages: int
    keys_stages: int
    queries_stages: int
    buffers: int


def attention_launch(query_size: int, value_size: int) -> AttentionLaunch:
    """The pinned launch of a pair of head sizes; shared memory ends at 227 KiB."""
    if query_size == 192:
        return AttentionLaunch(2, 2, 3, 1)  # two buffers do not fit
    if query_size == value_size == 64:
        return AttentionLaunch(2, 5, 5, 2)
    return AttentionLaunch(2, 3, 3, 2)


class RowsLaunch(NamedTuple):
    """Tiles of (rows, block) elements; a program takes `chunk` rows where it goes through several tiles."""

    block: int
    rows: int
    chunk: int
    warps: int


def norm_launch(width: int) -> RowsLaunch:
    """4096 elements a tile; a chunk of rows is what one partial sum of the weight's gradient covers."""
    block = max(32, _power_of_two(width))
    return RowsLaunch(block, max(1, 4096 // block), max(32, 32768 // block), max(4, min(16, block // 1024)))


def swiglu_launch(width: int) -> RowsLaunch:
    """2048 elements a tile; wide rows are cut into pieces of 1024."""
    block = max(32, min(1024, _power_of_two(width)))
    return RowsLaunch(block, 2048 // block, 2048 // block, 4)


class TokensLaunch(NamedTuple):
    """A program takes `tokens` neighbouring tokens and goes through their heads."""

    tokens: int
    warps: int


ROPE_LAUNCH = TokensLaunch(16, 4)


class PieceLaunch(NamedTuple):
    """A program takes `columns` of `rows` neighbouring tokens' rows."""

    rows: int
    columns: int
    warps: int


EXCHANGE_LAUNCH = PieceLaunch(4, 512, 4)
"""Two 16-byte loads a thread in flight; twelve other shapes were within 2% (NOTES.md)."""


class ReturnLaunch(NamedTuple):
    """At most `blocks` programs, each taking tiles of `columns` of `rows` neighbouring rows, one after the other."""

    blocks: int
    rows: int
    columns: int
    warps: int


RETURN_LAUNCH = ReturnLaunch(132, 128, 256, 32)
"""By itself: a block on each multiprocessor, four 16-byte loads a thread in flight; 2% before 16 small ones."""

RETURN_BESIDE_LAUNCH = ReturnLaunch(24, 128, 256, 32)
"""Beside a weight gradient, which is given the other multiprocessors: a block fills one."""


ROUTER_EXPERTS, ROUTER_CHOSEN = 256, 16
"""Most experts, and most of them for a token, that the router's kernel holds in registers."""


class LossLaunch(NamedTuple):
    """One program a row of logits, `block` logits at a time."""

    block: int
    warps: int


def loss_launch(vocab_size: int) -> LossLaunch:
    """A row to each multiprocessor, 1024 threads of 64 registers: rows in flight then fit the L2 for a second read."""
    block = max(128, min(16384, _power_of_two(vocab_size)))
    return LossLaunch(block, max(1, min(32, block // 512)))


LOSS_BYTES = 3 << 29
"""Room for a chunk's float32 logits and their bf16 gradient, 6 bytes a logit."""


def loss_chunk(vocab_size: int) -> int:
    """Tokens of a chunk: the power of two that fills LOSS_BYTES, at least 256 (4096 for 50k, 1024 for 201k logits)."""
    return max(256, _power_of_two(LOSS_BYTES // (6 * vocab_size) + 1) // 2)


class FlatLaunch(NamedTuple):
    """A program takes `chunk` neighbouring elements, `block` at a time."""

    chunk: int
    block: int
    warps: int


ADAMW_LAUNCH = FlatLaunch(16384, 2048, 8)
"""1 and 8 blocks a program differ in how often the table is read; 8 elements a thread are two 16-byte loads."""

SQUARES_LAUNCH = RowsLaunch(128, 32, 32, 4)
"""Rows' squares: one shape for every width, since a row's order of addition is the tile's."""

NORMALIZE_LAUNCH = RowsLaunch(128, 16, 16, 4)
"""A stack of matrices over its norms: half the rows of SQUARES_LAUNCH, whose loop would spill here."""


class SymmetricLaunch(NamedTuple):
    """Square tiles of `block`, `depth` of the common axis a stage."""

    block: int
    depth: int
    stages: int
    warps: int


SYMMETRIC_LAUNCH = SymmetricLaunch(128, 64, 3, 8)
"""Three stages are 96 KiB, so that two programs share a multiprocessor and one's epilogue hides under the other."""


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
