"""The kernels between ranks compile for Hopper and Blackwell anywhere: no atomics but the signals', in registers."""

import platform

import pytest

from tests.kernels.findings import findings

pytest.importorskip("triton")

WIDE = ("dispatch_kernel", "keep_kernel", "give_back_kernel", "beside", "gather_kernel")  # rows of 2 D bytes


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's assembler is an x86-64 program")
@pytest.mark.parametrize("capability", [90, 100])
def test_kernels_hold_their_promises(capability: int) -> None:
    found = findings("compiled_ranks", str(capability))
    kernels = {name.split()[1] for name in found} - {"wgrad_kernel"}  # `beside`: the return, beside that
    assert kernels == {*WIDE, "count_kernel", "sent_kernel", "scan_kernel", "shape_kernel", "rank_place_kernel",
                       "meet_kernel"}  # fmt: skip
    for name, kernel in found.items():
        ranks, what = name.split()
        assert kernel["stack"] == 0, name
        assert kernel["shared"] <= 227 * 1024, name
        if what == "meet_kernel":
            assert kernel["atomics"] == ["atom.global.sys.release.exch.b64"] * int(ranks)
            assert kernel["acquires"] == 2 * int(ranks)  # at once, and in the loop
            assert kernel["barrier_first"]
        else:
            assert kernel["atomics"] == [], name
        if what in WIDE:
            assert kernel["loads16"] >= 2, name
            assert kernel["stores16"] >= 2, name
        if what == "beside":  # a block has a multiprocessor for itself: all its registers, or none left for the other's
            assert 32 < kernel["registers"] <= 64, name
            assert kernel["loads16"] == kernel["stores16"] == 4, name
            assert kernel["barriers"] == 0, name
        if what == "wgrad_kernel":
            assert kernel["wgmma"] >= 8, name
