"""The wheel is the tree: every module and data file of it, nothing else, and it works where it is put."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"nmoe": ROOT / "nmoe", "nmoe/registry": ROOT / "registry", "nmoe/kernels": ROOT / "kernels"}


def python(*words: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, **more)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree, so that nothing is left in it; as an isolated build would."""
    copy = tmp_path_factory.mktemp("tree") / "nmoe"
    copy.mkdir()
    for name in ("nmoe", "registry", "kernels", "tests", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("dist")
    done = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    """A bare directory with the wheel in it; what it depends on comes from this environment."""
    directory = tmp_path_factory.mktemp("target")
    done = python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(directory), str(wheel))
    assert done.returncode == 0, done.stderr
    return directory


def test_the_wheel_is_the_tree(wheel):
    """File by file and byte by byte, with the two linked folders in the package; no test, config, lab book or cache."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    expected = {}
    for prefix, folder in FOLDERS.items():
        for path in folder.rglob("*"):
            name = f"{prefix}/{path.relative_to(folder)}"
            is_linked = prefix == "nmoe" and path.relative_to(folder).parts[0] in ("registry", "kernels")
            is_packed = path.suffix in (".py", ".xz", ".json", ".md") and path.name != "NOTES.md"
            if path.is_file() and not is_linked and is_packed:
                expected[name] = path.read_bytes()
    assert packed.keys() == expected.keys()
    assert all(packed[name] == content for name, content in expected.items())
    assert any(name.startswith("nmoe/registry/") for name in packed)
    assert any(name.startswith("nmoe/kernels/") for name in packed)
    assert "nmoe/data/corpus/shakespeare.train.txt.xz" in packed


def test_it_says_its_licence_and_its_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert texts["LICENSE"] == (ROOT / "LICENSE").read_text()
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "nmoe = nmoe.cli.main:main" in texts["entry_points.txt"]


def test_the_command_works_from_the_wheel(target, tmp_path):
    """The console script, in a directory that has nothing to do with the tree: a config, and the packaged text."""
    config = tmp_path / "my.toml"
    config.write_text((ROOT / "configs" / "debug.toml").read_text())
    program = (
        "import nmoe, nmoe.registry.table, nmoe.kernels; from nmoe.data import corpus;"
        "print(nmoe.__file__); print(nmoe.registry.table.__file__);"
        "print(len(corpus.documents('shakespeare', 'heldout')))"
    )
    variables = {**os.environ, "PYTHONPATH": str(target)}
    shown = python("-c", program, cwd=tmp_path, env=variables)
    assert shown.stdout.splitlines() == [
        str(target / "nmoe" / "__init__.py"), str(target / "nmoe" / "registry" / "table.py"), "2"
    ], shown.stderr  # fmt: skip
    command = [sys.executable, str(target / "bin" / "nmoe"), "build", "my.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)
    assert done.returncode == 0, done.stderr
    assert "my.toml" in done.stdout


@pytest.mark.parametrize("name", ["registry", "kernels"])
def test_the_folders_have_no_bare_name(name):
    """From the root of the tree, where Python would find them as top-level packages."""
    done = python("-c", f"import {name}", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert f"nmoe.{name}" in done.stderr
