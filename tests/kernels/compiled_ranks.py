"""Run by test_ranks_compiled.py: compile the kernels between ranks without a GPU, print what came out as JSON.

Arguments: the compute capability, 90 or 100. For 90 also the weight gradients over segments, which are Hopper's alone.
"""

import json
import re
import sys

import torch

from nmoe.kernels import signals
from nmoe.kernels.combine import gather_rows
from nmoe.kernels.exchange import Lists, Received, dispatch, give_back, keep, received_layout
from nmoe.kernels.launch import RETURN_BESIDE_LAUNCH, launches
from nmoe.kernels.layout_ranks import count, place
from nmoe.kernels.products import weight_gradient
from tests.kernels.pretended import pretend, usage

CAPABILITY = int(sys.argv[1])
found: dict[str, dict] = {}
case = ""


def see(function, kernel):
    ptx = kernel.asm["ptx"]
    body = ptx[ptx.index("{\n") :]
    found[f"{case} {function}"] = {
        "atomics": re.findall(r"\b(?:atom|red)\.\S+", ptx),
        "acquires": len(re.findall(r"ld\.\S*acquire\S*|atom\S*acquire", ptx)),
        "barrier_first": 0 <= body.find("bar.sync") < body.find("atom."),
        "loads16": len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        "stores16": len(re.findall(r"st\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        "barriers": ptx.count("bar.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        **usage(kernel),
    }


pretend(CAPABILITY, see)


def several(ranks: int, tokens: int, width: int, experts: int, top_k: int) -> None:
    """Everything that a rank launches for one layer."""
    int32, table = torch.int32, torch.zeros(ranks, dtype=torch.int64)
    expert_TK = torch.zeros(tokens, top_k, dtype=torch.int64)
    counted = count(expert_TK, num_experts=experts, ranks=ranks)
    places = place(
        expert_TK, counted, torch.zeros(ranks, experts + ranks, dtype=int32), rank=1, most_tokens=tokens, layer=0
    )
    x_TD, rows_UD = (torch.empty(t, width, dtype=torch.bfloat16) for t in (tokens, ranks * tokens))
    row_UK, token_U = torch.empty(len(rows_UD), top_k, dtype=int32), torch.empty(len(rows_UD), dtype=int32)
    dispatch(x_TD, places, table, rows_UD, 1, torch.empty(tokens, top_k), Lists(table, table, table))
    kept = keep(rows_UD, row_UK, row_UK.float(), token_U, rows_UD, places, 1)
    token_R = torch.zeros_like(kept.layout.token_R)
    received = Received(rows_UD, row_UK.float(), token_U, received_layout(places, token_R, token_R, row_UK))
    y_RD = torch.empty(len(token_R), width, dtype=torch.bfloat16)
    parts = torch.empty(6, len(token_R))
    give_back(y_RD, received, table, parts, table, RETURN_BESIDE_LAUNCH)
    found[f"{case} beside"] = found.pop(f"{case} give_back_kernel")
    give_back(y_RD, received, table, parts, table)
    gather_rows(rows_UD, received.layout)
    flags = torch.zeros(ranks * signals.FLAG_WORDS, dtype=torch.int64)
    signals.meet(
        phase=flags[:1], flags=flags, peers_N=table, verdict=torch.zeros(1, dtype=int32), report=flags, name=0, layer=0,
        limit_ns=60 * 10**9, rank=1, words=counted.counts_C, boxes_N=table,
    )  # fmt: skip
    if CAPABILITY == 90:
        rows_2RF = torch.empty(2, len(token_R), 256, dtype=torch.bfloat16)
        out = torch.empty(experts // ranks, 2, 256, width)
        weight_gradient(y_RD, rows_2RF, received.layout, out, True, False, launches(width)["dw_up"])


for ranks, width, experts, top_k in ((2, 2048, 128, 8), (8, 768, 256, 7)):
    case = f"{ranks}"
    several(ranks, 4096, width, experts, top_k)
print(json.dumps(found))
