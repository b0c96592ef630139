"""Ranks as processes: this script imports torch once, and forks the ranks of each job from there.

A line of stdin is a job, {"work", "ranks", "directory", "arguments"}; the line of stdout that answers it
has for each rank how it ended ("done", "raised", "exit 3", "signal 9", "stopped") and its result.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

LIMIT_S = 240
ROOT = Path(__file__).resolve().parents[2]


class Ranks:
    """The process that forks, as the tests see it. work: the module that says what the ranks can do."""

    def __init__(self, directory: Path, work: str = "tests.rdep.work") -> None:
        self.directory, self.jobs = directory, 0
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.rdep.ranks", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=ROOT,
        )  # fmt: skip

    def run(self, work: str, ranks: int, **arguments) -> list[tuple[str, object]]:
        """What each rank of a job came to, and what it returned or the text of what it raised."""
        self.jobs += 1
        directory = self.directory / str(self.jobs)
        directory.mkdir()
        job = {"work": work, "ranks": ranks, "directory": str(directory), "arguments": arguments}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server of ranks has ended"
        return [tuple(one) for one in json.loads(answer)]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def serve() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(job: dict) -> list[tuple[str, object]]:
    """Fork the ranks of a job and wait until each has ended or stopped."""
    children = {}
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            be(rank, job)
        children[child] = rank
    ends: dict[int, str] = {}
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(child, signal.SIGKILL) for child in children])
    signal.alarm(LIMIT_S)
    while len(ends) < len(children):
        child, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            ends[children[child]] = "stopped"
        elif ends.get(children[child]) != "stopped":
            code = os.waitstatus_to_exitcode(status)
            names = {0: "done", 1: "raised"}
            ends[children[child]] = f"signal {-code}" if code < 0 else names.get(code, f"exit {code}")
    signal.alarm(0)
    for child, rank in children.items():
        if ends[rank] == "stopped":
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    results = []
    for rank in range(job["ranks"]):
        file = Path(job["directory"]) / f"{rank}.json"
        results.append((ends[rank], json.loads(file.read_text()) if file.exists() else None))
    return results


def be(rank: int, job: dict) -> None:
    """One rank, from its fork to its end."""
    from nmoe.errors import NmoeError

    work = importlib.import_module(sys.argv[1])
    file = Path(job["directory"]) / f"{rank}.json"
    code = 1
    try:
        store = work.store(job["directory"], job["ranks"])
        result = work.WORK[job["work"]](rank=rank, ranks=job["ranks"], store=store, **job["arguments"])
        file.write_text(json.dumps(result))
        code = 0
    except NmoeError as error:
        file.write_text(json.dumps(error.render()))
    except BaseException as error:
        file.write_text(json.dumps(f"{type(error).__name__}: {error}"))
        if not isinstance(error, work.Planned):
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(code)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    importlib.import_module(sys.argv[1])

    serve()
    os._exit(0)  # libraries have much to say at an end, to whom nobody listens
