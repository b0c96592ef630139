"""A training that kills itself: the child process of `nmoe gate`.

    python -m nmoe.train.drill CONFIG --kill STEP:PHASE [--rank R] [--set KEY=VALUE ...]

It is `nmoe train` with an observer that sends SIGKILL to its own process as the named phase of the
named step begins; of several ranks, in rank R (0). Nothing is flushed, closed or caught: to the run it is a
power switch.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from nmoe import platform
from nmoe.errors import NmoeError
from nmoe.plan.resolve import resolve
from nmoe.train.loop import train

PHASES = ("batch", "forward", "backward", "optimizer", "router", "metrics")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m nmoe.train.drill")
    parser.add_argument("config")
    parser.add_argument("--kill", required=True, metavar="STEP:PHASE")
    parser.add_argument("--rank", type=int, default=0, metavar="R")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    step_text, _, phase = options.kill.partition(":")
    if not step_text.isdigit() or phase not in PHASES:
        parser.error(f"--kill takes STEP:PHASE, PHASE one of {', '.join(PHASES)}")
    target = (int(step_text), phase)
    rank = platform.process().rank

    def observe(step: int, now: str) -> None:
        if (step, now) == target and rank == options.rank:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        train(
            resolve(options.config, options.sets),
            config_text=Path(options.config).read_text(encoding="utf-8"),
            observe=observe,
        )
    except NmoeError as error:
        print(error.render(), *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return error.exit_code
    print(f"the run ended before step {step_text} reached its phase `{phase}`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
