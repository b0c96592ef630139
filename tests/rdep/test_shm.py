"""Several ranks compute bit for bit what one rank computes: outputs and every gradient."""

import json
import subprocess
import sys

import pytest

MICROBATCHES = 12


def merged(answers):
    """The ranks' digests as one table; every rank must have got to its end, and none may repeat another's."""
    assert [end for end, _ in answers] == ["done"] * len(answers), answers
    table = {key: value for _, digests in answers for key, value in digests.items()}
    assert len(table) == sum(len(digests) for _, digests in answers)
    return table


def case(name, kind, experts=12, top_k=3, microbatches=MICROBATCHES, depth=1):
    return {
        "name": name, "kind": kind, "experts": experts, "top_k": top_k, "microbatches": microbatches, "depth": depth
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "top_k"),
    [("spread", 3), ("one expert", 1), ("one expert", 2), ("one rank", 4), ("uniform", 2), ("skewed", 3),
     ("some empty", 3), ("cancelling", 3), ("spread", 12)],
)  # fmt: skip
def test_any_number_of_ranks_gives_the_same_bits(ranks, kind, name, top_k):
    work = case(name, kind, top_k=top_k)
    alone = merged(ranks.run("layers", 1, transport="local", **work))
    for number in (2, 3, 4):
        found = merged(ranks.run("layers", number, **work))
        wrong = sorted(key for key in alone.keys() | found.keys() if alone.get(key) != found.get(key))
        assert not wrong, f"{number} ranks: {wrong[:5]} of {len(wrong)}"


def test_the_cancelling_values_show_an_order(ranks):
    """Else the test above would pass whatever the order of the microbatches."""
    work = case("cancelling", "fp32")
    alone, reverse = (merged(ranks.run("layers", 1, transport="local", backwards=b, **work)) for b in (False, True))
    differ = {key for key in alone if alone[key] != reverse[key]}
    assert differ == {key for key in alone if "expert" in key}


def test_one_rank_over_shared_memory(ranks):
    work = case("some empty", "bf16", depth=2)
    local, shared = (merged(ranks.run("layers", 1, transport=name, **work)) for name in ("local", "shm"))
    assert local == shared


def test_two_runs_give_the_same_bits(ranks):
    work = case("spread", "fp32", depth=3)
    assert merged(ranks.run("layers", 4, **work)) == merged(ranks.run("layers", 4, **work))


def test_the_shared_memory_has_no_name(ranks):
    """So that nothing is left of a crash."""
    for end, found in ranks.run("files", 3):
        assert (end, found) == ("done", ["/memfd:nmoe-rdep (deleted)"])


def test_backward_may_compute_the_experts_again(ranks):
    """The layout is kept; rows and outputs travel once more, on all ranks together."""
    work = case("some empty", "bf16", depth=3)
    alone = merged(ranks.run("layers", 1, transport="local", **work))
    assert merged(ranks.run("layers", 1, transport="local", recompute=True, **work)) == alone
    assert merged(ranks.run("layers", 3, recompute=True, **work)) == alone


def test_the_whole_layer_with_its_router(ranks):
    """MoE as the model has it: dx has the router's part too, and the router's gradient is each microbatch's own."""
    alone = merged(ranks.run("moe", 1, microbatches=8))
    for number in (2, 4):
        assert merged(ranks.run("moe", number, microbatches=8)) == alone


def test_torchrun_starts_it(tmp_path):
    """The rendezvous of a launch, in processes of their own: the ranks' times, a line of JSON each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    shape = ["--json", "--tokens=64", "--hidden=16", "--width=16", "--experts=4", "--top-k=2", "--repeats=2"]
    done = subprocess.run(
        [*launch, "-m", "nmoe", "bench", "rdep", *shape], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    who = [("forward", "alone"), ("forward", "ours"), ("backward", "alone"), ("backward", "ours")]
    assert [(row["part"], row["who"]) for row in rows] == who
    assert all(row["note"] == "a rank; the bits of the layer alone" for row in rows if row["who"] == "ours")
