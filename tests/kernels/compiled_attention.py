"""Run by test_attention_compiled.py: compile the attention kernels for sm_90 without a GPU, print findings as JSON."""

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

from nmoe.kernels.attention import attention_backward, attention_forward, documents

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
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
found: dict[str, dict] = {}
case = ""


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        assembler = [tools / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
    found[f"{case} {self.fn.__name__}"] = {
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "serialized": "serialized" in said,
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "shared": kernel.metadata.shared,
    }


JITFunction.run = compile_only
B, H, G, S = 1, 4, 2, 300
for name, Q, V, window, by_document, with_sink in (
    ("mla", 192, 128, None, False, False),
    ("window", 128, 128, 128, True, True),
):
    case = name
    q, k, v, out = (torch.zeros(B, h, S, d, dtype=torch.bfloat16) for h, d in ((H, Q), (G, Q), (G, V), (H, V)))
    docs = documents(torch.zeros(B, S, dtype=torch.int32)) if by_document else None
    sink_H = torch.zeros(H) if with_sink else None
    _, lse = attention_forward(q, k, v, window=window, docs=docs, sink_H=sink_H)
    attention_backward(out, q, k, v, out, lse, window=window, docs=docs, sink_H=sink_H)
print(json.dumps(found))
