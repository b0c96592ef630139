"""Every test draws from named seeds and computes on one thread, so that two runs see the same bits."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(request):
    import sys

    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
    return
