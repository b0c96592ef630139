"""Cross-entropy of a linear head, chunk by chunk, forward and backward in one pass over the vocabulary.

    loss_t = log sum_v exp(x_tv) - x_t,target     dx_tv = p_tv - [v = target]     with x = h W^T, p = softmax(x)
    dh = dx W                                     dW = sum over chunks, in order, of dx^T h

For a chunk of C tokens: logits by one product, one kernel that turns them into losses and dx, two products.
Operands bf16, sums float32, logits float32, dx rounded to bf16 for the tensor cores; dh and dW float32, dW
summed over chunks by the product itself (addmm with a float32 result: beta = 1 reads and writes it in the
product's epilogue). p_target - 1 is minus the sum of the others, not a difference.

Why float32 logits: rounded to bf16 a logit near 16 is off by up to 0.03, so a probability is off by 3% where
rounding dx itself costs 0.4%, and the loss, the one figure everybody compares, by 0.01 a token. It costs 2 V
bytes a token in the product and 2 V in the kernel, a ninth of the whole for D 768. The kernel takes either.

Layout: logits rows of V, float32 or bf16, dx rows of V; both buffers are one chunk, 6 V bytes a token, reused.
Repeatable: one program owns a row; each thread keeps a running maximum and sum of its own columns, and the tile's
tree adds them at the end; a token's loss does not depend on the others of its chunk beyond the product's shape. A
target outside the vocabulary makes the loss nan, which the step's verdict sees.

Floor for T tokens: three products, 6 T V D FLOPs, and between them the kernel's 6 T V bytes (4 read and 2 written;
its second read is the L2's where 132 rows fit it, V up to 60k, and 4 T V more beyond). Prediction for T 16384, D 2048,
V 50304 at 700 TFLOP/s and 3 TB/s: 14.5 ms of products, 1.65 ms of kernel; D 768, T 32768: 10.9 and 3.3 ms.
Measured: see NOTES.md. Liger's kernel (arXiv 2410.10989) overwrites bf16 logits in place, 4 V bytes a token less.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.launch import loss_launch


def cross_entropy_reference(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    """The meaning: each token's -log softmax(W h)[target], in nats; differentiable, any dtype."""
    logits_TV = h_TD @ w_VD.T
    return torch.logsumexp(logits_TV, dim=1) - logits_TV.gather(1, targets_T[:, None])[:, 0]


