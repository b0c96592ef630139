"""Experts against dense layers: equal active parameters (the router's among them), equal tokens, the same text.

`python -m tests.learning.against_dense` (part of `make learning-goldens`) trains both over seeds and
rewrites against_dense.txt. A pair shares its seed, hence its text, step for step; what is compared is
the pair's difference. Both use Muon for all matrices behind the embedding at the rate that is the best
of 5e-3, 1e-2, 2e-2 for the dense model.
"""

from pathlib import Path

import attrs
import numpy as np

from tests.learning.kinds import MUON, MUON_EXPERTS
from tests.learning.training import DENSE, MOE, Training, train

FILE = Path(__file__).parent / "against_dense.txt"
SEEDS = range(6)
FINAL = 64
"""Steps whose mean loss is the final one: 32,768 tokens."""

TOKENS = ("schedule.stable_tokens=81_920", "schedule.decay_tokens=122_880")
EXPERTS = (*MUON, *MUON_EXPERTS, *TOKENS, "model.moe.router.num_experts=32")
LAYERS = (*MUON, *TOKENS)


@attrs.frozen(kw_only=True)
class Pair:
    """Final losses of one seed, nats a byte."""

    seed: int
    moe: float
    dense: float


def both(seed: int) -> tuple[Training, Training]:
    """The two trainings of one seed: experts, dense layers."""
    return train(MOE, [*EXPERTS, f"random.seed={seed}"]), train(DENSE, [*LAYERS, f"random.seed={seed}"])


def pair(seed: int) -> Pair:
    moe, dense = both(seed)
    return Pair(seed=seed, moe=float(moe.losses[-FINAL:].mean()), dense=float(dense.losses[-FINAL:].mean()))


def recorded() -> list[Pair]:
    """The pairs of the file."""
    lines = [line.split() for line in FILE.read_text(encoding="ascii").splitlines() if not line.startswith("#")]
    return [Pair(seed=int(seed), moe=float(moe), dense=float(dense)) for seed, moe, dense, _ in lines]


def differences(pairs: list[Pair]) -> np.ndarray:
    """Dense less experts, of each pair: above 0 where experts are better."""
    return np.array([p.dense - p.moe for p in pairs])


def render(pairs: list[Pair]) -> str:
    """The text of against_dense.txt."""
    found = differences(pairs)
    error = found.std(ddof=1) / len(found) ** 0.5
    return "\n".join([
        "# Mean loss (nats a byte) of the last 32,768 of 215,040 tokens, a line a seed; against_dense.py says more.",
        "# Only `make learning-goldens` rewrites this file, and a change needs a line in CHANGELOG.md.",
        f"# difference: mean {found.mean():.5f}, standard error {error:.5f}, t = {found.mean() / error:.1f}",
        f"# {'seed':<6}{'experts':>10}{'dense':>10}{'difference':>12}",
        *(f"{p.seed:<8}{p.moe:>10.5f}{p.dense:>10.5f}{p.dense - p.moe:>12.5f}" for p in pairs),
    ]) + "\n"  # fmt: skip


def main() -> None:
    text = render([pair(seed) for seed in SEEDS])
    same = FILE.exists() and FILE.read_text(encoding="ascii") == text
    FILE.write_text(text, encoding="ascii")
    print(f"{'unchanged' if same else 'rewrote  '} tests/learning/{FILE.name}")


if __name__ == "__main__":
    main()
