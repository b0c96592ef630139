"""Run by test_attention_compiled.py: compile the attention kernels for sm_90 without a GPU, print findings as JSON."""

import json

import torch

from nmoe.kernels.attention import attention_backward, attention_forward, documents
from tests.kernels.pretended import assembled, pretend

found: dict[str, dict] = {}
case = ""


def see(function, kernel):
    found[f"{case} {function}"] = {"wgmma": kernel.asm["ptx"].count("wgmma.mma_async"), **assembled(kernel)}


pretend(90, see)
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
