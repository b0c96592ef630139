"""[schedule]: the factor s on every group's rate, by tokens seen."""

from collections.abc import Iterator

import attrs

from nmoe.registry.component import Component, Problem, key


@attrs.frozen(kw_only=True)
class Wsd(Component):
    """Warm-up, stable, decay (Hu et al., arXiv 2404.06395): rate = lr_floor + (lr - lr_floor) * s."""

    warmup_tokens: int = key("tokens over which s rises from 0 to 1, linearly", minimum=0, unit="tokens")
    stable_tokens: int = key("tokens at s = 1", minimum=0, unit="tokens")
    decay_tokens: int = key("tokens over which s falls to 0", minimum=0, unit="tokens")
    decay_shape: str = key(
        "with u from 0 to 1: linear 1 - u, cosine (1 + cos(pi u)) / 2, sqrt 1 - sqrt(u)",
        default="linear", choices=("linear", "cosine", "sqrt"),
    )

    @property
    def total_tokens(self) -> int:
        return self.warmup_tokens + self.stable_tokens + self.decay_tokens

    def check(self, config, path: str) -> Iterator[Problem]:
        if self.total_tokens == 0:
            yield Problem(path=path, message="the schedule has no tokens", help="set stable_tokens")
        if self.total_tokens > 2**53 - 1:
            yield Problem(path=path, message="the schedule's total is beyond 2^53 - 1 tokens", help="lower it")

    def build(self):
        from nmoe.optim.wsd import Wsd as Run

        return Run(
            warmup_tokens=self.warmup_tokens, stable_tokens=self.stable_tokens,
            decay_tokens=self.decay_tokens, decay_shape=self.decay_shape,
        )
