"""Run by test_interpreted.py in a process of its own, because Triton reads TRITON_INTERPRET when kernels are defined.

Prints one JSON object, name -> largest deviation from the reference (0 where bits must agree).
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from nmoe.kernels import combine, layout, router

torch.set_num_threads(1)
found: dict[str, float] = {}


def note(name: str, value: float) -> None:
    found[name] = max(found.get(name, 0.0), value)


def routing(tokens: int, top_k: int, experts: int, kind: str) -> torch.Tensor:
    if kind == "single":
        return torch.full((tokens, top_k), experts - 1, dtype=torch.int32)
    chosen = torch.rand(tokens, experts).topk(top_k, dim=1).indices
    if kind == "holes":  # odd experts get nothing
        chosen = chosen // 2 * 2
    return chosen.int().contiguous()


torch.manual_seed(7)
for tokens, top_k, experts, kinds in (
    (1, 1, 1, "any"),
    (37, 3, 5, "any holes single"),
    (129, 4, 33, "holes"),
    (200, 2, 7, "single"),
):
    for kind in kinds.split():
        expert_TK = routing(tokens, top_k, experts, kind)
        got, want = layout.make_layout(expert_TK, experts), layout.layout_reference(expert_TK, experts)
        tiles = int(want.num_tiles)
        for name, a, b in zip(want._fields, got, want, strict=True):
            a = a[:tiles] if name.startswith("tile_") else a
            note("layout." + name, float(not torch.equal(a, b)))
        y_RD, base_TD = torch.randn(tokens * top_k, 40), torch.randn(tokens, 40)
        weight_TK = torch.rand(tokens, top_k)
        out = combine.combine(y_RD, want.row_TK, weight_TK)
        wide = combine.combine_reference(y_RD.double(), want.row_TK, weight_TK.double())
        note("combine.weighted", (out - wide).abs().max().item())
        out = combine.combine(y_RD, want.row_TK, None, base_TD)
        wide = combine.combine_reference(y_RD.double(), want.row_TK, None, base_TD.double())
        note("combine.based", (out - wide).abs().max().item())
        out = combine.combine(y_RD, want.row_TK, weight_TK, base_TD, y_RD[:tokens])
        wide = combine.combine_reference(*(t.double() for t in (y_RD, want.row_TK, weight_TK, base_TD, y_RD[:tokens])))
        note("combine.more", (out - wide).abs().max().item())
        rows = combine.gather_rows(base_TD, want)
        note("gather", float(not torch.equal(rows, base_TD[want.token_R.long()])))
        part_NR = torch.randn(3, tokens * top_k)
        dots = part_NR.double().sum(0)[want.row_TK.long()]
        note("dots", (combine.sum_dots(part_NR, want.row_TK) - dots).abs().max().item())

for tokens, width, experts, top_k in ((37, 40, 5, 3), (70, 72, 64, 8)):
    x_TD, w_ED = torch.randn(tokens, width), torch.randn(experts, width) / width**0.5
    bias_E, dweight_TK = torch.randn(experts) * 0.1, torch.randn(tokens, top_k)
    expert_TK, weight_TK, score_TK = router.route(x_TD, w_ED, bias_E, top_k, 2.5)
    want_TK, weight64_TK, _ = router.route_reference(x_TD.double(), w_ED.double(), bias_E.double(), top_k, 2.5)
    note("route.expert", float(not torch.equal(expert_TK.long(), want_TK)))
    note("route.weight", (weight_TK - weight64_TK).abs().max().item())
    logit_TE = (x_TD.double() @ w_ED.double().T).requires_grad_()
    chosen_TK = torch.sigmoid(logit_TE).gather(1, want_TK)
    weight64_TK = 2.5 * chosen_TK / chosen_TK.sum(1, keepdim=True)
    (want_TE,) = torch.autograd.grad(weight64_TK, logit_TE, dweight_TK.double())
    got_TE = router.route_backward(dweight_TK, expert_TK, score_TK, experts, 2.5, torch.float32)
    note("route.backward", (got_TE - want_TE).abs().max().item())

equal_TE = torch.zeros(16, 8)
expert_TK, weight_TK, _ = router.route(equal_TE, torch.zeros(6, 8), torch.zeros(6), 3, 1.0)
note("route.ties", float(not torch.equal(expert_TK, torch.arange(3, dtype=torch.int32).expand(16, 3))))
print(json.dumps(found))
