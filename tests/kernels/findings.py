"""What one of the scripts that compile kernels without a GPU has found, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def findings(script: str, *arguments: str) -> dict[str, dict]:
    """By kernel: the JSON object on the script's last line."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{script}", *arguments], capture_output=True, text=True, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict] = json.loads(done.stdout.splitlines()[-1])
    return found
