"""[data], [data.tokenizer]: what the model reads, and in which order. Paths stand outside the fingerprint."""

from collections.abc import Iterator
from typing import ClassVar

import attrs

from nmoe.registry.component import Component, Problem, key, section


@attrs.frozen(kw_only=True)
class Tokenizer(Component):
    """What every kind has."""

    known_vocab_size: ClassVar[int | None] = None

    def build(self):
        """The tokenizer: text to ids, and the bytes of text that each id stands for."""
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class BytesTokenizer(Tokenizer):
    """A token is a byte; 256 ends a document."""

    known_vocab_size: ClassVar[int | None] = 257

    def build(self):
        from nmoe.data.tokenizer import BytesTokenizer as Run

        return Run()


@attrs.frozen(kw_only=True)
class PackagedTokenizer(Tokenizer):
    """Byte pairs learnt from the training part of a text that ships with the package: 2,048 tokens."""

    known_vocab_size: ClassVar[int | None] = 2048

    name: str = key("the text it was learnt from", choices=("shakespeare",))

    def build(self):
        from nmoe.data.corpus import tokenizer

        return tokenizer(self.name)


@attrs.frozen(kw_only=True)
class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face's tokenizers."""

    path: str = key("the tokenizer.json", outside=True)
    end_of_document: str = key("the token that ends a document")

    def build(self):
        from nmoe.data.tokenizer import HuggingFaceTokenizer as Run

        return Run(path=self.path, end_of_document=self.end_of_document)


@attrs.frozen(kw_only=True)
class TiktokenTokenizer(Tokenizer):
    """Ranks in tiktoken's text format, with the pattern that splits the text before them."""

    path: str = key("the .tiktoken file", outside=True)
    pattern: str = key("name of the split pattern", choices=("gpt2", "cl100k", "o200k"))

    def build(self):
        from nmoe.data.tokenizer import TiktokenTokenizer as Run

        return Run(path=self.path, pattern=self.pattern)


@attrs.frozen(kw_only=True)
class Data(Component):
    """What every kind has: build(...) gives the training order as a pure function of the step."""

    has_heldout: ClassVar[bool] = False

    def build(self, *, seed: int, sequence_length: int):
        """The training order: nmoe.data.mixture.Mixture."""
        raise NotImplementedError

    def build_heldout(self):
        """The held-out text, where the data brings its own: nmoe.data.source.TokenSource."""
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class Corpus(Data):
    """Text that ships with the package, tokenised at the start."""

    has_heldout: ClassVar[bool] = True

    name: str = key("which text", choices=("shakespeare",))
    tokenizer: Tokenizer = section("how text becomes tokens")

    def check(self, config, path: str) -> Iterator[Problem]:
        known = self.tokenizer.known_vocab_size
        if known is not None and config.model.vocab_size < known:
            yield Problem(
                path="model.vocab_size",
                message=f"the tokenizer has {known} tokens, the model has room for {config.model.vocab_size}",
                help=f"set vocab_size to at least {known}",
            )

    def build(self, *, seed: int, sequence_length: int):
        from nmoe.data.corpus import load
        from nmoe.data.mixture import Mixture

        train = load(self.name, "train", self.tokenizer.build())
        return Mixture.single(train, seed=seed, sequence_length=sequence_length)

    def build_heldout(self):
        from nmoe.data import corpus

        return corpus.load(self.name, "heldout", self.tokenizer.build())


@attrs.frozen(kw_only=True)
class Shards(Data):
    """Token shards that `nmoe data prepare` wrote."""

    train: str = key("directory of the shards and their manifest", outside=True)

    def build(self, *, seed: int, sequence_length: int):
        from nmoe.data.mixture import Mixture
        from nmoe.data.shards import open_shards

        return Mixture.single(open_shards(self.train), seed=seed, sequence_length=sequence_length)


@attrs.frozen(kw_only=True)
class Stage(Component):
    """One stretch of training with one mixture."""

    until_tokens: int | None = key(
        "tokens seen at which the stage ends; absent in the last one", default=None, minimum=1, unit="tokens"
    )
    weights: tuple[int, ...] = key("sequences of each source, in proportion", minimum=0, maximum=2**20)


@attrs.frozen(kw_only=True)
class MixtureData(Data):
    """Several shard directories, mixed by integer weights that may change in stages."""

    sources: tuple[str, ...] = key("directories, in the order of the weights", outside=True)
    stages: tuple[Stage, ...] = section("the stages, in order")

    def check(self, config, path: str) -> Iterator[Problem]:
        tokens_per_step = config.batch.sequences * config.batch.sequence_length
        if not self.sources:
            yield Problem(path=f"{path}.sources", message="a mixture needs at least one source")
        if not self.stages:
            yield Problem(path=f"{path}.stages", message="a mixture needs at least one stage")
        previous = 0
        for index, stage in enumerate(self.stages):
            here = f"{path}.stages.{index}"
            last = index == len(self.stages) - 1
            if len(stage.weights) != len(self.sources):
                yield Problem(
                    path=f"{here}.weights",
                    message=f"{len(stage.weights)} weights for {len(self.sources)} sources",
                    help="give one weight for each source; 0 leaves it out",
                )
            elif not any(stage.weights):
                yield Problem(path=f"{here}.weights", message="every weight is 0", help="give one source a weight")
            if last and stage.until_tokens is not None:
                yield Problem(path=f"{here}.until_tokens", message="the last stage has no end", help="remove the key")
            if not last and stage.until_tokens is None:
                yield Problem(path=here, message="only the last stage goes without `until_tokens`", help="add it")
            if stage.until_tokens is not None:
                if stage.until_tokens <= previous:
                    yield Problem(
                        path=f"{here}.until_tokens",
                        message=f"the stage ends at {stage.until_tokens} tokens, where it begins or before",
                        help=f"set it above {previous}",
                    )
                elif stage.until_tokens >= config.schedule.total_tokens:
                    yield Problem(
                        path=f"{here}.until_tokens",
                        message=f"the stage ends at {stage.until_tokens} tokens, the schedule at "
                        f"{config.schedule.total_tokens}: no later stage begins",
                        help="set it below the schedule's total, or remove the stages after it",
                    )
                elif stage.until_tokens % tokens_per_step:
                    yield Problem(
                        path=f"{here}.until_tokens",
                        message=f"{stage.until_tokens} is not a multiple of the step's {tokens_per_step} tokens",
                        help=f"the nearest that is: {-(-stage.until_tokens // tokens_per_step) * tokens_per_step}",
                    )
                previous = max(previous, stage.until_tokens)

    def build(self, *, seed: int, sequence_length: int):
        from nmoe.data.mixture import Mixture, MixtureStage
        from nmoe.data.shards import open_shards

        stages = [
            MixtureStage(
                end_sequence=None if s.until_tokens is None else s.until_tokens // sequence_length, weights=s.weights
            )
            for s in self.stages
        ]
        sources = [open_shards(path) for path in self.sources]
        return Mixture(sources, stages, seed=seed, sequence_length=sequence_length)
