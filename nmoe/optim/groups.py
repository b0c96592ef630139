"""What every group of parameters shares: masters, rates, state by name; and all groups as one optimizer.

A group updates a *master* of each weight. Where the plan's state dtype is the weight's dtype, the
weight is its own master; where they differ, the master is kept beside it and the weight is the
master rounded (bf16 weight, fp32 master) or its exact value (fp32 weight, bf16 master).

Everything that an exact resume needs is in `state()`: tensors by logical name. The caller writes
into them in place and calls `refresh()`.

On several ranks a group has this rank's shares of its parameters (`nmoe.sharding`), each as a parameter of
its own; `places` says where they lie in the logical tensors, and `parts()` says it of the state.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch

from nmoe.errors import fail
from nmoe.optim import norm
from nmoe.optim.rounding import Rounding
from nmoe.part import Part

Places = Mapping[str, tuple[int, tuple[int, ...]]]
"""Where a share lies, by the parameter's name: its first element, and the shape of the logical tensor."""

WHOLE: Places = MappingProxyType({})
"""No parameter is a share."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Group(ABC):
    """Parameters that share a rule and a rate.

    parameters: (logical name, parameter), initialised, contiguous, float32 or bfloat16.
    lr, lr_floor: the rate is lr_floor + (lr - lr_floor) * scale. weight_decay: decoupled, times the
    rate, for tensors of two and more dimensions. state_dtype: "fp32" or "bf16" (stochastic rounding).
    places: of parameters that are shares; one that is not named there is whole.
    Building a group whose state is narrower than a weight rounds the weight to it, to nearest.
    """

    def __init__(
        self,
        *,
        name: str,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        lr_floor: float,
        weight_decay: float,
        state_dtype: str,
        rounding: Rounding,
        places: Places,
    ):
        self.name = name
        self.parameters = list(parameters)
        self.lr = lr
        self.lr_floor = lr_floor
        self.weight_decay = weight_decay
        self.state_dtype = DTYPES[state_dtype]
        self.rounding = rounding
        self.places = {logical: places.get(logical, (0, tuple(p.shape))) for logical, p in self.parameters}
        self.masters: dict[str, torch.Tensor] = {}
        for logical, parameter in self.parameters:
            if logical in self.masters:
                raise fail(
                    "N0523", f"`{logical}` is twice in the group", place=f"[optimizer.{name}]", help="name it once"
                )
            if not parameter.is_contiguous() or parameter.dtype not in DTYPES.values():
                raise fail(
                    "N0523",
                    f"`{logical}` is {'' if parameter.is_contiguous() else 'not contiguous, '}{parameter.dtype}",
                    place=f"[optimizer.{name}]",
                    help="weights are contiguous tensors of float32 or bfloat16",
                )
            weight = parameter.detach()
            self.masters[logical] = weight if weight.dtype == self.state_dtype else weight.to(self.state_dtype)
        self.refresh()

    def rate(self, scale: float) -> float:
        """The learning rate at the schedule's factor `scale`."""
        return self.lr_floor + (self.lr - self.lr_floor) * scale

    @abstractmethod
    def step(self, *, step: int, scale: float, grad_scale: torch.Tensor) -> None:
        """Updates masters and weights from the gradients.

        step: counts from 1. scale: the schedule's factor. grad_scale: float32, 0-dimensional, multiplied
        into the gradients in place (they are spent after this). RunError N0521 for a missing gradient.
        """

    @abstractmethod
    def moments(self) -> dict[str, torch.Tensor]:
        """The rule's own state by logical name ("adamw.exp_avg/PARAM"), in `state_dtype`."""

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of this group that exact resume needs, by logical name, not copied."""
        return {f"master/{logical}": master for logical, master in self.masters.items()} | self.moments()

    def parts(self) -> dict[str, Part]:
        """`state()`, and where each of its tensors lies in its logical one."""
        return {name: Part(tensor, *self.places[name.partition("/")[2]]) for name, tensor in self.state().items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes the weights from the masters, after these have been written to."""
        for logical, parameter in self.parameters:
            master = self.masters[logical]
            if master.dtype != parameter.dtype:
                parameter.detach().copy_(master)

    def scaled_gradients(self, grad_scale: torch.Tensor) -> list[torch.Tensor]:
        """The gradients in the order of `parameters`, multiplied by grad_scale in place."""
        gradients = [norm.gradient(logical, parameter) for logical, parameter in self.parameters]
        # Times 1 changes no bit; on the CPU, reading the factor costs nothing and saves a pass.
        if gradients and (grad_scale.device.type != "cpu" or float(grad_scale) != 1.0):
            torch._foreach_mul_(gradients, grad_scale)
        return gradients


class Optimizer:
    """The groups, in the plan's order, as one."""

    def __init__(self, groups: Sequence[Group]):
        self.groups = list(groups)
        owner: dict[str, str] = {}
        for group in self.groups:
            for logical, _ in group.parameters:
                if logical in owner:
                    raise fail(
                        "N0523",
                        f"`{logical}` is in two groups, `{owner[logical]}` and `{group.name}`",
                        place="[optimizer]",
                        help="every parameter belongs to exactly one group",
                    )
                owner[logical] = group.name

    def members(self) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
        """The groups' parameters by the groups' names, as nmoe.optim.norm takes them."""
        return {group.name: group.parameters for group in self.groups}

    def rates(self, scale: float) -> dict[str, float]:
        """Each group's learning rate at the schedule's factor `scale`."""
        return {group.name: group.rate(scale) for group in self.groups}

    def step(self, *, step: int, scale: float, grad_scale: torch.Tensor) -> None:
        """Steps every group; see Group.step."""
        for group in self.groups:
            group.step(step=step, scale=scale, grad_scale=grad_scale)

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that exact resume needs, by logical name, not copied."""
        return {name: tensor for group in self.groups for name, tensor in group.state().items()}

    def parts(self) -> dict[str, Part]:
        """`state()`, and where each of its tensors lies in its logical one."""
        return {name: part for group in self.groups for name, part in group.parts().items()}

    def refresh(self) -> None:
        """Recomputes the weights from the masters, after `state()` has been written to."""
        for group in self.groups:
            group.refresh()

    def clear_gradients(self) -> None:
        """Drops every gradient, so that the next backward starts a new sum."""
        for group in self.groups:
            for _, parameter in group.parameters:
                parameter.grad = None
