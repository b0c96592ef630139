"""Trainings on several nodes, of forked ranks on this machine: the bits of one rank, and an end when a rank is lost."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nmoe.checkpoint import reader
from nmoe.experts.grouped import Apart
from nmoe.metrics.reader import read_rows
from nmoe.plan.resolve import resolve
from nmoe.rdep.control import Control
from tests.rdep.ranks import Ranks
from tests.train.node_sums import EXPERT, EXPERTS, backward, bits, chain, orders

TINY = Path(__file__).parent / "tiny.toml"
STEPS = ("batch.microbatch=1", "output.stop_after_step=10")
SOFTMAX = (
    'model.moe.router.kind="softmax"', "model.moe.router.num_experts=12", "model.moe.router.top_k=3",
    "model.moe.router.balance_loss=0.01", "model.moe.router.z_loss=0.001",
    'optimizer.experts.kind="adamw"', "optimizer.experts.lr=1e-3",
)  # fmt: skip
FIGURES = ("train/", "grad/", "optimizer/", "router/", "eval/", "data/")
"""Metrics that are the training's; the others are of its time and place."""


class Runs:
    """Runs by name below one directory."""

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        self.directory, self.ranks, self.count = directory, ranks, 0

    def train(self, name: str, nodes: int, per_node: int, *sets: str, **more) -> tuple[list[tuple], list[str]]:
        """How each rank ended, and what it wrote."""
        self.count += 1
        keys = [f'output.run_dir="{self.directory / name}"', f'output.metrics_dir="{self.directory / "metrics"}"']
        log, number = self.directory / "logs" / str(self.count), nodes * per_node
        ends = self.ranks.run(
            "training", number, per_node=per_node, config=str(TINY), sets=[*keys, *sets], log=str(log), **more
        )
        return ends, [(log / f"{rank}.txt").read_text() for rank in range(number)]

    def finished(self, name: str, nodes: int, per_node: int, *sets: str) -> None:
        ends, said = self.train(name, nodes, per_node, *sets)
        assert ends == [("done", 0)] * (nodes * per_node), said

    def left(self, name: str) -> list[tuple]:
        """The state's digest and counters, and every figure of the training, to the last bit."""
        rows = [
            (row.step, row.name, row.layer, row.expert, row.label, None if row.value is None else row.value.hex())
            for row in read_rows(self.directory / "metrics" / name)
            if row.name.startswith(FIGURES)
        ]
        head = reader.require_head(self.directory / name / "checkpoints")
        return [(head.state_digest, json.dumps(dict(head.state), sort_keys=True)), *rows]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    server = Ranks(tmp_path_factory.mktemp("ranks"), "tests.train.node_work")
    yield server
    server.close()


@pytest.fixture(scope="module")
def node_runs(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), ranks)


@pytest.fixture(scope="module")
def straight(node_runs: Runs) -> list[tuple]:
    """What a run of one rank has left."""
    node_runs.finished("straight", 1, 1, *STEPS)
    return node_runs.left("straight")


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (2, 1)])
def test_several_nodes_train_the_bits_of_one_rank(node_runs, straight, nodes, per_node):
    """State, losses, norms, router loads, held-out figures."""
    name = f"{nodes}x{per_node}"
    node_runs.finished(name, nodes, per_node, *STEPS)
    found = {row[1] for row in straight[1:]}
    assert {"train/loss", "grad/norm", "grad/group_norm", "router/load_cv", "eval/bits_per_byte"} <= found
    assert node_runs.left(name) == straight
    memory = {row.rank for row in read_rows(node_runs.directory / "metrics" / name, names=["memory/resident"])}
    assert memory == set(range(nodes * per_node))


def test_softmax_routers_and_adamw_for_experts_too(node_runs):
    node_runs.finished("softmax, alone", 1, 1, *STEPS, *SOFTMAX)
    node_runs.finished("softmax, nodes", 2, 2, *STEPS, *SOFTMAX)
    assert node_runs.left("softmax, nodes") == node_runs.left("softmax, alone")


