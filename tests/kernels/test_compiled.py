"""The Gluon products compile for Hopper on any machine, use its matrix instructions and spill nothing."""

import platform

import pytest

from tests.kernels.findings import findings

pytest.importorskip("triton")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's assembler is an x86-64 program")
def test_products_use_wgmma_fit_shared_memory_and_spill_nothing() -> None:
    found = findings("compiled")
    rows, weights = {"up", "dgate", "dgate deep"}, {"dw_up", "dw_up of segments", "dw_up apart"}
    assert set(found) == weights | rows | {f"{name} in an arena" for name in rows}
    for product in found.values():
        assert product["wgmma"] >= 8  # four 16-deep steps for each of two warpgroups
        assert product["stack"] == 0
        assert product["shared"] <= 227 * 1024
    # A microbatch without rows has -0 for every element of a tile, which the compiler must not make 0 of.
    assert found["dw_up apart"]["negations"] == 2 * 128
