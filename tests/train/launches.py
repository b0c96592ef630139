"""Launches of `nmoe train` on forked ranks, and everything that a run leaves which must not depend on their number."""

import json
from pathlib import Path

import attrs

from nmoe.checkpoint import reader
from nmoe.metrics.reader import read_rows
from tests.rdep.ranks import Ranks

TINY = Path(__file__).parent / "tiny.toml"

FP32 = (
    'model.dtype="fp32"', 'model.moe.experts.kind="fp32"', "model.moe.experts.intermediate_size=16",
    'optimizer.state_dtype="fp32"', 'optimizer.matrices.ns_dtype="fp32"', 'optimizer.experts.ns_dtype="fp32"',
)  # fmt: skip
SOFTMAX = (
    'model.moe.router.kind="softmax"', "model.moe.router.num_experts=12", "model.moe.router.top_k=3",
    "model.moe.router.balance_loss=0.01", "model.moe.router.z_loss=0.001",
)  # fmt: skip
ADAMW = ('optimizer.experts.kind="adamw"', "optimizer.experts.lr=1e-3")
FOUR = ("batch.microbatch=1",)
SIX = ("batch.microbatch=1", "batch.sequences=6", "schedule.warmup_tokens=96", "schedule.stable_tokens=672",
       "schedule.decay_tokens=672")  # fmt: skip

CONFIGS: dict[str, tuple[tuple[str, ...], tuple[int, ...], str]] = {
    "tiny: bf16 states, muon for matrices and experts, sigmoid": (FOUR, (2, 4), ""),
    "fp32 states and weights": ((*FOUR, *FP32), (2, 4), ""),
    "adamw for experts": ((*FOUR, *ADAMW), (2, 4), ""),
    "softmax router, balance and z losses": ((*FOUR, *SOFTMAX), (2, 4), ""),
    "two microbatches of two sequences": ((), (2,), ""),
    "softmax router, balance and z losses, on 3 and 6 ranks": ((*SIX, *SOFTMAX), (3, 6), ""),
    "short documents, whole layers computed again": ((*FOUR, 'output.recompute="layer"'), (2, 4), "short documents"),
    "short documents, not apart": ((*FOUR, "batch.document_mask=false"), (2,), "short documents"),
    "attention computed again": ((*FOUR, 'output.recompute="attention"'), (4,), ""),
    "untied table, fp32": ((*FOUR, *FP32, "model.tie_embeddings=false"), (2, 4), ""),
    "microbatches that cancel": ((*FOUR, *FP32), (2, 4), "cancelling"),
    "microbatches that cancel, bf16": (FOUR, (2, 4), "cancelling"),
    "dense, no experts": (FOUR, (2, 4), ""),
}  # fmt: skip
"""name: (keys, numbers of ranks beside 1, what is odd on all ranks)"""
DENSE = "dense, no experts"

GROUPS = ("train/", "grad/", "optimizer/", "router/", "data/", "eval/", "quant/")
"""Metrics whose values are the training's; the others are of its time and place."""


@attrs.frozen(kw_only=True)
class Launch:
    """How the ranks of a launch ended ("done" is a return, of `codes`), and what each wrote."""

    ends: list[str]
    codes: list[int | None]
    said: list[str]


class Launches:
    """Runs by name below one directory, their metrics beside them; every launch is of forked ranks."""

    def __init__(self, directory: Path, ranks: Ranks, config: Path = TINY):
        self.directory, self.ranks, self.config = directory, ranks, config
        self.count = 0

    def path(self, name: str) -> Path:
        return self.directory / name

    def metrics(self, name: str) -> Path:
        return self.path(name).parent / "metrics" / self.path(name).name

    def train(self, name: str, ranks: int, *sets: str, config: Path | None = None, **more) -> Launch:
        self.count += 1
        log = self.directory / "logs" / str(self.count)
        keys = [f'output.run_dir="{self.path(name)}"', f'output.metrics_dir="{self.metrics(name).parent}"', *sets]
        answers = self.ranks.run(
            "training", ranks, config=str(config or self.config), sets=keys, log=str(log), **more
        )
        files = [log / f"{rank}.txt" for rank in range(ranks)]
        return Launch(
            ends=[end for end, _ in answers],
            codes=[code if end == "done" else None for end, code in answers],
            said=[file.read_text() if file.exists() else "" for file in files],
        )

    def finished(self, name: str, ranks: int, *sets: str, **more) -> str:
        """Train to the end; the state's digest."""
        launch = self.train(name, ranks, *sets, **more)
        assert launch.codes == [0] * ranks, (launch.ends, *launch.said)
        return self.digest(name)

    def digest(self, name: str) -> str:
        return reader.require_head(self.path(name) / "checkpoints").state_digest

    def left(self, name: str) -> list[tuple]:
        """All rows of the ledger that are the training's, and its state: equal for equal trainings, bit for bit."""
        rows = [
            (row.step, row.tokens_seen, row.name, row.layer, row.expert, row.label,
             None if row.value is None else row.value.hex())
            for row in read_rows(self.metrics(name))
            if row.name.startswith(GROUPS)
        ]  # fmt: skip
        head = reader.require_head(self.path(name) / "checkpoints")
        counters = [(head.step, key, json.dumps(value, sort_keys=True)) for key, value in sorted(head.state.items())]
        return [*rows, *counters, (head.step, "state", head.state_digest)]

    def errors(self, name: str) -> dict[int, dict]:
        """What each rank has left in its error file, by rank."""
        found = [json.loads(file.read_text()) for file in self.path(name).glob("error*.json")]
        return {one["rank"]: one for one in found}


def first_difference(one: list[tuple], other: list[tuple]) -> str:
    """In words; empty if there is none."""
    for left, right in zip(one, other, strict=False):
        if left != right:
            return f"{left} and {right}"
    return "" if len(one) == len(other) else f"{len(one)} and {len(other)} rows"
