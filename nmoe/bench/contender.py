"""One of those whose steps `nmoe bench step` compares on a CPU, in a process of its own.

    python -m nmoe.bench.contender PLAN.toml WHO [--text]

takes a step for each line of stdin and answers with its milliseconds; it ends with stdin. In one process
with two others a step of configs/bench/cpu_deepseek.toml took 423 ms, in its own 335 to 369 (2026-11-25).
WHO: `ours`, or a peer of `stock_steps`. The driver (`Contender`) lets them take turns.
"""

import subprocess
import sys
from pathlib import Path

from nmoe import platform
from nmoe.bench.memory import with_data
from nmoe.bench.training import even_batch, spent, stock_steps, take
from nmoe.errors import NmoeError, fail
from nmoe.graph import build
from nmoe.plan.resolve import resolve

OURS = "ours"


class Contender:
    """The other end: starts the process, asks for steps. Use as a context manager."""

    def __init__(self, plan: Path, who: str, *, text: bool) -> None:
        self.who = who
        command = [sys.executable, "-m", "nmoe.bench.contender", str(plan), who, *["--text"] * text]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> float:
        """Milliseconds of its next step. RunError N0609 if it has died, and said why on stderr."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            return float(self.process.stdout.readline())
        except (OSError, ValueError):
            raise fail("N0609", f"`{self.who}` ended in the middle of the measurement", place="nmoe bench step",
                       help="its own message stands above") from None  # fmt: skip

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main(config: str, who: str, text: bool) -> None:
    """Steps until stdin ends."""
    plan = with_data(resolve(config))
    platform.require(plan.config.platform.target, plan.config.platform.threads)
    graph = build(plan)
    loader, device = graph.loader, graph.device
    if who == OURS:
        for step, _ in enumerate(sys.stdin, start=1):
            print(1e3 * take(graph, plan, range(step, step + 1), text), flush=True)
        return
    del graph
    peer = dict(stock_steps(plan, device, compile=True))[who]()
    for step, _ in enumerate(sys.stdin, start=1):
        batch = loader.batch(step) if text else even_batch(plan, step)
        print(spent(lambda batch=batch: peer.run(batch)), flush=True)  # type: ignore[misc]


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], "--text" in sys.argv[3:])
    except NmoeError as error:
        sys.exit(str(error))
