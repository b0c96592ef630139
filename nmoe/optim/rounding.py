"""Stochastic rounding of float32 to bfloat16.

A bfloat16 keeps the upper half of a float32. Rounding to nearest loses every update smaller than
half a unit in the last place (2^-9 of the value); rounding up with a probability equal to the part
that is cut off loses none in the mean: E[round(x)] = x. In bits: add a uniform integer of
[0, 2^16) to the float32 read as an integer, and cut. The patterns of a sign are ordered as their
magnitudes are, so a carry into the exponent is the next bfloat16, as it should be. A value that is
a bfloat16 already stays what it is, infinities too.

The integers of one write are a stream named by (seed, "rounding", counter, tensor, block), the
block being 2^16 neighbouring elements of the flattened logical tensor. `counter` numbers the
optimizer's updates and is the only state, so the bits do not depend on who rounds which block. They are
drawn on the CPU on every target and copied: 1.7 s of one core for a billion (2026-11-24).
"""

import torch

from nmoe import rng

BLOCK = 1 << 16
"""Elements that one stream serves."""


class Rounding:
    """The source of rounding bits, and its one integer of state.

    counter: updates that have drawn so far. Save it, and set it before the first step of a resume.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.counter = 0

    def advance(self) -> int:
        """The number of the update that begins now. Each group calls it once a step, in the groups' order."""
        self.counter += 1
        return self.counter

    def noise(self, update: int, tensor: str, block: int, count: int) -> torch.Tensor:
        """`count` integers, uniform in [0, 2^16), int32 on the CPU: the head of the named stream."""
        generator = rng.stream(self.seed, "rounding", update, tensor, block)
        words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        return words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)

    def write(self, out: torch.Tensor, value: torch.Tensor, *, update: int, tensor: str, start: int = 0) -> None:
        """Rounds float32 `value` into bfloat16 `out`: flat, contiguous, of one length.

        tensor: the name of the logical tensor; start: where `out` begins in it. An element's bits depend on
        its place in the logical tensor, not on where the parts are cut.
        Sound for finite values; one above the largest bfloat16 (3.39e38) may become infinite.
        """
        done = 0
        while done < value.numel():
            block, skipped = divmod(start + done, BLOCK)
            part = value[done : done + BLOCK - skipped]
            noise = self.noise(update, tensor, block, skipped + part.numel())[skipped:]
            bits = part.view(torch.int32) + noise.to(part.device)
            out[done : done + part.numel()].view(torch.int16).copy_(bits >> 16)
            done += part.numel()
