"""The kernels between ranks in Triton's interpreter, bit for bit against plain torch.

interpreted_ranks.py: N ranks in one process, against one sort of all pairs, the CPU ranks' layout, and one rank that
takes the microbatches alone. interpreted_transport.py: the transport and the layer over it, in two processes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

NAMES = (
    "counts", "places.expert_TK", "places.pairs_E",
    "places.row_TK", "places.place_TN", "places.offsets_L1", "places.segments_S1",
    "places.source_N1", "places.tile_expert", "places.tile_row", "places.num_tiles", "cpu.row_TK", "cpu.place_TN",
    "cpu.segments", "cpu.sources", "received.rows", "received.row_UK", "received.weight_UK", "received.token_U",
    "received.pair_R", "received.token_R", "received.safe", "gather", "slots", "slots.sums", "slots.beyond",
    "one rank.out", "float64", "arena.first", "arena.within", "arena.needed", "arena.most", "arena.verdict",
    "arena.reference", "arena.alone", "arena.alone needed", "one rank.sums", "gradients.rows", "late.report",
    "late.verdict", "late.phase", "late.waited",
)  # fmt: skip


TRANSPORT = (
    "layer.y", "layer.dx", "layer.dw", "layer.order", "layer.matrices", "layer.apart", "node.peers", "node.gather",
    "node.phase", "late.text", "late.verdict", "arena.needed", "arena.forward", "arena.overwritten", "arena.alone",
    "arena.matrices",
)  # fmt: skip


def answer(script: str) -> dict[str, int]:
    path = Path(__file__).with_name(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("script", "names"), [("ranks", NAMES), ("transport", TRANSPORT)])
def test_every_rank_agrees(script: str, names: tuple[str, ...]) -> None:
    assert answer(f"interpreted_{script}.py") == dict.fromkeys(names, 0)
