"""The plain references of the rest of the step against torch's own functions and the trainer's plain layers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from nmoe.errors import RunError
from nmoe.kernels import launch
from nmoe.model.mla import by_head
from nmoe.model.rope import rotate_halves, rotate_interleaved, table
from nmoe.optim.norm import ordered_sum

pytest.importorskip("triton")

from nmoe.kernels import adamw, cross_entropy, grad_norm, newton_schulz, rms_norm, rope, swiglu

TIGHT = {"rtol": 1e-12, "atol": 1e-13}  # float64, a few operations
FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}  # float32 tables and turns


def normal(*size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_norm_activation_and_loss_are_torchs() -> None:
    x, w, targets = normal(9, 12), normal(12, seed=2), torch.arange(9) % 5
    torch.testing.assert_close(rms_norm.rms_norm_reference(x, w, 1e-3), functional.rms_norm(x, (12,), w, 1e-3), **TIGHT)
    torch.testing.assert_close(swiglu.swiglu_reference(x), functional.silu(x[:, :6]) * x[:, 6:], **TIGHT)
    head = normal(5, 12, seed=3)
    want = functional.cross_entropy(x @ head.T, targets, reduction="none")
    torch.testing.assert_close(cross_entropy.cross_entropy_reference(x, head, targets), want, **TIGHT)


def test_turned_heads_are_the_models() -> None:
    x = normal(2, 7, 3, 14, dtype=torch.float32)
    table_SJ = table(7, 8, 100.0, None, x.device)
    want = torch.cat([x[..., :6], rotate_interleaved(x[..., 6:], 100.0)], dim=3)
    torch.testing.assert_close(rope.rope_reference(x, table_SJ, interleaved=True), want, **FLOAT32)
    want = torch.cat([x[..., :6], rotate_halves(x[..., 6:], 100.0)], dim=3)
    torch.testing.assert_close(rope.rope_reference(x, table_SJ, interleaved=False), want, **FLOAT32)
    shared = normal(2, 7, 8, seed=4, dtype=torch.float32)
    k_BSHQ, v_BSHV = rope.mla_keys_reference(x, shared, table_SJ, 5)
    turned = rotate_interleaved(shared[:, :, None], 100.0).expand(2, 7, 3, 8)
    torch.testing.assert_close(k_BSHQ.transpose(1, 2), by_head(x[..., :9], turned), **FLOAT32)
    assert torch.equal(v_BSHV, x[..., 9:])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_three_updates_are_torchs_adamw(decay: float) -> None:
    weight = torch.nn.Parameter(normal(5, 4))
    optimizer = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    master, exp_avg, exp_avg_sq = weight.detach().clone(), torch.zeros(5, 4).double(), torch.zeros(5, 4).double()
    for step in (1, 2, 3):
        gradient = normal(5, 4, seed=step + 5)
        f = adamw.factors(step=step, rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=decay)
        scale = torch.tensor(0.5, dtype=torch.float64)
        master, exp_avg, exp_avg_sq = adamw.adamw_reference(master, gradient, exp_avg, exp_avg_sq, scale, f, True)
        weight.grad = gradient * 0.5
        optimizer.step()
        torch.testing.assert_close(master, weight.detach(), **TIGHT)


def test_squared_norms_are_torchs() -> None:
    groups = [[normal(3, 4), normal(7, seed=2)], [], [normal(2, 2, 2, seed=3)]]
    got = grad_norm.squared_norms_reference(groups)
    flat = [g for group in groups for g in group]
    torch.testing.assert_close(got.total.sqrt(), torch.nn.utils.get_total_norm(flat), **TIGHT)
    torch.testing.assert_close(got.tensor_N, torch.stack([g.norm() ** 2 for g in flat]), **TIGHT)
    torch.testing.assert_close(got.group_G, torch.stack([got.tensor_N[:2].sum(), torch.zeros(()), got.tensor_N[2]]))


@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_levels_are_those_of_the_ordered_sum(counts: list[int]) -> None:
    """As many levels as nmoe.optim.norm's loop takes, each covering its input once, in order."""
    tables = grad_norm.levels(counts)
    ends = [math.ceil(c / 1024) for c in counts]
    longest = max(counts)
    assert len(tables) == (1 if longest <= 1024 else 2 if longest <= 1024**2 else 3)
    assert [start for start, _ in tables[0]] == [
        sum(counts[:n]) + 1024 * i for n in range(len(counts)) for i in range(max(1, ends[n]))
    ]
    for before, after in zip([sum(counts), *map(len, tables)], [*tables, None], strict=True):
        if after is not None:
            covered = [i for start, count in after for i in (start, start + count)]
            assert covered == sorted(covered) and covered[-1] == before
            assert sum(count for _, count in after) == before
    assert len(tables[-1]) == len(counts)


