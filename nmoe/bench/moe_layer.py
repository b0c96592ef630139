"""The whole MoE layer, from router to output, ours beside its peers in one run."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from nmoe.bench.moe import Inputs, Shape, captured, dense_call, make_inputs, milliseconds
from nmoe.kernels import moe
from nmoe.kernels.layout import make_layout
from nmoe.kernels.router import route, route_backward


def ours(x: Inputs, top_k: int) -> tuple[Callable, Callable]:
    """Forward and backward as functions; the expert choice is the benchmark's, the router's work is done too."""
    bias_E = torch.zeros(x.router_ED.shape[0], device="cuda")

    def forward():
        _, weight_TK, score_TK = route(x.x_TD, x.router_ED, bias_E, top_k, 1.0)
        layout = make_layout(x.expert_TK, x.router_ED.shape[0])
        out, saved = moe.moe_forward(x.x_TD, layout, weight_TK, x.w_gate_up_E2FD, x.w_down_EDF)
        return out, saved, score_TK

    def backward(state):
        _, saved, score_TK = state
        drouter = []

        def router(dweight_TK: Tensor) -> Tensor:
            dlogit_TE = route_backward(dweight_TK, x.expert_TK, score_TK, x.router_ED.shape[0], 1.0)
            drouter.append(torch.mm(dlogit_TE.T, x.x_TD))
            return torch.mm(dlogit_TE, x.router_ED)

        g = moe.moe_backward(x.dout_TD, x.x_TD, x.w_gate_up_E2FD, x.w_down_EDF, saved, router)
        return g, drouter

    return forward, backward


def grouped_composite(x: Inputs, top_k: int) -> tuple[Callable, Callable]:
    """Library calls only: sort, index, torch's grouped_mm, autograd; bf16 weight gradients."""
    leaves = [v.detach().requires_grad_() for v in (x.x_TD, x.router_ED, x.w_gate_up_E2FD, x.w_down_EDF)]
    x_TD, router_ED, w_gu, w_down = leaves
    experts, _, F, D = w_gu.shape

    def layer() -> Tensor:
        score_TE = torch.sigmoid((x_TD @ router_ED.T).float())
        torch.topk(score_TE, top_k, dim=1)
        score_TK = score_TE.gather(1, x.expert_TK.long())
        weight_TK = score_TK / score_TK.sum(1, keepdim=True)
        pair_R = torch.argsort(x.expert_TK.reshape(-1), stable=True)
        row_P = torch.argsort(pair_R)
        offsets = torch.bincount(x.expert_TK.reshape(-1), minlength=experts).cumsum(0).int()
        h = functional.grouped_mm(x_TD[pair_R // top_k], w_gu.view(experts, 2 * F, D).transpose(1, 2), offs=offsets)
        a = functional.silu(h[:, :F]) * h[:, F:]
        y = functional.grouped_mm(a, w_down.transpose(1, 2), offs=offsets)
        return (y[row_P].view(-1, top_k, D) * weight_TK[..., None]).sum(1).to(x_TD.dtype)

    return layer, lambda out: torch.autograd.grad(out, leaves, x.dout_TD, retain_graph=True)


def time_layer(name: str, shape: Shape, routing: str) -> list[dict]:
    """ms and TFLOP/s of forward, backward and both, and the bytes kept for backward."""
    x = make_inputs(shape, routing)
    dense = milliseconds(dense_call(shape))
    report: list[dict] = [{"shape": name, "routing": routing, "who": "dense", "forward": dense, "backward": 2 * dense}]
    for who, make in (("ours", ours), ("grouped_mm", grouped_composite)):
        forward, backward = make(x, shape.K)
        base = torch.cuda.memory_allocated()
        state = forward()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - base
        backward(state)
        row: dict = {"shape": name, "routing": routing, "who": who, "kept": kept, "forward": milliseconds(forward)}
        row["backward"] = milliseconds(partial(backward, state))

        def both(f=forward, b=backward) -> None:
            b(f())

        row["whole"] = milliseconds(both)
        if who == "ours":
            row["graph"] = milliseconds(captured(both))
        report.append(row)
        del state
    again = milliseconds(dense_call(shape))
    report.append({"shape": name, "routing": routing, "who": "dense after", "forward": again, "backward": 2 * again})
    for row in report:
        whole = row.get("whole", row["forward"] + row["backward"])
        rate = [k * shape.flops / ms / 1e9 for k, ms in ((1, row["forward"]), (2, row["backward"]), (3, whole))]
        row["tflops"] = rate
        print(
            f"{name:10} {routing:8} {row['who']:11} "
            f"fwd {row['forward']:7.3f} bwd {row['backward']:7.3f} whole {whole:7.3f} ms "
            f"| {rate[0]:5.0f} {rate[1]:5.0f} {rate[2]:5.0f} TFLOP/s | kept {row.get('kept', 0) / 2**30:.2f} GiB"
            + (f" | as a graph {row['graph']:7.3f} ms" if "graph" in row else ""),
            flush=True,
        )
    return report
