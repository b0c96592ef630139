"""The one file that looks at the hardware and at the environment of the process.

Everything else is told. A run asks `require` before it allocates anything: the hardware must be the
plan's target, and no variable may be set that changes arithmetic behind the program's back. Both
are failures of the place where the run was started, not of the text that the user wrote: the same
file is valid on another machine, `nmoe build` accepts it here, and the exit status is 1.

Measured on 2 cores (torch 2.13, one thread): `use_deterministic_algorithms` costs nothing here once
`fill_uninitialized_memory`, which it switches on, is off again (with it an empty of 16 MB takes 2.7 ms,
without 0.005); index_put, index_add, scatter_add, embedding's backward and cumsum are within noise.
"""

import ctypes
import os
import platform as python_platform
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import attrs

from nmoe.errors import Diagnostic, RunError, fail
from nmoe.variables import FAMILIES, RECORDED, REFUSED

if TYPE_CHECKING:
    import torch

CAPABILITY_OF_TARGET = {"sm_100a": (10, 0), "sm_90a": (9, 0)}
NAME_OF_TARGET = {"sm_100a": "B200, compute capability 10.0", "sm_90a": "H100 or H200, compute capability 9.0"}

# What `require` itself sets, for the CUDA targets: the workspace that makes cuBLAS repeatable.
CUBLAS_WORKSPACE = ":4096:8"
_set_here: set[str] = set()


@attrs.frozen(kw_only=True)
class Process:
    """This process among those of a run, as torchrun says. One process alone is rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_address: str
    master_port: int


def process() -> Process:
    """Reads RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    RunError N0603 if some are set and others are not, or they contradict each other.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not any(name in found for name in names[:4]):
        return Process(rank=0, local_rank=0, world_size=1, local_world_size=1, master_address="", master_port=0)
    problems = [f"{name} is not set, and {min(found)} is" for name in names if name not in found]
    numbers = {}
    for name, text in found.items():
        if name == "MASTER_ADDR":
            continue
        if text.isascii() and text.isdigit() and int(text) < 2**31:
            numbers[name] = int(text)
        else:
            problems.append(f"{name} = {text!r} is no count")
    if not problems:
        problems = [
            f"{small} = {numbers[small]} is not below {large} = {numbers[large]}"
            for small, large in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
            if numbers[small] >= numbers[large]
        ]
        if numbers["LOCAL_WORLD_SIZE"] > numbers["WORLD_SIZE"]:
            problems.append("LOCAL_WORLD_SIZE is larger than WORLD_SIZE")
        if not 0 < numbers["MASTER_PORT"] < 65536:
            problems.append(f"MASTER_PORT = {numbers['MASTER_PORT']} is no port")
    if problems:
        raise fail(
            "N0603", f"the launch variables do not fit together: {problems[0]}",
            help="start one process without any of them, or all through torchrun", notes=problems[1:],
        )  # fmt: skip
    return Process(master_address=found["MASTER_ADDR"], **{name.lower(): number for name, number in numbers.items()})


def variables_of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of one of the ranks that this process launches on this machine, with a store at `port`.

    It is this process's, and what torchrun's would be beside.
    """
    mine = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }  # fmt: skip
    fixed = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**os.environ, **fixed, **{name: str(value) for name, value in mine.items()}}


def environment_variables() -> dict[str, str]:
    """Variables of the families that touch arithmetic libraries, for the record; those refused are not among them."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name.startswith(FAMILIES) or name in RECORDED) and name not in REFUSED
    }


def watch_nccl() -> None:
    """Has torch report what becomes of an NCCL communicator made from now on, and not end the process for it."""
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"


def refuse_environment_variables() -> None:
    """RunError N0604, one finding for each variable of the closed list that somebody has set."""
    found = [name for name in REFUSED if name in os.environ and name not in _set_here]
    if found:
        raise RunError(
            Diagnostic(
                code="N0604",
                message=f"the environment variable `{name}` is set to {os.environ[name]!r}: it {REFUSED[name]}",
                help=f"unset {name}; what may change a bit of training stands in the TOML",
            )
            for name in found
        )


def require(target: str, threads: int | None) -> None:
    """Makes this process fit for a plan of that target, or says why it is not.

    Checks the variables and the hardware (RunError N0604, N0605), sets the plan's number of threads
    (N0606 if torch does not take it) and torch's switches of determinism and precision. Allocates
    nothing on a device. May be called again with the same arguments.
    """
    refuse_environment_variables()
    if target in CAPABILITY_OF_TARGET:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACE
        _set_here.add("CUBLAS_WORKSPACE_CONFIG")
    import torch

    if target in CAPABILITY_OF_TARGET:
        _require_device(target)
    elif target == "cpu":
        _keep_freed_memory()
    else:
        raise ValueError(f"no such target: {target!r}")
    if threads is not None:
        torch.set_num_threads(threads)
        if torch.get_num_threads() != threads:
            raise fail("N0606", f"torch uses {torch.get_num_threads()} threads where the plan has {threads}")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of giving it back to the kernel (mallopt(3)).

    A step frees and asks again for the same buffers; given back, each page of them costs a fault. Quickstart's
    step: 6% less CPU time, measured 2026-11-23 on one core. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_threshold, m_trim_threshold, m_top_pad = -3, -1, -2
        mallopt(m_mmap_threshold, 32 * 2**20)
        mallopt(m_trim_threshold, 2**30)
        mallopt(m_top_pad, 64 * 2**20)


