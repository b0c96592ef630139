"""The ranks of a node as their training sees them: processes, and what their arithmetic runs on."""

from typing import TYPE_CHECKING

import attrs

from nmoe.rdep.node import Node

if TYPE_CHECKING:
    from nmoe.rdep.cuda_node import CudaNode


@attrs.frozen(eq=False)
class Peers:
    """host: the processes, which tell each other small values and when they end. device: where rows and gradients
    travel: the processes again on the CPU, or their GPUs.
    """

    host: Node
    device: "Node | CudaNode"

    @property
    def rank(self) -> int:
        return self.host.rank

    @property
    def ranks(self) -> int:
        return self.host.ranks

    def check(self) -> None:
        """RunError N0802 if a peer has failed or died, N0803 if its GPU did not come in time; waits for nobody."""
        self.host.signals.check()
        if not isinstance(self.device, Node):
            self.device.late.check()
