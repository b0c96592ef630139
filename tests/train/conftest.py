"""Trainings of a tiny model in this process: `runs` makes, continues, copies and looks at them."""

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from nmoe.checkpoint import environment, reader
from nmoe.checkpoint.manifest import Manifest
from nmoe.data import corpus
from nmoe.metrics.reader import read_rows
from nmoe.plan.plan import Plan
from nmoe.plan.resolve import resolve
from nmoe.train.loop import Outcome, train
from nmoe.train.step import Observer
from tests.rdep.ranks import Ranks
from tests.train.launches import Launches

TINY = Path(__file__).parent / "tiny.toml"


class Runs:
    """Runs by name below one directory, in the layout that nmoe.train.gate.compare reads."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.metrics = directory / "metrics"
        self.config = TINY

    def plan(self, name: str, *sets: str) -> Plan:
        """The tiny plan for the run `name`; a set replaces the default of the same key."""
        keys = {"output.run_dir": f'"{self.path(name)}"', "output.metrics_dir": f'"{self.metrics}"'}
        keys |= dict(item.split("=", 1) for item in sets)
        return resolve(self.config, [f"{key}={value}" for key, value in keys.items() if value])

    def train(self, name: str, *sets: str, observe: Observer | None = None, new_lineage: bool = False) -> Outcome:
        given = {} if observe is None else {"observe": observe}
        return train(self.plan(name, *sets), config_text="# a test's config\n", new_lineage=new_lineage, **given)

    def path(self, name: str) -> Path:
        return self.directory / name

    def head(self, name: str) -> Manifest:
        return reader.require_head(self.path(name) / "checkpoints")

    def digest(self, name: str) -> str:
        return self.head(name).state_digest

    def losses(self, name: str) -> list[float]:
        """Losses by step, for the steps that have rows."""
        return [row.value for row in read_rows(self.metrics / name, names=["train/loss"])]

    def copy(self, name: str, aside: Path) -> None:
        """Puts the run `name` and its ledger under `aside`."""
        shutil.copytree(self.path(name), aside / name)
        shutil.copytree(self.metrics / name, aside / "metrics" / name)

    def bring_back(self, name: str, aside: Path) -> None:
        """Makes the run what `copy` found."""
        for there, here in ((aside / name, self.path(name)), (aside / "metrics" / name, self.metrics / name)):
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(there, here)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def module_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that a module's tests share and only look at."""
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True, scope="session")
def _read_once():
    """What a process reads at each start is read once for all trainings of this one: the packaged text, the sources."""
    with pytest.MonkeyPatch.context() as patch:
        read, hashes = environment.source_hashes, environment.source_hashes()
        patch.setattr(environment, "source_hashes", lambda root=None: hashes if root is None else read(root))
        patch.setattr(corpus, "documents", cache(corpus.documents))
        yield


@pytest.fixture(autouse=True)
def _switches_back():
    """A training sets torch's switches for its process; the tests after it find them as they were."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def rank_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """One process from which all ranks are forked."""
    server = Ranks(tmp_path_factory.mktemp("ranks"), "tests.train.work")
    yield server
    server.close()


@pytest.fixture
def launches(tmp_path: Path, rank_server: Ranks) -> Launches:
    return Launches(tmp_path, rank_server)


@pytest.fixture(scope="module")
def module_launches(tmp_path_factory: pytest.TempPathFactory, rank_server: Ranks) -> Launches:
    """Runs that a module's tests share and only look at."""
    return Launches(tmp_path_factory.mktemp("launches"), rank_server)
