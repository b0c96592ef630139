"""[batch]: the step, and the microbatch that is the unit of its arithmetic."""

from collections.abc import Iterator

import attrs

from nmoe.registry.component import Component, divisible, key
from nmoe.registry.router import pair_problems


@attrs.frozen(kw_only=True)
class Batch(Component):
    sequence_length: int = key("tokens of a sequence", minimum=1, maximum=2**24, unit="tokens")
    sequences: int = key("sequences of a step, over all ranks", minimum=1, maximum=2**24)
    microbatch: int = key("sequences of a microbatch, the unit of arithmetic", minimum=1, maximum=2**24)
    document_mask: bool = key("attention stays within a document, in training and in evaluation", default=False)

    @property
    def tokens_per_step(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def microbatches(self) -> int:
        return self.sequences // self.microbatch

    def check(self, config, path: str) -> Iterator:
        yield from divisible(f"{path}.sequences", self.sequences, "sequences", self.microbatch, "microbatch")
        yield from pair_problems(f"{path}.microbatch", self.microbatch, "microbatch", config)
