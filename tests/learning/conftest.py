"""The packaged text is read once, and a training's switches of torch stay its own."""

from functools import cache

import pytest
import torch

from nmoe.data import corpus


@pytest.fixture(autouse=True, scope="session")
def _read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "documents", cache(corpus.documents))
        yield


@pytest.fixture(autouse=True)
def _switches_back():
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
