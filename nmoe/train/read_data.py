"""Is the text that a run reads still the text that its checkpoints were trained on? Every byte of it is read.

A checkpoint holds one digest of the training data and one of the held-out text (`nmoe.data.source`, `mixture`): over
the manifests of shards, which hold the digests of their files, or over the tokens of a packaged text. So there are
two ways to differ. Shards that are not what their own manifest says are named file by file; shards, a packaged text or
a tokenizer that are whole and are others give another digest than the checkpoint's.
"""

from collections.abc import Callable, Iterator, Mapping

import attrs

from nmoe.data.shards import open_shards
from nmoe.errors import Diagnostic, NmoeError
from nmoe.registry.config import Config
from nmoe.registry.data import Corpus, HuggingFaceTokenizer, MixtureData, Shards, TiktokenTokenizer

Progress = Callable[[str, int, int], None]
"""(directory, tokens read, tokens in all)"""


@attrs.frozen(kw_only=True)
class Text:
    """A directory of shards, or a text of the package. digest: empty where it is damaged."""

    name: str
    tokens: int
    digest: str


@attrs.frozen(kw_only=True)
class DataReport:
    """texts: all that was read, in the plan's order. faults: as `nmoe train` would say them."""

    texts: tuple[Text, ...]
    faults: tuple[Diagnostic, ...]


def read_data(config: Config, saved: Mapping[str, str], *, step: int, progress: Progress) -> DataReport:
    """Reads all that the plan names in [data] and [eval], relative paths from the working directory.

    saved: the digests that the checkpoint of `step` holds; empty where there is none. Held-out text cannot change a
    bit of training, and a start only tells of another one; here it is a fault too.
    """
    texts: list[Text] = []
    faults: list[Diagnostic] = []
    for part, directories in _shards(config).items():
        known = len(faults)
        for directory in directories:
            text, found = _read(directory, progress)
            texts.append(text)
            faults += found
        if len(faults) > known:
            continue
        try:
            digest, packaged = _digest(config, part)
        except NmoeError as error:
            faults += error.diagnostics
            continue
        texts += packaged
        if saved.get(part, digest) != digest:
            faults.append(_other(config, part, step, saved[part], digest))
    return DataReport(texts=tuple(texts), faults=tuple(faults))


def _shards(config: Config) -> dict[str, tuple[str, ...]]:
    """The directories of shards of each part that the run reads, by the names that a checkpoint has for the parts."""
    data = config.data
    found: dict[str, tuple[str, ...]] = {"train": ()}
    if isinstance(data, Shards):
        found["train"] = (data.train,)
    elif isinstance(data, MixtureData):
        found["train"] = data.sources
    if config.eval.bpb is not None:
        found["heldout"] = () if config.eval.bpb.heldout is None else (config.eval.bpb.heldout,)
    return found


def _read(directory: str, progress: Progress) -> tuple[Text, list[Diagnostic]]:
    try:
        source = open_shards(directory)
        source.verify(lambda done, total: progress(directory, done, total))
    except NmoeError as error:
        return Text(name=directory, tokens=0, digest=""), list(error.diagnostics)
    return Text(name=directory, tokens=source.num_tokens, digest=source.digest), []


def _digest(config: Config, part: str) -> tuple[str, list[Text]]:
    """The digest that a checkpoint of now would have of a part; and the text, if it is one of the package."""
    data = config.data
    if part == "train":
        mixture = data.build(seed=config.random.seed, sequence_length=config.batch.sequence_length)
        digest, source = mixture.digest, mixture.sources[0]
    else:
        assert config.eval.bpb is not None
        heldout = config.eval.bpb.heldout
        source = data.build_heldout() if heldout is None else open_shards(heldout)
        digest = source.digest
    if isinstance(data, Shards | MixtureData):
        return digest, []
    return digest, [Text(name=f"packaged text, {part}", tokens=source.num_tokens, digest=source.digest)]


def _other(config: Config, part: str, step: int, then: str, now: str) -> Diagnostic:
    what = {"train": "the training data", "heldout": "the held-out text"}[part]
    return Diagnostic(
        code="N0504",
        message=f"{what} is not what the checkpoint of step {step} has seen: {then[:16]}... then, {now[:16]}... now",
        place=", ".join(_named(config, part)),
        help="restore the data, or start another run in another `run_dir`",
    )


def _named(config: Config, part: str) -> Iterator[str]:
    """What the plan names for a part, as a place for people."""
    directories = _shards(config)[part]
    yield from directories
    if not directories and isinstance(config.data, Corpus):
        # The packaged text is compared with its own digest when it is read, so only the tokenizer can be another.
        tokenizer = config.data.tokenizer
        yield tokenizer.path if isinstance(tokenizer, HuggingFaceTokenizer | TiktokenTokenizer) else "[data.tokenizer]"
