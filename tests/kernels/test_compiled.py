"""The Gluon products compile for Hopper on any machine, use its matrix instructions and spill nothing."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's assembler is an x86-64 program")
def test_products_use_wgmma_fit_shared_memory_and_spill_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    rows, weights = {"up", "dgate", "dgate deep"}, {"dw_up", "dw_up of segments", "dw_up apart"}
    assert set(found) == weights | rows | {f"{name} in an arena" for name in rows}
    for product in found.values():
        assert product["wgmma"] >= 8  # four 16-deep steps for each of two warpgroups
        assert product["stack"] == 0
        assert product["shared"] <= 227 * 1024
    # A microbatch without rows has -0 for every element of a tile, which the compiler must not make 0 of.
    assert found["dw_up apart"]["negations"] == 2 * 128
