"""Run by test_compiled.py: compile two grouped products for sm_90 without a GPU and print what came out as JSON."""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nmoe.kernels import layout, products
from nmoe.kernels.launch import launches

driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
)
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
run = JITFunction.run
found = {}
name = ""


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found[name] = {
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
    }


JITFunction.run = compile_only
T, D, F, E, K = 64, 512, 256, 4, 2
lay = layout.layout_reference(torch.zeros(T, K, dtype=torch.int32), E)
x_TD = torch.zeros(T, D, dtype=torch.bfloat16)
w_gate_up = torch.zeros(E, 2, F, D, dtype=torch.bfloat16)
table = launches(D)
name = "up"
products.up_product(x_TD, w_gate_up, lay, table["up"])
name = "dw_up"
rows_2RF = torch.zeros(2, T * K, F, dtype=torch.bfloat16)
products.weight_gradient(x_TD, rows_2RF, lay, w_gate_up.float(), True, False, table["dw_up"])
print(json.dumps(found))
