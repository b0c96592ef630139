"""Which experts a token uses, and with which weights.

Scores are float32, the K largest are chosen, and ties go to the lower expert.

Sigmoid (DeepSeek-V3, arXiv 2412.19437, section 2.1.2):

    s = sigmoid(W x)
    i_1 ... i_K = the K largest of s + b
    w_k = route_scale * s[i_k] / (sum over j of s[i_j] + 1e-20)

The bias b takes part in the selection only, so it has no gradient: it is state. With G groups of
neighbouring experts only those of the best M groups can be chosen (section 2.1.2 as well); a group
counts as much as its two largest s + b together.

Softmax (Qwen3, arXiv 2505.09388; Mixtral, arXiv 2401.04088):

    s = softmax(W x) over all experts
    i_1 ... i_K = the K largest of s
    w_k = s[i_k], divided by the sum over the chosen if they are renormalised

Renormalised, that is the softmax over the chosen scores alone, which is how Mixtral's paper has it.

Training forwards count the pairs each expert got: here on the CPU; on a GPU the MoE layer reads them off the layout,
since counting them again would take a wait. `end_step` moves each bias by a fixed amount
towards the mean load, where there is one, and forgets the counts. Where a training has balance
losses (`nmoe.model.balance`), their gradient joins that of the logits here.
"""

import torch
from torch import Tensor

from nmoe.kernels.launch import ROUTER_CHOSEN, ROUTER_EXPERTS
from nmoe.model.balance import Balance
from nmoe.model.linear import linear


class Router(torch.nn.Module):
    """What every kind has.

    weight_ED: (E, D). bias_E: (E,) float32, state; None where the kind has no selection bias. load_E: (E,) int64,
    pairs since the last `end_step`. balance: the losses of the training that the router is in; None without any.
    """

    bias_E: Tensor | None
    load_E: Tensor
    balance: Balance | None

    def __init__(self, *, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.balance = None
        self.weight_ED = torch.nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("bias_E", None)
        self.register_buffer("load_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """x_TD: (T, D). Returns indices_TK int64 (int32 from a kernel), the best first, and weights_TK float32.

        In training mode load_E grows by each expert's pairs, and the gradient of the balance losses is added.
        """
        raise NotImplementedError

    def losses(self) -> dict[str, float]:
        """The balance losses by name since the last `end_step`, without coefficients; empty where there are none."""
        return {} if self.balance is None else self.balance.means()

    def count(self, indices_TK: Tensor) -> None:
        if self.training and indices_TK.device.type == "cpu":
            self.load_E += torch.bincount(indices_TK.view(-1), minlength=self.load_E.numel())

    def end_step(self, tokens_seen: int) -> None:
        """Nothing counted any more. tokens_seen: of the training, this step's among them."""
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """load = 0, and nothing recorded of the losses."""
        self.load_E.zero_()
        if self.balance is not None:
            self.balance.clear()


class SoftmaxRouter(Router):
    """renormalize: the chosen weights add up to 1."""

    def __init__(self, *, hidden_size: int, num_experts: int, top_k: int, renormalize: bool) -> None:
        super().__init__(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        self.renormalize = renormalize

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """As `Router.forward`."""
        logits_TE = linear(x_TD, self.weight_ED, torch.float32)
        score_TE = torch.softmax(logits_TE, dim=1)
        indices_TK = select(score_TE.detach(), self.top_k)
        weights_TK = score_TE.gather(1, indices_TK)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        if self.training and self.balance is not None:
            weights_TK = self.balance.inject(weights_TK, logits_TE, score_TE.detach(), indices_TK)
        self.count(indices_TK)
        return indices_TK, weights_TK


class SigmoidRouter(Router):
    """bias_update_rate: by which a bias moves after a step. num_groups, top_groups: G and M.

    bias_limit: largest absolute bias, None for none. bias_until_tokens: tokens of the training after which the bias
    stays, None for never.
    """

    bias_E: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        num_groups: int,
        top_groups: int,
        route_scale: float,
        bias_update_rate: float,
        bias_limit: float | None,
        bias_until_tokens: int | None,
    ) -> None:
        super().__init__(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        self.num_groups, self.top_groups = num_groups, top_groups
        self.route_scale, self.bias_update_rate = route_scale, bias_update_rate
        self.bias_limit, self.bias_until_tokens = bias_limit, bias_until_tokens
        self.bias_E = torch.zeros(num_experts, dtype=torch.float32)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """As `Router.forward`; the best are those of the largest s + b."""
        if self.in_one_pass(x_TD):
            from nmoe.kernels.router import sigmoid_route

            return sigmoid_route(x_TD, self.weight_ED, self.bias_E, self.top_k, self.route_scale)
        logits_TE = linear(x_TD, self.weight_ED, torch.float32)
        score_TE = torch.sigmoid(logits_TE)
        indices_TK = select(self.eligible(score_TE.detach() + self.bias_E), self.top_k)
        chosen_TK = score_TE.gather(1, indices_TK)
        weights_TK = chosen_TK * (self.route_scale / (chosen_TK.sum(dim=1, keepdim=True) + 1e-20))
        if self.training and self.balance is not None:
            best_TK = select(score_TE.detach(), self.top_k)
            weights_TK = self.balance.inject(weights_TK, logits_TE, score_TE.detach(), best_TK)
        self.count(indices_TK)
        return indices_TK, weights_TK

    def in_one_pass(self, x_TD: Tensor) -> bool:
        """Whether `nmoe.kernels.router` does all of it: on a GPU, without groups and balance losses, at its sizes."""
        if x_TD.device.type == "cpu" or self.top_groups < self.num_groups or self.balance is not None:
            return False
        return self.weight_ED.shape[0] <= ROUTER_EXPERTS and self.top_k <= ROUTER_CHOSEN

    def eligible(self, biased_TE: Tensor) -> Tensor:
        """s + b, and -inf for the experts of groups that are not among the best."""
        if self.top_groups == self.num_groups:
            return biased_TE
        biased_TGE = biased_TE.unflatten(1, (self.num_groups, -1))
        best_TM = select(biased_TGE.topk(2, dim=2).values.sum(dim=2), self.top_groups)
        hidden_TG = torch.ones(biased_TGE.shape[:2], dtype=torch.bool, device=biased_TE.device)
        hidden_TG.scatter_(1, best_TM, False)
        return biased_TGE.masked_fill(hidden_TG[:, :, None], -torch.inf).flatten(1)

    @torch.no_grad()
    def end_step(self, tokens_seen: int) -> None:
        """b += rate * sign(mean load - load), within the limit and until its tokens; then load = 0.

        Exact: E * load is compared with the integer total.
        """
        if self.bias_until_tokens is None or tokens_seen <= self.bias_until_tokens:
            short_E = self.load_E.sum() - self.load_E * self.load_E.numel()
            self.bias_E += self.bias_update_rate * torch.sign(short_E).to(torch.float32)
            if self.bias_limit is not None:
                self.bias_E.clamp_(-self.bias_limit, self.bias_limit)
        self.forget()


def select(score_TE: Tensor, top_k: int) -> Tensor:
    """Indices of the top_k largest of each row, falling; of equal ones the lower index comes first.

    score_TE: (T, E) float32. torch.topk leaves the order of ties open, so it is given keys that have none: the
    score's bits, as an integer of the same order, above E - 1 - e.
    """
    bits_TE = score_TE.view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    below_E = torch.arange(score_TE.shape[1] - 1, -1, -1, device=score_TE.device)
    return ((ordered_TE.long() << 32) | below_E).topk(top_k, dim=1).indices
