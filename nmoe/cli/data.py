"""nmoe data: text files to token shards, and a look at shards."""

import codecs
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmoe.errors import ConfigError, Diagnostic

if TYPE_CHECKING:
    from nmoe.data.prepare import Progress
    from nmoe.data.tokenizer import Tokenizer

PATTERNS = ("gpt2", "cl100k", "o200k")


@click.group("data")
def command() -> None:
    """Prepare token shards from text, and look at them."""


@command.command(
    "prepare",
    epilog="Exit status: 0 done, 1 failed (mend the cause and run the same command again: it continues), "
    "2 the arguments are not valid, 130 interrupted (run again to continue).",
)
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Directory to write; its parts are `train` and `heldout`.")  # fmt: skip
@click.option("--tokenizer", "tokenizer_path", required=True, metavar="bytes|PATH",
              help="`bytes`, a tokenizer.json, or a .tiktoken file of ranks.")  # fmt: skip
@click.option("--end-of-document", metavar="TOKEN", help="The token that ends a document; for a tokenizer.json.")
@click.option("--pattern", type=click.Choice(PATTERNS), help="How text is split; for a .tiktoken file.")
@click.option("--separator", metavar="TEXT",
              help="Cut each .txt file into documents here; \\n, \\t and \\xNN are understood.")  # fmt: skip
@click.option("--jsonl-field", default="text", show_default=True, metavar="KEY", help="The text's key in .jsonl.")
@click.option("--heldout-every", type=click.IntRange(min=2), metavar="N", help="Hold out every N-th document.")
@click.option("--heldout-fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="F",
              help="Hold out about this share of the documents, chosen by their content.")  # fmt: skip
@click.option("--shard-tokens", type=click.IntRange(1, 2**40), default=2**28, show_default=True, metavar="N",
              help="Tokens of a shard.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 1024), metavar="N",
              help="Threads that tokenise [default: one for each core]; the output does not depend on it.")  # fmt: skip
def prepare_command(inputs: tuple[Path, ...], output: Path, tokenizer_path: str, end_of_document: str | None,
                    pattern: str | None, separator: str | None, jsonl_field: str, heldout_every: int | None,
                    heldout_fraction: float | None, shard_tokens: int, workers: int | None) -> None:  # fmt: skip
    """Turn text files into token shards.

    INPUT is a .txt file (one document, or many with --separator), a .jsonl file (one document a
    line), either packed with .gz or .xz, or a directory of them. All text must be UTF-8. The output
    is the same bytes for any number of workers; stopped at any moment, the same command continues.

    \b
      nmoe data prepare books/ -o data/books --tokenizer bytes --heldout-every 20
      nmoe data prepare web.jsonl.gz -o data/web \\
          --tokenizer tokenizer.json --end-of-document "<|endoftext|>" --heldout-fraction 0.001

    \b
    Then train on it:
      [data]
      kind = "shards"
      train = "data/books/train"
    """
    import os

    from nmoe.data.documents import find_files
    from nmoe.data.prepare import Request, prepare

    if heldout_every is not None and heldout_fraction is not None:
        raise click.UsageError("--heldout-every and --heldout-fraction exclude each other.")
    if heldout_fraction is not None and not 0 < heldout_fraction < 1:  # click's range lets nan through
        raise click.BadParameter("it lies between 0 and 1", param_hint="--heldout-fraction")
    request = Request(
        separator=None if separator is None else _separator(separator),
        jsonl_field=jsonl_field,
        shard_tokens=shard_tokens,
        heldout_every=heldout_every,
        heldout_fraction=heldout_fraction,
    )
    tokenizer = _tokenizer(tokenizer_path, end_of_document, pattern)
    files, ignored = find_files(list(inputs))
    if ignored:
        names = ", ".join(path.name for path in ignored[:3]) + (", ..." if len(ignored) > 3 else "")
        click.echo(f"not read, for they are neither .txt nor .jsonl: {len(ignored)} files ({names})", err=True)
    threads = workers or os.cpu_count() or 1  # decides the speed alone
    with _display() as display:
        outcome = prepare(files, output, tokenizer, request, workers=threads, progress=display)
    for split, manifest in outcome.manifests.items():
        click.echo(
            f"{output / split}: {manifest.num_documents:,} documents, {manifest.text_bytes:,} bytes, "
            f"{manifest.num_tokens:,} tokens, {len(manifest.shards):,} shards, digest {manifest.digest}"
        )
        if manifest.altered_documents:
            click.echo(
                f"  {manifest.altered_documents:,} of them were altered by the tokenizer: the tokens stand for "
                "another number of bytes than the text has", err=True,
            )  # fmt: skip
    if outcome.empty_documents:
        click.echo(f"left out, for they have no text: {outcome.empty_documents:,} documents", err=True)


def _separator(text: str) -> bytes:
    try:
        value = codecs.decode(text.encode("latin-1", "backslashreplace"), "unicode_escape").encode("utf-8")
    except ValueError as error:
        raise click.BadParameter(f"cannot be read: {error}", param_hint="--separator") from error
    if not value:
        raise click.BadParameter("it is empty", param_hint="--separator")
    return value


