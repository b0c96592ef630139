"""Run by test_fused_compiled.py: compile the kernels of the rest of the step without a GPU, print findings as JSON.

Every variant that bench/super256, bench/moonlet6 and moonlet launch. Arguments: the compute capability, 90 or 100.
"""

import json
import re
import sys
from types import SimpleNamespace

import torch

from nmoe.kernels import adamw, cross_entropy, grad_norm, newton_schulz, rms_norm, rope, swiglu
from tests.kernels.pretended import pretend, usage

CAPABILITY = int(sys.argv[1])
found: dict[str, dict] = {}
seen: set[str] = set()
case = ""


def see(function, kernel):
    ptx = kernel.asm["ptx"]
    if ptx in seen:
        return
    seen.add(ptx)
    name = f"{case} {function}"
    name += f" {sum(known.startswith(name) for known in found)}"
    found[name] = {
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "fused": ptx.count("fma.rn.f32"),
        "loads16": len(re.findall(r"(?:ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\S*)", ptx)),
        "stores16": len(re.findall(r"st\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        "loads": ptx.count("ld.global"),
        "stores": ptx.count("st.global"),
        "exchanges": ptx.count("st.shared") + ptx.count("stmatrix"),
        "products": ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma"),
        **usage(kernel),
    }


pretend(CAPABILITY, see)


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype)


T = 16384
for width, stride in ((768, 768), (2048, 2048), (512, 576), (1536, 1536), (128, 128)):
    case = f"norm {width}"
    x_TD, w_D, r_T = empty(T, stride)[:, :width], empty(width), empty(T, dtype=torch.float32)
    rms_norm.rms_norm_forward(x_TD, w_D, 1e-6)
    rms_norm.rms_norm_backward(empty(T, width), x_TD, w_D, r_T)
    if width == stride and width in (768, 2048):
        case = f"add norm {width}"
        rms_norm.rms_norm_forward(x_TD, w_D, 1e-6, empty(T, width))
        rms_norm.rms_norm_backward(empty(T, width), x_TD, w_D, r_T, empty(T, width))
for width in (384, 1408, 2816, 11264):
    for dtype in (torch.bfloat16, torch.float32):
        case = f"swiglu {width} {str(dtype)[6:]}"
        swiglu.swiglu(empty(T, 2 * width))
        swiglu.swiglu_backward(empty(T, 2 * width), empty(T, width, dtype=dtype))
for heads in (6, 16):
    case = f"mla {heads}"
    table_SJ = torch.zeros(4096, 32, dtype=torch.complex64)
    q_BSHX = empty(4, 4096, heads, 192)
    rope._rope(q_BSHX, table_SJ, True, False)
    rope._rope(q_BSHX.view(4, heads, 4096, 192).transpose(1, 2), table_SJ, True, True)
    context = SimpleNamespace()
    rope._MlaKeys.forward(context, empty(4, 4096, heads, 256), empty(4, 4096, 576)[..., 512:], table_SJ, 128)
    rope._MlaKeys.backward(context, *(empty(4, heads, 4096, X).transpose(1, 2) for X in (192, 128)))
case = "gqa"
q_BSHX, table_SJ = empty(4, 4096, 32, 128), torch.zeros(4096, 64, dtype=torch.complex64)
rope._rope(q_BSHX, table_SJ, False, False)
rope._rope(q_BSHX.view(4, 32, 4096, 128).transpose(1, 2), table_SJ, False, True)
for vocab in (50304, 201088):
    for dtype in (torch.float32, torch.bfloat16):
        case = f"loss {vocab} {str(dtype)[6:]}"
        chunk, target, loss = empty(256, vocab, dtype=dtype), torch.zeros(256, dtype=torch.int64), empty(256).float()
        cross_entropy.softmax_gradient(chunk, target, loss, empty(256, vocab))
        cross_entropy.softmax_gradient(chunk, target, loss, None)
for dtype in (torch.bfloat16, None):
    case = f"adamw {dtype}"
    full = [empty(1024, 768, dtype=torch.float32) for _ in range(4)]
    weight = None if dtype is None else empty(1024, 768)
    group = adamw.FusedAdamW([adamw.State(*full[:3], weight, True)])
    some = adamw.factors(step=1, rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    group.step(full[3:], some, scale=torch.ones(()), verdict=torch.zeros((), dtype=torch.int32))
case = "norms"
grads = [torch.empty(1024, 768), torch.empty(7)]
norms = grad_norm.GradNorm([[g.shape for g in grads]], torch.device("cpu")).squared(grads)
grad_norm.verdict(norms.total, torch.ones((), dtype=torch.float64), torch.zeros(4))
for short, long in ((384, 768), (768, 768), (1408, 2048)):
    case = f"symmetric {short} {long}"
    gram = newton_schulz.symmetric_product(empty(4, short, long), 1.0)
    newton_schulz.symmetric_product(gram, 2.0, gram, -4.8)
    newton_schulz.product(gram, empty(4, short, long), 3.4)
    newton_schulz.normalized(empty(4, short, long, dtype=torch.float32), torch.bfloat16, 1e-7)
print(json.dumps(found))
