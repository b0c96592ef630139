"""Run by test_traced.py: a step of training, and one of evaluation, on a Hopper GPU that is not there.

    python traced.py CONFIG [--set KEY=VALUE ...]          prints what it found as JSON

Tensors are torch's fake ones, which have a device, a dtype and a shape and no memory: every operation of the real
step is checked for what it is given, and what lies where. The device is torch's spare one, because torch for the CPU
cannot name "cuda"; the program knows only "cpu" and "not cpu". Launches of Triton's kernels become compilations for
sm_90 with the arguments of the launch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nmoe import platform
from nmoe.data.loader import TokenBatch
from nmoe.eval.bpb import CHUNK_TOKENS
from nmoe.graph import build
from nmoe.model.loss import token_losses
from nmoe.plan.resolve import resolve
from nmoe.train.step import run_step

DEVICE = "gpu"
_setup_privateuseone_for_python_backend(DEVICE)
platform.device = lambda target: torch.device(DEVICE, 0)
driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
)
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
torch.cuda.Event = lambda **options: SimpleNamespace(record=lambda: None)

# Where the step asks for a value or an address, it gets one that lets it go on.
FakeTensor.data_ptr = lambda self: 0
FakeTensor.item = lambda self: 1.0
FakeTensor.pin_memory = lambda self: self

# A fake tensor that remembers its values cannot be moved to the spare device.
make = torch.tensor


def without_values(*args, **options):
    known = make(*args, **options)
    return torch.zeros(known.shape, dtype=known.dtype, device=known.device)


torch.tensor = without_values
torch.bincount = lambda x, minlength: x.new_zeros(minlength)

run = JITFunction.run
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
kernels: dict[str, dict] = {}


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    if kernel.hash in kernels:
        return
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        assembler = [tools / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
    kernels[kernel.hash] = {
        "name": self.fn.__name__,
        "serialized": "serialized" in said,
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "shared": kernel.metadata.shared,
    }


class Operations(TorchDispatchMode):
    """The operations that ran with a tensor on the device, and the dtypes of their tensors."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(t.device.type == DEVICE for t in tensors):
            self.seen.setdefault(str(function), set()).update(str(t.dtype) for t in tensors)
        return out


def main(config: str, sets: list[str]) -> dict:
    plan = resolve(config, sets)
    shape = (plan.config.batch.sequences, plan.config.batch.sequence_length)
    operations = Operations()
    with FakeTensorMode():
        graph = build(plan)
        ids_BS = torch.zeros(shape, dtype=torch.int64)
        batch = TokenBatch(
            step=1, input_ids_BS=ids_BS, targets_BS=ids_BS, document_ids_BS=ids_BS, digest="", num_bytes=1
        )
        JITFunction.run = compile_only
        gradients: dict[str, str] = {}

        def observe(step: int, phase: str) -> None:
            if phase == "optimizer":
                gradients.update((n, f"{p.grad.device} {p.grad.dtype}") for n, p in graph.model.named_parameters())

        with operations:
            run_step(graph, batch, step=1, tokens_seen=ids_BS.numel(), observe=observe)
            for _, router in graph.routers():
                router.end_step(ids_BS.numel())
            with torch.no_grad():
                h_TD = graph.model.eval()(ids_BS.to(graph.device), ids_BS.to(graph.device))
                targets_T = ids_BS.flatten().to(graph.device)
                losses_T = token_losses(h_TD, graph.model.head.weight_VD, targets_T, chunk_tokens=CHUNK_TOKENS)
    state = {name: part.tensor for name, part in graph.state().items()}
    tensors = {**dict(graph.model.named_parameters()), **dict(graph.model.named_buffers()), **state}
    return {
        "kernels": sorted(kernels.values(), key=lambda kernel: kernel["name"]),
        "operations": {name: sorted(dtypes) for name, dtypes in sorted(operations.seen.items())},
        "gradients": sorted(set(gradients.values())),
        "parameters": len(gradients) == len(list(graph.model.parameters())),
        "devices": sorted({str(tensor.device) for tensor in [losses_T, *tensors.values()]}),
        "dtypes": sorted({str(parameter.dtype) for parameter in graph.model.parameters()}),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], [word for word in sys.argv[2:] if word != "--set"])), flush=True)
    os._exit(0)  # the spare device's threads do not end by themselves
