"""The memory that the GPUs of a node share: on each one an allocation that all ranks map (CUDA symmetric memory).

torch.distributed._symmetric_memory allocates it, and exchanges its handles over the group's store. A region has the
same offset on every rank, so that its address on a peer is known: kernels are given a table of the N addresses and
load and store there as at home, over NVLink. Multicast is not used. Freshly made regions are zero on every rank.
"""

from typing import Any

import torch
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from nmoe.errors import fail
from nmoe.rdep.memory import Regions, offsets


class CudaMemory:
    """Every rank's regions. Made by all ranks of the group together.

    regions: dtype and shape by name, the same on all. group: None for one rank, whose memory is its own.
    RunError N0806 if the device has no room, or the ranks' memory cannot be mapped.

    ranks: each rank's regions as tensors of this process. table: by name, int64 (N), the ranks' addresses.
    """

    def __init__(self, regions: Regions, *, group: torch.distributed.ProcessGroup | None, device: torch.device) -> None:
        starts, size = offsets(regions)
        self.handle: Any = None
        try:
            if group is None:
                self.buffer = torch.zeros(size, dtype=torch.uint8, device=device)
            else:
                self._share(size, group, device)
        except RuntimeError as error:
            raise fail(
                "N0806",
                f"no {size} bytes of memory shared between the node's GPUs: {str(error).splitlines()[0]}",
                place="the buffers of the ranks of a node",
                help="lower [batch] microbatch, and see that all ranks of a node are on GPUs that reach each other",
            ) from error

        def at(rank: int, name: str) -> Tensor:
            dtype, shape = regions[name]
            if not torch.Size(shape).numel():
                return torch.empty(shape, dtype=dtype, device=device)
            first, items = starts[name] // dtype.itemsize, torch.Size(shape).numel()
            if self.handle is None:
                return self.buffer[first * dtype.itemsize :][: items * dtype.itemsize].view(dtype).view(shape)
            found: Tensor = self.handle.get_buffer(rank, shape, dtype, first)
            return found

        bases = [self.buffer.data_ptr()] if self.handle is None else self.handle.buffer_ptrs
        self.ranks: list[dict[str, Tensor]] = [{name: at(rank, name) for name in regions} for rank in range(len(bases))]
        self.table: dict[str, Tensor] = {
            name: torch.tensor([base + at for base in bases], dtype=torch.int64, device=device)
            for name, at in starts.items()
        }

    def _share(self, size: int, group: torch.distributed.ProcessGroup, device: torch.device) -> None:
        if symm_mem.get_backend(device) != "CUDA":
            symm_mem.set_backend("CUDA")
        self.buffer = symm_mem.empty(size, dtype=torch.uint8, device=device)
        self.buffer.zero_()
        torch.cuda.synchronize(device)  # zero everywhere before a peer can store
        self.handle = symm_mem.rendezvous(self.buffer, group)