def test_levels_added_one_by_one_are_the_ordered_sum() -> None:
    values, counts = normal(5000).square(), [3000, 0, 1, 1024, 975]
    got = values
    for level in grad_norm.levels(counts):
        got = torch.stack([got[start : start + count].sum() for start, count in level])
    want = torch.stack([ordered_sum(part) for part in values.split(counts)])
    torch.testing.assert_close(got, want, rtol=1e-15, atol=0)


@given(st.integers(1, 16384), st.integers(2, 300_000))
@settings(max_examples=100, deadline=None)
def test_launches_hold_their_rows(width: int, vocab: int) -> None:
    norm = launch.norm_launch(width)
    assert norm.block >= width and norm.chunk % norm.rows == 0
    assert norm.rows * norm.block / (32 * norm.warps) <= 32  # values a thread
    gate = launch.swiglu_launch(width)
    assert gate.rows * gate.block == 2048
    loss, chunk = launch.loss_launch(vocab), launch.loss_chunk(vocab)
    assert loss.block <= 32 * 32 * 16 and loss.block >= min(vocab, 16384)
    assert chunk == 256 or 6 * chunk * vocab <= launch.LOSS_BYTES < 6 * 2 * chunk * vocab


def flat(size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(size, dtype=dtype)


def state(**changes: Tensor) -> adamw.State:
    return adamw.State(flat(), flat(), flat(), flat(dtype=torch.bfloat16), True)._replace(**changes)


def some_factors() -> adamw.Factors:
    return adamw.factors(step=1, rate=1.0, beta1=0.9, beta2=0.9, eps=1.0, weight_decay=0.0)


REFUSED = {
    "norm of halves": ("N0714", lambda: rms_norm.rms_norm(torch.zeros(2, 4).half(), torch.ones(4), 1.0)),
    "norm of columns": ("N0714", lambda: rms_norm.rms_norm_forward(torch.zeros(4, 2).t(), torch.ones(4), 1.0)),
    "wide norm": ("N0715", lambda: rms_norm.rms_norm(torch.zeros(1, 16385), torch.ones(16385), 1.0)),
    "swiglu of columns": ("N0716", lambda: swiglu.swiglu(torch.zeros(4, 2).t())),
    "rope of halves": (
        "N0717", lambda: rope.rope(torch.zeros(1, 1, 1, 2).half(), torch.ones(1, 1) + 0j, interleaved=True),
    ),
    "loss of two dtypes": (
        "N0718", lambda: cross_entropy.token_losses(
            torch.zeros(2, 4), torch.zeros(3, 4).bfloat16(), torch.zeros(2, dtype=torch.int64), chunk_tokens=2
        ),
    ),
    "short moment": ("N0719", lambda: adamw.FusedAdamW([state(exp_avg=flat(7))])),
    "unaligned master": ("N0719", lambda: adamw.FusedAdamW([state(master=flat(9)[1:])])),
    "wide weight": ("N0719", lambda: adamw.FusedAdamW([state(weight=flat())])),
    "mixed weights": ("N0719", lambda: adamw.FusedAdamW([state(), state()._replace(weight=None)])),
    "bf16 gradient": (
        "N0719", lambda: adamw.FusedAdamW([state()]).step(
            [flat(dtype=torch.bfloat16)], some_factors(), scale=flat(1), verdict=flat(1).int()
        ),
    ),
    "another gradient": (
        "N0720", lambda: grad_norm.GradNorm([[(2, 4)]], torch.device("cpu")).squared([torch.zeros(4, 2)])
    ),
    "square of a wide stack": ("N0721", lambda: newton_schulz.symmetric_product(torch.zeros(1, 4, 8)[:, :, :6], 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_take_is_refused_by_name(name: str) -> None:
    code, call = REFUSED[name]
    with pytest.raises(RunError, match=code):
        call()
