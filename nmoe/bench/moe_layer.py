"""`nmoe bench moe`: the MoE layer from router to output, forward and backward, ours beside its peers in one run.

Data are random and the choice of experts is the benchmark's: even, or Zipf (popularity 1 / rank). Everybody computes
the router's scores, takes the K best, and goes on with the given choice. On a GPU everything is bf16 with our kernels,
on a CPU float32 through the trainer's own module. FLOPs are 6 T K D F forward and 12 backward; the router's, under 2%,
are left out on every side. The floor is the longer of these FLOPs at the rate of a dense product of as many, and of
reading the weights and the tokens once.

    torch grouped_mm              sort, index, torch's grouped_mm, autograd: library calls only
    transformers eager, ...       the experts of DeepseekV3ForCausalLM, in each of the library's ways that works here
    ... compiled                  through torch.compile, where asked for; not repeatable from process to process
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nmoe.bench.clock import captured, measure
from nmoe.bench.moe import Inputs, Shape, make_inputs
from nmoe.bench.peers import deepseek_experts
from nmoe.bench.rows import Row
from nmoe.experts.fp32 import Fp32Experts
from nmoe.model.linear import linear
from nmoe.rdep.local import LocalTransport

ROUTINGS = ("uniform", "zipf")


class Layer(NamedTuple):
    """forward() gives what backward(state) takes."""

    forward: Callable[[], Any]
    backward: Callable[[Any], object]
    note: str = ""


def both(layer: Layer) -> None:
    layer.backward(layer.forward())


def rows(
    shape: Shape, routings: tuple[str, ...], *, device: torch.device, repeats: int, compile: bool
) -> Iterator[Row]:
    """Forward, backward and both, of everybody who computes this layer here."""
    for routing in routings:
        x = make_inputs(shape, routing, device.type)
        if device.type == "cpu":
            x = Inputs(*(t.float() if t.is_floating_point() else t for t in x))
        yield from _rows(shape, routing, x, repeats=repeats, compile=compile)


def _rows(shape: Shape, routing: str, x: Inputs, *, repeats: int, compile: bool) -> Iterator[Row]:
    device = x.x_TD.device
    layers = {"ours": ours_on_cpu(x) if device.type == "cpu" else ours(x, shape.K)}
    layers |= autograd_peers(x, shape.K, compile=compile)
    calls: dict[str, Callable[[], object]] = {}
    notes = {}
    for who, layer in layers.items():
        before = 0 if device.type == "cpu" else torch.cuda.memory_allocated()
        try:
            state = layer.forward()
            kept = 0 if device.type == "cpu" else torch.cuda.memory_allocated() - before
            layer.backward(state)
        except (RuntimeError, ImportError, ValueError) as problem:  # a peer that does not take this shape or device
            if who == "ours":
                raise
            yield Row(work="moe", case=f"{shape} {routing}", part="both", who=who,
                      note=f"does not run: {str(problem).splitlines()[0][:90]}")  # fmt: skip
            continue
        notes[who] = "; ".join(filter(None, [layer.note, f"{kept / 2**30:.2f} GiB kept" if kept else ""]))
        calls[f"{who}: forward"] = layer.forward
        calls[f"{who}: backward"] = partial(layer.backward, state)
        calls[f"{who}: both"] = partial(both, layer)
        if who == "ours" and device.type != "cpu":
            calls["ours, as a graph: both"] = captured(calls["ours: both"])
    T, D, F, _, K = shape
    times, rates = measure(calls, repeats, device, product=(T * K, D, 3 * F))
    weights = x.w_gate_up_E2FD.nbytes + x.w_down_EDF.nbytes
    moved = {"forward": weights + 2 * x.x_TD.nbytes, "backward": 2 * weights + 3 * x.x_TD.nbytes}
    moved["both"] = moved["forward"] + moved["backward"]
    for part, times_forward in (("forward", 1), ("backward", 2), ("both", 3)):
        flops = times_forward * shape.flops
        for name, spent in times.items():
            who, _, timed = name.partition(": ")
            if timed == part:
                yield Row(
                    work="moe", case=f"{shape} {routing}", part=part, who=who, milliseconds=spent,
                    floor=rates.floor(bytes=moved[part], flops=flops), rate=flops / spent / 1e9, unit="TFLOP/s",
                    note=notes.get(who, ""),
                )  # fmt: skip
    yield Row(work="moe", case=f"{shape} {routing}", part="both", who="dense product", unit="TFLOP/s",
              milliseconds=3 * shape.flops / rates.dense, rate=rates.dense / 1e9, note="of as many FLOPs")  # fmt: skip


def ours(x: Inputs, top_k: int) -> Layer:
    """On a GPU: the kernels, as the trainer's module calls them."""
    from nmoe.kernels import moe
    from nmoe.kernels.layout import make_layout
    from nmoe.kernels.router import route, route_backward

    bias_E = torch.zeros(x.router_ED.shape[0], device="cuda")

    def forward() -> Any:
        _, weight_TK, score_TK = route(x.x_TD, x.router_ED, bias_E, top_k, 1.0)
        layout = make_layout(x.expert_TK, x.router_ED.shape[0])
        out, saved = moe.moe_forward(x.x_TD, layout, weight_TK, x.w_gate_up_E2FD, x.w_down_EDF)
        return out, saved, score_TK

    def backward(state: Any) -> object:
        _, saved, score_TK = state
        drouter = []

        def router(dweight_TK: Tensor) -> Tensor:
            dlogit_TE = route_backward(dweight_TK, x.expert_TK, score_TK, x.router_ED.shape[0], 1.0)
            drouter.append(torch.mm(dlogit_TE.T, x.x_TD))
            return torch.mm(dlogit_TE, x.router_ED)

        return moe.moe_backward(x.dout_TD, x.x_TD, x.w_gate_up_E2FD, x.w_down_EDF, saved, router), drouter

    return Layer(forward, backward, "float32 weight gradients")


