"""The transport of one rank: nothing travels, the layout's index points into x itself."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmoe.rdep.layout import Layout, layout, route
from nmoe.rdep.transport import Places, Received

if TYPE_CHECKING:
    from nmoe.rdep.arena import Arena


class LocalTransport:
    """All experts and all tokens are here."""

    rank, ranks = 0, 1
    arena: "Arena | None" = None

    def layout(self, indices_TK: Tensor, num_experts: int, layer: int) -> Places:
        """As `Transport.layout`; a GPU's host does not wait for it."""
        if indices_TK.device.type != "cpu":
            from nmoe.kernels.layout import make_layout

            return make_layout(indices_TK, num_experts)
        routing = route(indices_TK, num_experts=num_experts, ranks=1)
        return layout(routing, routing.pairs_E[None], routing.tokens_N[None], rank=0, layer=layer)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, places: Layout) -> Received:
        """As `Transport.dispatch`; x_UD is x_TD."""
        row_P, top_k = places.row_TK.view(-1), places.row_TK.shape[1]
        pair_R = torch.empty_like(row_P).scatter_(0, row_P, torch.arange(row_P.numel(), device=row_P.device))
        weight_R = weights_TK.reshape(-1).index_select(0, pair_R)
        return Received(x_UD=x_TD, token_R=pair_R // top_k, weight_R=weight_R, pair_R=pair_R)

    def give_back(self, y_RD: Tensor, received: Received, places: Layout) -> tuple[Tensor, Tensor]:
        """As `Transport.give_back`."""
        return y_RD, places.row_TK

    def dispatch_gradients(self, dy_TD: Tensor, places: Layout) -> Tensor:
        """As `Transport.dispatch_gradients`."""
        return dy_TD

    def give_back_gradients(
        self, dx_RD: Tensor, d_weight_R: Tensor, received: Received, places: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Transport.give_back_gradients`."""
        d_weights_TK = d_weight_R.index_select(0, places.row_TK.view(-1)).view(places.row_TK.shape)
        return dx_RD, places.row_TK, d_weights_TK
