"""Cross-entropy of a linear head, chunk by chunk: the (T, V) logits never exist at once.

    loss = sum over t of -log softmax(W h_t)[target_t]            in nats

A chunk is `chunk_tokens` rows from a multiple of it on, so boundaries and with them every sum are
fixed by the shape. Where gradients are wanted they are computed in the same pass, while the chunk's
probabilities are at hand,

    dh_t = W^T (p_t - onehot)       dW = sum over chunks, in order, of (p - onehot)^T h

and backward only scales them by the loss's own gradient. Logits, probabilities, both gradients and
the chain over chunks are float32; p - onehot is rounded to what the device's products read. On a GPU all this is
`nmoe.kernels.cross_entropy`'s, with one kernel between the products.
"""

from typing import Any

import torch
from torch import Tensor

from nmoe.experts.product import accumulate, into, operand, product

CHUNK_TOKENS = 1024
"""On the CPU."""


def chunk_of(w_VD: Tensor) -> int:
    """Tokens of a chunk in training: what a device works through well, of a vocabulary's size."""
    if w_VD.device.type == "cpu":
        return CHUNK_TOKENS
    from nmoe.kernels.launch import loss_chunk

    return loss_chunk(w_VD.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, chunk_tokens: int) -> Tensor:
        losses_T = torch.empty(h_TD.shape[0], dtype=torch.float32, device=h_TD.device)
        dh_TD = torch.empty(h_TD.shape, dtype=torch.float32, device=h_TD.device)
        dw_VD = torch.zeros(w_VD.shape, dtype=torch.float32, device=h_TD.device)
        w_VD = operand(w_VD)
        for start in range(0, h_TD.shape[0], chunk_tokens):
            stop = start + chunk_tokens
            h_CD, target_C1 = operand(h_TD[start:stop]), targets_T[start:stop, None]
            # One exponential an element: log_softmax and then exp would take two, and they are what it costs.
            logits_CV = product(h_CD, w_VD.t(), torch.float32)
            logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
            target_logit_C1 = logits_CV.gather(1, target_C1)
            d_logits_CV = logits_CV.exp_()
            z_C1 = d_logits_CV.sum(dim=1, keepdim=True)
            loss_C1 = z_C1.log() - target_logit_C1
            losses_T[start:stop] = loss_C1[:, 0]
            d_logits_CV = d_logits_CV.div_(z_C1).scatter_(1, target_C1, torch.expm1(-loss_C1)).to(h_CD.dtype)
            into(dh_TD[start:stop], d_logits_CV, w_VD)
            accumulate(dw_VD, d_logits_CV.t(), h_CD)
            del logits_CV, d_logits_CV  # or the next chunk's would be made beside them
        ctx.save_for_backward(dh_TD, dw_VD)
        ctx.dtype = h_TD.dtype
        return total(losses_T)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dh_TD, dw_VD = ctx.saved_tensors
        return (dh_TD * d_loss).to(ctx.dtype), dw_VD * d_loss, None, None


def linear_cross_entropy(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, *, chunk_tokens: int) -> Tensor:
    """The sum over tokens of -log p(target), in nats; a float32 scalar, differentiable in h and w.

    h_TD: (T, D); w_VD: (V, D), the same dtype; targets_T: (T,) int64, 0 <= target < V.
    The gradient of w is float32.
    """
    if h_TD.device.type != "cpu":
        from nmoe.kernels import cross_entropy as kernels

        return kernels.linear_cross_entropy(h_TD, w_VD, targets_T, chunk_tokens=chunk_tokens)
    if not torch.is_grad_enabled():
        return total(token_losses(h_TD, w_VD, targets_T, chunk_tokens=chunk_tokens))
    loss: Tensor = _LinearCrossEntropy.apply(h_TD, w_VD, targets_T, chunk_tokens)
    return loss


@torch.no_grad()
def token_losses(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, *, chunk_tokens: int) -> Tensor:
    """-log p(target) of each token, in nats: (T,) float32, without gradient; arguments as above."""
    if h_TD.device.type != "cpu":
        from nmoe.kernels import cross_entropy as kernels

        return kernels.token_losses(h_TD, w_VD, targets_T, chunk_tokens=chunk_tokens)
    losses = [
        torch.log_softmax(product(h_CD, w_VD.t(), torch.float32), dim=1).gather(1, target_C[:, None])[:, 0].neg_()
        for h_CD, target_C in zip(h_TD.split(chunk_tokens), targets_T.split(chunk_tokens), strict=True)
    ]
    return torch.cat(losses)


def total(losses_T: Tensor) -> Tensor:
    """The sum in float64, rounded once to float32."""
    return losses_T.sum(dtype=torch.float64).to(torch.float32)
