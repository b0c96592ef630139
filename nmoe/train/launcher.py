"""Ranks as processes of this machine, and the store at which they meet, which outlives them.

What torchrun does too; but it ends the other ranks when one has died, and whether they end by themselves is
what is asked here.
"""

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nmoe import platform
from nmoe.errors import RunError, fail

END_S = 15.0
"""Beside the time that ranks wait for each other: to write down why they end, and to go."""


def launch(command: Sequence[str], directory: Path, expect: Sequence[int], *, end_s: float) -> None:
    """Run `command` as each rank; expect: the exit status of each. Their output goes to DIRECTORY/rankR.log.

    RunError N0511 if one ends in another way, or is still there end_s seconds after the first has ended; it is
    killed then.
    """
    ranks = len(expect)
    # The server lives in this process, as in torchrun's agent; nobody has to wait for the others to make it.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [directory / f"rank{rank}.log" for rank in range(ranks)]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as file:
                variables = platform.variables_of_rank(rank, ranks, store.port)
                children.append(subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT))
        late = _wait(children, end_s)
    finally:
        for child in children:
            child.kill()
            child.wait()
    for rank, (child, wanted) in enumerate(zip(children, expect, strict=True)):
        status = child.returncode
        if status != wanted or rank in late:
            ended = f"ended with {status}"
            if rank in late:
                ended = f"was still there {end_s:g} s after the first had ended"
            tail = logs[rank].read_text(errors="replace").strip().splitlines()[-12:]
            raise otherwise(f"of {ranks} ranks: rank {rank} {ended}, not {wanted}", command, logs[rank], tail)


def otherwise(what: str, command: Sequence[str], log: Path, tail: Sequence[str]) -> RunError:
    """N0511: an attempt that ended in another way than expected."""
    return fail(
        "N0511", f"an attempt {what}", place=json.dumps(command), help=f"read its whole output in {log}", notes=tail
    )


def _wait(children: Sequence[subprocess.Popen[bytes]], end_s: float) -> set[int]:
    """The ranks that are still there end_s seconds after the first has ended."""
    deadline = None
    while any(child.poll() is None for child in children):
        if deadline is None and any(child.returncode is not None for child in children):
            deadline = time.monotonic() + end_s
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return {rank for rank, child in enumerate(children) if child.poll() is None}
