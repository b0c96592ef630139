"""The whole step of sm_90a on any machine: what lies where, which operations run, and every kernel compiled."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if platform.machine() != "x86_64":
    pytest.skip("Triton's assembler is an x86-64 program", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]

# The bench models are repetitions of their layers: the fewest that have each kind launch the same kernels.
BENCH = ['data={kind="corpus", name="shakespeare", tokenizer={kind="bytes"}}']
CASES = {
    "every_part": ("tests/gpu/every_part.toml", []),
    "hopper": ("configs/hopper.toml", []),
    "super256": ("configs/bench/super256.toml", [*BENCH, "model.num_layers=1"]),
    "moonlet6": ("configs/bench/moonlet6.toml", [*BENCH, "model.num_layers=2"]),
}

EXPERTS = {
    "count_kernel", "scan_kernel", "offsets_kernel", "place_kernel", "rows_kernel", "wgrad_kernel", "gather_kernel",
    "combine_kernel", "dots_kernel",
}  # fmt: skip
# forward_kernel and keys_kernel are names of attention's, and of norms', SwiGLU's and rope's.
ATTENTION = {"forward_kernel", "queries_kernel", "keys_kernel"}
REST = {"backward_kernel", "rope_kernel", "softmax_kernel", "blocks_kernel"}
# What a config has beside: latent attention's keys, a router in one pass, AdamW on float32, norms of more rows than a
# partial sum covers; Newton-Schulz in bfloat16.
MLA = {"keys_backward_kernel"}
MUON = {"symmetric_kernel", "product_kernel", "squares_kernel", "divide_kernel"}
PLAIN = MLA | {"route_kernel", "route_backward_kernel", "adamw_kernel", "sum_kernel"}
BESIDE = {"every_part": MLA | MUON, "hopper": PLAIN | MUON, "super256": PLAIN, "moonlet6": PLAIN}

# Of torch's list of operations that have no deterministic way on CUDA (torch.use_deterministic_algorithms): those
# that a transformer could come to use. bincount is there with weights alone, cumsum for floats alone.
NO_DETERMINISTIC_WAY = (
    "aten.histc", "aten.put_", "aten.median", "aten.kthvalue", "aten.nll_loss2d", "aten.index_reduce",
    "aten.scatter_reduce", "aten._embedding_bag", "aten.cumprod", "aten._scaled_dot_product",
)  # fmt: skip

# An accumulator is 32 or more registers, so its loss would show as 128 bytes and more (test_attention_compiled.py).
SPILLED = 96


@pytest.fixture(scope="module", params=CASES)
def traced(request):
    config, sets = CASES[request.param]
    script = Path(__file__).with_name("traced.py")
    words = [word for item in sets for word in ("--set", item)]
    done = subprocess.run(
        [sys.executable, str(script), config, *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {"case": request.param, **json.loads(done.stdout.splitlines()[-1])}


def test_every_tensor_is_on_the_device_and_of_its_dtype(traced):
    assert traced["devices"] == ["gpu:0"]
    assert traced["dtypes"] == ["torch.bfloat16"]
    assert traced["parameters"]
    assert traced["gradients"] == ["gpu:0 torch.float32"]


def test_no_operation_lacks_a_deterministic_way(traced):
    assert not [name for name in traced["operations"] if name.startswith(NO_DETERMINISTIC_WAY)]
    summed = [dtype for name, types in traced["operations"].items() if "cumsum" in name for dtype in types]
    assert set(summed) <= {"torch.int32", "torch.int64"}


def test_products_of_bfloat16_are_the_tensor_cores(traced):
    """No product but the norms' matrix by vector reads float32."""
    assert traced["operations"]["aten.mm.default"] == ["torch.bfloat16"]
    assert set(traced["operations"].get("aten.bmm.default", [])) <= {"torch.bfloat16"}


def test_kernels_compile_fit_and_keep_their_accumulators(traced):
    assert {kernel["name"] for kernel in traced["kernels"]} == EXPERTS | ATTENTION | REST | BESIDE[traced["case"]]
    for kernel in traced["kernels"]:
        assert not kernel["serialized"], kernel
        assert kernel["spilled"] <= SPILLED, kernel
        assert kernel["shared"] <= 227 * 1024, kernel
