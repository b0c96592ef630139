"""Attention on one GPU: right, repeatable, fast (in that order).

`python -m nmoe.bench.attention check` compares output, lse and every gradient with float64 at odd
lengths, every head size and mask. `repeat` runs twenty times, compares bits and prints digests, for
comparison between processes. `time` is the median of CUDA events, forward and backward apart, as a graph
(ours) and as single calls with the host's work (calls; the peers are such calls too), beside
torch's cuDNN and flash kernels, compiled flex_attention and a dense product in the same run. FLOPs are
2 (Q + V) forward and 2 (3 Q + 2 V) backward, the textbook five products, for each pair of query and
key that the mask shows; for causal masks S^2 / 2 pairs a head.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nmoe.bench.moe import captured, digest, error, milliseconds
from nmoe.kernels.attention import (
    AttentionGradients,
    Documents,
    attention_backward,
    attention_forward,
    attention_reference,
    documents,
)


class Shape(NamedTuple):
    B: int
    H: int
    G: int
    S: int
    Q: int
    V: int
    window: int | None = None
    documents: bool = False
    sink: bool = False

    @property
    def pairs(self) -> float:
        """Pairs of query and key over batch and heads; documents count as if there were one."""
        per = self.S**2 / 2 if self.window is None else self.S * self.window - self.window**2 / 2
        return self.B * self.H * per

    @property
    def flops(self) -> tuple[float, float]:
        """Forward and backward."""
        return 2 * (self.Q + self.V) * self.pairs, 2 * (3 * self.Q + 2 * self.V) * self.pairs


SHAPES = {
    "mla": Shape(4, 16, 16, 4096, 192, 128),
    "mha128": Shape(4, 16, 16, 4096, 128, 128),
    "window128": Shape(4, 16, 16, 4096, 128, 128, 128),
    "gqa128": Shape(4, 32, 8, 4096, 128, 128),
    "gptoss": Shape(4, 64, 8, 4096, 64, 64, 128, sink=True),
    "documents": Shape(4, 16, 16, 4096, 128, 128, documents=True),
    "mlawindow": Shape(4, 16, 16, 4096, 192, 128, 512),
}
ODD = {
    "causal64": Shape(2, 3, 3, 333, 64, 64),
    "causal96": Shape(1, 4, 2, 517, 96, 96),
    "causal128": Shape(2, 2, 1, 640, 128, 128),
    "mla": Shape(2, 3, 3, 301, 192, 128),
    "mlawindow": Shape(1, 4, 4, 700, 192, 128, 100),
    "mladocuments": Shape(2, 2, 2, 515, 192, 128, documents=True),
    "window": Shape(2, 2, 2, 777, 128, 128, 128),
    "narrow": Shape(1, 2, 2, 450, 128, 64, 1),
    "wide": Shape(1, 6, 2, 385, 64, 128, 200, sink=True),
    "sink": Shape(2, 8, 1, 260, 64, 64, 33, sink=True),
    "documents": Shape(3, 2, 2, 611, 128, 128, documents=True),
    "all": Shape(2, 6, 3, 900, 128, 128, 150, True, True),
    "short": Shape(3, 2, 2, 5, 128, 128),
    "long": Shape(1, 2, 2, 2100, 128, 128),
    "longmla": Shape(1, 2, 1, 2100, 192, 128),
}


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    docs: Documents | None
    sink: Tensor | None


def make_inputs(shape: Shape, device: str = "cuda") -> Inputs:
    """Random data; documents of random lengths with a mean of about a fifth of the sequence."""
    generator = torch.Generator(device).manual_seed(3)

    def normal(heads: int, width: int) -> Tensor:
        size = (shape.B, shape.S, heads, width)  # as projections give them: heads inside tokens
        return torch.randn(size, generator=generator, device=device).bfloat16().transpose(1, 2)

    docs = None
    if shape.documents:
        first_BS = torch.rand(shape.B, shape.S, generator=generator, device=device) < 5 / shape.S
        index_S = torch.arange(shape.S, device=device)
        docs = documents(torch.cummax(torch.where(first_BS, index_S, 0), dim=1).values)
    sink = torch.randn(shape.H, generator=generator, device=device) if shape.sink else None
    return Inputs(normal(shape.H, shape.Q), normal(shape.G, shape.Q), normal(shape.G, shape.V),
                  normal(shape.H, shape.V), docs, sink)  # fmt: skip


def ours(x: Inputs, window: int | None) -> tuple[Callable[[], tuple[Tensor, Tensor]], Callable]:
    def forward() -> tuple[Tensor, Tensor]:
        return attention_forward(x.q, x.k, x.v, window=window, docs=x.docs, sink_H=x.sink)

    def backward(out: Tensor, lse: Tensor) -> AttentionGradients:
        return attention_backward(x.dout, x.q, x.k, x.v, out, lse, window=window, docs=x.docs, sink_H=x.sink)

    return forward, backward


def check(names: list[str]) -> list[dict]:
    """Errors of out, lse and gradients against float64."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    report = []
    for name in names:
        shape = ODD[name]
        x = make_inputs(shape)
        leaves = [t.double().requires_grad_() for t in (x.q, x.k, x.v, x.sink) if t is not None]
        start = x.docs.start_BS if x.docs else None
        sink = leaves[3] if shape.sink else None
        want, lse64 = attention_reference(*leaves[:3], window=shape.window, start_BS=start, sink_H=sink)
        grads64 = torch.autograd.grad(want, leaves, x.dout.double())
        forward, backward = ours(x, shape.window)
        out, lse = forward()
        grads = backward(out, lse)
        row: dict = {"case": name, "out": error(out, want), "lse": (lse - lse64).abs().max().item()}
        for key, have, ref in zip(("dq", "dk", "dv", "dsink"), grads, grads64, strict=False):
            row[key] = error(have, ref)
        row["bad"] = [k for k, v in row.items() if k != "case" and not v < (2e-5 if k == "lse" else 1e-2)]
        report.append(row)
        print(" ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    return report


def repeat(names: list[str], times: int = 20) -> list[dict]:
    """Which tensors' bits ever differ, and the digest of the first run's."""
    report = []
    for name in names:
        x = make_inputs(SHAPES[name])
        forward, backward = ours(x, SHAPES[name].window)
        first: list[Tensor] = []
        differ = set()
        for _ in range(times):
            out, lse = forward()
            now = [t for t in (out, lse, *backward(out, lse)) if t is not None]
            first = first or now
            pairs = zip(("out", "lse", "dq", "dk", "dv", "dsink"), now, first, strict=False)
            differ |= {n for n, a, b in pairs if not torch.equal(a, b)}
        report.append({"shape": name, "times": times, "differ": sorted(differ), "digest": digest(first)})
        print(report[-1], flush=True)
    return report


def peers(x: Inputs, shape: Shape, flex: bool) -> Iterator[tuple[str, Callable, tuple[Tensor, ...]]]:
    """(name, forward, leaves) of those that compute this mask."""
    leaves = tuple(t.detach().contiguous().requires_grad_() for t in (x.q, x.k, x.v))
    q, k, v = leaves
    grouped = shape.H != shape.G
    if shape.window is None and not shape.documents:
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

            def library(backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

            yield name, library, leaves
    if flex and not shape.sink:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        window = shape.window or shape.S
        start_BS = x.docs.start_BS if x.docs else torch.zeros(shape.B, shape.S, dtype=torch.int32, device="cuda")

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < window) & (j >= start_BS[b, i])

        mask = create_block_mask(seen, shape.B if shape.documents else None, None, shape.S, shape.S)
        call: Callable = torch.compile(flex_attention, dynamic=False)
        yield "flex", lambda: call(q, k, v, block_mask=mask, enable_gqa=grouped), leaves


def time_shape(name: str, flex: bool) -> list[dict]:
    """ms and TFLOP/s of forward and backward, ours and peers'."""
    shape = SHAPES[name]
    x = make_inputs(shape)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    dense = 2 * 8192**3 / milliseconds(lambda: torch.mm(a, b.T)) / 1e9
    forward, backward = ours(x, shape.window)
    state = forward()
    rows: list[dict] = []
    times = [milliseconds(captured(forward)), milliseconds(captured(lambda: backward(*state)))]
    rows.append({"who": "ours", "forward": times[0], "backward": times[1]})
    rows.append({"who": "calls", "forward": milliseconds(forward), "backward": milliseconds(lambda: backward(*state))})
    for who, call, leaves in peers(x, shape, flex):
        try:
            out = call()
            gradient = partial(torch.autograd.grad, out, leaves, x.dout.contiguous(), retain_graph=True)
            rows.append({"who": who, "forward": milliseconds(call), "backward": milliseconds(gradient)})
        except RuntimeError as problem:  # a peer that does not take this shape
            print(f"{name} {who}: {str(problem).splitlines()[0][:100]}", flush=True)
    for row in rows:
        row |= {"shape": name, "dense": dense}
        row["tflops"] = [f / row[k] / 1e9 for f, k in zip(shape.flops, ("forward", "backward"), strict=True)]
        print(
            f"{name:10} {row['who']:6} fwd {row['forward']:7.3f} ms {row['tflops'][0]:5.0f} TFLOP/s"
            f" | bwd {row['backward']:7.3f} ms {row['tflops'][1]:5.0f} | dense {dense:4.0f}",
            flush=True,
        )
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m nmoe.bench.attention", description=__doc__)
    parser.add_argument("what", choices=("check", "repeat", "time"))
    parser.add_argument("--shapes", default="")
    parser.add_argument("--flex", action="store_true", help="compile flex_attention as a peer (half a minute a shape)")
    parser.add_argument("--out", default="")
    args = parser.parse_args(argv)
    names = [n for n in args.shapes.split(",") if n]
    if args.what == "check":
        report = check(names or list(ODD))
        print(f"check: {len(report)} cases, bad: {[(r['case'], r['bad']) for r in report if r['bad']]}")
    elif args.what == "repeat":
        report = repeat(names or list(SHAPES))
    else:
        report = [row for name in names or SHAPES for row in time_shape(name, args.flex)]
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
