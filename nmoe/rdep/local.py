"""The transport of one rank: nothing travels, the layout's index points into x itself."""

from torch import Tensor

from nmoe.rdep.layout import layout
from nmoe.rdep.transport import Experts, Places


class LocalTransport:
    """All experts and all tokens are here."""

    def layout(self, indices_TK: Tensor, num_experts: int) -> Places:
        """The layout as the routing's device makes it; a GPU's host does not wait for it."""
        if indices_TK.device.type == "cpu":
            return layout(indices_TK, num_experts)
        from nmoe.kernels.layout import make_layout

        return make_layout(indices_TK, num_experts)

    def run(self, x_TD: Tensor, weights_TK: Tensor, places: Places, experts: Experts) -> Tensor:
        """y_t = sum over k of w_tk * expert_{i_tk}(x_t).

        x_TD: (T, D). weights_TK: (T, K) float32. places: the layout of the choice i. Returns (T, D) in x's dtype.
        """
        return experts(x_TD, weights_TK, places)
