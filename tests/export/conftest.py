"""A short run of each family, trained once a session, and what its own graph computes."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from nmoe.checkpoint import environment, reader
from nmoe.data import corpus
from nmoe.data.source import MemorySource
from nmoe.graph import TrainingGraph, build
from nmoe.plan.plan import Plan
from nmoe.plan.resolve import resolve
from nmoe.rdep.control import Control
from nmoe.train.loop import train

HERE = Path(__file__).parent
ARCHITECTURES = {
    "deepseek": "DeepseekV3ForCausalLM",
    "qwen": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "stretched": "DeepseekV3ForCausalLM",
}


class Family:
    """name: of the config beside this file. path: the finished run's directory."""

    def __init__(self, name: str, config: Path, path: Path):
        self.name, self.path = name, path
        self.plan: Plan = resolve(config, [f"output.run_dir={json.dumps(str(path))}"])
        deterministic = torch.are_deterministic_algorithms_enabled()
        assert train(self.plan, config_text="# a test's config\n").exit_code == 0
        torch.use_deterministic_algorithms(deterministic)

    def graph(self) -> TrainingGraph:
        """The training graph at HEAD, as a resume restores it."""
        graph = build(self.plan)
        directory = self.path / "checkpoints"
        reader.read_into(directory, reader.require_head(directory), graph.state(), Control.alone())
        graph.refresh()
        return graph

    @torch.no_grad()
    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """(T, V), from the graph's model in float32."""
        model = self.graph().model.eval().float()
        return model.head(model(ids_BS))


HASHES = cache(environment.source_hashes)
DOCUMENTS = cache(corpus.documents)
LOAD = corpus.load
SOURCES: dict[tuple[str, str, str], MemorySource] = {}


def load_once(name, part, tokenizer):
    key = (name, part, tokenizer.digest)
    if key not in SOURCES:
        SOURCES[key] = LOAD(name, part, tokenizer)
    return SOURCES[key]


@pytest.fixture(autouse=True)
def _read_once(monkeypatch):
    """The packaged text and its tokens, which a process makes at each training and export, are made once.

    For the tests of this folder alone: others give corpora of their own.
    """
    monkeypatch.setattr(environment, "source_hashes", HASHES)
    monkeypatch.setattr(corpus, "documents", DOCUMENTS)
    monkeypatch.setattr(corpus, "load", load_once)


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Makes a family's run when it is first asked for."""
    made: dict[str, Family] = {}

    def family(name: str) -> Family:
        if name not in made:
            made[name] = Family(name, HERE / f"{name}.toml", tmp_path_factory.mktemp("runs") / name)
        return made[name]

    return family
