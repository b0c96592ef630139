"""Which experts a token uses, and with which weights.

    s = sigmoid(W x)                            float32
    i_1 ... i_K = the K largest of s + b        ties go to the lower expert
    w_k = route_scale * s[i_k] / (sum over j of s[i_j] + 1e-20)

The bias b takes part in the selection only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), so it
has no gradient: it is state. Training forwards count the pairs each expert got; after the step
`update_bias` moves each bias by a fixed amount towards the mean load and forgets the counts.
"""

import torch
from torch import Tensor

from nmoe.model.linear import linear


class SigmoidRouter(torch.nn.Module):
    """weight_ED: (E, D). bias_E: (E,) float32, state. load_E: (E,) int64, pairs since the last update."""

    bias_E: Tensor
    load_E: Tensor

    def __init__(
        self, *, hidden_size: int, num_experts: int, top_k: int, route_scale: float, bias_update_rate: float
    ) -> None:
        super().__init__()
        self.top_k, self.route_scale, self.bias_update_rate = top_k, route_scale, bias_update_rate
        self.weight_ED = torch.nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("load_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """x_TD: (T, D). Returns indices_TK int64, by falling s + b, and weights_TK float32.

        In training mode load_E grows by each expert's pairs.
        """
        score_TE = torch.sigmoid(linear(x_TD, self.weight_ED, torch.float32))
        indices_TK = select(score_TE.detach() + self.bias_E, self.top_k)
        chosen_TK = score_TE.gather(1, indices_TK)
        weights_TK = chosen_TK * (self.route_scale / (chosen_TK.sum(dim=1, keepdim=True) + 1e-20))
        if self.training:
            self.load_E += torch.bincount(indices_TK.view(-1), minlength=self.load_E.numel())
        return indices_TK, weights_TK

    @torch.no_grad()
    def update_bias(self) -> None:
        """b += rate * sign(mean load - load), then load = 0. Exact: E * load is compared with the integer total."""
        short_E = self.load_E.sum() - self.load_E * self.load_E.numel()
        self.bias_E += self.bias_update_rate * torch.sign(short_E).to(torch.float32)
        self.load_E.zero_()


def select(score_TE: Tensor, top_k: int) -> Tensor:
    """Indices of the top_k largest of each row, falling; of equal ones the lower index comes first.

    score_TE: (T, E) float32. torch.topk leaves the order of ties open, so it is given keys that have none: the
    score's bits, as an integer of the same order, above E - 1 - e.
    """
    bits_TE = score_TE.view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    below_E = torch.arange(score_TE.shape[1] - 1, -1, -1, device=score_TE.device)
    return ((ordered_TE.long() << 32) | below_E).topk(top_k, dim=1).indices
