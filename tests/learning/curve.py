"""The golden curve: how the loss of one small model falls, over seeds. `make learning-goldens` rewrites curve.txt.

The model is the first of kinds.py. A seed changes the weights' first values and the order of the text.
The curve is the mean, in each of PARTS equal parts of the training, of the loss less what the counted
bigram model loses on the same tokens, which takes out that some text is harder for any model. The band
around it is where the mean of a few further seeds lies but for one case in a thousand, over all parts
together (a normal spread over seeds, Student's t, the chance shared out evenly over the parts). A change
of training's arithmetic is such a further draw: it may move bits, and may not move the curve out of the
band, up or down. A loss that is too low is no better: it has seen what it should predict.
"""

from pathlib import Path

import numpy as np

from tests.learning.kinds import KINDS
from tests.learning.student import band
from tests.learning.training import MOE, train

FILE = Path(__file__).parent / "curve.txt"
SEEDS = range(12)
FURTHER = (100, 101, 102)
"""The test's own seeds; none of them has a line in the file."""
PARTS = 5
CHANCE = 1e-3


def curve(seed: int) -> np.ndarray:
    """The parts' mean losses above the bigram's, nats a byte."""
    first = next(iter(KINDS.values()))
    training = train(MOE, [*first, f"random.seed={seed}"])
    return np.array([part.mean() for part in np.array_split(training.losses - training.bigram, PARTS)])


def bands(curves: np.ndarray) -> np.ndarray:
    """(PARTS, 2): lowest and highest mean of each part over the further seeds. curves: (seeds, PARTS)."""
    return np.array([band(column, len(FURTHER), CHANCE / PARTS) for column in curves.T])


def recorded() -> np.ndarray:
    """The curves of the file, (seeds, PARTS)."""
    lines = [line.split() for line in FILE.read_text(encoding="ascii").splitlines() if not line.startswith("#")]
    assert [int(line[0]) for line in lines] == list(SEEDS)
    return np.array([[float(value) for value in line[1:]] for line in lines])


def render(curves: np.ndarray) -> str:
    """The text of curve.txt."""

    def line(name: str, values: np.ndarray) -> str:
        return f"{name:<8}" + "".join(f"{value:>10.5f}" for value in values)

    low, high = bands(curves).T
    return "\n".join([
        "# Mean loss less the bigram's (nats a byte) of each fifth of a training, a line a seed; curve.py says more.",
        "# moe.toml with the first keys of kinds.py: 71,680 bytes of the packaged text in 140 steps.",
        "# Only `make learning-goldens` rewrites this file, and a change needs a line in CHANGELOG.md.",
        "# low and high: where the mean of three further seeds lies but for one case in a thousand.",
        line("# mean", curves.mean(axis=0)),
        line("# sd", curves.std(axis=0, ddof=1)),
        line("# low", low),
        line("# high", high),
        *(line(str(seed), values) for seed, values in zip(SEEDS, curves, strict=True)),
    ]) + "\n"  # fmt: skip


def main() -> None:
    text = render(np.array([curve(seed) for seed in SEEDS]))
    same = FILE.exists() and FILE.read_text(encoding="ascii") == text
    FILE.write_text(text, encoding="ascii")
    print(f"{'unchanged' if same else 'rewrote  '} tests/learning/{FILE.name}")


if __name__ == "__main__":
    main()
