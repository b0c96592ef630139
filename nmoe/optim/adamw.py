"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), on torch's fused kernel, or on a GPU on `nmoe.kernels.adamw`.

With g the scaled gradient, t the step from 1, r the rate:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g g
    w <- w (1 - r weight_decay) - r (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

in float32, bias corrections and rate in float64. Only tensors of two and more dimensions decay.

An element's bits must not depend on where it lies, or rows could not be dealt out to ranks. The
CPU kernel works in vectors with fused multiply-adds and finishes a tensor's last few elements with
plain multiplies and adds, which round otherwise. Those last elements therefore go through the same
kernel in a padded copy: every element takes the vector path. (16 lanes cover every vector width.)

On a GPU one launch updates float32 state and writes the weights; state that is rounded stochastically, whose noise is
the CPU's, goes through torch's kernel there too.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from nmoe.optim import norm
from nmoe.optim.groups import WHOLE, Group, Places
from nmoe.optim.rounding import BLOCK, Rounding

if TYPE_CHECKING:
    from nmoe.kernels.adamw import FusedAdamW

LANES = 16
"""Float32 values in the widest vector."""

Quad = tuple[torch.Tensor, ...]
"""Master, gradient, first and second moment of one tensor, flat and float32."""


class AdamW(Group):
    """See the module; constructor arguments beyond Group's are beta1, beta2 and eps."""

    def __init__(
        self,
        *,
        name: str,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        lr_floor: float,
        weight_decay: float,
        beta1: float,
        beta2: float,
        eps: float,
        state_dtype: str,
        rounding: Rounding,
        places: Places = WHOLE,
    ):
        super().__init__(
            name=name,
            parameters=parameters,
            lr=lr,
            lr_floor=lr_floor,
            weight_decay=weight_decay,
            state_dtype=state_dtype,
            rounding=rounding,
            places=places,
        )
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.exp_avg = {logical: torch.zeros_like(master) for logical, master in self.masters.items()}
        self.exp_avg_sq = {logical: torch.zeros_like(master) for logical, master in self.masters.items()}
        self.fused = self._fused()

    def _fused(self) -> "FusedAdamW | None":
        """The kernel over all tensors; None where torch's does the work."""
        on_gpu = any(master.device.type != "cpu" for master in self.masters.values())
        if self.state_dtype != torch.float32 or not on_gpu:
            return None
        from nmoe.kernels.adamw import FusedAdamW, State

        return FusedAdamW(
            [
                State(
                    self.masters[name],
                    self.exp_avg[name],
                    self.exp_avg_sq[name],
                    None if parameter.dtype == torch.float32 else parameter.detach(),
                    parameter.ndim >= 2,
                )
                for name, parameter in self.parameters
            ]
        )

    def moments(self) -> dict[str, torch.Tensor]:
        return {f"adamw.exp_avg/{logical}": tensor for logical, tensor in self.exp_avg.items()} | {
            f"adamw.exp_avg_sq/{logical}": tensor for logical, tensor in self.exp_avg_sq.items()
        }

    @torch.no_grad()
    def step(self, *, step: int, scale: float, grad_scale: torch.Tensor) -> None:
        rate = self.rate(scale)
        if self.fused is not None:
            from nmoe.kernels.adamw import factors

            numbers = factors(
                step=step, rate=rate, beta1=self.beta1, beta2=self.beta2, eps=self.eps, weight_decay=self.weight_decay
            )
            gradients = [norm.gradient(name, parameter) for name, parameter in self.parameters]
            # The step has been found good before this is called: zero is the verdict that lets it be written.
            good = torch.zeros((), dtype=torch.int32, device=grad_scale.device)
            self.fused.step(gradients, numbers, scale=grad_scale, verdict=good)
            return
        gradients = self.scaled_gradients(grad_scale)
        if self.state_dtype == torch.float32:
            for decays in (True, False):
                quads: list[Quad] = [
                    (
                        self.masters[logical].view(-1),
                        gradient.reshape(-1),
                        self.exp_avg[logical].view(-1),
                        self.exp_avg_sq[logical].view(-1),
                    )
                    for (logical, parameter), gradient in zip(self.parameters, gradients, strict=True)
                    if (parameter.ndim >= 2) is decays
                ]
                self._update(quads, step=step, rate=rate, decay=self.weight_decay if decays else 0.0)
        else:
            update = self.rounding.advance()
            for (logical, parameter), gradient in zip(self.parameters, gradients, strict=True):
                decay = self.weight_decay if parameter.ndim >= 2 else 0.0
                self._update_rounded(logical, gradient.reshape(-1), update=update, step=step, rate=rate, decay=decay)
        self.refresh()

    def _update(self, quads: list[Quad], *, step: int, rate: float, decay: float) -> None:
        """One update of flat float32 (master, gradient, m, v), any lengths, each element alike."""
        whole = [tuple(t[: t.numel() - t.numel() % LANES] for t in quad) for quad in quads if quad[0].numel() >= LANES]
        tails = [tuple(t[t.numel() - t.numel() % LANES :] for t in quad) for quad in quads if quad[0].numel() % LANES]
        if tails:
            padded = torch.zeros(4, len(tails), LANES, device=tails[0][0].device)
            for i, tail in enumerate(tails):
                for j, t in enumerate(tail):
                    padded[j, i, : t.numel()] = t
            whole.append(tuple(padded.view(4, -1).unbind(0)))
        if not whole:
            return
        masters, gradients, exp_avgs, exp_avg_sqs = (list(ts) for ts in zip(*whole, strict=True))
        steps = [torch.full((), float(step), device=masters[0].device)] * len(masters)
        torch._fused_adamw_(
            masters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=rate,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
        for i, tail in enumerate(tails):
            for j in (0, 2, 3):
                tail[j].copy_(padded[j, i, : tail[j].numel()])

    def _update_rounded(
        self, logical: str, gradient: torch.Tensor, *, update: int, step: int, rate: float, decay: float
    ) -> None:
        """One update of bfloat16 state, block by block: read as float32, update, round stochastically.

        The update uses m and v before they are rounded.
        """
        first, _ = self.places[logical]
        kept = {
            f"master/{logical}": self.masters[logical].view(-1),
            f"adamw.exp_avg/{logical}": self.exp_avg[logical].view(-1),
            f"adamw.exp_avg_sq/{logical}": self.exp_avg_sq[logical].view(-1),
        }
        for start in range(0, gradient.numel(), BLOCK):
            master, exp_avg, exp_avg_sq = (t[start : start + BLOCK].float() for t in kept.values())
            quad = (master, gradient[start : start + BLOCK], exp_avg, exp_avg_sq)
            self._update([quad], step=step, rate=rate, decay=decay)
            for (name, tensor), value in zip(kept.items(), (master, exp_avg, exp_avg_sq), strict=True):
                out = tensor[start : start + BLOCK]
                self.rounding.write(out, value, update=update, tensor=name, start=first + start)
