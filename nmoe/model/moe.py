"""The MoE layer: y = sum over the chosen k of w_k expert_k(x), plus the shared experts' y; added to the stream h."""

import torch
from torch import Tensor

from nmoe.errors import fail
from nmoe.experts.grouped import Bases, GroupedExperts
from nmoe.model.mlp import DenseMlp
from nmoe.model.recompute import again
from nmoe.model.router import Router
from nmoe.rdep.layout import Layout
from nmoe.rdep.side import beside, side_stream
from nmoe.rdep.transport import AnyTransport, Places


class MoE(torch.nn.Module):
    """router, experts (those of this rank), and shared (None without shared experts); the transport is not a module.

    layer: its index in the model, for messages. RunError N0801 if the router chooses among other experts
    than the ranks hold.
    """

    def __init__(
        self, *, router: Router, experts: GroupedExperts, shared: DenseMlp | None, transport: AnyTransport, layer: int
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.transport, self.layer = transport, layer
        self.num_experts = router.weight_ED.shape[0]
        if self.num_experts != experts.num_experts * transport.ranks:
            raise fail(
                "N0801",
                f"the router chooses among {self.num_experts} experts; "
                f"ranks: {transport.ranks}, experts of each: {experts.num_experts}",
                place=f"layer {layer}",
                help="the router's number of experts must be the experts' times the ranks",
            )

    def forward(self, x_TD: Tensor, h_TD: Tensor, *, recompute: bool = False) -> Tensor:
        """h + y(x). x_TD, h_TD: (T, D); (T, D) in their dtype.

        recompute: backward computes the experts again; the routing, its weights and its layout are kept. It does so too
        where the experts' arena has no room for more than one layer.
        """
        indices_TK, weights_TK = self.router(x_TD)
        places = self.transport.layout(indices_TK, self.num_experts, self.layer)
        if self.training and not isinstance(places, Layout):
            self.router.load_E += places.pairs_E
        arena = self.transport.arena
        if recompute or (arena is not None and arena.alone):
            once = [h_TD]  # h is added and no more: it need not be kept for the second time, whose sum nobody reads
            return again(lambda *inputs: self.routed(once.pop() if once else None, *inputs), x_TD, weights_TK, places)
        return self.routed(h_TD, x_TD, weights_TK, places)

    def routed(self, h_TD: Tensor | None, x_TD: Tensor, weights_TK: Tensor, places: Places) -> Tensor:
        """What follows the routing: the chosen experts, the shared ones, and the sum; without h if there is none.

        A GPU adds all of it where it adds the experts' rows, in float32.
        """
        if x_TD.device.type == "cpu":
            y_TD = self.experts(x_TD, weights_TK, places, self.transport)
            y_TD = y_TD if self.shared is None else y_TD + self.shared(x_TD)
            return y_TD if h_TD is None else h_TD + y_TD
        if self.shared is None or self.transport.ranks == 1:
            shared_TD = None if self.shared is None else self.shared(x_TD)
            return self.experts(x_TD, weights_TK, places, self.transport, Bases(h_TD, shared_TD))
        # Beside each other: the shared experts' products run while rows are on their way.
        with beside(x_TD.device) as join:
            shared_TD = self.shared(x_TD)
        # Backward may drop the last reference to x while the other stream still reads. That to the shared experts'
        # output may be dropped while the main stream reads: whatever the other is given next waits for it first.
        x_TD.record_stream(side_stream(x_TD.device))
        return self.experts(x_TD, weights_TK, places, self.transport, Bases(h_TD, shared_TD, ready=join))
