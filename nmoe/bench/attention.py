"""Attention on one GPU: right, repeatable, fast (in that order).

`python -m nmoe.bench.attention check` compares output, lse and every gradient with float64 at odd
lengths, every head size and mask. `repeat` runs twenty times, compares bits and prints digests, for
comparison between processes. Times are `nmoe bench attention`'s. FLOPs are 2 (Q + V) forward and
2 (3 Q + 2 V) backward, the textbook five products, for each pair of query and key that the mask shows;
for causal masks S^2 / 2 pairs a head.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nmoe.bench.moe import digest, error
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
        window = min(self.window or self.S, self.S)
        per = self.S * window - window**2 / 2
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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m nmoe.bench.attention", description=__doc__)
    parser.add_argument("what", choices=("check", "repeat"))
    parser.add_argument("--shapes", default="")
    parser.add_argument("--out", default="")
    args = parser.parse_args(argv)
    names = [n for n in args.shapes.split(",") if n]
    if args.what == "check":
        report = check(names or list(ODD))
        print(f"check: {len(report)} cases, bad: {[(r['case'], r['bad']) for r in report if r['bad']]}")
    else:
        report = repeat(names or list(SHAPES))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
