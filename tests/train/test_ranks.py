"""Whole trainings by several ranks: the state and every figure of the ledger are one rank's, bit for bit."""

import pytest

from tests.train.launches import CONFIGS, DENSE, FOUR, FP32, TINY, first_difference

STEPS = ("output.stop_after_step=3", "eval.bpb.every_tokens=128", "eval.bpb.max_tokens=160")
SAMPLE = (
    "tiny: bf16 states, muon for matrices and experts, sigmoid",
    "softmax router, balance and z losses, on 3 and 6 ranks",
    "short documents, whole layers computed again",
    "microbatches that cancel",
    DENSE,
)
"""Of the table that `python -m tests.train.ranks_table` prints."""


@pytest.mark.parametrize("name", SAMPLE)
def test_any_number_of_ranks_trains_the_same_bits(module_launches, name):
    keys, numbers, odd = CONFIGS[name]
    config = TINY.with_name("dense.toml") if name == DENSE else TINY
    for number in (1, *numbers):
        module_launches.finished(f"{name}, {number}", number, *STEPS, *keys, config=config, odd=odd)
    alone = module_launches.left(f"{name}, 1")
    names = {row[2] for row in alone}
    assert {"train/loss", "grad/norm", "grad/group_norm", "data/batch_digest", "eval/bits_per_byte"} <= names
    if name != DENSE:
        assert {"router/entropy", "router/load_cv", "router/max_load"} <= names, sorted(names)
    for number in numbers:
        assert first_difference(alone, module_launches.left(f"{name}, {number}")) == ""


def test_a_run_goes_on_with_any_number_of_ranks(module_launches):
    """Begun on 2, continued on 4, finished on 1: the training that one rank did without a stop."""
    keys = (*FOUR, *STEPS[1:])
    for step, number in ((1, 2), (2, 4), (3, 1)):
        module_launches.finished("relay", number, *keys, f"output.stop_after_step={step}")
    straight = f"{SAMPLE[0]}, 1"
    if not module_launches.path(straight).exists():
        module_launches.finished(straight, 1, *STEPS, *FOUR)
    assert first_difference(module_launches.left(straight), module_launches.left("relay")) == ""


@pytest.mark.parametrize(("fault", "number", "odd"), [("other order", 4, "cancelling"), ("other microbatch", 2, "")])
def test_a_sum_in_another_order_is_found(module_launches, fault, number, odd):
    """The same microbatches and the same losses, and the norm of the first step is already another."""
    keys, straight = (*STEPS, *FOUR, *FP32), "microbatches that cancel, 1" if odd else "fp32, 1"
    if not module_launches.path(straight).exists():
        module_launches.finished(straight, 1, *keys, odd=odd)
    module_launches.finished(fault, number, *keys, odd=", ".join(filter(None, (odd, fault))))
    difference = first_difference(module_launches.left(straight), module_launches.left(fault))
    assert difference.startswith("(1, 64, 'grad/norm', "), difference
