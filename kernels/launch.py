"""Launch parameters of the grouped products and of attention, pinned: read by shape class, never tuned at run time.

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
