"""Held-out bits per byte against the definition: each byte once, plain cross-entropy in float64."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.data.heldout import HeldoutWindows
from nmoe.data.source import MemorySource
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.errors import RunError
from nmoe.eval import bpb
from nmoe.graph import build
from nmoe.plan.resolve import resolve

TINY = Path(__file__).parents[1] / "train" / "tiny.toml"
LENGTH = 16
TEXTS = ["It was the best of times, ", "é", "", "it was the worst of times: the age of \u20ac and of 0."]
BYTES = sum(len(text.encode()) for text in TEXTS)

# float32 arithmetic of a model of width 32, against float64 from its last hidden states on: the losses
# agree to a few times 2^-24 of their size, and the windows' batch shape changes sums by as much.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def graph():
    """The tiny model in float32, after a few updates of its biases so that evaluation depends on them."""
    torch.set_num_threads(1)
    plan = resolve(
        TINY, ["output.run_dir='unused'", "model.dtype='fp32'", "model.moe.experts.kind='fp32'",
               "model.moe.experts.intermediate_size=16", "optimizer.state_dtype='fp32'"],
    )  # fmt: skip
    made = build(plan)
    for layer, router in made.routers():
        router.bias_E += 0.01 * torch.arange(router.bias_E.numel()) * (layer + 1)
    return made


def windows(texts=TEXTS, **kept) -> HeldoutWindows:
    return HeldoutWindows(MemorySource(texts, BytesTokenizer()), sequence_length=LENGTH, **kept)


def by_hand(model, texts, context: int = 0, *, documents_apart: bool = False) -> tuple[float, int]:
    """(nats over all targets, targets): each target scored once, from its own window, cut out of the text here.

    Windows after the first one see `context` tokens that the one before has scored. documents_apart: a window's
    documents are given to the model one by one.
    """
    stream = [token for text in texts for token in (256, *text.encode())]
    nats = 0.0
    model.eval()
    with torch.no_grad():
        scored = 0
        for start in range(0, len(stream) - 1, LENGTH - context):
            if scored == len(stream) - 1:
                break
            inputs = stream[start : min(start + LENGTH, len(stream) - 1)]
            opens = [index for index, token in enumerate(inputs) if token == 256 and documents_apart]
            cuts = [0, *(index for index in opens if index), len(inputs)]
            h_TD = torch.cat([model(torch.tensor([inputs[a:b]])) for a, b in itertools.pairwise(cuts)])
            targets = torch.tensor(stream[start + 1 : start + LENGTH + 1])
            logits = h_TD.double() @ model.head.weight_VD.double().T
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            nats += losses[scored - start :].sum().item()
            scored = start + len(targets)
    model.train()
    return nats, len(stream) - 1


@pytest.mark.parametrize("sequences, context", [(1, 0), (3, 0), (50, 0), (2, 5), (3, 15)])
def test_it_is_the_definition(graph, sequences, context):
    """However many windows one forward pass takes, also more than there are, and however much they overlap."""
    nats, targets = by_hand(graph.model, TEXTS, context)
    result = bpb.evaluate(graph.model, windows(context=context), sequences=sequences)
    assert result.num_bytes == BYTES
    assert result.num_tokens == targets
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / BYTES, rel=TOLERANCE)
    assert result.loss == pytest.approx(nats / targets, rel=TOLERANCE)


def test_with_the_mask_documents_are_scored_apart(graph):
    result = bpb.evaluate(graph.model, windows(context=5), sequences=3, document_mask=True)
    nats, _ = by_hand(graph.model, TEXTS, 5, documents_apart=True)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / BYTES, rel=TOLERANCE)
    whole = by_hand(graph.model, TEXTS, 5)[0] / math.log(2) / BYTES
    assert abs(nats / math.log(2) / BYTES - whole) > 10 * TOLERANCE * whole, "the two differ by more than rounding"


def test_a_uniform_model_has_the_entropy_of_its_vocabulary(graph):
    """A head of zeros gives every one of the 257 tokens the same chance: log2(257) bits a token, exactly known."""
    weight = graph.model.head.weight_VD
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    result = bpb.evaluate(graph.model, windows(), sequences=2)
    with torch.no_grad():
        weight.copy_(kept)
    targets = BYTES + len(TEXTS) - 1
    assert result.bits_per_byte == pytest.approx(targets * math.log2(257) / BYTES, rel=TOLERANCE)


def test_max_tokens_scores_the_start(graph):
    """The first 20 targets of the first text: 20 of its bytes."""
    result = bpb.evaluate(graph.model, windows(max_tokens=20), sequences=2)
    nats, targets = by_hand(graph.model, [TEXTS[0][:20]])
    assert targets == result.num_tokens == result.num_bytes == 20
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 20, rel=TOLERANCE)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, LENGTH - 1))
@settings(max_examples=50, deadline=None)
def test_every_byte_once(texts, sequences, context):
    """The windows' valid targets, joined, are the stream after its first token."""
    held = windows(texts, context=context)
    stream = [token for text in texts for token in (256, *text.encode())]
    seen, count = [], 0
    for first in range(0, len(held), sequences):
        batch = held.batch(first, sequences)
        seen += batch.targets_BS[batch.valid_BS].tolist()
        count += batch.num_bytes
    assert seen == stream[1:]
    assert count == sum(len(text.encode()) for text in texts)


def test_it_leaves_nothing_behind(graph):
    """Weights, gradients, counters, biases, mode and the global generator are what they were."""
    for parameter in graph.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _, router in graph.routers():
        router.load_E += 3
    before = {name: tensor.clone() for name, tensor in graph.model.state_dict(keep_vars=False).items()}
    loads = [router.load_E.clone() for _, router in graph.routers()]
    state = torch.get_rng_state()
    calls: list[tuple[int, int]] = []
    graph.model.train()
    bpb.evaluate(graph.model, windows(), sequences=3, on_batch=lambda done, total: calls.append((done, total)))
    assert graph.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.model.state_dict().items())
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in graph.model.parameters())
    assert all(torch.equal(router.load_E, load) for (_, router), load in zip(graph.routers(), loads, strict=True))
    total = -(-len(windows()) // 3)
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_the_mode_is_put_back_after_a_failure(graph):
    def broken(done: int, total: int) -> None:
        raise RuntimeError("the terminal is gone")

    graph.model.train()
    with pytest.raises(RuntimeError):
        bpb.evaluate(graph.model, windows(), sequences=3, on_batch=broken)
    assert graph.model.training


@pytest.mark.parametrize("texts, kept", [([""], None), (["", ""], None), (["", "", "text"], 2)])
def test_a_text_without_a_byte_is_refused(texts, kept):
    with pytest.raises(RunError, match="no byte to score"):
        bpb.require_text(windows(texts, max_tokens=kept))


def test_a_byte_late_in_the_text_is_enough():
    bpb.require_text(windows([""] * 40 + ["x"]))
