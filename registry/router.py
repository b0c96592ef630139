"""[model.moe.router]: scores, selection and weights."""

from collections.abc import Iterator
from typing import ClassVar

import attrs

from nmoe.registry.component import Component, Parameter, Problem, divisible, key
from nmoe.registry.hopper import ROUTER_CHOSEN, ROUTER_EXPERTS


@attrs.frozen(kw_only=True)
class Router(Component):
    """What every kind has."""

    runs_on: ClassVar[tuple[str, ...]] = ("cpu", "sm_90a")

    num_experts: int = key("routed experts of a layer", minimum=1, maximum=65536)
    top_k: int = key("experts that a token uses", minimum=1, maximum=65536)

    def check(self, config, path: str) -> Iterator[Problem]:
        if self.top_k > self.num_experts:
            yield Problem(
                path=f"{path}.top_k",
                message=f"top_k = {self.top_k} is more than num_experts = {self.num_experts}",
                help=f"set top_k to at most {self.num_experts}",
            )

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[Parameter]:
        yield Parameter(name=f"{prefix}.weight_ED", shape=(self.num_experts, hidden_size), role="router")

    def saved_bytes(self, target: str) -> int:
        """Bytes of one token kept for backward beside the pairs' weights, in float32 and indices."""
        raise NotImplementedError

    def build(self, hidden_size: int):
        """One layer's router on torch's current default device."""
        raise NotImplementedError

    def build_balance(self, *, sequence_length: int, tokens_per_step: int):
        """One router's balance losses in a training (nmoe.model.balance.Balance); None where the plan asks for none."""
        raise NotImplementedError

    def even_problems(self, path: str, name: str) -> Iterator[Problem]:
        """The finding that the loss `name` has nothing to do, if it has not."""
        if self.top_k == self.num_experts:
            yield Problem(
                path=f"{path}.{name}",
                message=f"`{name}` has nothing to balance: every token uses all {self.num_experts} experts",
                help=f"remove `{name}`, or lower top_k",
            )


def pair_problems(path: str, sequences: int, name: str, config) -> Iterator[Problem]:
    """Rows of one pass are counted in 32-bit integers: tokens, or (token, expert) pairs of a MoE model."""
    pairs = 1 if config.model.moe is None else config.model.moe.router.top_k
    rows = sequences * config.batch.sequence_length * pairs
    if rows >= 2**31:
        most = (2**31 - 1) // (config.batch.sequence_length * pairs)
        yield Problem(
            path=path,
            message=f"`{name}` = {sequences} makes {rows} rows of one pass, more than 2^31 - 1",
            help=f"set {name} to at most {most}" if most else "shorten the sequences",
        )


@attrs.frozen(kw_only=True)
class SoftmaxRouter(Router):
    """Softmax scores over all experts (Qwen3, arXiv 2505.09388; Mixtral, arXiv 2401.04088), no selection bias.

    s_E = softmax(W x); the top_k of s are chosen; their weights are s_k, divided by their sum if renormalize
    (Mixtral's softmax over the chosen is the same).
    """

    renormalize: bool = key("the chosen weights add up to 1", default=True)
    balance_loss: float | None = key(
        "coefficient of each layer's balance loss over a microbatch, E sum f P (Switch); absent: none",
        default=None, above=0.0, maximum=1e3,
    )
    z_loss: float | None = key(
        "coefficient of each layer's mean squared log-partition of the router's logits (ST-MoE); absent: none",
        default=None, above=0.0, maximum=1e3,
    )

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from super().check(config, path)
        if self.renormalize and self.top_k == 1:
            yield Problem(
                path=f"{path}.top_k",
                message="the one chosen weight is always 1 when renormalised, so the router never learns",
                help="set renormalize = false, or top_k to at least 2",
            )
        if self.balance_loss is not None:
            yield from self.even_problems(path, "balance_loss")

    def build_balance(self, *, sequence_length: int, tokens_per_step: int):
        from nmoe.model.balance import Balance, SwitchBalance, ZLoss

        asked = ((self.balance_loss, SwitchBalance()), (self.z_loss, ZLoss()))
        losses = [(coefficient, loss) for coefficient, loss in asked if coefficient is not None]
        return Balance(losses, tokens_per_step=tokens_per_step) if losses else None

    def saved_bytes(self, target: str) -> int:
        """All scores, the chosen indices, where they are renormalised the chosen scores and their sum; a balance
        loss's gradient of all logits.
        """
        renormalized = 4 * self.top_k + 4 if self.renormalize else 0
        balanced = 4 * self.num_experts if self.balance_loss is not None or self.z_loss is not None else 0
        return 4 * self.num_experts + 8 * self.top_k + renormalized + balanced

    def build(self, hidden_size: int):
        from nmoe.model.router import SoftmaxRouter as Run

        return Run(
            hidden_size=hidden_size, num_experts=self.num_experts, top_k=self.top_k, renormalize=self.renormalize
        )


