"""The Triton kernels in Triton's interpreter, in float32, against their references in float64.

The grouped products are Gluon and have no interpreter: test_moe_gpu.py runs them on a device.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Layout, gathering and selection are exact. The rest adds at most 40 to 72 float32 numbers of
# size about one: a few units of 6e-8 each.
TOLERANCE = {
    "combine.weighted": 5e-6,
    "combine.based": 5e-6,
    "combine.more": 5e-6,
    "dots": 2e-6,
    "route.weight": 5e-6,
    "route.backward": 5e-6,
}


@pytest.fixture(scope="module")
def deviations() -> dict[str, float]:
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name",
    [
        "layout.offsets_E1",
        "layout.token_R",
        "layout.pair_R",
        "layout.row_TK",
        "layout.tile_expert",
        "layout.tile_row",
        "layout.num_tiles",
        "combine.weighted",
        "combine.based",
        "combine.more",
        "gather",
        "dots",
        "route.expert",
        "route.weight",
        "route.backward",
        "route.ties",
    ],
)
def test_kernel_agrees_with_its_reference(deviations: dict[str, float], name: str) -> None:
    assert deviations[name] <= TOLERANCE.get(name, 0.0)
