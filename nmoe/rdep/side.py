"""The stream of what runs beside the main one: shared experts beside rows on their way, rows beside a weight gradient.

Fork and join are events of the streams, so a recording (`nmoe.model.cuda_graph`) takes both streams' work as it is.
What one stream allocates the other may read until the join, if whoever launches holds a reference until then.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all layers: what it is given runs in that order."""
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """Within it, launches go to the side stream, after what the current one has been given before.

    What the current stream is given after it runs beside that, until the join, which is what it gives: a call, from
    which on the current stream waits for what the side stream has been given.
    """
    main, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)