@triton.jit
def softmax_kernel(logits_ptr, target_ptr, loss_ptr, d_ptr, V, stride, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    at = logits_ptr + row * stride
    wanted = tl.load(at + target, mask=known, other=float("nan")).to(tl.float32)
    top = tl.full([BLOCK], -1e38, tl.float32)
    others = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        x = tl.load(at + v, mask=v < V, other=float("-inf")).to(tl.float32)
        now = tl.maximum(top, x)
        others = others * tl.exp(top - now) + tl.where(v == target, 0.0, tl.exp(x - now))
        top = now
    best = tl.max(top, axis=0)
    rest = tl.sum(others * tl.exp(top - best), axis=0)
    z = rest + tl.exp(wanted - best)
    tl.store(loss_ptr + row, tl.log(z) - (wanted - best))
    if GRADIENT:
        share = 1.0 / z
        for first in range(0, V, BLOCK):
            v = first + tl.arange(0, BLOCK)
            x = tl.load(at + v, mask=v < V, other=float("-inf")).to(tl.float32)
            d = tl.where(v == target, -rest, tl.exp(x - best)) * share
            tl.store(d_ptr + row * V + v, d.to(d_ptr.dtype.element_ty), mask=v < V)


def softmax_gradient(logits_CV: Tensor, targets_C: Tensor, losses_C: Tensor, d_logits_CV: Tensor | None) -> None:
    """Writes each row's loss into losses_C (float32) and p - onehot into d_logits_CV, where it is given.

    logits_CV: float32 or bf16, contiguous; d_logits_CV: the same shape, contiguous. targets_C: int64; a target
    outside [0, V) gives a loss of nan.
    """
    rows, vocab = logits_CV.shape
    p = loss_launch(vocab)
    if rows:
        softmax_kernel[(rows,)](
            logits_CV, targets_C, losses_C, d_logits_CV, vocab, logits_CV.stride(0), d_logits_CV is not None, p.block,
            num_warps=p.warps,
        )  # fmt: skip


def _product(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """out = a b in float32, from float32 or bf16."""
    if a_MK.dtype == torch.float32:
        torch.mm(a_MK, b_KN, out=out_MN)
    else:
        torch.mm(a_MK, b_KN, out_dtype=torch.float32, out=out_MN)


def _accumulate(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """out += a b in float32, in the product's epilogue."""
    if a_MK.dtype == torch.float32:
        torch.addmm(out_MN, a_MK, b_KN, out=out_MN)
    else:
        torch.addmm(out_MN, a_MK, b_KN, out_dtype=torch.float32, out=out_MN)


def _require(h_TD: Tensor, w_VD: Tensor) -> None:
    if h_TD.dtype not in (torch.bfloat16, torch.float32) or w_VD.dtype != h_TD.dtype:
        raise fail(
            "N0718", f"`h_TD` and `w_VD` must be bf16 (or both float32), found {h_TD.dtype} and {w_VD.dtype}",
            place="cross-entropy kernels",
        )  # fmt: skip


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, chunk_tokens: int) -> Tensor:
        tokens, vocab = h_TD.shape[0], w_VD.shape[0]
        losses_T = torch.empty(tokens, dtype=torch.float32, device=h_TD.device)
        dh_TD = torch.empty(h_TD.shape, dtype=torch.float32, device=h_TD.device)
        dw_VD = torch.empty(w_VD.shape, dtype=torch.float32, device=h_TD.device)
        room = min(chunk_tokens, tokens)
        logits_CV = torch.empty(room, vocab, dtype=torch.float32, device=h_TD.device)
        d_logits_CV = torch.empty(room, vocab, dtype=h_TD.dtype, device=h_TD.device)
        if not tokens:
            dw_VD.zero_()
        for start in range(0, tokens, chunk_tokens):
            stop = min(start + chunk_tokens, tokens)
            h_CD, x_CV, d_CV = h_TD[start:stop], logits_CV[: stop - start], d_logits_CV[: stop - start]
            _product(h_CD, w_VD.t(), x_CV)
            softmax_gradient(x_CV, targets_T[start:stop], losses_T[start:stop], d_CV)
            _product(d_CV, w_VD, dh_TD[start:stop])
            (_accumulate if start else _product)(d_CV.t(), h_CD, dw_VD)
        ctx.save_for_backward(dh_TD, dw_VD)
        ctx.dtype = h_TD.dtype
        return losses_T.sum(dtype=torch.float64).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dh_TD, dw_VD = ctx.saved_tensors
        # In place: a copy would be as large as the head's gradient. A second backward is refused by torch.
        return (dh_TD * d_loss).to(ctx.dtype), dw_VD.mul_(d_loss), None, None


def linear_cross_entropy(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, *, chunk_tokens: int) -> Tensor:
    """The sum over tokens of -log p(target), in nats; a float32 scalar, differentiable once in h and w.

    h_TD: (T, D); w_VD: (V, D); both bf16 (or float32), contiguous; targets_T: (T,) int64. A chunk is chunk_tokens
    rows from a multiple of it on; `launch.loss_chunk` names the size that fills the memory meant for it. The
    gradient of h has its dtype, that of w is float32. Raises N0718 for another dtype.
    """
    _require(h_TD, w_VD)
    if not torch.is_grad_enabled():
        return token_losses(h_TD, w_VD, targets_T, chunk_tokens=chunk_tokens).sum(dtype=torch.float64).to(torch.float32)
    loss: Tensor = _LinearCrossEntropy.apply(h_TD, w_VD, targets_T, chunk_tokens)
    return loss


@torch.no_grad()
def token_losses(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, *, chunk_tokens: int) -> Tensor:
    """-log p(target) of each token, in nats: (T,) float32, without gradient; arguments as above, the same bits."""
    _require(h_TD, w_VD)
    tokens = h_TD.shape[0]
    losses_T = torch.empty(tokens, dtype=torch.float32, device=h_TD.device)
    logits_CV = torch.empty(min(chunk_tokens, tokens), w_VD.shape[0], dtype=torch.float32, device=h_TD.device)
    for start in range(0, tokens, chunk_tokens):
        stop = min(start + chunk_tokens, tokens)
        _product(h_TD[start:stop], w_VD.t(), logits_CV[: stop - start])
        softmax_gradient(logits_CV[: stop - start], targets_T[start:stop], losses_T[start:stop], None)
    return losses_T
