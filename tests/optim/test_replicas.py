"""Digests of tensors: the formula in Python's integers, and no flipped bit that is not seen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.optim import replicas
from nmoe.optim.replicas import Odd, Replicas, digest

DTYPES = {torch.float32: (4, "i"), torch.bfloat16: (2, "h"), torch.int64: (8, "q")}


def integers(x: torch.Tensor) -> list[int]:
    """The bytes as the module's text reads them."""
    content = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    size = 4 if len(content) % 4 == 0 else 2
    return [int.from_bytes(content[at : at + size], "little", signed=True) for at in range(0, len(content), size)]


def by_hand(x: torch.Tensor) -> int:
    total = sum((2 * i + 1) * value for i, value in enumerate(integers(x)))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (7, 3), (8, 16), (3, 5, 7)])
@pytest.mark.parametrize("chunk", [4, 7, 1 << 15])
def test_it_is_the_formula(monkeypatch, dtype, shape, chunk):
    monkeypatch.setitem(replicas.CHUNK, "cpu", chunk)
    bits = torch.randint(-(2**62), 2**62, (*shape, 8 // dtype.itemsize), generator=torch.Generator().manual_seed(3))
    x = bits.view(dtype)[..., : 1 if dtype == torch.bfloat16 else None].contiguous()
    assert digest(x).item() == by_hand(x)


def test_it_wraps_around():
    x = torch.full((70_000,), -1, dtype=torch.int32).view(torch.float32)
    assert digest(x).item() == by_hand(x) == -(70_000**2)
    x = torch.full((1 << 20,), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    assert digest(x).item() == (2**40 * (2**31 - 1) + 2**63) % 2**64 - 2**63


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=12), st.data(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_one_and_two_flipped_bits_and_swaps_are_seen(values, data):
    x = torch.tensor(values, dtype=torch.int32).view(torch.float32)
    places = st.tuples(st.integers(0, len(values) - 1), st.integers(0, 31))
    bits = data.draw(st.lists(places, min_size=1, max_size=2, unique=True))
    flipped = x.view(torch.int32).clone()
    for index, bit in bits:
        flipped[index] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
    assert digest(flipped.view(torch.float32)) != digest(x)
    i, j = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=2, max_size=2, unique=True))
    swapped = x.view(torch.int32).clone()
    swapped[[i, j]] = swapped[[j, i]]
    assert (digest(swapped.view(torch.float32)).item() != digest(x).item()) is (values[i] != values[j])


def holding(*, experts: dict, ranks_per_node: int = 1, **alike) -> Replicas:
    return Replicas(alike=alike, experts=experts, ranks_per_node=ranks_per_node, every=5)


def test_halves_hold_every_digest_exactly():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    upper, lower = holding(x=x, experts={}).halves().tolist()
    assert int(upper) * 2**32 + int(lower) == digest(x).item()


def told(values: list[float], name: str = "x") -> list[torch.Tensor]:
    """What ranks tell that each hold a tensor of one element."""
    return [holding(**{name: torch.tensor([value])}, experts={}).halves() for value in values]


@pytest.mark.parametrize(
    ("values", "holders", "minority"),
    [
        ([1.0, 1.0, 1.0], None, None),
        ([1.0, 1.0, 2.0], ((0, 1), (2,)), (2,)),
        ([2.0, 1.0, 1.0, 3.0, 1.0], ((1, 2, 4), (0,), (3,)), (0, 3)),
        ([1.0, 2.0], ((0,), (1,)), ()),
        ([2.0, 1.0, 1.0, 2.0], ((0, 3), (1, 2)), ()),
        ([0.0, -0.0, 0.0], ((0, 2), (1,)), (1,)),
        ([float("nan")] * 3, None, None),
    ],
)
def test_who_is_in_the_minority(values, holders, minority):
    found = holding(x=torch.zeros(1), experts={}).odd(told(values))
    if holders is None:
        assert found == []
    else:
        assert found == [Odd("x", holders)]
        assert found[0].minority == minority


def test_experts_are_held_against_their_counterparts_alone():
    """Two nodes of two ranks: ranks 0 and 2 have the same experts, and 1 and 3."""

    def ranks(*values):
        return [
            holding(x=torch.ones(3), experts={"e": torch.tensor([value])}, ranks_per_node=2).halves()
            for value in values
        ]

    mine = holding(x=torch.ones(3), experts={"e": torch.ones(1)}, ranks_per_node=2)
    assert mine.odd(ranks(1.0, 2.0, 1.0, 2.0)) == []
    assert mine.odd(ranks(1.0, 2.0, 1.0, 3.0)) == [Odd("e", ((1,), (3,)))]


def test_when_it_is_due():
    assert [step for step in range(1, 12) if holding(x=torch.ones(1), experts={}).due(step)] == [5, 10]
