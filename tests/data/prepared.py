"""Preparing text, and reading it back."""

import itertools
from pathlib import Path

from nmoe.data.documents import find_files
from nmoe.data.prepare import Request, prepare
from nmoe.data.shards import open_shards
from nmoe.data.tokenizer import BytesTokenizer


def read_texts(directory: Path) -> list[str]:
    source = open_shards(directory)
    tokens = source.read(0, source.num_tokens).tolist()
    starts = [*source.document_starts.tolist(), len(tokens)]
    return [bytes(tokens[a + 1 : b]).decode("utf-8") for a, b in itertools.pairwise(starts)]


def run(folder, output, request=None, workers=2, tokenizer=None, progress=None):
    files, _ = find_files([folder])
    request = request or Request(separator=b"\x1e", shard_tokens=1000)
    return prepare(files, output, tokenizer or BytesTokenizer(), request, workers=workers, progress=progress)
