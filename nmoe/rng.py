"""Named streams of randomness.

No draw of nmoe comes from a global generator. A stream is named by (seed, purpose, index...):
its 64-bit key is the head of SHA-256 over the canonical text of that name, so that a stream
depends on nothing but its name: not on ranks, on the order of calls, or on other streams.
"""

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key(seed: int, purpose: str, *index: int | str) -> int:
    """The 63-bit key of stream (seed, purpose, index...).

    JSON of a list is an injective text of the name: ("a", 1) and ("a1",) cannot collide.
    63 bits because torch.Generator.manual_seed takes a signed 64-bit integer.
    """
    name = json.dumps([seed, purpose, *index], separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(name.encode("ascii")).digest()[:8], "big") >> 1


def stream(seed: int, purpose: str, *index: int | str) -> "torch.Generator":
    """A fresh CPU generator at the start of the named stream."""
    import torch

    return torch.Generator(device="cpu").manual_seed(key(seed, purpose, *index))
