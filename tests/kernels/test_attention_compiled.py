"""The attention kernels compile for Hopper anywhere: products stay in flight, accumulators in registers."""

import platform

import pytest

from tests.kernels.findings import findings

pytest.importorskip("triton")

# Addresses that the three roles share are kept in memory across a block of work; an accumulator is 32 or more
# registers, so its loss would show as 128 bytes and more.
SPILLED = 96


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's assembler is an x86-64 program")
def test_products_stay_in_flight_and_accumulators_in_registers() -> None:
    found = findings("compiled_attention")
    kernels = ("forward_kernel", "queries_kernel", "keys_kernel")
    assert set(found) == {f"{case} {kernel}" for case in ("mla", "window") for kernel in kernels}
    for name, kernel in found.items():
        assert kernel["wgmma"] >= 32, name  # 8 steps of 16 for two products in each of two warpgroups
        assert not kernel["serialized"], name
        assert kernel["spilled"] <= SPILLED, name
        assert kernel["shared"] <= 227 * 1024, name
