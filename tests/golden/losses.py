"""The first 20 losses of the configs that run on a CPU, at full digits: losses/NAME.txt.

The first line is the kind of machine that made the file: the bits follow from it and from the plan.
On that kind a comparison is exact; on another one libraries choose other kernels, whose sums are
ordered otherwise, and the losses agree within TOLERANCE. Each step stands as the text of float.hex.
"""

import tempfile
from pathlib import Path

import torch

from nmoe import platform
from nmoe.metrics.reader import read_rows
from nmoe.plan.resolve import resolve
from nmoe.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
LOSSES = ROOT / "tests" / "golden" / "losses"
STEPS = 20

# The quickstart with a step of one sequence: 20 of its own take minutes where the cores are shared.
SETS = {
    "debug": [],
    "quickstart": ["platform.threads=1", "batch.sequences=1", "batch.microbatch=1"],
}

# Relative. A sum ordered otherwise moves a float32 loss by about 1e-7, a bfloat16 activation by 2^-9;
# twenty steps of a growing difference and a few tokens routed otherwise multiply both.
TOLERANCE = {"quickstart": 1e-3, "debug": 2e-2}


def kind() -> str:
    """What decides the bits beside the plan: CPU, the kernels that torch takes for it, torch."""
    facts = platform.cpu_facts()
    return f"{facts['model']} ({facts['family']}); {torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}"


def losses(name: str) -> list[float]:
    """Train STEPS steps of configs/NAME.toml in a directory that is then removed; without evaluation."""
    with tempfile.TemporaryDirectory(prefix="nmoe-golden-") as directory:
        own = [f'output.run_dir="{directory}/run"', f"output.stop_after_step={STEPS}", "output.checkpoint_every=1000"]
        plan = resolve(ROOT / "configs" / f"{name}.toml", [*SETS[name], *own, "eval.bpb.every_tokens=1000000000"])
        train(plan, config_text="")
        rows = read_rows(Path(directory) / "metrics" / "run", names=["train/loss"])
    return [row.value for row in rows if row.value is not None]


def render(name: str) -> str:
    """The text of losses/NAME.txt, made here and now."""
    head = [f"# {kind()}", f"# configs/{name}.toml {' '.join(f'--set {item}' for item in SETS[name])}".rstrip()]
    return "\n".join([*head, *(value.hex() for value in losses(name))]) + "\n"


def parse(text: str) -> tuple[str, list[float]]:
    """(kind of machine, losses) of such a text."""
    lines = text.splitlines()
    return lines[0].removeprefix("# "), [float.fromhex(line) for line in lines if not line.startswith("#")]
