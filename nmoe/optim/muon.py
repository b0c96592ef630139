"""Muon (Jordan et al., 2024): momentum, orthogonalised, each matrix on its own.

With G the scaled gradient of one matrix of A rows and B columns, r the rate:

    M <- mu M + (1 - mu) G         U = (1 - mu) G + mu M with Nesterov, else U = M
    X = U / max(||U||_F, eps), transposed if A > B; then ns_steps times
    X <- a X + b (X X') X + c (X X')^2 X
    W <- W (1 - r weight_decay) - r f X

f is "original" sqrt(max(1, A / B)) or "match_rms_adamw" 0.2 sqrt(max(A, B)): torch.optim.Muon's rule
and names. A tensor of more than two dimensions is a stack of matrices, its last two dimensions: each
expert has its own norm and its own iteration. So have gate and up, which only share a tensor
(w_gate_up_E2FD, w_gate_up_2FD): they are two maps of x, and one iteration over both would orthogonalise
the one against the other.

All matrices that have one shape, up to transposition, over all tensors, go through one chain of
batched products (cut into pieces of a bounded size). A product's bits for one matrix do not depend on
the others of its batch, so any split of the matrices over ranks gives the same weights. On the CPU
that takes a batch of at least as many matrices as threads: MKL gives each thread whole matrices of
such a batch, and divides the matrices of a smaller one. The norm of a matrix is added over its rows
in a fixed order for the same reason. A GPU iterates in bfloat16 with the kernels of `nmoe.kernels.newton_schulz`.
"""

import math
from collections.abc import Callable, Iterable

import torch

from nmoe.errors import fail
from nmoe.optim.groups import DTYPES, WHOLE, Group, Places
from nmoe.optim.rounding import Rounding

PIECE = 1 << 24
"""Elements of one batch of matrices at most (a larger matrix goes alone): bounds the scratch memory."""


