"""Every config of `tests.train.launches` by every number of ranks, to its end: `python -m tests.train.ranks_table`.

A row says whether the state and every figure of the ledger are one rank's, bit for bit; the last ones are runs
that changed their number of ranks on the way.
"""

import sys
import tempfile
from pathlib import Path

from tests.rdep.ranks import Ranks
from tests.train.launches import CONFIGS, DENSE, FOUR, TINY, Launches, first_difference

RELAYS = ((2, 4, 1), (4, 1, 2), (1, 2, 4), (4, 2, 4))


def main(wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="nmoe-ranks-") as directory:
        (Path(directory) / "ranks").mkdir()
        launches = Launches(Path(directory), Ranks(Path(directory) / "ranks", "tests.train.work"))
        print(f"{'config':62} {'ranks':11} {'rows':>5}  state digest")
        for name, (keys, numbers, odd) in CONFIGS.items():
            if wanted and name not in wanted:
                continue
            config = TINY.with_name("dense.toml") if name == DENSE else TINY
            for number in (1, *numbers):
                launches.finished(f"{name}, {number}", number, *keys, config=config, odd=odd)
                _row(launches, name, str(number), f"{name}, 1", f"{name}, {number}")
        if not wanted:
            first = next(iter(CONFIGS))
            for relay in RELAYS:
                for number, step in zip(relay, (7, 14, 20), strict=True):
                    launches.finished(f"relay {relay}", number, *FOUR, f"output.stop_after_step={step}")
                _row(launches, first, " -> ".join(map(str, relay)), f"{first}, 1", f"relay {relay}")
        launches.ranks.close()


def _row(launches: Launches, name: str, ranks: str, alone: str, run: str) -> None:
    left = launches.left(run)
    difference = first_difference(launches.left(alone), left)
    verdict = f"DIFFERS: {difference}" if difference else "equal"
    print(f"{name:62} {ranks:11} {len(left):5}  {launches.digest(run)[:16]} {verdict}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
