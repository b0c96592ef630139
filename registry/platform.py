"""[platform]: the hardware a plan is for. Nothing else is used in its place."""

from collections.abc import Iterator

import attrs

from nmoe.registry.component import TARGETS, Component, Problem, key

DEVICE_BYTES = {"sm_90a": 80 * 10**9, "sm_100a": 180 * 10**9}
"""Memory that a plan may fill without being told, of the smallest card of a target: H100 80 GB, B200 180 GB. The
80 GB card has 85.0 * 10^9 bytes (2026-11-25): what is beyond is for what no plan counts.
"""


@attrs.frozen(kw_only=True)
class Platform(Component):
    target: str = key(
        "hardware: sm_100a (B200), sm_90a (H100, H200) or cpu", default="sm_100a", choices=TARGETS
    )
    threads: int | None = key(
        "threads of the CPU's arithmetic; only for target cpu, where it decides the bits",
        default=None, minimum=1, maximum=1024,
    )

    def check(self, config, path: str) -> Iterator[Problem]:
        if self.target == "cpu" and self.threads is None:
            yield Problem(
                path=f"{path}.target",
                message="target `cpu` needs the number of threads, which decides the order of its sums",
                help="add `threads = 2` to [platform]",
            )
        if self.target != "cpu" and self.threads is not None:
            yield Problem(
                path=f"{path}.threads",
                message=f"`threads` has no meaning on target `{self.target}`",
                help="remove it, or set target = \"cpu\"",
            )
