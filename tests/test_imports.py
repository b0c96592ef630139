"""Imports go one way, every module has a place, and what must stay light never imports torch.

The layers of DESIGN, from the top; a module may import its own layer's package and those listed.
Imports inside a spec's `build()`, or a `build_...()` beside it, are the one exception: that is how
a plan becomes run-time code.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEAVES = {"errors", "part", "rng", "sharding", "slices", "strict_json"}
RUNTIME = {"model", "experts", "rdep", "optim", "data", "metrics"}
# package (or module of nmoe) -> what it may import, beside itself and the leaves
ALLOWED: dict[str, set[str]] = {
    "": set(),  # nmoe/__init__.py
    "errors": set(),
    "part": set(),
    "rng": set(),
    "sharding": {"slices"},
    "slices": set(),
    "strict_json": set(),
    "__main__": {"cli"},
    "registry": set(),
    "plan": {"registry"},
    "kernels": set(),
    **{package: {"kernels"} for package in ("data", "metrics")},
    "optim": {"kernels", "rdep"},  # adds the gradients of a node's ranks
    "experts": {"kernels", "rdep"},  # grouped by rdep's layout
    "rdep": {"kernels"},
    "model": {"kernels", "experts", "rdep"},
    "platform": {"variables"},
    "variables": set(),
    "graph": {"plan", "registry", "platform"} | RUNTIME,
    "checkpoint": {"plan", "registry", "platform"} | RUNTIME,
    "eval": {"plan", "registry"} | RUNTIME,
    "report": {"checkpoint", "plan", "registry", "metrics"},
    "export": {"plan", "registry", "checkpoint", "data", "metrics", "model"},
    "bench": {"train", "checkpoint", "export", "plan", "registry", "platform", "graph"} | RUNTIME | {"kernels"},
    "train": {"graph", "checkpoint", "eval", "report", "plan", "registry", "platform"} | RUNTIME,
    "cli": {"train", "graph", "checkpoint", "eval", "report", "bench", "export", "plan", "registry", "platform"}
    | RUNTIME,
}
LIGHT = {"", "errors", "variables", "part", "sharding", "slices", "strict_json", "rng", "registry", "plan", "cli",
         "__main__"}  # fmt: skip


def modules():
    """(dotted name below nmoe, file) of every module; registry/ and kernels/ through their real folders."""
    for file in sorted((ROOT / "nmoe").rglob("*.py")):
        if not {"registry", "kernels"} & set(file.relative_to(ROOT / "nmoe").parts):
            yield ".".join(file.relative_to(ROOT / "nmoe").with_suffix("").parts), file
    for folder in ("registry", "kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join(file.relative_to(ROOT).with_suffix("").parts), file


FILES = dict(modules())


def package_of(name: str) -> str:
    head = name.split(".")[0]
    return "" if head == "__init__" else head


def imported(file: Path, *, skip_build: bool, lazy: bool = True):
    """(module, line) of every import. lazy: those inside functions too; TYPE_CHECKING blocks never count."""

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                if lazy and not (skip_build and child.name.partition("_")[0] == "build"):
                    yield from walk(child)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            elif isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: relative import"
                if child.module == "nmoe":
                    yield from ((f"nmoe.{alias.name}", child.lineno) for alias in child.names)
                else:
                    yield child.module, child.lineno
            else:
                yield from walk(child)

    yield from walk(ast.parse(file.read_text(), str(file)))


def test_every_module_has_a_place():
    for name, file in FILES.items():
        assert package_of(name) in ALLOWED, f"{file.relative_to(ROOT)} has no place in the house"


@pytest.mark.parametrize("name", sorted(FILES))
def test_arrows_go_one_way(name):
    package = package_of(name)
    build_is_free = package == "registry"
    for module, line in imported(FILES[name], skip_build=build_is_free):
        parts = module.split(".")
        if parts[0] != "nmoe" or len(parts) == 1:
            assert parts[0] not in ("registry", "kernels"), f"{name}:{line} imports {module} under its bare name"
            continue
        if parts[1] == "__version__":
            continue
        assert parts[1] in ALLOWED[package] | LEAVES | {package}, f"{name}:{line} imports {module}"


@pytest.mark.parametrize("name", sorted(n for n in FILES if package_of(n) in LIGHT))
def test_what_must_stay_light_imports_no_torch(name):
    for module, line in imported(FILES[name], skip_build=True, lazy=False):
        heavy = {"torch", "numpy", "duckdb", "pyarrow", "datasets", "triton", "rich"}
        assert module.split(".")[0] not in heavy, f"{name}:{line} imports {module}"


def test_only_one_file_looks_at_the_process_environment():
    """nmoe/platform.py reads it; a test process or a gate may hand one to its children."""
    for name, file in FILES.items():
        if name == "platform":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
                assert not isinstance(node.value, ast.Name) or node.value.id != "os", f"{name}:{node.lineno}"


LIGHT_COMMANDS = [
    ["--help"], ["--version"], ["bench", "--help"], ["bench", "step", "--help"], ["build", "--help"],
    ["build", "--schema"], ["build", "configs/moonlet.toml"],
    ["build", "configs/debug.toml", "--json"], ["build", "configs/moonlet.toml", "--diff", "configs/moonlight.toml"],
    ["build", "configs/nowhere.toml"], ["nonsense"],
]  # fmt: skip


@pytest.mark.parametrize("args", LIGHT_COMMANDS, ids=" ".join)
def test_the_front_end_never_loads_torch(args):
    code = (
        "import sys; from nmoe.cli.main import run; run(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'duckdb', 'pyarrow', 'datasets', 'triton', 'rich'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
