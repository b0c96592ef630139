"""Experts in float32: products, activations and saved rows."""

from nmoe.experts.grouped import GroupedExperts


class Fp32Experts(GroupedExperts):
    """The weights' dtype is float32, and so is everything else."""
