"""The step that test_hopper.py takes on a GPU, taken on the CPU: bfloat16 differs from float32 by roundings alone."""

import pytest
import torch

from tests.gpu.one_step import CONFIGS, CPU, FLOAT32, errors, one_step


@pytest.mark.parametrize("config", CONFIGS)
def test_bfloat16_differs_by_its_roundings(config, monkeypatch):
    """A rounding is 2^-9 at most; what one or two hundred leave of a gradient adds as a random walk: 16 of them."""
    torch.set_num_threads(1)
    loss, gradients = one_step(config, CPU, monkeypatch)
    wanted_loss, wanted = one_step(config, FLOAT32, monkeypatch)
    assert loss == pytest.approx(wanted_loss, rel=2**-12)
    assert max(errors(gradients, wanted).values()) < 16 * 2**-9
