"""The kernels of the rest of the step compile for Hopper and Blackwell anywhere, without atomics, in registers."""

import platform

import pytest

from tests.kernels.findings import findings

pytest.importorskip("triton")

# Bytes of stack. A row of the loss takes all registers of a multiprocessor; on Blackwell four of them do not fit.
STACK = {90: 0, 100: 16}

# Not wide by their nature: scalars, sums over columns, tensors of odd sizes.
NARROW = ("sum_kernel", "blocks_kernel", "verdict_kernel", "rows_kernel 1")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's assembler is an x86-64 program")
@pytest.mark.parametrize("capability", [90, 100])
def test_kernels_hold_their_promises(capability: int) -> None:
    found = findings("compiled_fused", str(capability))
    kernels = {name.split()[-2] for name in found}
    assert kernels == {
        "forward_kernel", "backward_kernel", "sum_kernel", "rope_kernel", "keys_kernel", "keys_backward_kernel",
        "softmax_kernel", "adamw_kernel", "rows_kernel", "blocks_kernel", "verdict_kernel", "symmetric_kernel",
        "product_kernel", "squares_kernel", "divide_kernel",
    }  # fmt: skip
    for name, kernel in found.items():
        assert kernel["atomics"] == 0, name
        assert kernel["stack"] <= STACK[capability], name
        assert kernel["shared"] <= 227 * 1024, name
        if not any(word in name for word in NARROW):
            assert kernel["loads16"] >= 2, name
        if "adamw" in name:  # each operation is rounded on its own
            assert kernel["fused"] == 0, name
        if "symmetric_kernel" in name or "product_kernel" in name:
            assert kernel["products"] >= 4, name
