"""The command line: a table of commands, each imported when it is used, and one way out of every failure.

    0    done            2    not valid (a config, an argument): nothing was started
    1    a run failed    130  interrupted

Results go to stdout, everything else to stderr. A failure that nmoe understands is printed as a
diagnostic; only a fault of nmoe's own shows a traceback.
"""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import click

from nmoe import __version__
from nmoe.errors import Diagnostic, NmoeError

# command -> (its module, which exposes `command`; what --help says of it without importing it)
COMMANDS: dict[str, tuple[str, str]] = {
    "build": ("nmoe.cli.build", "Show what a config resolves to: values, fingerprint, cost."),
    "train": ("nmoe.cli.train", "Start a run, continue it, or say that it is complete."),
    "gate": ("nmoe.cli.gate", "Prove that a killed run continues to the same bits."),
    "verify": ("nmoe.cli.verify", "Check every checkpoint of a run."),
    "compare": ("nmoe.cli.compare", "Find the first step and thing at which two runs part."),
    "export": ("nmoe.cli.export", "Write a run's model for the transformers library."),
    "bench": ("nmoe.cli.bench", "Measure the parts of a training on this machine."),
    "data": ("nmoe.cli.data", "Prepare token shards from text."),
}


class Commands(click.Group):
    """The table as click sees it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from nmoe.plan.structure import closest

            near = closest(args[0], list(COMMANDS))
            hint = f" Did you mean '{near}'?" if near else f" Commands: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command '{args[0]}'.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nmoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Train Mixture-of-Experts language models: one TOML file, one fingerprint, the same bits."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGUSR1 interrupt a command as Ctrl-C does; a run that has begun watches them itself."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its status."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """The exit status of a command line; what it has to say is printed."""
    _open_closed_streams()
    try:
        status = _status(list(sys.argv[1:] if args is None else args))
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except OSError as error:
        if not _was_a_result(error):
            raise
        _forget_stdout()
        lost = Diagnostic(
            code="N0001",
            message=f"the result cannot be written: {(error.strerror or str(error)).lower()}",
            place="stdout",
            help="make room where it goes, or send it elsewhere, and run the command again",
        )
        print(lost.render(), file=sys.stderr)
        return 1
    return status


def _open_closed_streams() -> None:
    """A command started with stdout or stderr closed has nobody to tell; no file may get their numbers."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _was_a_result(error: OSError) -> bool:
    """Whether the call that failed wrote to stdout: click's own, of all commands and of --help, or the last flush."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code is run.__code__ or (frame.f_code is click.echo.__code__ and not frame.f_locals["err"])


def _forget_stdout() -> None:
    """Whatever is still buffered goes nowhere, or Python complains at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _status(arguments: list[str]) -> int:
    try:
        with _interruptible(), cli.make_context("nmoe", arguments) as context:
            cli.invoke(context)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except NmoeError as error:
        print(error.render(), *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show(file=sys.stderr)
        return 2
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    return 0
