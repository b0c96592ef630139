"""Text that ships with the package, so that a fresh machine can train on something real.

`shakespeare`: Shakespeare's plays (ORIGIN.md beside this file says where they come from and how
`make.py` cleaned them). 36 plays train; Macbeth and Twelfth Night are held out whole, 4.3 % of the
bytes, so that no sentence of a scored play has been read. A byte-pair vocabulary of 2,048 tokens,
learnt from the training plays, comes with it. All bytes, packed and unpacked, are compared with the
digests below before a token is made of them.
"""

import hashlib
import lzma
from importlib.resources import files

from nmoe.data.source import MemorySource
from nmoe.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from nmoe.errors import fail

SEPARATOR = "\x1e"

# (name, part) -> unpacked bytes, SHA-256 packed, SHA-256 unpacked
DIGESTS = {
    ("shakespeare", "train"): (
        4_741_444,
        "7abaa55adf5884755c9b855171af0d672d649bdd0a3566d8cfafb87156ce92d0",
        "997d5f617a5972a06fddd9e7575287780e935bbf07c0c7ebc360c11ded918763",
    ),
    ("shakespeare", "heldout"): (
        214_210,
        "83a5acaf1dcc1d5f1ae9bd6f3fdac214fb39f083a3c12a612e9baa857829f6ec",
        "dc155e43f9d9dbcadd186a1d1631a0abd28fadc7d1d0e022ffc19c751a846add",
    ),
}

TOKENIZER_SHA256 = {"shakespeare": "e2b34c5d7c9a0fda505d530c2c85cc3b4b0f6f584499dffb747fb9c88f13033f"}
END_OF_DOCUMENT = "<|end|>"


def documents(name: str, part: str) -> list[str]:
    """The texts of one part ("train" or "heldout"), in their fixed order.

    Raises RunError N0201 where the installed file is not the one that this version was made with.
    """
    num_bytes, packed_sha256, sha256 = DIGESTS[name, part]
    file = f"{name}.{part}.txt.xz"
    packed = files(__name__).joinpath(file).read_bytes()
    _compare(file, "packed", packed, packed_sha256)
    text = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=2**28).decompress(packed, max_length=num_bytes + 1)
    _compare(file, "unpacked", text, sha256)
    return text.decode("ascii").split(SEPARATOR)[:-1]


def tokenizer(name: str) -> HuggingFaceTokenizer:
    """The vocabulary that was learnt from the text's training part. Raises RunError N0201 as `documents` does."""
    file = files(__name__).joinpath(f"{name}.tokenizer.json")
    _compare(file.name, "tokenizer", file.read_bytes(), TOKENIZER_SHA256[name])
    return HuggingFaceTokenizer(path=str(file), end_of_document=END_OF_DOCUMENT)


def _compare(file: str, state: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise fail(
            "N0201",
            f"the packaged file `{file}` is damaged ({state})",
            help="install nmoe again",
            notes=(f"expected SHA-256 {expected}", f"found {found}"),
        )


def load(name: str, part: str, tokenizer: Tokenizer) -> MemorySource:
    """One part of a packaged text as tokens in memory; a TokenSource."""
    return MemorySource(documents(name, part), tokenizer)
