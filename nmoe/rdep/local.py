"""The transport of one rank: nothing travels, the layout's index points into x itself."""

from torch import Tensor

from nmoe.rdep.layout import layout
from nmoe.rdep.transport import Experts, Places


class LocalTransport:
    """All experts and all tokens are here."""

    def run(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Tensor:
        """y_t = sum over k of w_tk * expert_{i_tk}(x_t).

        x_TD: (T, D). indices_TK: (T, K) int64. weights_TK: (T, K) float32. Returns (T, D) in x's dtype.
        """
        return experts(x_TD, weights_TK, places(indices_TK, experts.num_experts))


def places(indices_TK: Tensor, num_experts: int) -> Places:
    """The layout as the routing's device makes it; a GPU's host does not wait for it."""
    if indices_TK.device.type == "cpu":
        return layout(indices_TK, num_experts)
    from nmoe.kernels.layout import make_layout

    return make_layout(indices_TK, num_experts)
