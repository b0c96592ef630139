"""The GPU of one rank and those of its counterparts on other nodes: tensors as they lie, over NCCL.

Sends and receives of one exchange are one NCCL group, so that none waits for another to be launched. NCCL adds
nothing here, and so decides no order and no bit. It is only used between ranks that have met just before
(`nmoe.rdep.nodes`), by a host that watches until all is there; its own watchdog, which ends a process without a word,
must have been told to leave that to us (`nmoe.platform.watch_nccl`).
"""

import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ErrorType

NEVER = timedelta(days=365)  # NCCL's own time-out: the nodes have theirs
END_S = 5.0  # for NCCL to end; a communicator that hangs then dies with the process


class Column:
    """One rank's way to its counterparts' GPUs. Made by all of them together; RuntimeError if they do not come.

    store: of the column, whose time-out bounds the meeting. number of count: this rank's place in it.
    """

    def __init__(self, store: torch.distributed.Store, *, number: int, count: int, device: torch.device) -> None:
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = NEVER
        options.global_ranks_in_group = list(range(count))
        self.device = device
        with torch.cuda.device(device):
            self._group = torch.distributed.ProcessGroupNCCL(store, number, count, options)
            self._group.eager_connect_single_device(device)

    def move(
        self, sends: Mapping[int, Sequence[Tensor]], receives: Mapping[int, Sequence[Tensor]], stream: torch.cuda.Stream
    ) -> torch.cuda.Event:
        """Launch an exchange in the stream; what happens once it is done, if it has not failed.

        Blocks until the counterparts launch theirs where two meet for the first time.
        """
        group: Any = self._group
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            group._start_coalescing()
            for call, tensors in ((group.send, sends), (group.recv, receives)):
                for peer, several in tensors.items():
                    for tensor in several:
                        if tensor.numel():
                            call([tensor], peer, 0)
            if (work := group._end_coalescing()) is not None:
                work.wait()  # the stream does
            return stream.record_event()

    @property
    def has_failed(self) -> bool:
        """Whether NCCL has lost a counterpart; it looks ten times a second."""
        found: bool = self._group.get_error() != ErrorType.SUCCESS
        return found

    def close(self, *, has_failed: bool) -> None:
        """End the communicator; after a failure whatever still runs on it ends too, unfinished."""
        end = self._group.abort if has_failed else self._group.shutdown
        thread = threading.Thread(target=end, name="nccl end", daemon=True)
        thread.start()
        thread.join(END_S)
