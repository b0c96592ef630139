"""The kernels of the rest of the step in Triton's interpreter, in float32, against their meaning in float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Relative to the largest value. A result is a few float32 operations of 6e-8 each, or a sum of up to 4200 terms
# (a weight's gradient); five iterations of degree five carry the rounding of each on. Bits and facts: 0.
TOLERANCE = {
    "norm": 5e-7, "norm.d0": 5e-7, "norm.d1": 2e-6,
    "add norm": 5e-7, "add norm.d0": 5e-7, "add norm.d1": 5e-7, "add norm.d2": 2e-6,
    "swiglu": 5e-7, "swiglu.d": 5e-7,
    "rope": 3e-7, "rope.d0": 3e-7, "keys": 3e-7, "keys.d0": 0.0, "keys.d1": 5e-7,
    "loss": 1e-6, "loss.another chunk": 1e-6, "loss.d0": 2e-6, "loss.d1": 2e-6,
    "squares.tensor_N": 2e-7, "squares.group_G": 2e-7, "squares.total": 2e-7,
    "symmetric": 5e-7, "symmetric.added": 5e-7, "schulz": 1e-5,
}  # fmt: skip
FACTS = [
    "norm.rows alone", "add norm.sum", "add norm.sum alone", "swiglu.both", "keys.values", "loss.without gradient",
    "loss.extreme", "loss.wrong target", "adamw", "adamw.weight", "adamw.held", "verdict.clip", "verdict.good",
    "verdict.bad", "symmetric.mirrored", "schulz.alone", "schulz.zero",
]  # fmt: skip


@pytest.fixture(scope="module")
def deviations() -> dict[str, float]:
    script = Path(__file__).with_name("interpreted_fused.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*TOLERANCE, *FACTS])
def test_kernel_agrees_with_its_meaning(deviations: dict[str, float], name: str) -> None:
    assert deviations[name] <= TOLERANCE.get(name, 0.0)


def test_every_finding_has_a_bound(deviations: dict[str, float]) -> None:
    assert set(deviations) == {*TOLERANCE, *FACTS}
