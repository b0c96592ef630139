"""The MoE layer on one GPU: right, repeatable, fast (in that order).

`python -m nmoe.bench.moe check` compares every product and the whole layer with float64 at odd
sizes, with empty experts and with one expert that holds all rows, into memory poisoned with NaN.
`repeat` runs the layer 20 times and compares bits. `kernels` times every product under several
launch parameters beside the pinned ones. Times are medians of CUDA events over single calls. FLOPs are
6 T K D F forward and 12 backward. The whole, from router to output, is `nmoe bench moe`'s.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nmoe.bench.clock import captured, milliseconds
from nmoe.kernels import moe, products
from nmoe.kernels.arena import Kept
from nmoe.kernels.combine import combine, gather_rows
from nmoe.kernels.launch import SM_90A_DEEP, Launch, Table, launches
from nmoe.kernels.layout import layout_reference, make_layout


class Shape(NamedTuple):
    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def flops(self) -> float:
        """Forward; backward is twice that."""
        return 6.0 * self.T * self.K * self.D * self.F

    def __str__(self) -> str:
        return f"T{self.T} D{self.D} F{self.F} E{self.E} K{self.K}"


SHAPES = {
    "qwen30b": Shape(32768, 2048, 768, 128, 8),
    "wide4096": Shape(32768, 4096, 512, 128, 8),
    "moonlet64": Shape(32768, 2048, 1408, 64, 6),
    "super256": Shape(32768, 768, 384, 256, 7),
}
ODD = {
    "odd": Shape(517, 200, 136, 7, 3),
    "narrow": Shape(333, 72, 40, 5, 2),
    "block": Shape(2048, 512, 384, 16, 4),
    "many": Shape(700, 256, 64, 200, 9),
    "one": Shape(1300, 256, 192, 4, 1),
    "deep": Shape(900, 1096, 200, 6, 2),
}


class Inputs(NamedTuple):
    x_TD: Tensor
    dout_TD: Tensor
    router_ED: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    w_gate_up_E2FD: Tensor
    w_down_EDF: Tensor


def make_inputs(shape: Shape, routing: str, device: str = "cuda") -> Inputs:
    """Random data; routing "uniform", "zipf" (popularity 1 / rank), or "single" (all rows to expert 1)."""
    generator = torch.Generator(device).manual_seed(1)
    T, D, F, E, K = shape

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).bfloat16()

    logits_TE = torch.zeros(T, E, device=device)
    if routing == "zipf":
        logits_TE -= torch.log(torch.arange(1, E + 1, device=device, dtype=torch.float32))
    if routing == "single":
        logits_TE[:, 1] = 1e9
    noise_TE = torch.rand(T, E, generator=generator, device=device).clamp_min(1e-9)
    expert_TK = torch.topk(logits_TE - torch.log(-torch.log(noise_TE)), K).indices
    weight_TK = torch.rand(T, K, generator=generator, device=device) + 0.1
    return Inputs(
        normal(T, D), normal(T, D), normal(E, D, scale=D**-0.5), expert_TK.int(), weight_TK / weight_TK.sum(1, True),
        normal(E, 2, F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5),
    )  # fmt: skip


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; nan where got has one."""
    want = want.double()
    scale = want.norm().item()
    return (got.double() - want).norm().item() / (scale if scale > 0 else 1.0)


