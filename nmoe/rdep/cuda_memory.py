"""The memory that the GPUs of a node share: on each one an allocation that all ranks map (CUDA symmetric memory).

torch.distributed._symmetric_memory allocates it, and exchanges its handles over the group's store. A region has the
same offset on every rank, so that its address on a peer is known: kernels are given a table of the N addresses and
load and store there as at home, over NVLink. Multicast is not used. Freshly made regions are zero on every rank.
"""

from collections.abc import Mapping

import torch
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from nmoe.errors import fail

ALIGNMENT = 128  # bytes: two regions never share a cache line, and 16-byte accesses are aligned
Regions = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def offsets(regions: Regions) -> tuple[dict[str, int], int]:
    """Where each region begins, in bytes, and how many there are in all."""
    found, end = {}, 0
    for name, (dtype, shape) in regions.items():
        found[name] = end
        end += -(-dtype.itemsize * torch.Size(shape).numel() // ALIGNMENT) * ALIGNMENT
    return found, max(end, ALIGNMENT)


class CudaMemory:
    """This rank's regions, and where its peers have theirs.

    regions: dtype and shape by name, the same on all ranks of the group. Made by all of them together.
    RunError N0806 if the device has no room, or the ranks' memory cannot be mapped.
    """

    def __init__(self, regions: Regions, *, group: torch.distributed.ProcessGroup, device: torch.device) -> None:
        self.regions = regions
        self.offset, size = offsets(regions)
        if symm_mem.get_backend(device) != "CUDA":
            symm_mem.set_backend("CUDA")
        try:
            self.buffer = symm_mem.empty(size, dtype=torch.uint8, device=device)
            self.buffer.zero_()
            torch.cuda.synchronize(device)  # zero everywhere before a peer can store
            self.handle = symm_mem.rendezvous(self.buffer, group)
        except RuntimeError as error:
            raise fail(
                "N0806",
                f"no {size} bytes of memory shared between the node's GPUs: {str(error).splitlines()[0]}",
                place="the expert transport's buffers",
                help="lower [batch] microbatch, and see that all ranks of a node are on GPUs that reach each other",
            ) from error
        self.rank, self.ranks = self.handle.rank, self.handle.world_size
        self.mine: dict[str, Tensor] = {name: self.at(self.rank, name) for name in regions}
        self.table: dict[str, Tensor] = {
            name: torch.tensor([base + at for base in self.handle.buffer_ptrs], dtype=torch.int64, device=device)
            for name, at in self.offset.items()
        }

    def at(self, rank: int, name: str) -> Tensor:
        """A rank's region, as a tensor of this process."""
        dtype, shape = self.regions[name]
        found: Tensor = self.handle.get_buffer(rank, shape, dtype, self.offset[name] // dtype.itemsize)
        return found
