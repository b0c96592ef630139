"""Cases of `nmoe.bench.elementwise`: cross-entropy, AdamW, gradient norms, Newton-Schulz.

Sizes: T tokens, D hidden, V vocabulary, C tokens of a chunk; N matrices of A x B.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nmoe.bench.elementwise_case import BF16, DEVICE, FP32, Case, Part, Peer, leaves_of, normals
from nmoe.bench.moe import error
from nmoe.kernels import adamw, cross_entropy, grad_norm, newton_schulz
from nmoe.kernels.launch import loss_chunk
from nmoe.optim import muon, norm

SCHULZ: dict[str, Any] = {"steps": 5, "coefficients": (3.4445, -4.7750, 2.0315), "eps": 1e-7}


def loss_case(T: int, D: int, V: int, C: int | None = None) -> Case:
    normal = normals()
    h, w = normal(T, D), (normal(V, D, dtype=torch.float32) * D**-0.5).bfloat16()
    targets = torch.randint(0, V, (T,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(2))
    chunk = C or loss_chunk(V)
    leaves = leaves_of(h, w)
    leaves[1].grad_dtype = torch.float32

    def whole() -> tuple[Tensor, ...]:
        loss = cross_entropy.linear_cross_entropy(leaves[0], leaves[1], targets, chunk_tokens=chunk)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def exact() -> dict[str, Tensor]:
        leaves = leaves_of(h, w, dtype=torch.float64)
        loss = cross_entropy.cross_entropy_reference(leaves[0], leaves[1], targets).sum()
        return dict(zip(("loss", "dh", "dw"), (loss, *torch.autograd.grad(loss, leaves)), strict=True))

    def facts() -> dict[str, bool]:
        with torch.no_grad():
            alone = cross_entropy.linear_cross_entropy(h, w, targets, chunk_tokens=chunk)
        wrong = targets.clone()
        wrong[0] = V
        losses = cross_entropy.token_losses(h, w, wrong, chunk_tokens=chunk)
        return {
            "no gradient": torch.equal(alone, whole()[0]),
            "wrong target": bool(losses[0].isnan()) and bool(losses[1:].isfinite().all()),
        }

    def plain(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy((h @ w.t()).float(), targets, reduction="sum")

    def chunked(function: Callable[..., Tensor]) -> Callable[..., object]:
        def run(h: Tensor, w: Tensor) -> object:
            total = torch.zeros(w.shape, device=DEVICE)
            grads = []
            for start in range(0, T, chunk):
                part = h[start : start + chunk].detach().requires_grad_()
                dh, dw = torch.autograd.grad(function(part, w, targets[start : start + chunk]), (part, w))
                grads.append(dh)
                total += dw
            return torch.cat(grads), total

        return run

    def parts() -> list[Part]:
        room = min(T, chunk)
        logits = torch.randn(room, V, device=DEVICE)
        narrow, d = logits.bfloat16(), torch.empty_like(logits, dtype=torch.bfloat16)
        losses, some = torch.empty(room, device=DEVICE), targets[:room]
        dw = torch.zeros(V, D, device=DEVICE)
        product, each = 2.0 * room * V * D, 2.0 * room * V
        kernel = cross_entropy.softmax_gradient
        peers = {
            "torch": Peer(chunked(plain), leaves, None, False),
            "torch, chunk compiled": Peer(chunked(torch.compile(plain, dynamic=False)), leaves, None, False),
        }
        return [
            Part("whole", whole, 6.0 * T * V, 6.0 * T * V * D, peers),
            Part("kernel", partial(kernel, logits, some, losses, d), 3 * each, 0, {}),
            Part("kernel, bf16", partial(kernel, narrow, some, losses, d), 2 * each, 0, {}),
            Part("logits", partial(cross_entropy._product, h[:room], w.t(), logits), 0, product, {}),
            Part("logits, bf16", partial(torch.mm, h[:room], w.t(), out=narrow), 0, product, {}),
            Part("dW chained", partial(cross_entropy._accumulate, d.t(), h[:room], dw), 0, product, {}),
            Part("dW fresh", partial(cross_entropy._product, d.t(), h[:room], dw), 0, product, {}),
        ]

    limits = {"loss": 1e-6, "dh": BF16, "dw": BF16}
    return Case(lambda: dict(zip(("loss", "dh", "dw"), whole(), strict=True)), exact, limits, facts, parts)


def adamw_case(shapes: Sequence[tuple[int, ...]]) -> Case:
    normal = normals()
    wide = partial(normal, dtype=torch.float32)
    weights = [normal(*s) for s in shapes]
    states = [
        adamw.State(wide(*s), wide(*s), wide(*s).square(), weight, len(s) > 1)
        for s, weight in zip(shapes, weights, strict=True)
    ]
    grads = [wide(*s) for s in shapes]
    start = [[t.clone() for t in s[:3]] for s in states]
    group = adamw.FusedAdamW(states)
    f = adamw.factors(step=3, rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    scale = torch.tensor(0.37, device=DEVICE)
    go, held = (torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in (0, 1))

    def step(verdict: Tensor = go) -> None:
        group.step(grads, f, scale=scale, verdict=verdict)

    def ours() -> dict[str, Tensor]:
        for state, first in zip(states, start, strict=True):
            for t, value in zip(state[:3], first, strict=True):
                t.copy_(value)
        step()
        lists = ([s.master for s in states], [s.exp_avg for s in states], [s.exp_avg_sq for s in states], weights)
        return {k: torch.cat([t.flatten() for t in ts]) for k, ts in zip(("w", "m", "v", "weight"), lists, strict=True)}

    def reference(dtype: torch.dtype) -> dict[str, Tensor]:
        made = [
            adamw.adamw_reference(m.to(dtype), g.to(dtype), a.to(dtype), b.to(dtype), scale.to(dtype), f, s.decays)
            for (m, a, b), g, s in zip(start, grads, states, strict=True)
        ]
        return {k: torch.cat([t[i].flatten() for t in made]) for i, k in enumerate(("w", "m", "v"))}

    def exact() -> dict[str, Tensor]:
        found = reference(torch.float64)
        return found | {"weight": found["w"]}

    def facts() -> dict[str, bool]:
        got, want = ours(), reference(torch.float32)
        step(held)
        after = torch.cat([s.master.flatten() for s in states])
        return {
            "bits": all(torch.equal(got[k], want[k]) for k in want),
            "weight": torch.equal(got["weight"], want["w"].bfloat16()),
            "held": torch.equal(after, got["w"]),
        }

    def parts() -> list[Part]:
        params = [s.master.clone().requires_grad_() for s in states]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True, capturable=True)

        @torch.no_grad()
        def plain() -> None:
            optimizer.step()
            torch._foreach_copy_(weights, [p.detach() for p in params])

        count = sum(s.master.numel() for s in states)
        return [Part("step", step, 30.0 * count, 0, {"torch fused, copy": Peer(plain, (), None, False)})]

    return Case(ours, exact, {"w": FP32, "m": FP32, "v": FP32, "weight": BF16}, facts, parts)


def squares_case(groups: Sequence[Sequence[tuple[int, ...]]]) -> Case:
    normal = normals()
    grads = [[normal(*s, dtype=torch.float32) for s in group] for group in groups]
    flat = [g for group in grads for g in group]
    norms = grad_norm.GradNorm(groups, torch.device(DEVICE))
    losses, clip_norm = torch.ones(4, device=DEVICE), torch.ones((), dtype=torch.float64, device=DEVICE)

    def call() -> dict[str, Tensor]:
        found = norms.squared(flat)
        clip, verdict = grad_norm.verdict(found.total, clip_norm, losses)
        return found._asdict() | {"clip": clip, "verdict": verdict}

    def exact() -> dict[str, Tensor]:
        found = grad_norm.squared_norms_reference([[g.cpu() for g in group] for group in grads])
        clip = norm.clip_coefficient(found.total, 1.0)
        wanted = found._asdict() | {"clip": clip, "verdict": torch.tensor(0)}
        return {name: t.to(DEVICE) for name, t in wanted.items()}

    def facts() -> dict[str, bool]:
        found = call()
        most, last = max(flat, key=Tensor.numel), losses[-1].clone()
        row = most.view(-1, most.shape[-1])
        one = grad_norm.GradNorm([[row[r : r + 1].shape] for r in range(3)], torch.device(DEVICE))
        alone = one.squared([row[r : r + 1].contiguous().clone() for r in range(3)]).tensor_N
        whole = grad_norm.GradNorm([[row[:3].shape]], torch.device(DEVICE)).squared([row[:3].clone()])
        clip = norm.clip_coefficient(found["total"], 1.0)
        losses[-1] = torch.nan
        bad = call()["verdict"]
        losses[-1] = last
        rows_alone = torch.allclose(alone.sum(), whole.total, rtol=1e-15)
        return {"clip": torch.equal(clip, found["clip"]), "rows alone": rows_alone, "nan loss": int(bad) == 1}

    def parts() -> list[Part]:
        count = sum(g.numel() for g in flat)
        plain = Peer(lambda: torch.stack(torch._foreach_norm(flat)).norm(), (), None, False)
        return [Part("norms", call, 4.0 * count, 0, {"torch foreach": plain})]

    limits = {"tensor_N": 1e-6, "group_G": 1e-6, "total": 1e-6, "clip": 1e-6, "verdict": 0.0}
    return Case(call, exact, limits, facts, parts)


def schulz_case(N: int, A: int, B: int) -> Case:
    normal = normals()
    x, start = normal(N, A, B), normal(N, A, B, dtype=torch.float32)

    def ours() -> dict[str, Tensor]:
        gram = newton_schulz.symmetric_product(x, 1.0 / B)
        return {
            "gram": gram,
            "polynomial": newton_schulz.symmetric_product(gram, 2.0, gram, -4.8),
            "product": newton_schulz.product(gram, x, 3.4),
            "normalized": newton_schulz.normalized(start, torch.bfloat16, 1e-7),
        }

    def exact() -> dict[str, Tensor]:
        gram = newton_schulz.symmetric_reference(x.double(), 1.0 / B)
        rounded = gram.bfloat16().double()
        return {
            "gram": gram,
            "polynomial": newton_schulz.symmetric_reference(rounded, 2.0, rounded, -4.8),
            "product": rounded @ x.double() + 3.4 * x.double(),
            "normalized": start.double() / start.double().flatten(1).norm(dim=1)[:, None, None],
        }

    def iterate(function: Callable[..., Tensor]) -> Tensor:
        return function(start.clone(), dtype=torch.bfloat16, **SCHULZ)

    def facts() -> dict[str, bool]:
        gram = ours()["gram"]
        iterated, library = iterate(newton_schulz.orthogonalize), iterate(muon.orthogonalize)
        one = newton_schulz.orthogonalize(start[-1:].clone(), dtype=torch.bfloat16, **SCHULZ)
        alone = newton_schulz.symmetric_product(x[-1:].clone(), 1.0 / B)
        return {
            "symmetric": torch.equal(gram, gram.mT),
            "alone": torch.equal(alone[0], gram[-1]),
            "iterated alone": torch.equal(one[0], iterated[-1]),
            "like muon's": error(iterated, library.double()) < 0.05,
        }

    def parts() -> list[Part]:
        gram = newton_schulz.symmetric_product(x, 1.0 / B)
        square, cube = 2.0 * N * A * A * B, 2.0 * N * A**3
        library = Peer(partial(iterate, muon.orthogonalize), (), None, False)
        whole = SCHULZ["steps"] * (1.5 * square + 0.5 * cube)
        return [
            Part("five steps", partial(iterate, newton_schulz.orthogonalize), 0, whole, {"library": library}),
            Part("gram", partial(newton_schulz.symmetric_product, x, 1.0), 0, square / 2,
                 {"bmm": Peer(lambda: torch.bmm(x, x.mT), (), None, False)}),
            Part("polynomial", partial(newton_schulz.symmetric_product, gram, 2.0, gram, -4.8), 0, cube / 2,
                 {"baddbmm": Peer(lambda: torch.baddbmm(gram, gram, gram, beta=-4.8, alpha=2.0), (), None, False)}),
            Part("product", partial(newton_schulz.product, gram, x, 3.4), 0, square,
                 {"baddbmm": Peer(lambda: torch.baddbmm(x, gram, x, beta=3.4), (), None, False)}),
            Part("normalized", partial(newton_schulz.normalized, start, torch.bfloat16, 1e-7), 10.0 * start.numel(), 0,
                 {}),
        ]  # fmt: skip

    # the rounded gram may differ in a last bit from the exact one's rounding
    limits = {"gram": BF16, "polynomial": 8e-3, "product": 8e-3, "normalized": BF16}
    return Case(ours, exact, limits, facts, parts)