def exact(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients (x, weight, gate_up, down) in float64."""
    leaves = [v.double().requires_grad_() for v in (x.x_TD, x.weight_TK, x.w_gate_up_E2FD, x.w_down_EDF)]
    out = moe.moe_reference(leaves[0], x.expert_TK, leaves[1], leaves[2], leaves[3])
    return out.detach(), list(torch.autograd.grad(out, leaves, x.dout_TD.double()))


def tables(names: str, hidden_size: int) -> dict[str, Table]:
    """The pinned table, or variants by name: gather g or none n, share, sets; "n21" is TMA, shared, one set."""
    made = {}
    for name in names.split(","):
        if name == "pinned":
            made[name] = launches(hidden_size)
            continue
        share, sets = int(name[1]), int(name[2])
        made[name] = {
            k: Launch(stages(k, share, sets), share, name[0] == "g" and k not in ("down", "dx"), sets)
            for k in SM_90A_DEEP
        }
    return made


def stages(kernel: str, share: int, sets: int) -> int:
    """As many as 227 KiB of shared memory hold beside the staging buffers."""
    if kernel.startswith("dw"):
        return 4
    staging = sets * (48 // share if kernel == "dgate" else 32)
    return (226 - staging) // (16 + 16 * share)


def check(variants: str, names: list[str]) -> list[dict]:
    """Errors against float64, stage by stage and whole."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    report = []
    for name in names:
        shape = ODD[name]
        for routing in ("uniform", "zipf", "single"):
            x = make_inputs(shape, routing)
            out64, grads64 = exact(x)
            want = layout_reference(x.expert_TK, shape.E)
            got = make_layout(x.expert_TK, shape.E)
            n = int(want.num_tiles)
            same = all(
                torch.equal(g[:n] if f.startswith("tile_") else g, w)
                for f, g, w in zip(want._fields, got, want, strict=True)
            )
            token = want.token_R.long()
            for label, table in tables(variants, shape.D).items():
                row: dict = {"shape": name, "routing": routing, "table": label, "layout": same}
                h = torch.empty(2, len(token), shape.F, device="cuda", dtype=torch.bfloat16)
                a = products.up_product(
                    x.x_TD if table["up"].gather else x.x_TD[token], x.w_gate_up_E2FD, got, Kept(h, None), table["up"]
                )
                h64 = torch.zeros(h.shape, dtype=torch.float64, device=h.device)
                e_R = x.expert_TK.reshape(-1)[want.pair_R.long()].long()
                for e in range(shape.E):
                    r = e_R == e
                    for s in range(2):
                        h64[s, r] = x.x_TD.double()[token[r]] @ x.w_gate_up_E2FD[e, s].double().T
                row["h"] = error(h, h64)
                row["a"] = error(a, torch.nn.functional.silu(h[0].double()) * h[1].double())
                y = products.down_product(a, x.w_down_EDF, got, table["down"])
                y64 = torch.stack([a[r].double() @ x.w_down_EDF[e_R[r]].double().T for r in range(0, len(token), 97)])
                row["y"] = error(y[::97], y64)
                out, saved = moe.moe_forward(x.x_TD, got, x.weight_TK, x.w_gate_up_E2FD, x.w_down_EDF, table)
                row["out"] = error(out, out64)
                g = moe.moe_backward(x.dout_TD, x.x_TD, x.w_gate_up_E2FD, x.w_down_EDF, saved, table=table)
                for key, have, ref in zip(("dx", "dweight", "dgate_up", "ddown"), g, grads64, strict=True):
                    row[key] = error(have, ref)
                again = (g.w_gate_up_E2FD.clone(), g.w_down_EDF.clone())
                moe.moe_backward(x.dout_TD, x.x_TD, x.w_gate_up_E2FD, x.w_down_EDF, saved, grads=again, table=table)
                row["chained"] = error(again[0], 2 * grads64[2]) + error(again[1], 2 * grads64[3])
                torch.cuda.synchronize()
                bad = [k for k, v in row.items() if isinstance(v, float) and not v < 1e-2] + (
                    [] if same else ["layout"]
                )
                row["bad"] = bad
                report.append(row)
                print(" ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    return report


def repeat(variants: str, times: int = 20) -> list[dict]:
    """The whole layer again and again on one input: which tensors' bits ever differ."""
    report = []
    for label, table in tables(variants, SHAPES["qwen30b"].D).items():
        for routing in ("uniform", "zipf"):
            x = make_inputs(SHAPES["qwen30b"]._replace(T=8192), routing)
            first: list[Tensor] = []
            differ = set()
            for _ in range(times):
                layout = make_layout(x.expert_TK, x.w_down_EDF.shape[0])
                out, saved = moe.moe_forward(x.x_TD, layout, x.weight_TK, x.w_gate_up_E2FD, x.w_down_EDF, table)
                g = moe.moe_backward(x.dout_TD, x.x_TD, x.w_gate_up_E2FD, x.w_down_EDF, saved, table=table)
                now = [out, saved.h_2RF, *g]
                first = first or now
                names = ("out", "h", "dx", "dweight", "dgate_up", "ddown")
                differ |= {n for n, a, b in zip(names, now, first, strict=True) if not torch.equal(a, b)}
            report.append(
                {"table": label, "routing": routing, "times": times, "differ": sorted(differ), "digest": digest(first)}
            )
            print(report[-1], flush=True)
    return report


def digest(tensors: list[Tensor]) -> str:
    """SHA-256 of the bytes, so that processes can be compared."""
    total = hashlib.sha256()
    for t in tensors:
        total.update(t.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def dense_call(shape: Shape) -> Callable[[], object]:
    """One dense bf16 product with the forward's FLOPs."""
    a = torch.randn(shape.T * shape.K, shape.D, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(3 * shape.F, shape.D, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(len(a), len(b), device="cuda", dtype=torch.bfloat16)
    return lambda: torch.mm(a, b.T, out=out)


def time_kernels(shape: Shape, routing: str, variants: str) -> list[dict]:
    """Each part alone, in ms and TFLOP/s or GB/s; gathers are counted on their own line."""
    x = make_inputs(shape, routing)
    lay = make_layout(x.expert_TK, shape.E)
    third = shape.flops / 3
    R = shape.T * shape.K
    moved = 2.0 * R * shape.D + 2.0 * shape.T * shape.D
    report = []

    def show(kernel: str, label: str, call: Callable[[], object], flops: float = 0.0, moves: float = 0.0) -> None:
        ms = milliseconds(call)
        rate = f"{flops / ms / 1e9:7.0f} TFLOP/s" if flops else f"{moves / ms / 1e6:7.0f} GB/s"
        report.append({"kernel": kernel, "table": label, "ms": ms, "flops": flops, "bytes": moves})
        print(f"{shape} {routing:8} {kernel:8} {label:7} {ms:8.3f} ms {rate}", flush=True)

    show("dense", "", dense_call(shape), shape.flops)
    show("layout", "", captured(lambda: make_layout(x.expert_TK, shape.E)), moves=16.0 * R)
    x_RD, dout_RD = gather_rows(x.x_TD, lay), gather_rows(x.dout_TD, lay)
    show("gather", "", lambda: gather_rows(x.x_TD, lay), moves=moved)
    show("combine", "", lambda: combine(x_RD, lay.row_TK, x.weight_TK), moves=moved)
    w_R = x.weight_TK.view(-1)[lay.pair_R]
    gu = torch.empty(x.w_gate_up_E2FD.shape, device="cuda")
    dn = torch.empty(x.w_down_EDF.shape, device="cuda")
    dh = torch.randn(2, R, shape.F, device="cuda").bfloat16()
    aw = torch.randn(R, shape.F, device="cuda").bfloat16()
    kept = Kept(torch.randn(2, R, shape.F, device="cuda").bfloat16(), None)
    for label, table in tables(variants, shape.D).items():
        for name, p in table.items():
            rows = x.x_TD if p.gather else x_RD
            drows = x.dout_TD if p.gather else dout_RD
            if name == "up":
                show(name, label, partial(products.up_product, rows, x.w_gate_up_E2FD, lay, kept, p), 2 * third)
            elif name == "down":
                show(name, label, partial(products.down_product, aw, x.w_down_EDF, lay, p), third)
            elif name == "dgate":
                show(name, label, partial(products.dgate_product, drows, x.w_down_EDF, kept, w_R, lay, p), third)
            elif name == "dx":
                show(name, label, partial(products.dx_product, dh, x.w_gate_up_E2FD, lay, p), 2 * third)
            else:
                for add in (False, True):
                    end = label + ("+=" if add else "=")
                    if name == "dw_up":
                        call = partial(products.weight_gradient, rows, dh, lay, gu, add, False, p)
                        show(name, end, call, 2 * third)
                    else:
                        call = partial(products.weight_gradient, drows, aw[None], lay, dn, add, True, p)
                        show(name, end, call, third)
    return report


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m nmoe.bench.moe", description=__doc__)
    parser.add_argument("what", choices=("check", "repeat", "kernels"))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--routing", default="uniform,zipf")
    parser.add_argument("--tables", default="pinned")
    parser.add_argument("--out", default="")
    args = parser.parse_args(argv)
    report: list[dict] = []
    if args.what == "check":
        report = check(args.tables, [n for n in args.shapes.split(",") if n in ODD] or list(ODD))
        bad = [r for r in report if r["bad"]]
        print(
            f"check {args.tables}: {len(report)} cases, {len(bad)} bad",
            [(r["shape"], r["routing"], r["table"], r["bad"]) for r in bad[:6]],
        )
    elif args.what == "repeat":
        report = repeat(args.tables)
    else:
        for name in args.shapes.split(","):
            for routing in args.routing.split(","):
                report += [
                    {"shape": name, "routing": routing, **r} for r in time_kernels(SHAPES[name], routing, args.tables)
                ]
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
