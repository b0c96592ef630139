"""Experts beat dense layers of equal active parameters on the same text; against_dense.txt has the seeds."""

import numpy as np

from nmoe.plan.resolve import resolve
from tests.learning.against_dense import EXPERTS, LAYERS, SEEDS, differences, pair, recorded
from tests.learning.student import band, tail
from tests.learning.training import DENSE, MOE


def test_the_comparison_is_fair():
    """Active parameters of the dense model at least those of the other, and within 1% of them; all else equal."""
    experts, dense = resolve(MOE, EXPERTS), resolve(DENSE, LAYERS)
    assert dense.parameters_active == dense.parameters_total
    assert experts.parameters_active <= dense.parameters_active <= 1.01 * experts.parameters_active
    assert dense.total_tokens == experts.total_tokens and dense.tokens_per_step == experts.tokens_per_step
    for section in ("platform", "random", "schedule", "data", "batch"):
        assert dense.sections[section] == experts.sections[section], section
    for part in ("dense", "matrices"):
        assert getattr(dense.config.optimizer, part) == getattr(experts.config.optimizer, part)
    assert dense.config.model.attention == experts.config.model.attention


def test_experts_beat_dense_layers_over_the_recorded_seeds():
    """Paired t test, one-sided: the chance of such a difference between equals is below one in a thousand."""
    pairs = recorded()
    assert [p.seed for p in pairs] == list(SEEDS) and len(pairs) >= 3
    found = differences(pairs)
    t = float(found.mean() / (found.std(ddof=1) / np.sqrt(len(found))))
    assert tail(t, len(found) - 1) < 1e-3
    assert (found > 0).all()


def test_a_further_seed_is_like_the_recorded_ones():
    further = pair(100)
    low, high = band(differences(recorded()), 1, 1e-3)
    assert further.moe < further.dense
    assert low < further.dense - further.moe < high
