"""`nmoe bench attention`: causal attention, forward and backward, ours beside its peers in one run.

On a GPU everything is bf16 and ours is the kernels, as single calls and as CUDA graphs; on a CPU float32 and ours is
nmoe.model.attention. FLOPs are those of nmoe.bench.attention. The floor is the longer of these at the rate of a dense
product, and of reading and writing queries, keys, values and output once.

    torch cudnn, flash      scaled_dot_product_attention through that library, on a GPU
    torch sdpa, math        through torch's kernel on a CPU, and through plain products
    torch flex compiled     flex_attention through torch.compile, where asked for (half a minute a shape)
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nmoe.bench.attention import Inputs, Shape, make_inputs, ours
from nmoe.bench.clock import captured, measure
from nmoe.bench.moe_layer import Layer
from nmoe.bench.rows import Row
from nmoe.model.attention import attend

ON_GPU = {"torch cudnn": SDPBackend.CUDNN_ATTENTION, "torch flash": SDPBackend.FLASH_ATTENTION}
ON_CPU = {"torch sdpa": SDPBackend.FLASH_ATTENTION, "torch math": SDPBackend.MATH}


def rows(shape: Shape, *, device: torch.device, repeats: int, compile: bool) -> Iterator[Row]:
    """Forward and backward of everybody who computes this mask here."""
    x = make_inputs(shape, device.type)
    if device.type == "cpu":
        x = x._replace(q=x.q.float(), k=x.k.float(), v=x.v.float(), dout=x.dout.float())
    case = " ".join(f"{axis}{size}" for axis, size in zip("BHGSQV", shape, strict=False))
    case += "" if shape.window is None else f" window {shape.window}"
    calls: dict[str, Callable[[], object]] = {}
    for who, layer in layers(x, shape, compile=compile).items():
        try:
            state = layer.forward()
            layer.backward(state)
        except RuntimeError as problem:  # a peer that does not take this shape
            if who == "ours":
                raise
            yield Row(work="attention", case=case, part="forward", who=who,
                      note=f"does not run: {str(problem).splitlines()[0][:90]}")  # fmt: skip
            continue
        calls[f"{who}: forward"] = layer.forward
        calls[f"{who}: backward"] = partial(layer.backward, state)
        if who == "ours" and device.type != "cpu":
            calls |= {f"ours, as a graph: {part}": captured(calls[f"ours: {part}"]) for part in ("forward", "backward")}
    times, rates = measure(calls, repeats, device)
    read = sum(t.nbytes for t in (x.q, x.k, x.v))
    moved = {"forward": read + x.dout.nbytes, "backward": 2 * read + 2 * x.dout.nbytes}
    for part, flops in zip(moved, shape.flops, strict=True):
        for name, spent in times.items():
            who, _, timed = name.partition(": ")
            if timed == part:
                yield Row(
                    work="attention", case=case, part=part, who=who, milliseconds=spent,
                    floor=rates.floor(bytes=moved[part], flops=flops), rate=flops / spent / 1e9, unit="TFLOP/s",
                )  # fmt: skip


def layers(x: Inputs, shape: Shape, *, compile: bool) -> dict[str, Layer]:
    """Ours and the peers, by name."""
    return {"ours": _ours(x, shape), **_peers(x, shape, compile)}


def _ours(x: Inputs, shape: Shape) -> Layer:
    if x.q.device.type != "cpu":
        forward, backward = ours(x, shape.window)
        return Layer(forward, lambda state: backward(*state))
    leaves = q, k, v = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]

    def gradients(y_BHSV: Tensor) -> object:
        return torch.autograd.grad(y_BHSV, leaves, x.dout, retain_graph=True)

    return Layer(lambda: attend(q, k, v, shape.window), gradients)


def _peers(x: Inputs, shape: Shape, compile: bool) -> dict[str, Layer]:
    leaves = tuple(t.detach().contiguous().requires_grad_() for t in (x.q, x.k, x.v))
    q, k, v = leaves
    grouped = shape.H != shape.G
    mask = None if shape.window is None else seen(shape.S, shape.window, q.device)
    ways: dict[str, Callable[[], Any]] = {}
    if shape.window is None or q.device.type == "cpu":  # neither cuDNN nor flash takes a mask in torch
        for who, backend in (ON_CPU if q.device.type == "cpu" else ON_GPU).items():
            if who == "torch sdpa" and shape.Q != shape.V:
                continue  # torch's CPU kernel has one size of head

            def library(backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(
                        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
                    )

            ways[who] = library
    if compile:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        window = shape.window or shape.S

        def shows(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < window)

        blocks = create_block_mask(shows, None, None, shape.S, shape.S, device=q.device.type)
        flex: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
        ways["torch flex compiled"] = lambda: flex(q, k, v, block_mask=blocks, enable_gqa=grouped)
    dout = x.dout.contiguous()

    def backward(out: Tensor) -> object:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return {who: Layer(way, backward) for who, way in ways.items()}


def seen(length: int, window: int, device: torch.device) -> Tensor:
    """(S, S) bool: query i meets keys i - window < j <= i."""
    ahead_SS = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (ahead_SS >= 0) & (ahead_SS < window)
