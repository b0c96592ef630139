"""A GPU that is not there: Triton takes it for the current one, and launches become compilations for it.

For scripts that run in a process of their own: what is replaced stays replaced.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def pretend(capability: int, see: Callable[[str, Any], None]) -> None:
    """From now on every launch only compiles, for 90 or 100; see(the function's name, what came out of Triton)."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
        )
    )
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        see(self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only


def usage(kernel: Any) -> dict[str, int]:
    """registers of a thread, and bytes of its stack, in the machine code; bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", said)[1]),
        "stack": int(re.search(r"STACK:(\d+)", said)[1]),
        "shared": kernel.metadata.shared,
    }


def assembled(kernel: Any) -> dict[str, Any]:
    """What the assembler for sm_90a says: whether it serialized products, and bytes that it spilled."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        command = [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "serialized": "serialized" in said,
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "shared": kernel.metadata.shared,
    }