def _require_device(target: str) -> None:
    """RunError N0605 unless this process's CUDA device is the target; it is then torch's current one."""
    import torch

    way_out = f'[platform] target = "{target}" is the line to change'
    wanted = f"target `{target}` needs a {NAME_OF_TARGET[target]}"
    if not torch.cuda.is_available():
        raise fail(
            "N0605", f"{wanted}, and no CUDA device was found",
            help=f'{way_out}; target = "cpu" with threads = {usable_cpus()} asks for this machine',
            notes=[f"torch is {torch.__version__}"],
        )  # fmt: skip
    local_rank, count = process().local_rank, torch.cuda.device_count()
    if local_rank >= count:
        raise fail(
            "N0605", f"local rank {local_rank} has no device: {count} were found",
            help=f"launch at most {count} processes on this host",
        )  # fmt: skip
    found = torch.cuda.get_device_capability(local_rank)
    if found != CAPABILITY_OF_TARGET[target]:
        matching = [name for name, capability in CAPABILITY_OF_TARGET.items() if capability == found]
        asks = f'; target = "{matching[0]}" asks for this device' if matching else ""
        raise fail(
            "N0605",
            f"{wanted}, and a {torch.cuda.get_device_name(local_rank)} "
            f"(compute capability {found[0]}.{found[1]}) was found",
            help=way_out + asks,
        )  # fmt: skip
    torch.cuda.set_device(local_rank)


def device(target: str) -> "torch.device":
    """Where the tensors of a plan of that target live in this process."""
    import torch

    return torch.device("cpu") if target == "cpu" else torch.device("cuda", process().local_rank)


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def cpu_facts() -> dict[str, Any]:
    """The CPU by what decides which code paths libraries choose: model, vector extensions, cache sizes."""
    first = _read("/proc/cpuinfo").split("\n\n")[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = fields.get("flags", fields.get("Features", "")).split()
    vector = ("sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "sve", "asimd", "bf16", "i8mm")
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    numbers = [fields.get(name, "") for name in ("vendor_id", "cpu family", "model", "stepping")]
    return {
        "machine": python_platform.machine(),
        "model": fields.get("model name", fields.get("CPU part", "unknown")),
        "family": " ".join(numbers).strip(),
        "isa": sorted(flag for flag in flags if flag.startswith(vector)),
        "caches": [f"{_read(str(path / 'type'))} {_read(str(path / 'size'))}" for path in caches],
    }


def device_facts(target: str) -> dict[str, Any]:
    """The accelerator by what decides bits: name, capability, number of multiprocessors. Empty for the CPU."""
    if target == "cpu":
        return {}
    import torch

    properties = torch.cuda.get_device_properties(process().local_rank)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def host_facts() -> dict[str, Any]:
    """Where this process runs: what a reader wants to know and what changes no bit."""
    return {
        "host": host_name(),
        "boot_id": boot_id(),
        "pid": os.getpid(),
        "kernel": python_platform.release(),
        "os": _os_name(),
        "usable_cpus": usable_cpus(),
        "python_path": sys.executable,
        "working_directory": str(Path.cwd()),
        "nvidia_driver": _read("/proc/driver/nvidia/version").partition("\n")[0],
        "variables": environment_variables(),
    }


def host_name() -> str:
    return socket.gethostname()


def boot_id() -> str:
    """The kernel's name for this boot: equal only for processes of one running kernel; empty where there is none."""
    return _read("/proc/sys/kernel/random/boot_id")


def machine_id() -> str:
    """The installed system's name for itself; empty where it has none, as in many containers."""
    return _read("/etc/machine-id")


@attrs.frozen(kw_only=True)
class Memory:
    """Bytes: resident now and at most so far; on the device, allocated now and at most (0 on the CPU)."""

    resident: int
    resident_peak: int
    device_allocated: int
    device_peak: int


def memory(target: str) -> Memory:
    """This process's memory."""
    import resource

    pages = int(_read("/proc/self/statm").split()[1])
    allocated = peak = 0
    if target != "cpu":
        import torch

        allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return Memory(
        resident=pages * os.sysconf("SC_PAGE_SIZE"),
        resident_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device_allocated=allocated,
        device_peak=peak,
    )


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody watches the stream on a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def terminal_width(stream: TextIO) -> int:
    """Columns of the terminal that the stream writes to."""
    return os.get_terminal_size(stream.fileno()).columns


def _os_name() -> str:
    try:
        return python_platform.freedesktop_os_release().get("PRETTY_NAME", sys.platform)
    except OSError:
        return sys.platform


def _read(path: str) -> str:
    """The text of a small file of the kernel, stripped; empty where this system has no such file."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
