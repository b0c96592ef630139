"""The kernels between ranks in Triton's interpreter: N ranks simulated in one process, bit for bit against plain torch.

Against one sort of all pairs, against the CPU ranks' layout, and against one rank that takes the microbatches alone.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

NAMES = (
    "counts", "places.expert_TK", "places.row_TK", "places.place_TN", "places.offsets_L1", "places.segments_S1",
    "places.source_N1", "places.tile_expert", "places.tile_row", "places.num_tiles", "cpu.row_TK", "cpu.place_TN",
    "cpu.segments", "cpu.sources", "received.rows", "received.row_UK", "received.weight_UK", "received.token_U",
    "received.pair_R", "received.token_R", "received.safe", "gather", "slots", "one rank.out", "float64",
    "one rank.sums", "gradients.rows", "late.report", "late.verdict", "late.phase", "late.waited",
)  # fmt: skip


@pytest.fixture(scope="module")
def wrong() -> dict[str, int]:
    script = Path(__file__).with_name("interpreted_ranks.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_agrees(wrong: dict[str, int], name: str) -> None:
    assert wrong[name] == 0


def test_nothing_is_compared_unseen(wrong: dict[str, int]) -> None:
    assert set(wrong) == set(NAMES)