class Muon(Group):
    """See the module; constructor arguments beyond Group's are named as in the plan."""

    def __init__(
        self,
        *,
        name: str,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        lr_floor: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        ns_coefficients: tuple[float, float, float],
        ns_dtype: str,
        eps: float,
        adjust_lr: str,
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
        for logical, parameter in self.parameters:
            if parameter.ndim < 2:
                raise fail(
                    "N0523",
                    f"`{logical}` has {parameter.ndim} dimension and is no matrix",
                    place=f"[optimizer.{name}]",
                    help="give vectors to an AdamW group",
                )
        self.mu = momentum
        self.nesterov = nesterov
        self.ns_steps = ns_steps
        self.ns_coefficients = ns_coefficients
        self.ns_dtype = DTYPES[ns_dtype]
        self.eps = eps
        self.adjust_lr = adjust_lr
        self.momentum = {logical: torch.zeros_like(master) for logical, master in self.masters.items()}
        self._pieces = pieces([(logical, tuple(parameter.shape)) for logical, parameter in self.parameters])

    def moments(self) -> dict[str, torch.Tensor]:
        return {f"muon.momentum/{logical}": tensor for logical, tensor in self.momentum.items()}

    def factor(self, rows: int, columns: int) -> float:
        """f of a matrix's shape; torch.optim.Muon's adjust_lr_fn of the same name."""
        if self.adjust_lr == "original":
            return math.sqrt(max(1.0, rows / columns))
        if self.adjust_lr == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        raise ValueError(f"adjust_lr {self.adjust_lr!r}")

    @torch.no_grad()
    def step(self, *, step: int, scale: float, grad_scale: torch.Tensor) -> None:
        gradients = dict(zip(self.masters, self.scaled_gradients(grad_scale), strict=True))
        rate = self.rate(scale)
        update = self.rounding.advance() if self.state_dtype != torch.float32 else 0
        for (short, long), piece in self._pieces:
            device = gradients[piece[0][0]].device
            x_NAB = torch.empty(sum(stop - start for _, start, stop in piece), short, long, device=device)
            place = 0
            for logical, start, stop in piece:
                gradient = matrices(gradients[logical].contiguous())[start:stop]
                kept = matrices(self.momentum[logical])[start:stop]
                moved = kept.float()
                moved.lerp_(gradient, 1.0 - self.mu)
                self._keep(kept, moved, start, f"muon.momentum/{logical}", update)
                part = torch.lerp(gradient, moved, self.mu) if self.nesterov else moved
                out = x_NAB[place : place + stop - start]
                out.copy_(part if part.shape[-2:] == out.shape[-2:] else part.mT)
                place += stop - start
            x_NAB = self.iteration(x_NAB)(
                x_NAB, steps=self.ns_steps, coefficients=self.ns_coefficients, dtype=self.ns_dtype, eps=self.eps
            )
            place = 0
            for logical, start, stop in piece:
                kept = matrices(self.masters[logical])[start:stop]
                moved = kept.float().mul_(1.0 - rate * self.weight_decay)
                x = x_NAB[place : place + stop - start]
                factor = self.factor(moved.shape[-2], moved.shape[-1])
                moved.add_(x if moved.shape[-2:] == x.shape[-2:] else x.mT, alpha=-rate * factor)
                self._keep(kept, moved, start, f"master/{logical}", update)
                place += stop - start
        self.refresh()

    def iteration(self, x_NAB: torch.Tensor) -> Callable[..., torch.Tensor]:
        """`orthogonalize`, or the kernels of that name where they are."""
        if x_NAB.device.type == "cpu" or self.ns_dtype != torch.bfloat16:
            return orthogonalize
        from nmoe.kernels import newton_schulz

        return newton_schulz.orthogonalize

    def _keep(self, kept: torch.Tensor, moved: torch.Tensor, start: int, name: str, update: int) -> None:
        """Writes float32 matrices from number `start` on back into bfloat16 state; float32 state is them already."""
        if kept.dtype != torch.float32:
            offset, _ = self.places[name.partition("/")[2]]
            first = offset + start * moved[0].numel()
            self.rounding.write(kept.view(-1), moved.view(-1), update=update, tensor=name, start=first)


def matrices(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a stack of the matrices of its last two dimensions, (N, A, B), not copied."""
    return tensor.view(-1, *tensor.shape[-2:])


def pieces(shapes: list[tuple[str, tuple[int, ...]]]) -> list[tuple[tuple[int, int], list[tuple[str, int, int]]]]:
    """Batches of matrices that share a shape up to transposition.

    shapes: (tensor, shape). Returns ((short, long), [(tensor, first matrix, end)]), each of at most PIECE
    elements or of a single matrix.
    """
    by_shape: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name, shape in shapes:
        short, long = sorted(shape[-2:])
        by_shape.setdefault((short, long), []).append((name, math.prod(shape[:-2])))
    result: list[tuple[tuple[int, int], list[tuple[str, int, int]]]] = []
    for (short, long), stacks in by_shape.items():
        most = max(1, PIECE // (short * long))
        room = 0
        for name, count in stacks:
            start = 0
            while start < count:
                if room == 0:
                    result.append(((short, long), []))
                    room = most
                stop = min(count, start + room)
                result[-1][1].append((name, start, stop))
                room -= stop - start
                start = stop
    return result


def orthogonalize(
    x_NAB: torch.Tensor, *, steps: int, coefficients: tuple[float, float, float], dtype: torch.dtype, eps: float
) -> torch.Tensor:
    """Newton-Schulz on each matrix of a stack, A <= B; x float32, the result in `dtype`.

    Each matrix is divided by its Frobenius norm (squares added over a row in float32, over rows in
    float64), at least `eps`, so that its singular values are at most 1; `steps` quintic iterations then
    bring them near 1 (to [0.7, 1.2] with the usual coefficients and five steps).
    """
    a, b, c = coefficients
    count = x_NAB.shape[0]
    missing = torch.get_num_threads() - count if x_NAB.device.type == "cpu" else 0
    if missing > 0:
        x_NAB = torch.cat([x_NAB, x_NAB.new_zeros(missing, *x_NAB.shape[1:])])
    norm_N = x_NAB.square().sum(-1).sum(-1, dtype=torch.float64).sqrt().float().clamp(min=eps)
    x_NAB = x_NAB.div_(norm_N[:, None, None]).to(dtype)
    for _ in range(steps):
        gram_NAA = torch.bmm(x_NAB, x_NAB.mT)
        polynomial_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, polynomial_NAA, x_NAB, beta=a)
    return x_NAB[:count]
