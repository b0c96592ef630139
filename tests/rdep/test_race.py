"""The race drill: delays before every publication and read, poison in every freed buffer; and that it finds faults.

`python -m tests.rdep.test_race` is the long one: 1,000 layers and more on each of 3 and of 4 ranks.
"""

import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.rdep.ranks import Ranks
from tests.rdep.test_shm import case, merged


@pytest.mark.parametrize("number", [2, 3, 4])
def test_delays_and_poison_change_no_bit(ranks, number):
    work = case("skewed", "bf16", depth=5)
    assert merged(ranks.run("layers", number, transport="drilled", **work)) == merged(
        ranks.run("layers", 1, transport="local", **work)
    )


@pytest.mark.parametrize("fault", ["keeps rows", "publishes early", "writes too soon"])
def test_the_drill_finds_a_fault(ranks, fault):
    work = case("spread", "fp32", depth=4)
    answers = ranks.run("layers", 4, transport=fault, timeout_s=30.0, **work)
    alone = merged(ranks.run("layers", 1, transport="local", **work))
    assert any(end != "done" for end, _ in answers) or merged(answers) != alone


def main():
    with tempfile.TemporaryDirectory() as directory:
        server = Ranks(Path(directory))
        for number in (3, 4):
            work = case("skewed", "bf16", microbatches=12 * number, depth=84)
            started = time.perf_counter()
            found = merged(server.run("layers", number, transport="drilled", **work))
            took = time.perf_counter() - started
            same = found == merged(server.run("layers", 1, transport="local", **work))
            print(f"{number} ranks, {12 * 84} layers each: {took:.0f} s, the same bits as one rank: {same}", flush=True)
        server.close()
    sys.exit(not same)


if __name__ == "__main__":
    main()
