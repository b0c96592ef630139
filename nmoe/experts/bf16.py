"""Experts in bfloat16: rows, weights and saved pre-activations are bfloat16, sums float32.

Values are rounded to bfloat16 where a product reads or writes rows: x, pre-activation, activation,
output row, gradient of the pre-activation, gradient of the input row. Weight gradients stay
float32.
"""

from nmoe.experts.grouped import GroupedExperts


class Bf16Experts(GroupedExperts):
    """The weights' dtype is bfloat16, and so is that of the rows."""
