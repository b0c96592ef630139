"""[transport]: how a token's row reaches its experts and comes back."""

import attrs

from nmoe.registry.component import Component


@attrs.frozen(kw_only=True)
class Rdep(Component):
    """Direct dispatch and return: every pair has one place, computed from the counts by every rank."""

    def build(self, node=None, sizes=None, arena_of=None):
        """The transport of one rank, whose index points into x itself, or between the ranks of a node.

        sizes: of its buffers; None for a model without experts, whose tokens stay where they are. arena_of: between
        GPUs, the numbers of the experts' arena by the names that `nmoe.rdep.arena.Arena` has for them.
        """
        if node is None or sizes is None:
            from nmoe.rdep.local import LocalTransport

            return LocalTransport()
        from nmoe.rdep.node import Node

        if isinstance(node, Node):
            from nmoe.rdep.shm import ShmTransport

            return ShmTransport(node=node, sizes=sizes)
        from nmoe.rdep.arena import Arena
        from nmoe.rdep.cuda import CudaTransport

        arena = Arena(**arena_of, sizes=sizes, rank=node.rank, device=node.device)
        return CudaTransport(node=node, sizes=sizes, arena=arena)
