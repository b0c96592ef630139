"""The ranks of a launch as their training sees them: processes, what their arithmetic runs on, and other nodes."""

from typing import TYPE_CHECKING

import attrs

from nmoe.rdep.node import Node
from nmoe.rdep.nodes import Nodes

if TYPE_CHECKING:
    from nmoe.rdep.cuda_node import CudaNode


@attrs.frozen(eq=False)
class Peers:
    """nodes: all nodes, by way of this one's processes. device: where rows and gradients travel in this node: its
    processes on the CPU, or their GPUs. host: the processes, which tell each other small values and when they end.
    """

    nodes: Nodes
    device: "Node | CudaNode"

    @property
    def host(self) -> Node:
        return self.nodes.node

    def check(self) -> None:
        """RunError N0802 if a peer has failed or died, N0803 if its GPU did not come in time; waits for nobody."""
        self.host.signals.check()
        if not isinstance(self.device, Node):
            self.device.late.check()
