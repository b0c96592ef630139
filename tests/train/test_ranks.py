"""Whole trainings by several ranks: the state and every figure of the ledger are one rank's, bit for bit."""

import pytest

from nmoe.metrics.reader import read_rows
from tests.train.launches import CONFIGS, DENSE, FOUR, FP32, SOFTMAX, TINY, first_difference

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


@pytest.mark.parametrize("number", [2, 4])
def test_steps_that_are_repeated_for_want_of_room_give_the_same_bits(module_launches, number):
    """Gradients, loads, balance losses and sums begin anew; all ranks repeat what one of them had no room for."""
    keys, name = (*STEPS, *FOUR, *SOFTMAX), f"no room, {number}"
    if not module_launches.path("room, 1").exists():
        module_launches.finished("room, 1", 1, *keys)
    launch = module_launches.train(name, number, *keys, odd="no room")
    assert launch.codes == [0] * number, launch.said
    assert first_difference(module_launches.left("room, 1"), module_launches.left(name)) == ""
    said = "a microbatch brought 101 rows to a rank, and activation_rows = 100"
    assert [text.count(said) for text in launch.said] == [1] + [0] * (number - 1)
    rows = read_rows(module_launches.metrics(name), names=["memory/activation_rows", "time/repeated"])
    assert [row.value for row in rows if row.rank is not None] == [101 if n == 1 else 100 for n in range(number)] * 3
    assert len([row for row in rows if row.name == "time/repeated" and row.value > 0]) == 3
