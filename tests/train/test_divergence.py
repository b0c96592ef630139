"""One bit that flips on one rank of three: found at the next comparison, with its tensor and its rank."""

import pytest

from nmoe.checkpoint import reader
from nmoe.graph import build
from nmoe.optim.replicas import Odd
from nmoe.plan.ranks import is_expert
from nmoe.plan.resolve import resolve
from tests.train.faults import flip
from tests.train.launches import SIX, TINY

KEYS = (
    *SIX, "model.moe.router.num_experts=12", "model.moe.router.top_k=3", "output.stop_after_step=9",
    "eval.bpb.max_tokens=32", "output.checkpoint_every=3",
)  # fmt: skip
BIAS, WEIGHT = "router.bias/layers.2", "embedding.weight_VD"


@pytest.fixture(scope="module")
def straight(module_launches):
    """One rank, which has nobody to compare with."""
    return module_launches.finished("straight", 1, *KEYS, "output.divergence_every=1")


def test_a_comparison_in_every_step_moves_no_bit(module_launches, straight):
    assert module_launches.finished("three", 3, *KEYS, "output.divergence_every=1") == straight


@pytest.mark.parametrize(
    ("fault", "who", "every", "keys", "place", "saved"),
    [
        # A bias that has parted stays so, until the next comparison or the next save.
        (f"flip {BIAS}@batch", 1, 4, ("output.checkpoint_every=9",), "step 8, before its update", 0),
        (f"flip {BIAS}@forward", 0, 100, (), "after step 6, before it is saved", 3),
        # What forward and backward of a step that compares have used.
        (f"flip {WEIGHT}@batch", 2, 5, (), "step 5, before its update", 3),
        (f"flip {WEIGHT}@backward", 1, 1, (), "step 5, before its update", 3),
        ("flip layers.1.ffn_norm.weight_D@forward", 0, 5, (), "step 5, before its update", 3),
        ("flip layers.2.moe.router.weight_ED@batch", 1, 5, (), "step 5, before its update", 3),
        # Of one that goes wrong in every step.
        (f"stuck flip {WEIGHT}@batch", 2, 8, ("output.checkpoint_every=9",), "step 8, before its update", 0),
    ],
)
def test_a_flipped_bit_is_found_and_the_run_goes_on_from_before_it(
    module_launches, straight, fault, who, every, keys, place, saved
):
    name, tensor = f"{fault} {every}".replace("/", " "), fault.partition("@")[0].rpartition(" ")[2]
    own = [key for key in KEYS if key.partition("=")[0] not in {one.partition("=")[0] for one in keys}]
    launch = module_launches.train(name, 3, *own, *keys, f"output.divergence_every={every}", who=who, fault=fault)
    assert launch.codes == [1, 1, 1], (launch.ends, *launch.said)
    others = ", ".join(str(rank) for rank in range(3) if rank != who)
    for rank, said in enumerate(launch.said):
        assert (
            f"error[N0510]: the ranks do not hold the same `{tensor}`: rank {who} has other bits than ranks {others}\n"
            in said
        ), said
        assert f"--> {place}\n" in said
        assert f"this was rank {rank} of 3" in said
        assert "Traceback" not in said
    errors = module_launches.errors(name)
    assert {errors[rank]["errors"][0]["code"] for rank in range(3)} == {"N0510"}
    # What a slow disk has not finished by then is not finished by ranks that end.
    assert reader.head_step(module_launches.path(name) / "checkpoints") in {0, saved}
    assert module_launches.finished(name, 3, *own, *keys) == straight


def test_one_bit_of_any_tensor_that_all_ranks_hold_is_seen():
    """And they are all parameters but the experts', and all biases. One graph is told three times, once with a flip."""
    graph = build(resolve(str(TINY)))
    alike = {name for name, _ in graph.model.named_parameters() if not is_expert(name)}
    biases = {name for name in graph.state() if name.startswith("router.bias/")}
    assert set(graph.replicas.tensors) == alike | biases
    assert len(biases) == 3
    before = graph.replicas.halves()
    for name in graph.replicas.tensors:
        flip(graph, name)
        assert graph.replicas.odd([before, before, graph.replicas.halves()]) == [Odd(name, ((0, 1), (2,)))]
        flip(graph, name)
