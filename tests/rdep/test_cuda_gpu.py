"""The transport between GPUs: bit for bit what one GPU gives, whatever comes late, and said when nobody comes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nmoe import platform

GPUS = torch.cuda.device_count() if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} HOPPER GPUS, 2 NEEDED: the transport between GPUs is not tested"),
]


def run(work: str) -> dict:
    """The answer of rank 0 of two."""
    environment = {name: value for name, value in os.environ.items() if name not in platform.REFUSED}
    environment["CUBLAS_WORKSPACE_CONFIG"] = platform.CUBLAS_WORKSPACE
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("cuda_work.py")), work], capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_gpus_give_the_bits_of_one_and_of_themselves():
    rows = run("bits")["rows"]
    assert len(rows) == 20
    assert [row for row in rows if not (row["same"] and row["same_matrices"] and row["again"])] == []


def test_a_thousand_layers_whatever_comes_late_and_with_every_free_buffer_spoiled():
    assert run("race") == {"layers": 1000, "ok": True}


def test_a_peer_that_does_not_come_is_named_and_waited_for_once():
    found = run("absent")
    assert found["verdict"] == 1
    assert found["seconds 6"] < found["seconds 5"]
    for words in ("N0803", "rank 1 did not come to phase 2, `counts` of layer 5 within 4 s", "seen of rank 1: phase 1"):
        assert words in found["text"]


def test_layers_that_fit_into_an_arena_are_those_of_one_gpu_and_all_ranks_know_of_those_that_do_not():
    assert run("arena") == {"fits": True, "alone": True, "verdicts": True}


def test_peers_gradients_are_added_in_order_and_small_values_gathered():
    assert run("node") == {"ok": True}


def test_a_layer_with_shared_experts_beside_is_that_of_one_gpu_and_the_host_never_waits():
    assert run("model") == {"ok": True}
