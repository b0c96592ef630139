"""The command line: a table of commands, each imported when it is used, and one way out of every failure.

    0    done            2    not valid (a config, an argument): nothing was started
    1    a run failed    130  interrupted

Results go to stdout, everything else to stderr. A failure that nmoe understands is printed as a
diagnostic; only a fault of nmoe's own shows a traceback.
"""

import importlib
import os
import sys
from collections.abc import Sequence

import click

from nmoe import __version__
from nmoe.errors import NmoeError

# command -> (its module, which exposes `command`; what --help says of it without importing it)
COMMANDS: dict[str, tuple[str, str]] = {
    "build": ("nmoe.cli.build", "Show what a config resolves to: values, fingerprint, cost."),
    "train": ("nmoe.cli.train", "Start a run, continue it, or say that it is complete."),
    "gate": ("nmoe.cli.gate", "Prove that a killed run continues to the same bits."),
    "verify": ("nmoe.cli.verify", "Check every checkpoint of a run."),
    "export": ("nmoe.cli.export", "Write a run's model for the transformers library."),
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


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its status."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """The exit status of a command line; what it has to say is printed."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        with cli.make_context("nmoe", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except SystemExit as error:
        sys.stdout.flush()
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
    except BrokenPipeError:
        # The reader has gone. Whatever is still buffered goes nowhere, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
