"""The plain references against definitions written another way."""

import torch

from nmoe.kernels.combine import combine_reference
from nmoe.kernels.layout import TILE_ROWS, layout_reference
from nmoe.kernels.moe import moe_reference


def routing(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    chosen_TK = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    return torch.where(chosen_TK == 1, 0, chosen_TK)  # expert 1 is empty


def test_rows_are_the_sorted_pairs_and_tiles_cover_them_once() -> None:
    expert_TK = routing(500, 3, 6)
    layout = layout_reference(expert_TK, 6)
    want = sorted((int(e), p) for p, e in enumerate(expert_TK.reshape(-1)))
    assert layout.pair_R.tolist() == [p for _, p in want]
    assert layout.token_R.tolist() == [p // 3 for _, p in want]
    covered = []
    for e, row in zip(layout.tile_expert.tolist(), layout.tile_row.tolist(), strict=True):
        assert (row - int(layout.offsets_E1[e])) % TILE_ROWS == 0
        covered += range(row, min(row + TILE_ROWS, int(layout.offsets_E1[e + 1])))
    assert covered == list(range(1500))


def test_layer_is_the_weighted_sum_of_its_tokens_experts() -> None:
    generator = torch.Generator().manual_seed(5)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x_TD, w_gu, w_down, weight_TK = normal(40, 12), normal(6, 2, 10, 12), normal(6, 12, 10), normal(40, 3)
    expert_TK = routing(40, 3, 6)
    got_TD = moe_reference(x_TD, expert_TK, weight_TK, w_gu, w_down)
    for t in range(40):
        out_D = torch.zeros(12, dtype=torch.float64)
        for k in range(3):
            e = expert_TK[t, k]
            gate_F, up_F = w_gu[e, 0] @ x_TD[t], w_gu[e, 1] @ x_TD[t]
            out_D += weight_TK[t, k] * (w_down[e] @ (gate_F * torch.sigmoid(gate_F) * up_F))
        torch.testing.assert_close(got_TD[t], out_D, rtol=1e-11, atol=1e-12)


def test_gated_gradient_formulas_agree_with_autograd() -> None:
    """What the gated product's epilogue computes: dh from d = dout W_down, and <d, a> for the weight."""
    generator = torch.Generator().manual_seed(6)
    h_2F = torch.randn(2, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    d_F = torch.randn(9, generator=generator, dtype=torch.float64)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    a_F = torch.nn.functional.silu(h_2F[0]) * h_2F[1]
    dh_2F, dweight = torch.autograd.grad(weight * (a_F * d_F).sum(), (h_2F, weight))
    g_F, u_F = h_2F.detach()
    sigmoid_F = torch.sigmoid(g_F)
    silu_F = g_F * sigmoid_F
    da_F = 0.7 * d_F
    torch.testing.assert_close(da_F * u_F * (sigmoid_F + silu_F * (1 - sigmoid_F)), dh_2F[0])
    torch.testing.assert_close(da_F * silu_F, dh_2F[1])
    torch.testing.assert_close((d_F * silu_F * u_F).sum(), dweight)


def test_combine_sums_in_the_order_of_k() -> None:
    """1e8, 1, -1e8 in float32: left to right loses the one; another order would keep it."""
    y_RD = torch.tensor([[-1e8], [1.0], [1e8]])
    row_TK = torch.tensor([[2, 1, 0], [2, 0, 1]], dtype=torch.int32)
    assert combine_reference(y_RD, row_TK, None).flatten().tolist() == [0.0, 1.0]
