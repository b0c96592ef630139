"""Cases of `nmoe.bench.elementwise`: norms, SwiGLU, rotary positions, latent attention's keys.

Sizes: T tokens, D hidden, F intermediate; B, S, H sequences, positions, heads; N, V, 2J a head's parts.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from nmoe.bench.elementwise_case import BF16, DEVICE, FP32, Case, Part, Peer, leaves_of, normals
from nmoe.kernels import rms_norm, rope, swiglu
from nmoe.model.mla import by_head
from nmoe.model.rope import rotate_halves, rotate_interleaved, table

EPS = 1e-6


def norm_case(T: int, D: int, *, added: bool = False, gap: int = 0) -> Case:
    """gap: elements between x's rows, as in a slice of a wider projection."""
    normal = normals()
    x, y, dn, ds = normal(T, D + gap)[:, :D], normal(T, D), normal(T, D), normal(T, D)
    w = 1 + normal(D) / 4
    inputs = (x, y, w) if added else (x, w)

    def forward() -> tuple[Tensor, ...]:
        return rms_norm.rms_norm_forward(x, w, EPS, y if added else None)

    s, _, r = forward()

    def backward() -> tuple[Tensor, Tensor]:
        return rms_norm.rms_norm_backward(dn, s, w, r, ds if added else None)

    def ours() -> dict[str, Tensor]:
        s, n, _ = forward()
        return {"n": n, **dict(zip(("dx", "dw"), backward(), strict=True))} | ({"s": s} if added else {})

    def meaning(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        s = x + rest[0] if added else x
        rounded = s + (s.detach().bfloat16().to(s.dtype) - s.detach())  # as the kernel's sum is; the gradient is s's
        return rounded, rms_norm.rms_norm_reference(rounded, rest[-1], EPS)

    def exact() -> dict[str, Tensor]:
        leaves = leaves_of(*inputs, dtype=torch.float64)
        s, n = meaning(*leaves)
        grads = torch.autograd.grad((s, n), leaves, (ds.double() if added else torch.zeros_like(s), dn.double()))
        return {"n": n, "dx": grads[0], "dw": grads[-1]} | ({"s": s} if added else {})

    def facts() -> dict[str, bool]:
        cut = T // 3
        ends = [rms_norm.rms_norm_forward(x[a:b], w, EPS, y[a:b] if added else None) for a, b in ((0, cut), (cut, T))]
        n = forward()[1]
        return {"rows alone": torch.equal(n, torch.cat([ends[0][1], ends[1][1]]))}

    def plain(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        if added:
            s = x + rest[0]
            return s, functional.rms_norm(s, (D,), rest[1], EPS)
        return (functional.rms_norm(x, (D,), rest[0], EPS),)

    def parts() -> list[Part]:
        leaves = leaves_of(*inputs)
        each, given = 2.0 * T * D, (ds, dn) if added else (dn,)
        return [
            Part("forward", forward, each * (4 if added else 2), 0, {"torch": Peer(plain, leaves)}),
            Part("backward", backward, each * (4 if added else 3), 0, {"torch": Peer(plain, leaves, given)}),
        ]

    limits = {"n": BF16, "dx": BF16, "dw": FP32} | ({"s": BF16} if added else {})
    return Case(ours, exact, limits, facts, parts)


def swiglu_case(T: int, F: int) -> Case:
    normal = normals()
    pre, d = normal(T, 2 * F), normal(T, F)

    def forward() -> Tensor:
        return swiglu.swiglu(pre)

    def backward() -> tuple[Tensor, Tensor]:
        return swiglu.swiglu_backward(pre, d)

    def exact() -> dict[str, Tensor]:
        (leaf,) = leaves_of(pre, dtype=torch.float64)
        a = swiglu.swiglu_reference(leaf)
        return {"a": a, "dpre": torch.autograd.grad(a, leaf, d.double())[0]}

    def facts() -> dict[str, bool]:
        act, d_pre = backward()
        wide, d_wide = swiglu.swiglu_backward(pre, d.float())
        return {"same a": torch.equal(act, forward()) and torch.equal(wide, act), "d wide": torch.equal(d_wide, d_pre)}

    def plain(pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, dim=1)
        return functional.silu(gate) * up

    def parts() -> list[Part]:
        leaves = leaves_of(pre)
        return [
            Part("forward", forward, 6.0 * T * F, 0, {"torch": Peer(plain, leaves)}),
            Part("backward", backward, 12.0 * T * F, 0, {"torch, no a": Peer(plain, leaves, d)}),
        ]

    return Case(lambda: {"a": forward(), "dpre": backward()[1]}, exact, {"a": BF16, "dpre": BF16}, facts, parts)


def rope_case(B: int, S: int, H: int, N: int, J: int, *, interleaved: bool) -> Case:
    normal = normals()
    x, dy = normal(B, S, H, N + 2 * J), normal(B, H, S, N + 2 * J).transpose(1, 2)
    table_SJ = table(S, 2 * J, 10000.0, None, torch.device(DEVICE))
    turn = partial(rope.rope, table_SJ=table_SJ, interleaved=interleaved)

    def forward() -> Tensor:
        return turn(x)

    (leaf,) = leaves_of(x)
    made = turn(leaf)

    def backward() -> Tensor:
        return torch.autograd.grad(made, leaf, dy, retain_graph=True)[0]

    def exact() -> dict[str, Tensor]:
        (leaf,) = leaves_of(x, dtype=torch.float64)
        y = rope.rope_reference(leaf, table_SJ, interleaved=interleaved)
        return {"y": y, "dx": torch.autograd.grad(y, leaf, dy.double())[0]}

    def plain(x: Tensor) -> Tensor:
        if not interleaved:
            return rotate_halves(x, 10000.0).transpose(1, 2).contiguous()
        kept, turned = x.split([N, 2 * J], dim=3)
        return by_head(kept, rotate_interleaved(turned, 10000.0))

    def parts() -> list[Part]:
        moved = 4.0 * x.numel() + 8.0 * S * J
        peers = [{"model": Peer(plain, [leaf], given, False)} for given in (None, dy.transpose(1, 2))]
        return [Part("forward", forward, moved, 0, peers[0]), Part("backward", backward, moved, 0, peers[1])]

    return Case(lambda: {"y": forward(), "dx": backward()}, exact, {"y": BF16, "dx": BF16}, dict, parts)


def keys_case(B: int, S: int, H: int, N: int, V: int, J: int) -> Case:
    normal = normals()
    kv, wide = normal(B, S, H, N + V), normal(B, S, 512 + 2 * J)
    dk, dv = normal(B, H, S, N + 2 * J).transpose(1, 2), normal(B, H, S, V).transpose(1, 2)
    table_SJ = table(S, 2 * J, 10000.0, None, torch.device(DEVICE))
    inputs = leaves_of(kv, wide)

    def forward() -> tuple[Tensor, Tensor]:
        return rope.mla_keys(inputs[0], inputs[1][..., 512:], table_SJ, V)

    shared = inputs[1][..., 512:]
    made = rope.mla_keys(inputs[0], shared, table_SJ, V)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(made, (inputs[0], shared), (dk, dv), retain_graph=True)

    def exact() -> dict[str, Tensor]:
        leaves = leaves_of(kv, wide[..., 512:], dtype=torch.float64)
        k, v = rope.mla_keys_reference(leaves[0], leaves[1], table_SJ, V)
        grads = torch.autograd.grad((k, v), leaves, (dk.double(), dv.double()))
        return {"k": k, "v": v, "dkv": grads[0], "drope": grads[1]}

    def plain(kv: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        own, value = kv.split([N, V], dim=3)
        turned = rotate_interleaved(wide[..., 512:][:, :, None], 10000.0).expand(B, S, H, 2 * J)
        return by_head(own, turned), by_head(value)

    def ours() -> dict[str, Tensor]:
        return dict(zip(("k", "v", "dkv", "drope"), (*forward(), *backward()), strict=True))

    def parts() -> list[Part]:
        rows = 1.0 * B * S
        given = (dk.transpose(1, 2), dv.transpose(1, 2))
        peers = [{"model": Peer(plain, inputs, g, False)} for g in (None, given)]
        back = rows * (4 * H * (N + V) + 4 * H * J + 4 * J)
        return [
            Part("forward", forward, rows * (4 * H * N + 4 * H * J + 4 * J), 0, peers[0]),
            Part("backward", backward, back, 0, peers[1]),
        ]

    return Case(ours, exact, {"k": BF16, "v": 0.0, "dkv": 0.0, "drope": BF16}, dict, parts)
