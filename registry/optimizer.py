"""[optimizer] and its groups: every parameter belongs to exactly one."""

from collections.abc import Iterator
from typing import ClassVar

import attrs

from nmoe.registry.component import Component, Parameter, Problem, key, section


@attrs.frozen(kw_only=True)
class Group(Component):
    """What every kind of group has. Norm weights (one-dimensional) never decay."""

    lr: float = key("peak learning rate", above=0.0, maximum=1000.0)
    lr_floor: float = key("learning rate where the schedule's factor is 0", default=0.0, minimum=0.0, maximum=1000.0)
    weight_decay: float = key(
        "decoupled weight decay of the matrices, times the rate", default=0.1, minimum=0.0, maximum=1000.0
    )

    def build(self, *, name: str, parameters, state_dtype: str, rounding, places):
        """The group at work on `parameters`, (logical name, tensor) pairs: nmoe.optim.groups.Group."""
        raise NotImplementedError

    def check(self, config, path: str) -> Iterator[Problem]:
        if self.lr_floor > self.lr:
            yield Problem(
                path=f"{path}.lr_floor",
                message=f"the floor {self.lr_floor} is above the peak {self.lr}",
                help="set lr_floor below lr",
            )
        if self.lr * self.weight_decay >= 1.0:
            yield Problem(
                path=f"{path}.weight_decay",
                message=f"lr * weight_decay = {self.lr * self.weight_decay:g}: one step decays a weight to nothing",
                help=f"set weight_decay below {1 / self.lr:g}",
            )


@attrs.frozen(kw_only=True)
class AdamW(Group):
    """Loshchilov and Hutter, arXiv 1711.05101."""

    beta1: float = key("decay of the first moment", default=0.9, minimum=0.0, below=1.0)
    beta2: float = key("decay of the second moment", default=0.95, minimum=0.0, below=1.0)
    eps: float = key("added to the root of the second moment", default=1e-8, above=0.0, maximum=1.0)

    def build(self, *, name: str, parameters, state_dtype, rounding, places):
        from nmoe.optim.adamw import AdamW as Run

        return Run(
            name=name, parameters=parameters, lr=self.lr, lr_floor=self.lr_floor, weight_decay=self.weight_decay,
            beta1=self.beta1, beta2=self.beta2, eps=self.eps, state_dtype=state_dtype, rounding=rounding, places=places,
        )


@attrs.frozen(kw_only=True)
class Muon(Group):
    """Orthogonalised momentum (Jordan et al., 2024), each matrix on its own; an expert has three."""

    momentum: float = key("decay of the momentum", default=0.95, minimum=0.0, below=1.0)
    nesterov: bool = key("look one step ahead", default=True)
    ns_steps: int = key("Newton-Schulz iterations", default=5, minimum=1, maximum=99)
    ns_coefficients: tuple[float, float, float] = key(
        "a, b, c of X <- aX + b(XX')X + c(XX')^2 X", default=(3.4445, -4.775, 2.0315), minimum=-1e3, maximum=1e3
    )
    ns_dtype: str = key("dtype of the iteration", default="bf16", choices=("bf16", "fp32"))
    eps: float = key("lower bound of the norm that the momentum is divided by", default=1e-7, above=0.0, maximum=1.0)
    adjust_lr: str = key(
        "factor on the rate, by a matrix's shape (torch.optim.Muon's names)",
        default="match_rms_adamw", choices=("original", "match_rms_adamw"),
    )

    def build(self, *, name: str, parameters, state_dtype, rounding, places):
        from nmoe.optim.muon import Muon as Run

        return Run(
            name=name, parameters=parameters, lr=self.lr, lr_floor=self.lr_floor, weight_decay=self.weight_decay,
            momentum=self.momentum, nesterov=self.nesterov, ns_steps=self.ns_steps,
            ns_coefficients=self.ns_coefficients, ns_dtype=self.ns_dtype, eps=self.eps,
            adjust_lr=self.adjust_lr, state_dtype=state_dtype, rounding=rounding, places=places,
        )


@attrs.frozen(kw_only=True)
class Optimizer(Component):
    grad_dtype: str = key("dtype in which gradients are added: fp32", choices=("fp32",))
    state_dtype: str = key("dtype of masters and moments; bf16 rounds stochastically", choices=("fp32", "bf16"))
    clip_norm: float = key("largest norm of the whole gradient; a larger one is scaled to it", default=1.0, above=0.0)
    dense: AdamW = section("embedding, head, norms, and the matrices that [optimizer.matrices] does not take")
    matrices: Muon | None = section("every matrix but embedding, head, router and experts", optional=True)
    router: AdamW | None = section("the routers' weights", optional=True)
    experts: Group | None = section("the routed experts' weights", optional=True)

    GROUP_OF_ROLE: ClassVar[dict[str, str]] = {
        "embedding": "dense", "head": "dense", "tied": "dense", "norm": "dense",
        "matrix": "matrices", "router": "router", "expert": "experts",
    }

    def group_of(self, parameter: Parameter) -> str:
        """The name of the group that takes a parameter."""
        name = self.GROUP_OF_ROLE[parameter.role]
        return "dense" if name == "matrices" and self.matrices is None else name

    def groups(self) -> dict[str, Group]:
        """The groups that the plan has, by name."""
        named = {"dense": self.dense, "matrices": self.matrices, "router": self.router, "experts": self.experts}
        return {name: group for name, group in named.items() if group is not None}

    def check(self, config, path: str) -> Iterator[Problem]:
        for name in ("router", "experts"):
            group = getattr(self, name)
            if config.model.moe is None and group is not None:
                yield Problem(
                    path=f"{path}.{name}",
                    message=f"[{path}.{name}] has nothing to train: the model has no MoE layer",
                    help="remove the section, or add [model.moe]",
                )
            if config.model.moe is not None and group is None:
                yield Problem(
                    path=path,
                    message=f"no [{path}.{name}] says how the {name} learn" + ("s" if name == "router" else ""),
                    help=f"add [{path}.{name}] with kind and lr",
                )