def routed_weights(x_TD: Tensor, router_ED: Tensor, expert_TK: Tensor) -> Tensor:
    """The router's work: scores, the K best, and the weights of the given choice."""
    score_TE = torch.sigmoid(linear(x_TD, router_ED, torch.float32))
    torch.topk(score_TE.detach(), expert_TK.shape[1], dim=1)
    score_TK = score_TE.gather(1, expert_TK)
    return score_TK / score_TK.sum(1, keepdim=True)


def ours_on_cpu(x: Inputs) -> Layer:
    """The trainer's module of fp32 experts; its weight gradients are added to those of the call before."""
    experts, _, width, hidden = x.w_gate_up_E2FD.shape
    module = Fp32Experts(num_experts=experts, hidden_size=hidden, intermediate_size=width)
    for parameter, drawn in zip(module.parameters(), (x.w_gate_up_E2FD, x.w_down_EDF), strict=True):
        parameter.data = drawn
    x_TD, router_ED = (v.detach().requires_grad_() for v in (x.x_TD, x.router_ED))
    expert_TK, transport = x.expert_TK.long(), LocalTransport()

    def forward() -> Tensor:
        weight_TK = routed_weights(x_TD, router_ED, expert_TK)
        y_TD: Tensor = module(x_TD, weight_TK, transport.layout(expert_TK, experts, 0), transport)
        return y_TD

    def backward(y_TD: Tensor) -> object:
        return torch.autograd.grad(y_TD, (x_TD, router_ED), x.dout_TD, retain_graph=True)

    return Layer(forward, backward)


def autograd_peers(x: Inputs, top_k: int, *, compile: bool) -> dict[str, Layer]:
    """Peers made of differentiable calls, by name."""
    leaves = [v.detach().requires_grad_() for v in (x.x_TD, x.router_ED, x.w_gate_up_E2FD, x.w_down_EDF)]
    x_TD, router_ED, w_gate_up, w_down = leaves
    experts, _, F, D = w_gate_up.shape
    expert_TK = x.expert_TK.long()

    def grouped_mm() -> Tensor:
        weight_TK = routed_weights(x_TD, router_ED, expert_TK)
        pair_R = torch.argsort(expert_TK.reshape(-1), stable=True)
        row_P = torch.argsort(pair_R)
        offsets = torch.bincount(expert_TK.reshape(-1), minlength=experts).cumsum(0).int()
        h = functional.grouped_mm(
            x_TD[pair_R // top_k], w_gate_up.view(experts, 2 * F, D).transpose(1, 2), offs=offsets
        )
        a = functional.silu(h[:, :F]) * h[:, F:]
        y = functional.grouped_mm(a, w_down.transpose(1, 2), offs=offsets)
        return (y[row_P].view(-1, top_k, D) * weight_TK[..., None]).sum(1).to(x_TD.dtype)

    ways: dict[str, Callable[[], Tensor]] = {"torch grouped_mm": grouped_mm}
    for way, module in deepseek_experts(w_gate_up, w_down, top_k):

        def library(module: Callable[..., Tensor] = module) -> Tensor:
            weight_TK = routed_weights(x_TD, router_ED, expert_TK).to(x_TD.dtype)
            return module(x_TD, expert_TK, weight_TK)

        ways[f"transformers {way}"] = library
    if compile:
        ways |= {f"{who} compiled": torch.compile(way, dynamic=False) for who, way in ways.items()}

    def backward(y_TD: Tensor) -> object:
        return torch.autograd.grad(y_TD, leaves, x.dout_TD, retain_graph=True)

    note = "" if x.x_TD.dtype == torch.float32 else "weight gradients rounded to bf16"
    return {who: Layer(way, backward, note) for who, way in ways.items()}
