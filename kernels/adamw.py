"""AdamW over all tensors of a group in one launch, with the bf16 weights written in the same pass.

    g <- scale g      m <- b1 m + (1 - b1) g      v <- b2 v + ((1 - b2) g) g
    w <- w (1 - r decay) - r / (1 - b1^t) * (m / (sqrt(v) / sqrt(1 - b2^t) + eps))

(Loshchilov and Hutter, arXiv 1711.05101), t the step from 1, r the rate. Masters w, moments and gradients
are float32; the weight beside a master is its rounding to bf16. `scale` (the clip factor) is read on the
device and so is `verdict`: if it is not zero, nothing is written. What depends on the step alone is
computed in float64 on the host and rounded once to float32.

Every operation is rounded on its own, in the order written (no fused multiply-add, division and square root
correctly rounded), so `adamw_reference`, which is these operations in torch, gives the same bits on any
device. torch's fused kernel differs by float32 rounding.

Repeatable: elementwise; an element's bits do not depend on where it lies or how tensors are cut. A table on
the device, made once, holds addresses and sizes; gradients' addresses are sent again when they have moved.

Floor: 30 bytes a parameter (w, m, v read and written 24, g read 4, weight written 2): 28 without the weight.
Prediction for 9.8e8 parameters at 2.9 TB/s: 10.2 ms. Measured: see NOTES.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.launch import ADAMW_LAUNCH
from nmoe.kernels.table import Addresses, pieces, rows


class State(NamedTuple):
    """One tensor: its master and moments, float32, and the weight that is the master rounded (None: its own master).

    decays: whether weight decay acts on it.
    """

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor | None
    decays: bool


class Factors(NamedTuple):
    """What depends on the step alone; each is float64, and rounded to float32 where it is used."""

    keep: float
    rate: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    root: float
    eps: float


def factors(*, step: int, rate: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Factors:
    """1 - r decay, r / (1 - b1^t), the betas and what they leave, 1 / sqrt(1 - b2^t), eps. step counts from 1."""
    root = (1.0 - beta2**step) ** -0.5
    return Factors(
        1.0 - rate * weight_decay, rate / (1.0 - beta1**step), beta1, 1.0 - beta1, beta2, 1.0 - beta2, root, eps
    )


def adamw_reference(
    master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scale: Tensor, f: Factors, decays: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning, operation by operation: the new (master, exp_avg, exp_avg_sq); float32 or float64.

    In float32 the factors are rounded to it, as a kernel's arguments are.
    """
    f = Factors(*(torch.tensor(value, dtype=master.dtype, device=master.device) for value in f))  # type: ignore[arg-type]
    g = gradient * scale
    exp_avg = exp_avg * f.beta1 + g * f.rest1
    exp_avg_sq = exp_avg_sq * f.beta2 + (g * f.rest2) * g
    kept = master * f.keep if decays else master
    # Through float64, since torch's float32 root is not correctly rounded everywhere.
    root = torch.sqrt(exp_avg_sq.double()).to(master.dtype)
    return kept - f.rate * (exp_avg / (root * f.root + f.eps)), exp_avg, exp_avg_sq


@triton.jit
def _pointer(address, ALIGNED: tl.constexpr, TYPE: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def adamw_kernel(table_ptr, gradient_ptr, owner_ptr, scale_ptr, verdict_ptr, keep, rate, beta1, rest1, beta2, rest2,
                 root, eps, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    if tl.load(verdict_ptr) == 0:
        p = tl.program_id(0)
        n = tl.load(owner_ptr + p)
        row = table_ptr + n * 7
        count = tl.load(row + 4)
        if ALIGNED:  # a number of elements that vectors divide, said so that the compiler sees it
            count = count // 8 * 8
        master_ptr = _pointer(tl.load(row), ALIGNED, tl.float32)
        exp_avg_ptr = _pointer(tl.load(row + 1), ALIGNED, tl.float32)
        exp_avg_sq_ptr = _pointer(tl.load(row + 2), ALIGNED, tl.float32)
        g_ptr = _pointer(tl.load(gradient_ptr + n), ALIGNED, tl.float32)
        start = (p - tl.load(row + 5)) * CHUNK
        keep = tl.where(tl.load(row + 6) != 0, keep, 1.0)
        scale = tl.load(scale_ptr)
        for first in range(0, CHUNK, BLOCK):
            at = start + first + tl.arange(0, BLOCK)
            mask = at < count
            g = tl.load(g_ptr + at, mask=mask, other=0.0) * scale
            exp_avg = tl.load(exp_avg_ptr + at, mask=mask, other=0.0) * beta1 + g * rest1
            exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0) * beta2 + (g * rest2) * g
            update = tl.div_rn(exp_avg, tl.sqrt_rn(exp_avg_sq) * root + eps)
            master = tl.load(master_ptr + at, mask=mask, other=0.0) * keep - rate * update
            tl.store(master_ptr + at, master, mask=mask)
            tl.store(exp_avg_ptr + at, exp_avg, mask=mask)
            tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=mask)
            if WEIGHT is not None:
                weight_ptr = _pointer(tl.load(row + 3), ALIGNED, WEIGHT)
                tl.store(weight_ptr + at, master.to(WEIGHT), mask=mask)


DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Part(NamedTuple):
    """The tensors of one launch: those whose sizes vectors divide, or the others."""

    aligned: bool
    chosen: list[int]
    owner_P: Tensor
    table_N7: Tensor
    gradients: Addresses


class FusedAdamW:
    """The update of a list of tensors, whose tables are made here: one launch, and one for odd sizes.

    states: all on one device, contiguous, at 16-byte addresses; masters and moments float32; either every tensor has
    a weight, of one 16-bit dtype, or none has. Raises N0719 otherwise. A tensor must not move while this is in use.
    """

    def __init__(self, states: Sequence[State]):
        self.states = list(states)
        for s in self.states:
            for name, t in zip(("master", "exp_avg", "exp_avg_sq"), s[:3], strict=True):
                _require(name, t, s.master.numel(), (torch.float32,))
            if s.weight is not None:
                _require("weight", s.weight, s.master.numel(), tuple(DTYPES))
        kinds = {None if s.weight is None else s.weight.dtype for s in self.states}
        if len(kinds) > 1:
            raise fail("N0719", "tensors differ in whether they have a weight beside their master, or in its dtype",
                       place="adamw kernel", help="give each kind an object of its own")  # fmt: skip
        self.weight_dtype = next(iter(kinds), None)
        self.parts = []
        for aligned in (True, False):
            chosen = [n for n, s in enumerate(self.states) if (s.master.numel() % 8 == 0) is aligned]
            if not any(self.states[n].master.numel() for n in chosen):
                continue
            device = self.states[0].master.device
            sizes = [self.states[n].master.numel() for n in chosen]
            owner_P, first = pieces([triton.cdiv(size, ADAMW_LAUNCH.chunk) for size in sizes], device)
            table = [
                [*(0 if t is None else t.data_ptr() for t in self.states[n][:4]), size, at, int(self.states[n].decays)]
                for n, size, at in zip(chosen, sizes, first, strict=True)
            ]
            self.parts.append(_Part(aligned, chosen, owner_P, rows(table, device), Addresses(device)))

    def step(self, gradients: Sequence[Tensor], f: Factors, *, scale: Tensor, verdict: Tensor) -> None:
        """Updates masters, moments and weights from the gradients, which stay as they are.

        gradients: float32, contiguous, at 16-byte addresses, in the order of the states. scale: float32,
        0-dimensional. verdict: int32, 0-dimensional; nothing is written where it is not 0. Both are read on the
        device. Raises N0719 for another dtype, size or layout.
        """
        for s, g in zip(self.states, gradients, strict=True):
            _require("gradient", g, s.master.numel(), (torch.float32,))
        weight = None if self.weight_dtype is None else DTYPES[self.weight_dtype]
        p = ADAMW_LAUNCH
        for part in self.parts:
            address_N = part.gradients.of([gradients[n] for n in part.chosen])
            adamw_kernel[(len(part.owner_P),)](
                part.table_N7, address_N, part.owner_P, scale, verdict, *f, weight, part.aligned, p.chunk, p.block,
                num_warps=p.warps, enable_fp_fusion=False,
            )  # fmt: skip


def _require(name: str, t: Tensor, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in dtypes or not t.is_contiguous() or t.numel() != size or (size and t.data_ptr() % 16):
        raise fail(
            "N0719", f"`{name}` must be contiguous {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} of "
            f"{size} elements at a 16-byte address, found {t.dtype} of {tuple(t.shape)}", place="adamw kernel",
        )  # fmt: skip