def test_a_run_goes_on_from_nodes_to_one_rank_and_back(node_runs, straight):
    for stop, nodes, per_node in ((3, 2, 2), (6, 1, 1), (8, 1, 2), (10, 2, 1)):
        node_runs.finished("moved", nodes, per_node, STEPS[0], f"output.stop_after_step={stop}")
    assert node_runs.left("moved") == straight


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (2, 1), (3, 2), (6, 1), (2, 3)])
def test_sums_over_nodes_are_the_chain_over_microbatches(ranks, nodes, per_node):
    """Bit for bit, signs of zeros included, where another order gives other digits."""
    number = nodes * per_node
    answers = ranks.run("summing", number, per_node=per_node, microbatches=2 * number)
    assert {end for end, _ in answers} == {"done"}, answers
    wanted = [{name: bits(total) for name, total in chain(order).items()} for order in orders(2 * number)]
    assert all(wanted[0][name] != wanted[1][name] for name in wanted[0])
    for turn, totals in enumerate(wanted):
        pieces = sorted(tuple(piece) for _, (sums, _, _) in answers for piece in sums[turn])
        for name, total in totals.items():
            assert "".join(found for of, _, found in pieces if of == name) == total, (turn, name)
    each = len(wanted[1][EXPERT.name]) // per_node
    for rank, (_, (_, weights, told)) in enumerate(answers):
        place = rank % per_node
        here = wanted[1][EXPERT.name][place * each : (place + 1) * each]
        assert weights == {**wanted[1], EXPERT.name: here}
        assert told == [list(range(1 + peer)) for peer in range(number)]


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (4, 1)])
def test_the_plan_says_what_nodes_take_and_send(ranks, nodes, per_node):
    """Of the rank that has most, but for what keeps shares at multiples of 16 bytes."""
    number, sets = nodes * per_node, [STEPS[0], 'output.run_dir="unused"']
    answers = ranks.run("counted", number, per_node=per_node, config=str(TINY), sets=sets)
    assert {end for end, _ in answers} == {"done"}, answers
    kept, parts, weights = (max(column) for column in zip(*(found for _, found in answers), strict=True))
    plan = resolve(TINY, sets, ranks=number, ranks_per_node=per_node)
    assert plan.memory["none"].whole["reduction"] == pytest.approx(kept, rel=0.01)
    assert plan.traffic.parts == pytest.approx(parts, rel=0.01)
    assert plan.traffic.weights == pytest.approx(weights, rel=0.01)
    assert plan.traffic.passes == 1


@pytest.mark.parametrize("begins", [True, False])
def test_a_microbatch_without_rows_changes_nothing(begins):
    """Not even -0, to which 0 would be added; the step's first microbatch has 0, as one rank has it."""
    parameter = torch.nn.Parameter(torch.zeros(EXPERTS, 3, 4))
    apart = Apart(parameter, 3)
    apart.begins = begins
    backward(apart, range(EXPERTS), [2, 0, 1])
    negative = torch.full((3, 4), -0.0)
    assert bits(negative + apart.parts_M[0, 1]) == bits(torch.zeros(3, 4) if begins else negative)
    assert bits(negative + apart.parts_M[1, 1]) == bits(negative)
    assert parameter.grad is None


@pytest.mark.parametrize(("nodes", "per_node", "who"), [(2, 2, 3), (2, 1, 1)])
@pytest.mark.parametrize("fault", ["SIGKILL@backward", "SIGSTOP@optimizer", "raise@batch"])
def test_a_lost_rank_of_another_node_ends_all_and_is_named(node_runs, nodes, per_node, who, fault):
    """Nobody hangs, nobody shows a traceback but the one that raised, and what HEAD names is whole."""
    name = f"{fault} {nodes}x{per_node}"
    keys = (*STEPS, "output.checkpoint_every=2", "output.rank_timeout=4.0")
    ends, said = node_runs.train(name, nodes, per_node, *keys, who=who, fault=fault)
    for rank in set(range(nodes * per_node)) - {who}:
        assert ends[rank] == ("done", 1), (ends, *said)
        first = next(line for line in said[rank].splitlines() if line.startswith("error["))
        assert f"rank {who} " in first, said[rank]
        assert "Traceback" not in said[rank]
        file = "error.json" if rank == 0 else f"error.rank{rank}.json"
        assert f"rank {who} " in json.loads((node_runs.directory / name / file).read_text())["errors"][0]["message"]
    assert ends[who][0] == {"SIGKILL": "signal 9", "SIGSTOP": "stopped", "raise": "raised"}[fault.partition("@")[0]]
    reader.open_head(node_runs.directory / name / "checkpoints", Control.alone())  # verifies, if one was finished


EXPERTS_WEIGHT = "layers.2.moe.experts.w_down_EDF"


@pytest.mark.parametrize(
    ("nodes", "per_node", "sequences", "who", "said"),
    [(3, 1, 6, 2, "rank 2 has other bits than ranks 0, 1"), (2, 2, 4, 3, "rank 1 and rank 3 have different bits")],
)
def test_a_flipped_bit_of_an_expert_is_found_by_its_counterparts(node_runs, nodes, per_node, sequences, who, said):
    """Every node has all experts; where only two have one, nobody can say which of them is right."""
    name, keys = f"flip {nodes}x{per_node}", (*STEPS, f"batch.sequences={sequences}", "output.divergence_every=5")
    ends, told = node_runs.train(name, nodes, per_node, *keys, who=who, fault=f"flip {EXPERTS_WEIGHT}@forward")
    assert ends == [("done", 1)] * (nodes * per_node), told
    for text in told:
        assert f"error[N0510]: the ranks do not hold the same `{EXPERTS_WEIGHT}`: {said}\n" in text
        assert "--> step 5, before its update\n" in text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([[0, 3], [1, 3], [2, 3], [0, 1]], "rank 3 is one of 1 on its node, and rank 0 one of 3"),
        ([[0, 2], [0, 2], [1, 2], [1, 2]], "rank 1 is local rank 0 of 2"),
    ],
)
def test_nodes_that_are_not_alike_are_refused_by_name(node_runs, sizes, message):
    """sizes: what each rank is told of its place, and of its node's size."""
    ends, said = node_runs.train(message, 2, 2, *STEPS, sizes=sizes)
    assert ends == [("done", 2)] * 4
    assert all(f"error[N0601]: {message}\n" in text for text in said), said
