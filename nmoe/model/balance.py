"""Losses that keep a router's experts in use, and the one place where their gradient joins the model's.

With logits z = W x of a microbatch's T tokens, scores s of E experts, and n_e the tokens that have
expert e among the K largest of their s:

    balance     E sum_e f_e P_e,  f_e = n_e / T,  P_e = mean over tokens of s_te
                Fedus et al., arXiv 2101.03961, eq. 4-6, as Mixtral and Qwen3 count it: over all K
                chosen, so that it is K when even. s = softmax(z)
    sequence    of each sequence of S tokens, then the mean over the sequences,
                sum_e f_e P_e,  f_e = E n_e / (K S),  P_e = mean over its tokens of s_te / sum_j s_tj
                DeepSeek-V3, arXiv 2412.19437, eq. 17-20: 1 when even. s = sigmoid(z)
    z           mean over tokens of (ln sum_e exp z_te)^2
                Zoph et al., arXiv 2202.08906, eq. 5

n is a count and has no gradient. It is of the K largest scores themselves (eq. 18), whatever bias
or groups the selection proper has: the losses move the scores.

Every mean is over the tokens of one microbatch, whole sequences, documents or not. A step's loss is
the mean of its microbatches', weighted by their tokens, and what training descends is

    (1 / T_step) sum over microbatches (sum over tokens of -log p + T sum over layers and losses of c L)

with c a loss's coefficient: each layer's losses add to the mean cross-entropy as they are.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class BalanceLoss(Protocol):
    """One loss. name: of its metric, after `router/`."""

    name: str

    def __call__(self, logits_TE: Tensor, score_TE: Tensor, best_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(L, T dL/dz): the mean over the microbatch as a float64 scalar, and (T, E) float32.

        logits_TE, score_TE: (T, E) float32, z and s. best_TK: (T, K) int64, the K largest of s.
        """
        ...


class SwitchBalance:
    """E sum_e f_e P_e over the microbatch, for softmax scores (Fedus et al., arXiv 2101.03961, eq. 4-6)."""

    name = "balance_loss"

    def __call__(self, logits_TE: Tensor, score_TE: Tensor, best_TK: Tensor) -> tuple[Tensor, Tensor]:
        """As `BalanceLoss`. T dL/ds_te = E f_e; the softmax takes its mean under s off."""
        tokens, experts = score_TE.shape
        f_E = chosen(best_TK, experts).sum(dim=0) * (experts / tokens)
        product_TE = score_TE * f_E
        token_T1 = product_TE.sum(dim=1, keepdim=True)
        return token_T1.mean(dtype=torch.float64), product_TE - score_TE * token_T1


class SequenceBalance:
    """sum_e f_e P_e of each sequence, for sigmoid scores (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    sequence_length: S; a microbatch is a whole number of sequences.
    """

    name = "sequence_balance_loss"

    def __init__(self, *, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def __call__(self, logits_TE: Tensor, score_TE: Tensor, best_TK: Tensor) -> tuple[Tensor, Tensor]:
        """As `BalanceLoss`. With q = s / sum s and l_t = sum_e f_e q_te: T dL/ds_te = (f_e - l_t) / sum s."""
        experts, length = score_TE.shape[1], self.sequence_length
        n_B1E = chosen(best_TK, experts).view(-1, length, experts).sum(dim=1, keepdim=True)
        f_B1E = n_B1E * (experts / (length * best_TK.shape[1]))
        score_BSE = score_TE.view(-1, length, experts)
        q_BSE = score_BSE / (score_BSE.sum(dim=2, keepdim=True) + 1e-20)
        token_BS1 = (q_BSE * f_B1E).sum(dim=2, keepdim=True)
        gradient_BSE = q_BSE * (1 - score_BSE) * (f_B1E - token_BS1)
        return token_BS1.mean(dtype=torch.float64), gradient_BSE.view_as(score_TE)


class ZLoss:
    """Mean of the squared log-partition of softmax scores (Zoph et al., arXiv 2202.08906, eq. 5)."""

    name = "z_loss"

    def __call__(self, logits_TE: Tensor, score_TE: Tensor, best_TK: Tensor) -> tuple[Tensor, Tensor]:
        """As `BalanceLoss`. T dL/dz_te = 2 ln(sum exp z_t) s_te."""
        z_T1 = torch.logsumexp(logits_TE, dim=1, keepdim=True)
        return z_T1.double().square().mean(), 2 * z_T1 * score_TE


def chosen(best_TK: Tensor, experts: int) -> Tensor:
    """(T, E) float32: 1 where a token has an expert among its K. Sums of it are counts, exact in any order below 2^24.

    A bincount would have a GPU's host wait for the largest index.
    """
    tokens = best_TK.shape[0]
    return torch.zeros(tokens, experts, device=best_TK.device).scatter_(1, best_TK, 1.0)


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights_TK: Tensor, logits_TE: Tensor, gradient_TE: Tensor, means: list[Tensor], balance: "Balance"
    ) -> Tensor:
        ctx.save_for_backward(gradient_TE)
        ctx.means, ctx.balance = means, balance
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, d_weights_TK: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient_TE,) = ctx.saved_tensors
        # Here and not in forward: a layer that is computed again for its backward pass still counts once.
        ctx.balance.record(gradient_TE.shape[0], ctx.means)
        return d_weights_TK, gradient_TE, None, None, None


