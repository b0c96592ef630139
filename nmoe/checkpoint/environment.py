"""The environment record: what can change a bit of the training, and what a reader wants to know beside it.

A record has two parts. `exact` holds what can change bits: the source files that take part in the
arithmetic, each by its hash; the versions of Python, of the C library (schedules use its functions)
and of the numerical libraries; the device, or on the cpu target the CPU with its vector extensions,
caches and threads, by which libraries choose their code, and what that code computes
(`nmoe.checkpoint.arithmetic`); the switches of determinism and precision as torch reports them.
`recorded` holds what cannot: host, driver, paths, process, variables.

A run goes on from a checkpoint only if every entry of `exact` is as it was. Where one is not, the
table says which, and `--new-lineage` goes on openly as a new line of states.
"""

import hashlib
import importlib.metadata
import platform as python_platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

import nmoe
from nmoe import platform
from nmoe.errors import fail

# Below the package: what runs between a batch's tokens and the next state, and the specs that build it.
SOURCES = (
    "data", "experts", "graph.py", "kernels", "model", "optim", "part.py", "rdep", "registry", "rng.py", "sharding.py",
    "slices.py", "train",
)  # fmt: skip
# Among them what only talks, locks, waits or makes files whose content is recorded by digest.
NOT_ARITHMETIC = (
    "data/corpus/make.py", "data/hub.py", "data/prepare.py", "rdep/control.py",
    "train/drill.py", "train/events.py", "train/failure.py", "train/gate.py", "train/progress.py", "train/recording.py",
    "train/run_dir.py", "train/run_lock.py", "train/signals.py",
)  # fmt: skip
LIBRARIES = ("numpy", "triton")  # beside torch
COLUMN = 44
# Of `recorded`: another one at every start.
PASSING = (
    "boot_id", "pid", "usable_cpus", "working_directory", "variables.TORCHELASTIC_RESTART_COUNT",
    "variables.TORCHELASTIC_RUN_ID",
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Difference:
    """One entry of a record that is not as it was; "absent" where one side has none."""

    what: str
    then: str
    now: str


def record(target: str) -> dict[str, Any]:
    """The record of this process, to be taken after platform.require; JSON without floats."""
    exact: dict[str, Any] = {
        "target": target,
        "source": source_hashes(),
        "python": ".".join(python_platform.python_version_tuple()[:2]),
        "libc": " ".join(python_platform.libc_ver()),
        "libraries": _versions(),
        "torch": _torch_facts(),
    }
    recorded: dict[str, Any] = {
        **platform.host_facts(),
        "python": sys.version,
        "nmoe": nmoe.__version__,
        "git_commit": _git_commit(),
    }
    if target == "cpu":
        from nmoe.checkpoint import arithmetic

        exact["cpu"] = platform.cpu_facts()
        exact["arithmetic"] = arithmetic.results()
    else:
        exact["device"] = platform.device_facts(target)
        exact["cuda"] = _cuda_versions()
        exact["triton"] = _triton_compiler(target)
        recorded["cpu"] = platform.cpu_facts()
        recorded["threads"] = exact["torch"].pop("threads")
    return {"exact": exact, "recorded": recorded}


def compare(saved: Mapping[str, Any], current: Mapping[str, Any], *, part: str = "exact") -> list[Difference]:
    """Entries of one part ("exact" or "recorded") that differ between two records, by dotted name."""
    then, now = _flat(saved.get(part, {})), _flat(current.get(part, {}))
    return [
        Difference(what=name, then=then.get(name, "absent"), now=now.get(name, "absent"))
        for name in sorted(then.keys() | now.keys())
        if then.get(name, "absent") != now.get(name, "absent")
    ]


def table(differences: Sequence[Difference]) -> list[str]:
    """Aligned lines: what, then, now."""
    rows = [("what", "then", "now"), *((item.what, item.then, item.now) for item in differences)]
    cells = [[_shortened(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], *, run: str) -> None:
    """RunError N0309, with the table and the way to go on openly, if an entry of `exact` is not as it was saved."""
    differences = compare(saved, current)
    if not differences:
        return
    count = len(differences)
    raise fail(
        "N0309",
        f"{count} thing{'s' if count > 1 else ''} that can change bits {'are' if count > 1 else 'is'} not as when the "
        "checkpoint was saved: the run would not go on exactly",
        place=run,
        help="go back to that environment, or add --new-lineage to go on openly as a new line that says what changed",
        notes=table(differences),
    )


def source_hashes(root: Path | None = None) -> dict[str, str]:
    """SHA-256 of each source file that takes part in the arithmetic, by its name below the package."""
    root = Path(nmoe.__file__).parent if root is None else root
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(_sources(root))
        if str(path.relative_to(root)) not in NOT_ARITHMETIC
    }


def _sources(root: Path) -> Iterator[Path]:
    for name in SOURCES:
        if name.endswith(".py"):
            yield root / name
        else:
            yield from (root / name).rglob("*.py")


def _versions() -> dict[str, str]:
    """Of the libraries as installed; torch's own word for its version, which also names what it was built for."""
    import torch

    versions = {"torch": str(torch.__version__)}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _torch_facts() -> dict[str, Any]:
    """torch's build and its switches, as torch itself reports them."""
    import torch

    return {
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "git": torch.version.git_version,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "default_dtype": str(torch.get_default_dtype()),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": torch.backends.cudnn.enabled,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "matmul_bf16_reduction": str(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
        "matmul_fp16_reduction": str(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction),
    }


def _cuda_versions() -> dict[str, str]:
    """CUDA as torch was built for it, cuDNN and NCCL as loaded, and NVIDIA's packages as installed."""
    import torch

    packages = {
        name: distribution.version
        for distribution in importlib.metadata.distributions()
        if (name := str(distribution.metadata["Name"] or "").lower()).startswith("nvidia-")
    }
    return {
        **dict(sorted(packages.items())),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _triton_compiler(target: str) -> dict[str, str]:
    """Triton's own hashes of its compiler (sources and libraries) and of the target's backend (the assembler).

    With the kernels' sources and launch tables, which `source` has, they decide every compiled kernel: Triton
    names a kernel in its cache by the four.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    backend = make_backend(GPUTarget("cuda", int(target.removeprefix("sm_").removesuffix("a")), 32))
    return {
        "compiler": hashlib.sha256(triton_key().encode()).hexdigest(),
        "backend": hashlib.sha256(backend.hash().encode()).hexdigest(),
    }


def _git_commit() -> str:
    """The commit of the source tree, "" where there is no repository or no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(nmoe.__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Dotted name -> text of every leaf; a list is one."""
    if not isinstance(value, Mapping):
        return {path: " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)}
    leaves: dict[str, str] = {}
    for name, item in value.items():
        leaves |= _flat(item, f"{path}.{name}" if path else name)
    return leaves


def _shortened(text: str) -> str:
    return text if len(text) <= COLUMN else f"{text[: COLUMN - 12]}...{text[-9:]}"