def _tokenizer(path: str, end_of_document: str | None, pattern: str | None) -> "Tokenizer":
    from nmoe.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, TiktokenTokenizer

    suffix = "" if path == "bytes" else Path(path).suffix
    for option, value, wanted in (("--end-of-document", end_of_document, ".json"), ("--pattern", pattern, ".tiktoken")):
        if (value is None) == (suffix == wanted):
            raise click.UsageError(
                f"A {wanted} tokenizer needs {option}." if value is None else f"{option} is for a {wanted} tokenizer."
            )
    if path == "bytes":
        return BytesTokenizer()
    if suffix == ".json":
        assert end_of_document is not None
        return HuggingFaceTokenizer(path=path, end_of_document=end_of_document)
    if suffix == ".tiktoken":
        assert pattern is not None
        return TiktokenTokenizer(path=path, pattern=pattern)
    raise click.BadParameter("give `bytes`, a .json or a .tiktoken file", param_hint="--tokenizer")


class _Lines:
    """Progress for a log: a line for each finished shard, and one every ten seconds."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, progress: "Progress") -> None:
        now = time.monotonic()
        if not progress.shard_finished and now - self.last < 10:
            return
        self.last = now
        click.echo(f"{_counts(progress)}, {_left(progress, now - self.began)} left", err=True)


class _Bar:
    """Progress for a terminal: one line that is drawn over."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.began = time.monotonic()
        columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
        self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("reading", total=None)

    def __enter__(self) -> "_Bar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, progress: "Progress") -> None:
        left = _left(progress, time.monotonic() - self.began)
        self.bar.update(
            self.task, completed=progress.disk_bytes, total=progress.total_bytes,
            description=f"{_counts(progress)}, {left} left",
        )  # fmt: skip


def _display() -> _Lines | _Bar:
    return _Bar() if sys.stderr.isatty() else _Lines()


def _counts(progress: "Progress") -> str:
    return (
        f"{progress.disk_bytes / 1e6:,.1f} of {progress.total_bytes / 1e6:,.1f} MB, "
        f"{progress.documents:,} documents, {progress.tokens:,} tokens, {progress.shards:,} shards"
    )


def _left(progress: "Progress", seconds: float) -> str:
    done = progress.disk_bytes - progress.resumed_bytes
    rest = seconds * (progress.total_bytes - progress.disk_bytes) / max(done, 1)
    minutes, seconds = divmod(round(rest), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@command.command("inspect", epilog="Exit status: 0 fine, 1 missing or damaged.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every byte and compare it with the manifest.")
@click.option("--json", "as_json", is_flag=True, help="The same for programs.")
@click.option("--tokenizer", "tokenizer_path", metavar="PATH", help="To decode the first tokens; bytes need none.")
@click.option("--end-of-document", metavar="TOKEN", help="As for `prepare`.")
@click.option("--pattern", type=click.Choice(PATTERNS), help="As for `prepare`.")
def inspect_command(directory: Path, verify: bool, as_json: bool, tokenizer_path: str | None,
                    end_of_document: str | None, pattern: str | None) -> None:  # fmt: skip
    """Show what DIRECTORY holds and how its text begins.

    \b
      nmoe data inspect data/books/train
      nmoe data inspect data/books/train --verify
    """
    from nmoe.data.shards import open_shards

    source = open_shards(directory)
    manifest = source.manifest
    facts: dict[str, Any] = {
        "digest": source.digest, "tokens": manifest.num_tokens, "dtype": manifest.dtype,
        "documents": manifest.num_documents, "text_bytes": manifest.text_bytes,
        "altered_documents": manifest.altered_documents, "shards": len(manifest.shards),
        "tokenizer": manifest.tokenizer_kind, "tokenizer_digest": manifest.tokenizer_digest,
        "vocab_size": manifest.vocab_size, "end_of_document": manifest.end_of_document,
        "bytes_per_token": manifest.text_bytes / manifest.num_tokens,
    }  # fmt: skip
    first = source.read(0, min(64, source.num_tokens))
    facts["first_tokens"] = first.tolist()
    if tokenizer_path is not None or manifest.tokenizer_kind == "bytes":
        tokenizer = _tokenizer(tokenizer_path or "bytes", end_of_document, pattern)
        if tokenizer.digest != manifest.tokenizer_digest:
            way_out = "give the tokenizer of `nmoe data prepare`, with the same options"
            message = "the shards were made by another tokenizer"
            raise ConfigError(Diagnostic(code="N0232", message=message, place=str(directory), help=way_out))
        facts["first_text"] = tokenizer.decode(first)
    if verify:
        with click.progressbar(length=source.num_tokens, label="verifying", file=sys.stderr) as bar:
            source.verify(lambda done, _: bar.update(done - bar.pos))
        facts["verified"] = True
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        if name.startswith("first"):
            value = ascii(value) if isinstance(value, str) else " ".join(map(str, value[:16]))
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        elif isinstance(value, float):
            value = f"{value:.3f}"
        click.echo(f"{name.replace('_', ' '):18} {'yes' if value is True else value}")

