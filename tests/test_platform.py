"""The hardware, the launch and the variables: what is accepted, and how each refusal names its cause."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nmoe import platform
from nmoe.errors import RunError

LAUNCH = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in [*LAUNCH, *platform.REFUSED]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "_set_here", set())
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)


def launch(monkeypatch, **changes):
    for name, value in {**LAUNCH, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_one_process_alone_is_rank_0_of_1():
    process = platform.process()
    assert (process.rank, process.local_rank, process.world_size, process.local_world_size) == (0, 0, 1, 1)


def test_the_variables_of_torchrun(monkeypatch):
    launch(monkeypatch)
    process = platform.process()
    assert (process.rank, process.local_rank, process.world_size, process.local_world_size) == (3, 1, 4, 2)
    assert (process.master_address, process.master_port) == ("h", 29500)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": None}, "RANK is not set, and LOCAL_RANK is"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"RANK": "4"}, "RANK = 4 is not below WORLD_SIZE = 4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK = 2 is not below LOCAL_WORLD_SIZE = 2"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is larger"),
        ({"RANK": "-1"}, "RANK = '-1' is no count"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE = 'four' is no count"),
        ({"RANK": "\u0663"}, "is no count"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '' is no count"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT = 0 is no port"),
    ],
)
def test_launch_variables_that_do_not_fit(monkeypatch, changes, words):
    launch(monkeypatch, **changes)
    with pytest.raises(RunError, match="N0603") as caught:
        platform.process()
    assert words in caught.value.render()


@pytest.mark.parametrize("name", sorted(platform.REFUSED))
def test_each_variable_of_the_closed_list_is_refused_by_name(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(RunError, match="N0604") as caught:
        platform.require("cpu", 1)
    assert f"`{name}` is set to '1'" in caught.value.render()
    assert f"unset {name}" in caught.value.render()
    assert caught.value.exit_code == 1


def test_all_of_them_are_named_at_once(monkeypatch):
    for name in ("NCCL_ALGO", "MKL_CBWR", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(RunError) as caught:
        platform.require("cpu", 1)
    assert len(caught.value.diagnostics) == 3


def test_others_of_those_families_are_recorded(monkeypatch):
    for name in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "7")
        platform.refuse_environment_variables()
        assert platform.environment_variables()[name] == "7"
    monkeypatch.setenv("HOME_OF_SOMETHING", "7")
    assert "HOME_OF_SOMETHING" not in platform.environment_variables()


def test_the_plans_threads_win_over_the_variable():
    code = (
        "import torch; from nmoe import platform; print(torch.get_num_threads()); platform.require('cpu', 3); "
        "print(torch.get_num_threads())"
    )
    clean = {name: value for name, value in os.environ.items() if name not in platform.REFUSED}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "3"]


def test_torchs_switches_are_set():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    platform.require("cpu", 1)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("target", ["sm_100a", "sm_90a"])
def test_a_machine_without_the_device_says_what_to_change(target):
    with pytest.raises(RunError, match="N0605") as caught:
        platform.require(target, None)
    text = caught.value.render()
    assert f"target `{target}` needs" in text
    assert "no CUDA device was found" in text
    assert f'[platform] target = "{target}" is the line to change' in text


@pytest.mark.parametrize(
    ("target", "found", "words"),
    [
        ("sm_100a", (9, 0), 'target = "sm_90a" asks for this device'),
        ("sm_90a", (10, 0), 'target = "sm_100a" asks for this device'),
        ("sm_90a", (8, 0), "(compute capability 8.0) was found"),
    ],
)
def test_another_device_than_the_target_is_refused(monkeypatch, target, found, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    with pytest.raises(RunError, match="N0605") as caught:
        platform.require(target, None)
    assert "a Some GPU" in caught.value.render()
    assert words in caught.value.render()
    launch(monkeypatch, LOCAL_RANK="1")
    with pytest.raises(RunError, match="local rank 1 has no device: 1 were found"):
        platform.require(target, None)


def test_what_require_sets_itself_it_does_not_refuse_later(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for _ in range(2):
        with pytest.raises(RunError, match="N0605"):
            platform.require("sm_90a", None)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == platform.CUBLAS_WORKSPACE


def test_devices_and_memory():
    assert platform.device("cpu") == torch.device("cpu")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    found = platform.memory("cpu")
    # The kernel's other account of the same; its counters lag by some pages a thread.
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    assert found.resident == pytest.approx(int(status["VmRSS"].split()[0]) * 1024, abs=8 << 20)
    assert found.resident_peak == pytest.approx(int(status["VmHWM"].split()[0]) * 1024, abs=8 << 20)
    assert found.resident > block.numel()
    assert found.device_allocated == found.device_peak == 0


def test_a_file_is_no_terminal():
    assert not platform.is_terminal(io.StringIO())


def test_importing_it_does_not_import_torch():
    code = "import sys, nmoe.platform; nmoe.platform.process(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