@attrs.frozen(kw_only=True)
class SigmoidRouter(Router):
    """Sigmoid scores, a bias for selection only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    s_E = sigmoid(W x); the top_k of s + bias are chosen; their weights are
    route_scale * s_k / sum over the chosen of s. After a step each expert's bias rises by
    bias_update_rate if it got fewer tokens than the mean, and falls if it got more, over the whole
    step's batch.
    """

    num_groups: int = key("groups of neighbouring experts", default=1, minimum=1, maximum=65536)
    top_groups: int = key(
        "groups of which a token can choose experts, those whose two best s + b add up to most", default=1, minimum=1,
        maximum=65536,
    )
    route_scale: float = key(
        "factor on the weights after they are renormalised over the chosen", default=1.0, above=0.0, maximum=1e6
    )
    bias_update_rate: float = key(
        "step of the selection bias; 0 keeps it at zero", default=0.001, minimum=0.0, maximum=1.0
    )
    bias_limit: float | None = key(
        "largest absolute selection bias; absent: none", default=None, above=0.0, maximum=1e6
    )
    bias_until_tokens: int | None = key(
        "tokens after which the selection bias stays as it is; absent: never", default=None, minimum=1, unit="tokens"
    )
    sequence_balance_loss: float | None = key(
        "coefficient of each layer's balance loss within a sequence, sum f P (DeepSeek-V3); absent: none",
        default=None, above=0.0, maximum=1e3,
    )

    def check(self, config, path: str) -> Iterator[Problem]:
        yield from super().check(config, path)
        yield from divisible(f"{path}.num_experts", self.num_experts, "num_experts", self.num_groups, "num_groups")
        size = self.num_experts // self.num_groups
        if self.top_groups > self.num_groups:
            yield Problem(
                path=f"{path}.top_groups",
                message=f"top_groups = {self.top_groups} is more than num_groups = {self.num_groups}",
                help=f"set top_groups to at most {self.num_groups}",
            )
        elif self.num_groups > 1 and size < 2:
            yield Problem(
                path=f"{path}.num_groups",
                message="a group of one expert has no two best scores to be chosen by",
                help=f"set num_groups to at most {self.num_experts // 2}",
            )
        elif self.top_groups * size < self.top_k <= self.num_experts:
            yield Problem(
                path=f"{path}.top_groups",
                message=f"{self.top_groups} groups of {size} experts hold fewer than top_k = {self.top_k}",
                help="raise top_groups or lower top_k",
            )
        yield from self._bias_problems(config, path)
        if self.sequence_balance_loss is not None:
            yield from self.even_problems(path, "sequence_balance_loss")

    def _bias_problems(self, config, path: str) -> Iterator[Problem]:
        for name in ("bias_limit", "bias_until_tokens"):
            if self.bias_update_rate == 0 and getattr(self, name) is not None:
                yield Problem(
                    path=f"{path}.{name}",
                    message=f"`{name}` says how the selection bias moves, and bias_update_rate = 0 keeps it at zero",
                    help=f"remove `{name}`, or set bias_update_rate",
                )
        if self.bias_limit is not None and self.bias_limit < self.bias_update_rate:
            yield Problem(
                path=f"{path}.bias_limit",
                message=f"bias_limit = {self.bias_limit} is less than one step, bias_update_rate = "
                f"{self.bias_update_rate}",
                help=f"set bias_limit to at least {self.bias_update_rate}",
            )
        if self.bias_until_tokens is not None and self.bias_until_tokens >= config.schedule.total_tokens:
            yield Problem(
                path=f"{path}.bias_until_tokens",
                message=f"bias_until_tokens = {self.bias_until_tokens} is not before the schedule's end at "
                f"{config.schedule.total_tokens} tokens",
                help="remove it: the selection bias then moves to the end",
            )

    def build_balance(self, *, sequence_length: int, tokens_per_step: int):
        from nmoe.model.balance import Balance, SequenceBalance

        if self.sequence_balance_loss is None:
            return None
        loss = SequenceBalance(sequence_length=sequence_length)
        return Balance([(self.sequence_balance_loss, loss)], tokens_per_step=tokens_per_step)

    def saved_bytes(self, target: str) -> int:
        """All scores, the chosen scores and indices, 1 / sum and the factor on the chosen ones; a balance loss's
        gradient of all logits. Kernel: the chosen scores and int32 indices.
        """
        at_its_sizes = self.num_experts <= ROUTER_EXPERTS and self.top_k <= ROUTER_CHOSEN
        whole = self.top_groups == self.num_groups and self.sequence_balance_loss is None
        if target != "cpu" and at_its_sizes and whole:
            return 8 * self.top_k
        balanced = 4 * self.num_experts if self.sequence_balance_loss is not None else 0
        return 4 * self.num_experts + 12 * self.top_k + 8 + balanced

    def build(self, hidden_size: int):
        from nmoe.model.router import SigmoidRouter as Run

        return Run(
            hidden_size=hidden_size, num_experts=self.num_experts, top_k=self.top_k,
            num_groups=self.num_groups, top_groups=self.top_groups, route_scale=self.route_scale,
            bias_update_rate=self.bias_update_rate, bias_limit=self.bias_limit,
            bias_until_tokens=self.bias_until_tokens,
        )
