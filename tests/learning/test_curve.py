"""The loss of a fixed small model falls as the golden curve does."""

import numpy as np

from tests.learning import curve
from tests.learning.curve import FILE, FURTHER, PARTS, SEEDS, bands, recorded


def test_the_curve_stays_in_its_band():
    found = np.mean([curve.curve(seed) for seed in FURTHER], axis=0)
    low, high = bands(recorded()).T
    assert (found < high).all(), f"learns less than the golden curve allows: {found}, at most {high}"
    assert (found > low).all(), f"too good to be true: {found}, at least {low}"


def test_the_file_is_what_its_figures_say():
    """Mean, spread and band follow from the lines of the seeds, of which the test's own are none."""
    assert not set(FURTHER) & set(SEEDS)
    assert len(SEEDS) >= 5
    figures = recorded()
    low, high = bands(figures).T
    wanted = {"mean": figures.mean(axis=0), "sd": figures.std(axis=0, ddof=1), "low": low, "high": high}
    lines = [line.split() for line in FILE.read_text(encoding="ascii").splitlines()]
    printed = {line[1]: line[2:] for line in lines if line[0] == "#" and len(line) == 2 + PARTS and line[1] in wanted}
    assert printed.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose([float(v) for v in printed[name]], values, atol=1e-4, err_msg=name)


def test_the_band_is_narrower_than_what_there_is_to_learn():
    """From the bigram's loss down to the curve's end is several times the band's half width there."""
    low, high = bands(recorded())[-1]
    assert high < 0.0
    assert -(low + high) / 2 > 2 * (high - low) / 2
