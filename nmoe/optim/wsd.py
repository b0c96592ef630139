"""Warm-up, stable, decay: the factor on every group's learning rate, by tokens.

Hu et al., arXiv 2404.06395. The factor belongs to a step by the tokens that have been seen when
the step is over, so the first step already has a rate and the last one is the first that reaches
the total. A pure function of one integer, in Python's float64: nothing of it is state.
"""

import math

from nmoe.errors import fail


class Wsd:
    """s(tokens): linear from 0 to 1 over `warmup_tokens`, 1 over `stable_tokens`, then down to 0.

    With u from 0 to 1 over `decay_tokens`, `decay_shape` is "linear" 1 - u, "cosine"
    (1 + cos(pi u)) / 2, or "sqrt" 1 - sqrt(u). Beyond the end s stays what it is at the end: 0, or 1
    for a schedule without a decay, whose last step may end past the total.
    """

    def __init__(self, *, warmup_tokens: int, stable_tokens: int, decay_tokens: int, decay_shape: str):
        if min(warmup_tokens, stable_tokens, decay_tokens) < 0 or warmup_tokens + stable_tokens + decay_tokens == 0:
            raise fail(
                "N0520",
                f"a schedule of {warmup_tokens} + {stable_tokens} + {decay_tokens} tokens has no meaning",
                place="[schedule]",
                help="give lengths of 0 or more, not all of them 0",
            )
        if decay_shape not in ("linear", "cosine", "sqrt"):
            raise fail(
                "N0520",
                f"no decay has the shape `{decay_shape}`",
                place="[schedule]",
                help="decay_shape is linear, cosine or sqrt",
            )
        self.warmup_tokens = warmup_tokens
        self.stable_tokens = stable_tokens
        self.decay_tokens = decay_tokens
        self.decay_shape = decay_shape

    @property
    def total_tokens(self) -> int:
        """Tokens after which training is complete."""
        return self.warmup_tokens + self.stable_tokens + self.decay_tokens

    def scale(self, tokens: int) -> float:
        """s for the step at whose end `tokens` tokens have been seen; in [0, 1]."""
        if tokens < 0:
            raise fail("N0520", f"{tokens} tokens cannot have been seen", place="[schedule]", help="count from 0")
        if tokens < self.warmup_tokens:
            return tokens / self.warmup_tokens
        past = tokens - self.warmup_tokens - self.stable_tokens
        if past <= 0 or self.decay_tokens == 0:
            return 1.0
        u = min(1.0, past / self.decay_tokens)
        if self.decay_shape == "linear":
            return 1.0 - u
        if self.decay_shape == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * u))
        return 1.0 - math.sqrt(u)
