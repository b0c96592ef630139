"""Texts and shards that several data tests read."""

import random
from pathlib import Path

import pytest

from nmoe.data.prepare import Request, prepare
from nmoe.data.source import MemorySource
from nmoe.data.tokenizer import BytesTokenizer


def make_texts(count: int, seed: int, longest: int = 400) -> list[str]:
    """Texts of 1 to `longest` characters, one to four bytes each."""
    draw = random.Random(seed)
    return ["".join(draw.choices("ab cdé\n€😀", k=draw.randint(1, longest))) for _ in range(count)]


@pytest.fixture(scope="session")
def texts():
    return make_texts


@pytest.fixture
def memory_source():
    """memory_source(documents, seed) -> a source of that many documents of bytes."""

    def make(count: int, seed: int, longest: int = 400) -> MemorySource:
        return MemorySource(make_texts(count, seed, longest), BytesTokenizer())

    return make


@pytest.fixture
def write_shards(tmp_path: Path):
    """write_shards(texts, shard_tokens) -> the directory of their shards."""

    def write(documents: list[str], shard_tokens: int, name: str = "shards") -> Path:
        source = tmp_path / f"{name}.txt"
        source.write_bytes("\x1e".join(documents).encode("utf-8"))
        request = Request(separator=b"\x1e", shard_tokens=shard_tokens)
        prepare([source], tmp_path / name, BytesTokenizer(), request, workers=1)
        return tmp_path / name / "train"

    return write
