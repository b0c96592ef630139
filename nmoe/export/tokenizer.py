"""tokenizer.json and its settings, where the tokenizer can be said in that format without changing a token.

A `tokenizer.json` is handed on byte for byte. Bytes are one too: GPT-2's alphabet gives each byte a
character, and byte pairs without a merge leave every byte its own token. Tiktoken's ranks are not
written: they would have to be turned into merges and another library's dialect of its patterns.
"""

import json
from collections.abc import Callable
from typing import Any

from nmoe.data.mixture import Mixture
from nmoe.data.shards import ShardSource
from nmoe.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, Tokenizer
from nmoe.errors import ConfigError, Diagnostic, NmoeError, fail
from nmoe.registry.config import Config
from nmoe.registry.data import Corpus

END_OF_BYTES = "<|end|>"


def tokenizer_files(tokenizer: Tokenizer, *, context: int) -> dict[str, bytes]:
    """File name -> content; empty for a kind that has no exact tokenizer.json.

    context: the most tokens that the model is meant for. The token that ends a document opens one too.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content, end = tokenizer.content, tokenizer.end_of_document_name
    elif isinstance(tokenizer, BytesTokenizer):
        content, end = json.dumps(byte_level(), indent=1, ensure_ascii=False).encode(), END_OF_BYTES
    else:
        return {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n"}


def of_run(
    config: Config, digest: str | None, path: str | None, say: Callable[[str], None]
) -> tuple[Tokenizer | None, int | None]:
    """(tokenizer, the id that ends a document) of a run, each None if it cannot be known; then `say` says why.

    digest: of the training data, as the checkpoint has it; RunError N0917 if it is another one now. path: the
    tokenizer.json of shards, which know it by its digest alone.
    """
    try:
        mixture: Mixture = config.data.build(seed=config.random.seed, sequence_length=config.batch.sequence_length)
    except NmoeError as error:
        if path is not None:
            raise
        say(f"no tokenizer files and no eos_token_id are written: {error.diagnostics[0].message}")
        return None, None
    if mixture.digest != digest:
        raise fail(
            "N0917", "the training data is not what the checkpoint was trained on, so its tokenizer may be another",
            place="[data]", help="restore the data, or move it away to export without a tokenizer",
            notes=(f"then {digest}", f"now  {mixture.digest}"),
        )  # fmt: skip
    end, source = mixture.end_of_document, mixture.sources[0]
    if path is not None:
        return from_file(path, end_of_document=end, digest=mixture.tokenizer_digest), end
    if isinstance(config.data, Corpus):
        return config.data.tokenizer.build(), end
    assert isinstance(source, ShardSource)
    if source.manifest.tokenizer_kind == "bytes":
        return BytesTokenizer(), end
    if source.manifest.tokenizer_kind == "huggingface":
        say("no tokenizer files are written: shards know their tokenizer by its digest; give it with --tokenizer")
    else:
        say(f"no tokenizer files are written: `{source.manifest.tokenizer_kind}` has no exact tokenizer.json")
    return None, end


def from_file(path: str, *, end_of_document: int, digest: str) -> HuggingFaceTokenizer:
    """The `tokenizer.json` at `path`, which must be the tokenizer of that digest; ConfigError N0918 if it is not."""
    import tokenizers

    try:
        name = tokenizers.Tokenizer.from_file(path).id_to_token(end_of_document)
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise _another(path, f"tokenizers cannot read it: {error}") from error
    if name is None:
        raise _another(path, f"it has no token {end_of_document}, which ended the documents")
    tokenizer = HuggingFaceTokenizer(path=path, end_of_document=name)
    if tokenizer.digest != digest:
        raise _another(path, "its digest is another one", f"then {digest}", f"now  {tokenizer.digest}")
    return tokenizer


def _another(path: str, message: str, *notes: str) -> ConfigError:
    return ConfigError(
        Diagnostic(
            code="N0918",
            message=f"not the tokenizer of the training data: {message}",
            path=path,
            help="name the tokenizer.json that `nmoe data prepare` was given",
            notes=notes,
        )
    )


def byte_level() -> dict[str, Any]:
    """BytesTokenizer as a tokenizer.json: id b for byte b, 256 for the end of a document."""
    vocabulary = {character: byte for byte, character in enumerate(alphabet())}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {
        "id": 256, "content": END_OF_BYTES, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte,
        "post_processor": None,
        "decoder": byte,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": [],
        },
    }  # fmt: skip


def alphabet() -> list[str]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
