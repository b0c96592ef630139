"""[eval]: what is measured on held-out data. It draws nothing from training and changes no bit of it."""

from collections.abc import Iterator
from posixpath import normpath

import attrs

from nmoe.registry.component import Component, Problem, key, section
from nmoe.registry.data import MixtureData, Shards
from nmoe.registry.router import pair_problems


@attrs.frozen(kw_only=True)
class Bpb(Component):
    """Bits per byte of held-out text: sum of -log2 p(token) over the bytes that the tokens stand for."""

    every_tokens: int | None = key(
        "tokens between evaluations; absent: only at the end", default=None, minimum=1, unit="tokens"
    )
    heldout: str | None = key(
        "directory of held-out shards; the packaged text brings its own", default=None, outside=True
    )
    max_tokens: int | None = key(
        "held-out tokens that are scored, from the start; absent: all of them", default=None, minimum=1, unit="tokens"
    )
    context: int = key(
        "tokens that every scored token sees at least; windows overlap by as many, and none is scored twice",
        default=0, minimum=0, unit="tokens",
    )  # fmt: skip
    sequences: int = key("sequences of one forward pass", default=8, minimum=1, maximum=2**20)

    def check(self, config, path: str) -> Iterator[Problem]:
        if self.context >= config.batch.sequence_length:
            yield Problem(
                path=f"{path}.context",
                message=f"a context of {self.context} leaves nothing to score in sequences of "
                f"{config.batch.sequence_length}",
                help="set it below batch.sequence_length; half of it is usual",
            )
        if config.data.has_heldout and self.heldout is not None:
            yield Problem(
                path=f"{path}.heldout",
                message="the packaged text brings its own held-out part",
                help="remove `heldout`",
            )
        if not config.data.has_heldout and self.heldout is None:
            yield Problem(
                path=path, message=f"[{path}] does not say what to score",
                help="add `heldout`, a directory that `nmoe data prepare` wrote",
            )
        trained = {config.data.train} if isinstance(config.data, Shards) else set()
        trained |= set(config.data.sources) if isinstance(config.data, MixtureData) else set()
        if self.heldout is not None and normpath(self.heldout) in {normpath(directory) for directory in trained}:
            yield Problem(
                path=f"{path}.heldout",
                message=f'"{self.heldout}" is trained on, so nothing in it is held out',
                help="name other shards",
            )
        yield from pair_problems(f"{path}.sequences", self.sequences, "sequences", config)

    def build(self, data, sequence_length: int):
        """The held-out text, cut into windows of the training's length."""
        from nmoe.data.heldout import HeldoutWindows
        from nmoe.data.shards import open_shards

        source = data.build_heldout() if self.heldout is None else open_shards(self.heldout)
        return HeldoutWindows(
            source, sequence_length=sequence_length, context=self.context, max_tokens=self.max_tokens
        )


@attrs.frozen(kw_only=True)
class Eval(Component):
    bpb: Bpb | None = section("held-out bits per byte", optional=True)
