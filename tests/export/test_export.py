"""nmoe export: what strangers load is the run's model; what cannot be exported is refused; nothing half is left."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmoe.checkpoint import format as layout
from nmoe.checkpoint import reader
from nmoe.cli.main import run as nmoe
from nmoe.export import compare, hf, library, weights
from nmoe.metrics.reader import last_value
from tests.export.conftest import ARCHITECTURES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LOGITS = 2e-5  # as in tests/model/test_against_transformers.py


@pytest.fixture
def run(families, tmp_path):
    """A copy of the Qwen3 run: the tests may damage it."""
    family = families("qwen")
    shutil.copytree(family.path, tmp_path / family.name)
    return tmp_path / family.name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_stranger_loads_it_and_computes_the_same(name, families, tmp_path, capsys):
    """In a fresh process without nmoe: the class, the logits of the resumed training graph, tokens and text."""
    family, out = families(name), tmp_path / "out"
    assert nmoe(["export", str(family.path), "--format", "hf", "-o", str(out)]) == 0
    assert f"as {ARCHITECTURES[name]} into {out}" in capsys.readouterr().out
    length = 64 if name == "stretched" else 32
    ids = torch.randint(0, 257, (4, length), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids, "logits": family.logits(ids)}, tmp_path / "given.safetensors")
    done = subprocess.run(
        [sys.executable, str(HERE / "stranger.py"), str(out), str(tmp_path / "given.safetensors")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["ours"] == []
    assert found["class"] == ARCHITECTURES[name]
    assert found["stored"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[family.plan.config.model.dtype]
    assert found["difference"] < LOGITS
    assert found["context"] == [length, length]
    assert found["tied"] == family.plan.config.model.tie_embeddings
    tokenizer = family.plan.config.data.tokenizer.build()
    assert found["ids"] == tokenizer.encode(found["text"]).tolist()
    assert found["decoded"] == found["text"]
    assert found["end"] == [tokenizer.end_of_document] * 3
    assert found["prompt"] == [tokenizer.end_of_document, *tokenizer.encode("KING.").tolist()]
    assert len(found["generated"]) == len(found["prompt"]) + 12
    assert found["written"].endswith(tokenizer.decode(found["generated"][1:]))


def test_norms_and_biases_of_these_runs_are_not_ones_and_zeros(families):
    """What the comparison above stands on."""
    for name in ARCHITECTURES:
        graph = families(name).graph()
        for parameter in graph.model.parameters():
            if parameter.dim() == 1:
                assert (parameter - 1).abs().max() > 0.05
        for _, router in graph.routers():
            assert router.bias_E is None or (router.bias_E.std() > 0.01)


def test_the_card_tells_where_it_comes_from(families, tmp_path):
    family = families("deepseek")
    assert nmoe(["export", str(family.path), "-o", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    manifest = reader.require_head(family.path / "checkpoints")
    bits = last_value(family.path.parent / "metrics" / "deepseek", "eval/bits_per_byte")
    for fact in (family.plan.fingerprint, manifest.state_digest, "| 6 of 6 |", "| 1,536 |", f"{bits:.4f}"):
        assert fact in text
    assert "held-out bits per byte | not measured" not in text


def test_many_files_hold_what_one_holds(families, tmp_path, monkeypatch, capsys):
    family = families("deepseek")
    assert nmoe(["export", str(family.path), "-o", str(tmp_path / "one")]) == 0
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    assert nmoe(["export", str(family.path), "-o", str(tmp_path / "many")]) == 0
    capsys.readouterr()
    expected = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    found = {}
    for name in files:
        content = load_file(tmp_path / "many" / name)
        assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= 100_000
        assert all(index["weight_map"][tensor] == name for tensor in content)
        found |= content
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_from_the_root_of_the_tree(families, tmp_path):
    """Where the library would take the folder `kernels` for a distribution."""
    done = subprocess.run(
        [sys.executable, "-m", "nmoe", "export", str(families("qwen").path), "-o", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("exported step 6 of ")
    assert "reading step 6" in done.stderr


def refused(args: list[str], code: str, status: int, capsys) -> str:
    assert nmoe(["export", *args]) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert f"error[{code}]" in said.err
    return said.err


def test_a_plan_without_a_stock_class(run, tmp_path, capsys):
    (run / "resolved.toml").write_text((run / "resolved.toml").read_text() + LOCAL)
    said = refused([str(run), "-o", str(tmp_path / "out")], "N0910", 2, capsys)
    assert "the nearest is Qwen3MoeForCausalLM" in said
    assert "model.attention.local.window = 8: it slides in every layer or in none" in said
    assert "model.attention.local.sinks = true: it has no attention sinks" in said
    assert not (tmp_path / "out").exists()


LOCAL = """
[model.attention.local]
window = 8
global_every = 2
sinks = true
"""


def test_what_is_no_run_or_no_place(run, tmp_path, capsys):
    assert "is not a run's directory" in refused([str(tmp_path), "-o", str(tmp_path / "out")], "N0318", 2, capsys)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    assert "is not empty" in refused([str(run), "-o", str(full)], "N0911", 2, capsys)
    assert [path.name for path in full.iterdir()] == ["mine"]
    assert nmoe(["export", str(run)]) == 2
    assert nmoe(["export", str(run), "--format", "gguf", "-o", str(tmp_path / "out")]) == 2
    assert nmoe(["export", str(run), "-o", str(full / "mine")]) == 2
    capsys.readouterr()
    (tmp_path / "out.partial" / "config.json").mkdir(parents=True)
    said = refused([str(run), "-o", str(tmp_path / "out")], "N0911", 2, capsys)
    assert "out.partial`, where the export is made, holds `config.json`, which is not of one" in said
    (tmp_path / "empty").mkdir()
    assert nmoe(["export", str(run), "-o", str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "config.json").is_file()


def test_no_checkpoint_yet(run, tmp_path, capsys):
    shutil.rmtree(run / "checkpoints")
    assert "= help: " in refused([str(run), "-o", str(tmp_path / "out")], "N0304", 1, capsys)


def test_another_plan_than_the_checkpoints(run, tmp_path, capsys):
    text = (run / "resolved.toml").read_text()
    assert "seed = 0" in text
    (run / "resolved.toml").write_text(text.replace("seed = 0", "seed = 1"))
    refused([str(run), "-o", str(tmp_path / "out")], "N0914", 1, capsys)


@pytest.mark.parametrize("version", [None, "4.57.1", "6.0.0"])
def test_without_the_library(version, run, tmp_path, capsys, monkeypatch):
    def installed(name):
        if version is None:
            raise library.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(library.importlib.metadata, "version", installed)
    said = refused([str(run), "-o", str(tmp_path / "out")], "N0912", 2, capsys)
    assert "pip install 'transformers>=5.17,<6'" in said


def test_a_damaged_checkpoint(run, tmp_path, capsys):
    manifest = reader.require_head(run / "checkpoints")
    sha256 = manifest.tensors["master/layers.1.moe.experts.w_down_EDF"].slices[3]
    path = layout.object_path(run / "checkpoints", sha256)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    said = refused([str(run), "-o", str(tmp_path / "out")], "N0303", 1, capsys)
    assert "tensor `master/layers.1.moe.experts.w_down_EDF`" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen"]


def test_objects_that_go_while_they_are_read(run, tmp_path, capsys, monkeypatch):
    """A training that goes on clears old checkpoints away: said so, and not as damage."""
    directory, true = run / "checkpoints", reader.read_some

    def read_some(checkpoints, manifest, tensors):
        monkeypatch.setattr(reader, "head_step", lambda directory: manifest.step + 1)
        for record in manifest.tensors.values():
            for sha256 in record.slices:
                layout.object_path(directory, sha256).unlink(missing_ok=True)
        true(checkpoints, manifest, tensors)

    monkeypatch.setattr(reader, "read_some", read_some)
    refused([str(run), "-o", str(tmp_path / "out")], "N0916", 1, capsys)


def swapped(architecture, name, tensor, true=hf.stock_tensors):
    """Gate and up in each other's place."""
    return true(architecture, name, tensor.flip(0) if "w_gate_up_2FD" in name else tensor)


def lost(architecture, name, tensor, true=hf.stock_tensors):
    """No query norm in layer 1."""
    return () if name == "layers.1.attention.q_norm.weight_D" else true(architecture, name, tensor)


def turned(*args, true=hf.config_json, **more):
    """Another base of the rotary angles."""
    return true(*args, **more) | {"rope_theta": 600.0, "rope_parameters": {"rope_type": "default", "rope_theta": 600.0}}


def shifted(architecture, name, tensor, true=hf.stock_tensors):
    """The router's experts in another order."""
    return true(architecture, name, tensor.roll(1, 0) if name.endswith("router.weight_ED") else tensor)


@pytest.mark.parametrize(
    ("part", "fault"),
    [("stock_tensors", swapped), ("stock_tensors", lost), ("stock_tensors", shifted), ("config_json", turned)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_export_is_never_called_done(part, fault, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hf, part, fault)
    refused([str(run), "-o", str(tmp_path / "out")], "N0915", 1, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen"]


def test_a_wrong_selection_bias_is_found(families, tmp_path, capsys, monkeypatch):
    true = hf.stock_tensors

    def stock_tensors(architecture, name, tensor):
        return true(architecture, name, tensor.roll(1, 0) if name.endswith("bias_E") else tensor)

    monkeypatch.setattr(hf, "stock_tensors", stock_tensors)
    said = refused([str(families("deepseek").path), "-o", str(tmp_path / "out")], "N0915", 1, capsys)
    assert "choices of experts differ" in said


KILLED = """
import os, signal, sys
from nmoe.cli.main import main
from nmoe.export import compare
compare.load = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
main(["export", *sys.argv[1:]])
"""


def test_a_kill_leaves_nothing_that_looks_whole(run, tmp_path, capsys):
    """Killed with every file but the card written: DIR is not there, and the next export takes the rest away."""
    out, args = tmp_path / "out", [str(run), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, *args], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()
    assert nmoe(["export", *args]) == 0
    assert nmoe(["export", str(run), "-o", str(tmp_path / "other")]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "qwen"]
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("out", "other"))
    assert first == second


def test_an_interrupt(run, tmp_path, capsys, monkeypatch):
    def load(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "load", load)
    assert nmoe(["export", str(run), "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen"]


def test_two_exports_into_one_place(run, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    descriptor = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        refused([str(run), "-o", str(tmp_path / "out")], "N0913", 1, capsys)
    finally:
        os.close(descriptor)


def test_help_teaches(capsys):
    assert nmoe(["export", "--help"]) == 0
    text = capsys.readouterr().out
    for words in ("--format", "--tokenizer", "nmoe export runs/mine -o exported/mine", "Exit status", "nmoe build"):
        assert words in text
