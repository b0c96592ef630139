"""Launch parameters of every grouped product, pinned: one table, read by name, never tuned at run time.

`share` = 1: two warpgroups take turns, each with its own 128 x 128 tile, so that one's epilogue
runs under the other's products. `share` = 2: both work on one 128 x 256 tile and share its rows.
`gather` says who brings token rows: True, the producer copies them row by row (cp.async) into the
ring; False, a pass before the product gathers them and the ring is filled by TMA.
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


SM_90A: dict[str, Launch] = {
    "up": Launch(4, 2, True),
    "down": Launch(4, 2, False),
    "dgate": Launch(5, 1, False),
    "dx": Launch(4, 2, False),
    "dw_up": Launch(4, 2, False),
    "dw_down": Launch(4, 2, False),
}
