"""The plain reference of attention against torch's own, against its parts, and the formulas of its gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nmoe.errors import RunError
from nmoe.kernels.attention import attention_forward, attention_reference, documents

TIGHT = {"rtol": 1e-12, "atol": 1e-13}  # float64; sums of at most 40 terms


def normal(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_causal_with_shared_keys_is_torchs_attention() -> None:
    q, k, v = normal(2, 6, 40, 12), normal(2, 2, 40, 12, seed=2), normal(2, 2, 40, 8, seed=3)
    out, lse = attention_reference(q, k, v)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), **TIGHT)
    score = (q @ k.repeat_interleave(3, 1).transpose(2, 3)) * 12**-0.5
    last = torch.logsumexp(score[:, :, -1], dim=-1)
    torch.testing.assert_close(lse[:, :, -1], last, **TIGHT)


def test_window_shows_the_token_itself_and_those_before() -> None:
    q, k, v = (normal(1, 2, 30, 8, seed=s) for s in (4, 5, 6))
    out, _ = attention_reference(q, k, v, window=1)
    torch.testing.assert_close(out, v, **TIGHT)
    out, _ = attention_reference(q, k, v, window=7, scale=0.3)
    for i in (0, 3, 6, 7, 29):
        seen = slice(max(0, i - 6), i + 1)
        weight = torch.softmax(0.3 * (q[:, :, i : i + 1] @ k[:, :, seen].transpose(2, 3)), dim=-1)
        torch.testing.assert_close(out[:, :, i : i + 1], weight @ v[:, :, seen], **TIGHT)


def test_a_document_is_attended_as_if_it_were_alone() -> None:
    q, k, v = (normal(1, 2, 25, 8, seed=s) for s in (7, 8, 9))
    start_BS = torch.tensor([[0] * 4 + [4] * 1 + [5] * 20])
    out, lse = attention_reference(q, k, v, start_BS=start_BS)
    for a, b in ((0, 4), (4, 5), (5, 25)):
        alone, lse_alone = attention_reference(*(t[:, :, a:b] for t in (q, k, v)))
        torch.testing.assert_close(out[:, :, a:b], alone, **TIGHT)
        torch.testing.assert_close(lse[:, :, a:b], lse_alone, **TIGHT)


def test_a_sink_is_one_more_key_whose_value_is_zero() -> None:
    q, k, v = (normal(2, 3, 20, 8, seed=s) for s in (10, 11, 12))
    sink_H = normal(3, seed=13)
    out, _ = attention_reference(q, k, v, sink_H=sink_H)
    score = (q @ k.transpose(2, 3)) * 8**-0.5
    score = score.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf)
    score = torch.cat([score, sink_H[None, :, None, None].expand(2, 3, 20, 1)], dim=3)
    torch.testing.assert_close(out, torch.softmax(score, dim=3)[..., :-1] @ v, **TIGHT)


def test_ends_of_documents_follow_from_their_starts() -> None:
    start_BS = torch.tensor([[0, 0, 2, 2, 2, 5], [0, 1, 2, 2, 4, 4]])
    assert documents(start_BS).end_BS.tolist() == [[2, 2, 5, 5, 5, 6], [1, 2, 4, 4, 6, 6]]


def test_gradient_formulas_of_the_kernels_agree_with_autograd() -> None:
    """p from lse, delta from out, ds = p (dp - delta), and the sink's gradient from both."""
    q, k, v = (normal(1, 2, 18, 8, seed=s).requires_grad_() for s in (14, 15, 16))
    sink_H = normal(2, seed=17).requires_grad_()
    dout = normal(1, 2, 18, 8, seed=18)
    out, lse = attention_reference(q, k, v, window=5, sink_H=sink_H)
    want = torch.autograd.grad(out, (q, k, v, sink_H), dout)
    index = torch.arange(18)
    seen = (index <= index[:, None]) & (index > index[:, None] - 5)
    p = torch.exp((q @ k.transpose(2, 3)) * 8**-0.5 - lse[..., None]) * seen
    delta = (dout * out).sum(-1)
    ds = p * (dout @ v.transpose(2, 3) - delta[..., None])
    torch.testing.assert_close(ds @ k * 8**-0.5, want[0], **TIGHT)
    torch.testing.assert_close(ds.transpose(2, 3) @ q * 8**-0.5, want[1], **TIGHT)
    torch.testing.assert_close(p.transpose(2, 3) @ dout, want[2], **TIGHT)
    dsink_H = -(torch.exp(sink_H[None, :, None] - lse) * delta).sum((0, 2))
    torch.testing.assert_close(dsink_H, want[3], **TIGHT)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("N0712", {"dtype": torch.float32}),
        ("N0712", {"stride": True}),
        ("N0712", {"offset": 4}),
        ("N0713", {"Q": 80}),
        ("N0713", {"G": 3}),
        ("N0713", {"window": 0}),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_by_name(code: str, change: dict) -> None:
    Q, G, dtype = change.get("Q", 64), change.get("G", 2), change.get("dtype", torch.bfloat16)
    q = torch.zeros(1, 4, 16, Q, dtype=dtype)
    k, v = torch.zeros(1, G, 16, Q, dtype=dtype), torch.zeros(1, G, 16, 64, dtype=dtype)
    if "stride" in change:
        v = torch.zeros(1, G, 64, 16, dtype=dtype).transpose(2, 3)
    if "offset" in change:
        k = torch.zeros(1, G, 16, Q + 8, dtype=dtype)[..., 4 : Q + 4]
    with pytest.raises(RunError, match=code):
        attention_forward(q, k, v, window=change.get("window"))
