"""[model.attention.rope_scaling]: rotary positions beyond the context that their frequencies were trained on.

It belongs to the attention that names it. Local layers without sizes of their own have the global
ones' (GPT-OSS turns all its layers alike); local layers with sizes of their own have a theta of
their own, and a scaling only if [model.attention.local.rope_scaling] says so.
"""

import math
from collections.abc import Iterator

import attrs

from nmoe.registry.component import Component, Problem, key


@attrs.frozen(kw_only=True)
class Yarn(Component):
    """YaRN (Peng et al., arXiv 2309.00071): fast pairs turn as before, slow ones `factor` times slower.

    What makes up for the longer context is said in one of two ways. The paper's: cosines and sines
    are multiplied by `attention_factor`. DeepSeek's, with m(c) = 0.1 c ln(factor) + 1: cosines and sines
    are multiplied by m(mscale) / m(mscale_all_dim), and all scores by m(mscale_all_dim)^2.
    """

    factor: float = key("how many times longer the context becomes", above=1.0, maximum=1e6)
    original_context: int = key(
        "tokens of the context that the frequencies were trained on", minimum=1, maximum=2**40, unit="tokens"
    )
    beta_fast: float = key(
        "a pair that turns so many times within the original context, or more, stays as it is",
        default=32.0, minimum=1e-6, maximum=1e6,
    )
    beta_slow: float = key(
        "a pair that turns so many times, or fewer, becomes `factor` times slower; at most beta_fast",
        default=1.0, minimum=1e-6, maximum=1e6,
    )
    truncate: bool = key(
        "the ramp between the two begins and ends at whole pairs (GPT-OSS: false)", default=True
    )
    attention_factor: float | None = key(
        "factor on cosines and sines; absent: 0.1 ln(factor) + 1, or what mscale and mscale_all_dim make of it",
        default=None, above=0.0, maximum=100.0,
    )
    mscale: float | None = key(
        "DeepSeek's c for the rotary part of the scores (mla only, with mscale_all_dim)",
        default=None, above=0.0, maximum=100.0,
    )
    mscale_all_dim: float | None = key(
        "DeepSeek's c for the whole scores (mla only, with mscale)", default=None, above=0.0, maximum=100.0
    )

    def check(self, config, path: str) -> Iterator[Problem]:
        if self.beta_slow > self.beta_fast:
            yield Problem(
                path=f"{path}.beta_slow",
                message=f"beta_slow = {self.beta_slow:g} is above beta_fast = {self.beta_fast:g}",
                help="beta_fast counts the turns of the faster pairs: exchange the two",
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            have, lack = ("mscale", "mscale_all_dim") if self.mscale_all_dim is None else ("mscale_all_dim", "mscale")
            yield Problem(
                path=f"{path}.{have}",
                message=f"`{have}` without `{lack}`",
                help=f"add {lack}; published models have both alike",
            )
        if self.attention_factor is not None and (self.mscale, self.mscale_all_dim) != (None, None):
            yield Problem(
                path=f"{path}.attention_factor",
                message="`attention_factor` and `mscale` both say what cosines and sines are multiplied by",
                help="keep attention_factor, or mscale and mscale_all_dim",
            )
        length, longest = config.batch.sequence_length, math.floor(self.factor * self.original_context)
        if length > longest:
            yield Problem(
                path=f"{path}.original_context",
                message=f"a sequence of {length} tokens is longer than factor * original_context = {longest}",
                help=f"a factor that works: {math.ceil(length / self.original_context)}",
            )

    def owner_problems(self, path: str, *, rotary_dim: int, theta: float, mla: bool) -> Iterator[Problem]:
        """What contradicts the attention that this scaling, found at `path`, belongs to."""
        low, high = self.ramp(rotary_dim, theta)
        if low >= high and self.beta_slow <= self.beta_fast:
            yield Problem(
                path=f"{path}.original_context",
                message=f"none of {rotary_dim // 2} rotary pairs turns between {self.beta_slow:g} and "
                f"{self.beta_fast:g} times within {self.original_context} tokens",
                help="raise original_context, or move beta_slow and beta_fast apart",
            )
        if not mla and self.mscale is not None:
            yield Problem(
                path=f"{path}.mscale",
                message="`mscale` is DeepSeek's, for attention of kind `mla`; this one is `gqa`",
                help="write attention_factor, or nothing for 0.1 ln(factor) + 1",
            )

    def ramp(self, rotary_dim: int, theta: float) -> tuple[float, float]:
        """Between which pairs the change from old to slower frequencies lies, as transformers and DeepSeek have it.

        Pair j makes L theta^(-2j/d) / 2 pi turns within L = original_context tokens, so b turns are made by
        j(b) = d ln(L / (2 pi b)) / (2 ln theta); the ramp goes from j(beta_fast) to j(beta_slow).
        """
        low, high = (
            rotary_dim * math.log(self.original_context / (2 * math.pi * beta)) / (2 * math.log(theta))
            for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0.0), min(high, rotary_dim - 1.0)

    def _m(self, c: float) -> float:
        return 0.1 * c * math.log(self.factor) + 1.0

    @property
    def rotary_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return self._m(1.0)
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """What all scores are multiplied by, beside that."""
        return 1.0 if self.mscale_all_dim is None else self._m(self.mscale_all_dim) ** 2

    def build(self, *, rotary_dim: int, theta: float):
        """The scaling of one attention's frequencies: nmoe.model.rope.Yarn."""
        from nmoe.model import rope

        low, high = self.ramp(rotary_dim, theta)
        return rope.Yarn(factor=self.factor, low=low, high=high, rotary_factor=self.rotary_factor)
