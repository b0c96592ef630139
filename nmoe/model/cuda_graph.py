"""Recordings of work on a CUDA device, as CUDA graphs: one launch in the place of thousands.

Recording runs the work's Python while the device does nothing: what it would have been given becomes the graph's
nodes, with their addresses. So nothing in it may wait for the device, ask it for a value, or compile or load a kernel;
`first` does the work once as it is before. All of it runs in one stream of its own, so that the libraries' workspaces
of that stream are there, outside the graphs, when the first is recorded.

Memory. What the work allocates comes from a pool that all recordings share and nobody else: temporaries of one lie
where those of another did, which is right because replays follow each other in one stream. The pool keeps its memory,
so whatever runs beside the graphs needs its own.

Other threads may use the device meanwhile (a checkpoint that is being written): only this thread's calls, and those of
autograd's on its behalf, are held to what a recording may do.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from nmoe.errors import fail


class CudaGraphs:
    """seconds, count: what recording has taken so far, and of how many. bytes: the pool's memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.seconds, self.bytes, self.count = 0.0, 0, 0

    def first(self, work: Callable[[], Tensor]) -> Tensor:
        """Does the work in the stream in which its like will be recorded."""
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            result = work()
        main.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Where the graph will put its result, and its launch into the current stream.

        RunError N0524 if the work cannot be recorded.
        """
        started = time.perf_counter()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the pool takes what the first step has used
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:  # among them torch's of a device that is full
            raise fail(
                "N0524",
                f"a microbatch could not be recorded as a CUDA graph: {str(error).splitlines()[0]}",
                place="the second step of this attempt",
                help="set cuda_graph = false in [output]; if it was memory, lower [batch] microbatch or see "
                "[output] recompute",
            ) from error
        self.bytes += torch.cuda.memory_reserved(self.device) - before
        self.seconds += time.perf_counter() - started
        self.count += 1
        return result, graph.replay

    def cost(self) -> str:
        """For the log."""
        return (
            f"microbatches recorded: {self.count} CUDA graph{'s' * (self.count > 1)} in {self.seconds:.1f} s, "
            f"{self.bytes / 2**30:.2f} GiB with the gradients"
        )
