"""Gradient norms in an order of addition that no layout of the machine can change.

A row is a slice along a tensor's last dimension. Squares are added over a row in float32, because a
row always lies on one rank; over rows and tensors in float64, in order. However rows are dealt out
to ranks, the sums of the rows are the same numbers, and so is the norm. The error is that of one
row's float32 sum, about 1e-7, whatever the size of the model.

Long vectors of rows are added in fixed blocks of 1024, block sums after that: a plain sum of a long
vector is cut by the number of threads. On a GPU `nmoe.kernels.grad_norm` adds in the same blocks; within a row and a
block its order is its own.
"""

from collections.abc import Iterable, Mapping

import attrs
import torch

from nmoe.errors import RunError, fail

BLOCK = 1024
"""Row sums added in one go."""

ROWS_AT_ONCE = 1 << 18
"""Elements squared at a time, so that the squares stay in the CPU's cache; a row is never cut."""


@attrs.frozen(kw_only=True, eq=False)
class Norms:
    """Squared norms of one step's gradients, float64, 0-dimensional, on the gradients' device."""

    parameters: dict[str, torch.Tensor]
    groups: dict[str, torch.Tensor]
    total: torch.Tensor


def gradient(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The float32 gradient of a parameter; RunError N0521 if it has none or another dtype."""
    found = parameter.grad
    if found is None:
        raise fail(
            "N0521",
            f"`{name}` has no gradient",
            place=f"parameter `{name}`",
            help="a parameter that the loss does not reach does not belong in the model",
        )
    if found.dtype != torch.float32:
        raise fail(
            "N0521",
            f"the gradient of `{name}` is {str(found.dtype).removeprefix('torch.')}, not float32",
            place=f"parameter `{name}`",
            help="set grad_dtype of the parameter to torch.float32",
        )
    return found


def row_sums(gradient: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each row: float32, shape (rows,), rows in the order of memory."""
    rows_RD = gradient.reshape(-1, gradient.shape[-1]) if gradient.ndim > 1 else gradient.reshape(1, -1)
    step = max(1, ROWS_AT_ONCE // max(1, rows_RD.shape[1]))
    return torch.cat([part.square().sum(-1) for part in rows_RD.split(step)])


def ordered_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of a vector in float64, over fixed blocks of 1024 and then over their sums; 0-dimensional."""
    values = values.double()
    while values.numel() > BLOCK:
        values = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK).sum(-1)
    return values.sum()


def norms_of(rows: Mapping[str, Mapping[str, torch.Tensor]]) -> Norms:
    """Squared 2-norms of each parameter, of each group, of everything.

    rows: `row_sums` of all rows of each parameter, by group and name.
    """
    parameters: dict[str, torch.Tensor] = {}
    by_group: dict[str, torch.Tensor] = {}
    device = next((sums.device for members in rows.values() for sums in members.values()), None)
    for group, members in rows.items():
        sums = {name: ordered_sum(row_sum) for name, row_sum in members.items()}
        parameters |= sums
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        by_group[group] = ordered_sum(torch.stack(list(sums.values()))) if sums else nothing
    return Norms(parameters=parameters, groups=by_group, total=ordered_sum(torch.stack(list(by_group.values()))))


def clip_coefficient(squared_norm: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """min(1, clip_norm / (norm + 1e-6)) as float32, 0-dimensional: torch.nn.utils.clip_grad_norm_'s factor."""
    return (clip_norm / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0).to(torch.float32)


def not_finite(
    groups: Mapping[str, Iterable[tuple[str, torch.nn.Parameter]]], *, step: int, notes: Iterable[str] = ()
) -> RunError:
    """The error for gradients whose norm is not finite: it names the first parameter at fault and where.

    Called once a step has been found to be bad, so it may read everything. A gradient of finite
    values can have an infinite norm (squares beyond 3.4e38); the message tells the two apart.
    """
    large = ""
    for group, members in groups.items():
        for name, parameter in members:
            values = gradient(name, parameter)
            bad = ~torch.isfinite(values)
            count = int(bad.sum())
            if count:
                index = tuple(int(i) for i in bad.nonzero()[0])
                return fail(
                    "N0522",
                    f"the gradient of `{name}` is not finite: {float(values[index])} at {list(index)}, "
                    f"{count} of {values.numel()} values",
                    place=f"step {step}, group `{group}`",
                    help="weights are as they were before the step; lower the rate or look at the batch",
                    notes=notes,
                )
            if not large and not bool(torch.isfinite(row_sums(values)).all()):
                large = f"the gradient of `{name}` is too large for a norm: {float(values.abs().max()):.3g}"
    return fail(
        "N0522",
        large or "the norm of the gradients is not finite, though each of them is",
        place=f"step {step}",
        help="weights are as they were before the step; lower the rate or look at the batch",
        notes=notes,
    )
