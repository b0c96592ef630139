"""Run by test_fused_interpreted.py in a process of its own: Triton reads TRITON_INTERPRET when kernels are defined.

Prints one JSON object, name -> largest deviation from the float64 meaning, relative to the largest value; for facts
and bits 0 where they hold and 1 where not.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from nmoe.kernels import adamw, cross_entropy, grad_norm, newton_schulz, rms_norm, rope, swiglu
from nmoe.kernels.launch import SymmetricLaunch
from nmoe.model.rope import table
from nmoe.optim import muon, norm

torch.set_num_threads(1)
torch.manual_seed(11)
found: dict[str, float] = {}


def note(name: str, value: float | bool) -> None:
    found[name] = max(found.get(name, 0.0), float(value))


def compare(name: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, name
    if got.numel():
        note(name, (got - want).abs().max().item() / max(want.abs().max().item(), 1e-30))


def leaves(*size: int, count: int = 1) -> list[Tensor]:
    return [torch.randn(size, requires_grad=True) for _ in range(count)]


def compare_gradients(name: str, got: object, want: object, to: list[Tensor], given: list[Tensor]) -> None:
    have = torch.autograd.grad(got, to, given)  # type: ignore[arg-type]
    for i, pair in enumerate(zip(have, torch.autograd.grad(want, to, [g.double() for g in given]), strict=True)):
        compare(f"{name}.d{i}", *pair)


# Norms: one row, none, widths that are no power of two, rows of a wider row, more rows than one partial sum covers.
for T, D, gap in ((1, 7, 0), (0, 8, 0), (37, 72, 5), (300, 1000, 0), (4200, 16, 0)):
    wide, y, w = *leaves(T, D + gap), *leaves(T, D), *leaves(D)
    x, dn, ds = wide[:, gap:], torch.randn(T, D), torch.randn(T, D)
    n, want = rms_norm.rms_norm(x, w, 1e-6), rms_norm.rms_norm_reference(x.double(), w.double(), 1e-6)
    compare("norm", n, want)
    compare_gradients("norm", n, want, [x, w], [dn])
    half = T // 2
    alone = torch.cat([rms_norm.rms_norm(part, w, 1e-6) for part in (x[:half], x[half:])])
    note("norm.rows alone", not torch.equal(alone, n))
    s, n = rms_norm.add_rms_norm(x, y, w, 1e-6)
    sum64 = x.double() + y.double()
    want = rms_norm.rms_norm_reference(sum64, w.double(), 1e-6)
    compare("add norm", n, want)
    note("add norm.sum", not torch.equal(s, x + y))
    compare_gradients("add norm", (s, n), (sum64, want), [x, y, w], [ds, dn])
    s, _ = rms_norm.add_rms_norm(x, y, w, 1e-6)
    note("add norm.sum alone", not torch.equal(torch.autograd.grad(s, y, ds)[0], ds))

for T, F in ((1, 5), (0, 3), (33, 48), (3, 1100)):
    pre, d = *leaves(T, 2 * F), torch.randn(T, F)
    want = swiglu.swiglu_reference(pre.double())
    act, d_pre = swiglu.swiglu_backward(pre.detach(), d)
    compare("swiglu", act, want)
    note("swiglu.both", not torch.equal(act, swiglu.swiglu(pre.detach())))
    compare("swiglu.d", d_pre, torch.autograd.grad(want, pre, d.double())[0])

for B, S, H, N, J, V in ((2, 5, 3, 6, 4, 5), (1, 19, 2, 1, 3, 7), (1, 33, 2, 16, 8, 16), (2, 1, 1, 3, 1, 1)):
    table_SJ = 1.3 * table(S, 2 * J, 10000.0, None, torch.device("cpu"))  # as YaRN may stretch it
    for interleaved in (True, False):
        for kept in (0, N):
            (x,) = leaves(B, S, H, kept + 2 * J)
            y = rope.rope(x, table_SJ, interleaved=interleaved)
            want = rope.rope_reference(x.double(), table_SJ, interleaved=interleaved)
            compare("rope", y, want)
            compare_gradients("rope", y, want, [x], [torch.randn(B, H, S, kept + 2 * J).transpose(1, 2)])
    kv, wide = *leaves(B, S, H, N + V), *leaves(B, S, 2 * J + 3)
    k_rope = wide[..., 3:]
    got = rope.mla_keys(kv, k_rope, table_SJ, V)
    want = rope.mla_keys_reference(kv.double(), k_rope.double(), table_SJ, V)
    compare("keys", got[0], want[0])
    note("keys.values", not torch.equal(got[1], kv[..., N:]))
    given = [torch.randn(B, H, S, X).transpose(1, 2) for X in (N + 2 * J, V)]
    compare_gradients("keys", got, want, [kv, k_rope], given)

for T, V, D, C in ((1, 3, 4, 8), (9, 301, 8, 4), (5, 17000, 4, 2), (0, 5, 3, 4)):
    h, w = *leaves(T, D), *leaves(V, D)
    targets = torch.randint(0, V, (T,))
    loss = cross_entropy.linear_cross_entropy(h, w, targets, chunk_tokens=C)
    want = cross_entropy.cross_entropy_reference(h.double(), w.double(), targets).sum()
    compare("loss", loss.detach(), want.detach())
    each = cross_entropy.token_losses(h, w, targets, chunk_tokens=C)
    note("loss.without gradient", not torch.equal(each.double().sum().float(), loss))
    whole = cross_entropy.token_losses(h, w, targets, chunk_tokens=max(T, 1))
    compare("loss.another chunk", each, whole)
    compare_gradients("loss", loss, want, [h, w], [torch.tensor(0.3)])
logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, torch.nan, 0.0]])
losses, d_logits = torch.empty(4), torch.empty(4, 3)
cross_entropy.softmax_gradient(logits, torch.tensor([1, 3, -1, 0]), losses, d_logits)
note("loss.extreme", losses[0].item() != 2e4 or d_logits[0].tolist() != [1.0, -1.0, 0.0])
note("loss.wrong target", not bool(losses[1:].isnan().all()))

for dtype in (None, torch.float16):  # the interpreter's bfloat16 is wrong
    states, grads, wanted = [], [], []
    scale, held = torch.tensor(0.37), torch.tensor(1, dtype=torch.int32)
    factors = adamw.factors(step=3, rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    for shape in ((3,), (7, 9), (0, 4), (20, 1000), (1,), (8,)):
        master, exp_avg, exp_avg_sq, gradient = (torch.randn(shape) for _ in range(4))
        exp_avg_sq.square_()
        weight = None if dtype is None else torch.zeros(shape, dtype=dtype)
        states.append(adamw.State(master, exp_avg, exp_avg_sq, weight, len(shape) > 1))
        grads.append(gradient)
        wanted.append(adamw.adamw_reference(master, gradient, exp_avg, exp_avg_sq, scale, factors, len(shape) > 1))
    group = adamw.FusedAdamW(states)
    before = [[t.clone() for t in state[:3]] for state in states]
    group.step(grads, factors, scale=scale, verdict=held)
    for state, old in zip(states, before, strict=True):
        note("adamw.held", not all(torch.equal(a, b) for a, b in zip(state[:3], old, strict=True)))
    moved = [g.clone() for g in grads]  # other addresses
    group.step(moved, factors, scale=scale, verdict=torch.zeros_like(held))
    for state, want in zip(states, wanted, strict=True):
        note("adamw", not all(torch.equal(a, b) for a, b in zip(state[:3], want, strict=True)))
        note("adamw.weight", dtype is not None and not torch.equal(state.weight, want[0].to(dtype)))

groups = [[(300, 24), (24,), (5,), (1, 1)], [], [(4, 2, 40, 24), (3, 7)], [(1500, 3)]]
gradients = [[torch.randn(shape) for shape in group] for group in groups]
flat = [g for group in gradients for g in group]
got = grad_norm.GradNorm(groups, torch.device("cpu")).squared(flat)
for name, a, b in zip(got._fields, got, grad_norm.squared_norms_reference(gradients), strict=True):
    compare(f"squares.{name}", a, b)
for clip_norm in (0.5, 1e9):
    clip, verdict = grad_norm.verdict(got.total, torch.tensor(clip_norm, dtype=torch.float64), torch.ones(300))
    note("verdict.clip", not torch.equal(clip, norm.clip_coefficient(got.total, clip_norm)))
    note("verdict.good", verdict.item() != 0)
infinite, one = torch.tensor(torch.inf, dtype=torch.float64), torch.ones((), dtype=torch.float64)
for total, value in ((infinite, 1.0), (infinite - infinite, 1.0), (one, torch.nan), (one, torch.inf)):
    losses = torch.ones(300)
    losses[-1] = value
    note("verdict.bad", grad_norm.verdict(total, one, losses)[1].item() != 1)

newton_schulz.SYMMETRIC_LAUNCH = SymmetricLaunch(16, 16, 1, 4)  # more than one tile of a small matrix
iteration = {"steps": 5, "coefficients": (3.4445, -4.7750, 2.0315), "eps": 1e-7}
for N, A, B in ((1, 5, 9), (2, 33, 40)):
    x = torch.randn(N, A, B)
    square = newton_schulz.symmetric_product(x, 0.5)
    compare("symmetric", square, newton_schulz.symmetric_reference(x.double(), 0.5))
    note("symmetric.mirrored", not torch.equal(square, square.mT))
    added = newton_schulz.symmetric_product(x, 0.5, square, -2.0)
    compare("symmetric.added", added, newton_schulz.symmetric_reference(x.double(), 0.5, square.double(), -2.0))
    got = newton_schulz.orthogonalize(x.clone(), dtype=torch.float32, **iteration)
    compare("schulz", got, muon.orthogonalize(x.double(), dtype=torch.float64, **iteration))
    alone = newton_schulz.orthogonalize(x[-1:].clone(), dtype=torch.float32, **iteration)
    note("schulz.alone", not torch.equal(alone[0], got[-1]))
zero = newton_schulz.orthogonalize(torch.zeros(1, 4, 6), dtype=torch.float32, **iteration)
note("schulz.zero", zero.abs().max().item())
print(json.dumps(found))
