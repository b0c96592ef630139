"""The memory that the ranks of a node share: one anonymous file for each rank, which all of them map.

The file has no name (memfd_create(2)): its descriptor travels over the ranks' sockets, so that a crash at
any moment leaves nothing behind, and the size of a mounted /dev/shm is no limit. All its pages are
reserved when it is made, and it is sealed against another size, so that no later access can fail.

The regions of the expert transport, for N ranks with at most T tokens in a microbatch, E experts, K of them for
a token, rows of D values (those of the data-parallel sums are in `nmoe.rdep.reduction`):

    counts_2C     C = E + N: this rank's pairs for each expert and tokens for each owner, read by all; two of
                  them, used by turns, so that one layout may follow another with no phase between them
    rows_UD       N*T rows received, by (microbatch, token). Written by all, each source its own part
    token_R       N*T*K int32: which of them an expert row reads       \
    pair_R        int32: the pair t*K + k in its source's microbatch    > written by the row's source
    weight_R      float32: the router's weight                         /
    returned_PD   T*K rows, one for each of this rank's pairs. Written by the pairs' owners
    d_weight_P    T*K float32, the gradient of each pair's weight. Written by the pairs' owners
"""

import fcntl
import mmap
import os
from collections.abc import Mapping
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

from nmoe.errors import fail

ALIGNMENT = 128  # bytes: two cache lines, so that two regions never share one

Region: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape."""

Regions: TypeAlias = Mapping[str, Region]
"""Those of a rank's memory, by name."""


@attrs.frozen(kw_only=True, str=False)
class Sizes:
    """What a transport's buffers are for, the same on all ranks.

    ranks: N. tokens: T, at most in a microbatch. num_experts: E, of all ranks. top_k: K. hidden_size: D.
    dtype: of rows, float32 or bfloat16.
    """

    ranks: int
    tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks, {self.tokens} tokens each, {self.top_k} of {self.num_experts} experts for a token, "
            f"rows of {self.hidden_size} {str(self.dtype).removeprefix('torch.')}"
        )

    def require(self, indices_TK: Tensor, num_experts: int, layer: int) -> None:
        """RunError N0807 if a routing needs more room than the buffers have. layer: for the message."""
        tokens, top_k = indices_TK.shape
        if tokens > self.tokens or top_k != self.top_k or num_experts != self.num_experts:
            raise fail(
                "N0807",
                f"a microbatch of {tokens} tokens, {top_k} of {num_experts} experts for a token, does not fit",
                place=f"layer {layer}",
                notes=[f"the buffers are for {self}"],
                help="make the transport for the largest microbatch of the plan",
            )

    def regions(self) -> Regions:
        """Of the names in `Memory`."""
        received, pairs = self.ranks * self.tokens, self.tokens * self.top_k
        return {
            "counts_2C": (torch.int64, (2, self.num_experts + self.ranks)),
            "rows_UD": (self.dtype, (received, self.hidden_size)),
            "token_R": (torch.int32, (self.ranks * pairs,)),
            "pair_R": (torch.int32, (self.ranks * pairs,)),
            "weight_R": (torch.float32, (self.ranks * pairs,)),
            "returned_PD": (self.dtype, (pairs, self.hidden_size)),
            "d_weight_P": (torch.float32, (pairs,)),
        }


@attrs.frozen(kw_only=True, eq=False)
class Memory:
    """The transport's regions of one rank, as tensors in the mapped file."""

    counts_2C: Tensor
    rows_UD: Tensor
    token_R: Tensor
    pair_R: Tensor
    weight_R: Tensor
    returned_PD: Tensor
    d_weight_P: Tensor


def offsets(regions: Regions) -> tuple[dict[str, int], int]:
    """Where each region begins, in bytes, and how many there are in all."""
    found, end = {}, 0
    for name, (dtype, shape) in regions.items():
        found[name] = end
        size = dtype.itemsize * torch.Size(shape).numel()
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return found, max(end, ALIGNMENT)


def create(regions: Regions) -> int:
    """The descriptor of a new file for these regions, reserved and sealed. RunError N0806 if there is no room."""
    _, size = offsets(regions)
    file = os.memfd_create("nmoe-rdep", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        os.close(file)
        raise fail(
            "N0806",
            f"no room for {size} bytes of memory shared between the ranks: {error.strerror}",
            place="the buffers of the ranks of a node",
            help="lower [batch] microbatch, or give the machine or its container more memory",
        ) from error
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file


def mapped(file: int, regions: Regions) -> dict[str, Tensor]:
    """The regions of a rank's file. The descriptor may be closed afterwards; the mapping lives as its tensors do."""
    starts, size = offsets(regions)
    if os.fstat(file).st_size != size:
        raise fail("N0806", f"a rank shares {os.fstat(file).st_size} bytes where {size} belong", help="start again")
    pages = mmap.mmap(file, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    tensors = {}
    for name, (dtype, shape) in regions.items():
        count = torch.Size(shape).numel()
        if count:
            tensors[name] = torch.frombuffer(pages, dtype=dtype, count=count, offset=starts[name]).view(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors
