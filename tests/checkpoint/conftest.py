"""A small training state with every kind of tensor, and one way to save and to look at it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nmoe.checkpoint import reader
from nmoe.checkpoint.manifest import Identity
from nmoe.checkpoint.writer import CheckpointWriter, Saved
from nmoe.part import Part
from nmoe.rdep.control import Control
from nmoe.rng import stream
from tests.rdep.ranks import Ranks

DIGEST = "ab" * 32


def state(step: int) -> dict[str, torch.Tensor]:
    """The tensors after `step` steps: a pure function, so that any history leads to the same."""
    random = stream(7, "checkpoint-test", step)
    return {
        "master/model.embedding.weight_VD": torch.randn(17, 8, generator=random),
        "model.layers.0.moe.experts.w_down_EDF": torch.randn(4, 3, 5, generator=random).bfloat16(),
        "adamw.exp_avg/model.norm.weight_D": torch.randn(8, generator=random).double(),
        "model.layers.0.moe.router.load_E": torch.arange(4) * step,
        "model.frozen": torch.full((6, 6), 1.5),
        "a.scalar": torch.tensor(step),
        "an.empty.tensor": torch.empty(0, 3),
        "a.mask": torch.tensor([True, False, True]),
    }


def identity(attempt: int = 1, **changes: object) -> Identity:
    fields = {
        "run": "test", "lineage": "line", "attempt": attempt, "fingerprint": DIGEST, "sections": {"model": DIGEST},
        "tree_digest": DIGEST, "data": {"train": DIGEST}, "environment": {"exact": {"a": 1}, "recorded": {"host": "h"}},
    }  # fmt: skip
    return Identity(**{**fields, **changes})


def counters(step: int) -> dict:
    return {"step": step, "schedule": {"tokens_seen": step * 64}, "rng": {"rounding": 0}}


def save(directory: Path, *steps: int, keep: int = 2, attempt: int = 1, few: bool = False) -> list[Saved]:
    """One process's saves of those steps, one after the other; few: of three of the tensors."""
    writer = CheckpointWriter(directory, keep=keep, threads=1, control=Control.alone())
    saved = []
    for step in steps:
        tensors = dict(list(state(step).items())[4:7]) if few else state(step)
        writer.save(step=step, tensors=whole(tensors), state=counters(step), identity=identity(attempt))
        saved.append(writer.wait())
    return saved


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
    return {name: Part.whole(tensor) for name, tensor in tensors.items()}


def empty_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def holds(directory: Path, step: int) -> bool:
    """Whether HEAD stands at `step`; whatever step it names must have that step's state."""
    manifest = reader.open_head(directory, Control.alone(), threads=1)
    if manifest is None:
        return step == 0
    wanted = {name: tensor for name, tensor in state(manifest.step).items() if name in manifest.tensors}
    tensors = empty_like(wanted)
    reader.read_into(directory, manifest, whole(tensors), Control.alone(), threads=1)
    assert all(same_bytes(tensors[name], wanted[name]) for name in wanted)
    assert manifest.state == counters(manifest.step)
    return manifest.step == step


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """What fsync is for is tested by test_crash.py, which looks at the calls; the others need not wait for it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def tool():
    return SimpleNamespace(
        state=state, identity=identity, counters=counters, save=save, empty_like=empty_like, same_bytes=same_bytes,
        holds=holds, whole=whole, digest=DIGEST,
    )  # fmt: skip


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    server = Ranks(tmp_path_factory.mktemp("ranks"), "tests.checkpoint.work")
    yield server
    server.close()


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run" / "checkpoints"