class Balance:
    """The losses of one router in one training, and what they were in the step under way.

    losses: (c, loss) pairs; c: by which the loss counts beside the mean cross-entropy. tokens_per_step: T_step.
    """

    def __init__(self, losses: Sequence[tuple[float, BalanceLoss]], *, tokens_per_step: int) -> None:
        self.losses = list(losses)
        self.tokens_per_step = tokens_per_step
        self._terms: list[Tensor] = []
        self._tokens = 0

    def inject(self, weights_TK: Tensor, logits_TE: Tensor, score_TE: Tensor, best_TK: Tensor) -> Tensor:
        """weights_TK as they are; backward adds the losses' gradient to that of logits_TE.

        weights_TK: (T, K) float32, the pairs' weights. The rest as in `BalanceLoss`. The gradient has the step's
        scale already, as has the one that arrives through the weights.
        """
        means, gradient_TE = [], torch.zeros_like(score_TE)
        with torch.no_grad():
            for coefficient, loss in self.losses:
                mean, part_TE = loss(logits_TE, score_TE, best_TK)
                means.append(mean)
                gradient_TE.add_(part_TE, alpha=coefficient / self.tokens_per_step)
        injected_TK: Tensor = _Inject.apply(weights_TK, logits_TE, gradient_TE, means, self)
        return injected_TK

    def record(self, tokens: int, means: list[Tensor]) -> None:
        """One microbatch has gone backward: its tokens, and each loss's mean over them."""
        self.add(tokens, torch.stack(means).double() * tokens)

    def add(self, tokens: int, terms_L: Tensor) -> None:
        """As `record`, for a microbatch whose T L of every loss are given: float64."""
        self._terms.append(terms_L)
        self._tokens += tokens

    def take_back(self, tokens: int) -> Tensor:
        """Forgets the last microbatch, of so many tokens; what `add` was given for it."""
        self._tokens -= tokens
        return self._terms.pop()

    def terms(self) -> Tensor:
        """Each microbatch's T L of every loss, as recorded since `clear`: (M, losses) float64, on the CPU."""
        return torch.stack(self._terms).cpu() if self._terms else torch.empty(0, len(self.losses), dtype=torch.float64)

    def replace(self, terms: Tensor, tokens: int) -> None:
        """As if this router had seen all ranks' microbatches: their `terms`, and how many tokens they have together."""
        self._terms, self._tokens = list(terms), tokens

    def means(self) -> dict[str, float]:
        """Each loss by name, without its coefficient: the mean over the tokens since `clear`. Nothing before any."""
        terms = self.terms()
        return {
            loss.name: math.fsum(terms[:, index].tolist()) / self._tokens
            for index, (_, loss) in enumerate(self.losses)
            if self._tokens
        }

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._terms, self._tokens = [], 0
