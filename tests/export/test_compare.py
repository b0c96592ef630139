"""What the comparison lets pass: a tie of two experts and what follows from it, and nothing else."""

import attrs
import pytest
import torch

from nmoe.errors import RunError
from nmoe.export.compare import Outputs, compare

SEQUENCES, LENGTH, LAYERS, VOCAB = 4, 50, 2, 7


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(SEQUENCES * LENGTH, VOCAB, generator=generator)
    chosen = [torch.randint(0, 8, (SEQUENCES * LENGTH, 2), generator=generator) for _ in range(LAYERS)]
    return Outputs(logits, tuple(chosen))


def changed(outputs, token, *, choice=False, logits=0.0, until=None):
    """Another choice in layer 1 at `token` of the flattened batch, and logits moved from there up to `until`."""
    logits_TV, chosen = outputs.logits_TV.clone(), [indices.clone() for indices in outputs.chosen]
    logits_TV[token : token + 1 if until is None else until] += logits
    if choice:
        chosen[1][token, 0] += 1
    return attrs.evolve(outputs, logits_TV=logits_TV, chosen=tuple(chosen))


def test_equal_models(outputs):
    result = compare(outputs, outputs, sequences=SEQUENCES, place="")
    assert (result.difference, result.tokens, result.ties) == (0.0, 200, 0)
    assert (result.all_tokens, result.choices) == (200, 400)


def test_a_tie_excuses_its_token_and_what_follows_in_its_sequence(outputs):
    theirs = changed(outputs, 60, choice=True, logits=1.0, until=100)
    result = compare(outputs, theirs, sequences=SEQUENCES, place="")
    assert (result.difference, result.tokens, result.ties) == (0.0, 160, 1)


@pytest.mark.parametrize("token", [59, 100, 49])
def test_it_excuses_nothing_else(outputs, token):
    """Not the token before it, nor another sequence."""
    theirs = changed(changed(outputs, 60, choice=True), token, logits=1.0)
    with pytest.raises(RunError, match="N0915"):
        compare(outputs, theirs, sequences=SEQUENCES, place="")


def test_too_many_ties(outputs):
    theirs = outputs
    for token in range(45, 50):
        theirs = changed(theirs, token, choice=True)
    with pytest.raises(RunError, match="5 of 400 choices"):
        compare(outputs, theirs, sequences=SEQUENCES, place="")


def test_ties_everywhere_leave_nothing_to_compare(outputs):
    few = Outputs(outputs.logits_TV[:2], tuple(indices[:2] for indices in outputs.chosen))
    with pytest.raises(RunError, match="N0915"):
        compare(few, changed(changed(few, 0, choice=True), 1, choice=True), sequences=2, place="")


@pytest.mark.parametrize("logits", [float("nan"), float("inf"), 1e-3])
def test_logits_that_differ_or_are_no_numbers(outputs, logits):
    with pytest.raises(RunError, match="N0915"):
        compare(outputs, changed(outputs, 17, logits=logits), sequences=SEQUENCES, place="")
    with pytest.raises(RunError, match="N0915"):
        compare(changed(outputs, 17, logits=logits), outputs, sequences=SEQUENCES, place="")
