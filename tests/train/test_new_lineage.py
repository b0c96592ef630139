"""A changed environment on another number of ranks: refused by all, or openly a new line over the same data."""

from nmoe.metrics.reader import read_rows
from nmoe.train import events
from tests.train.launches import FOUR, first_difference

KEYS = (*FOUR, "eval.bpb.max_tokens=32", "output.checkpoint_every=9")


def batches(launches, name) -> list[tuple[int, str]]:
    return [(row.step, row.label) for row in read_rows(launches.metrics(name), names=["data/batch_digest"])]


def test_a_new_line_on_fewer_ranks_has_the_same_batches(launches):
    """Begun on 4; the source changes, and 2 go on as a new line; it changes back, and 1 goes on as a third."""
    launches.finished("straight", 1, *KEYS, "output.stop_after_step=6")
    launches.finished("run", 4, *KEYS, "output.stop_after_step=2")
    for ranks, stop, odd in ((2, 4, "other source"), (1, 6, "")):
        keys = (*KEYS, f"output.stop_after_step={stop}")
        refused = launches.train("run", ranks, *keys, odd=odd)
        assert refused.codes == [1] * ranks, (refused.ends, *refused.said)
        assert all("1 thing that can change bits is not as when" in said for said in refused.said)
        first = next(said for said in refused.said if "error[N0309]" in said)  # the others may hear of it before
        assert "source.model/moe.py" in first
        assert "--new-lineage" in first
        launches.finished("run", ranks, *keys, odd=odd, new_lineage=True)

    rows = read_rows(launches.metrics("run"), names=["train/loss"])
    lines = [[row.lineage for row in rows if row.step in steps] for steps in ((1, 2), (3, 4), (5, 6))]
    first, second, third = (set(line) for line in lines)
    assert len(first) == len(second) == len(third) == 1
    assert len(first | second | third) == 3
    told = [event for event in events.read(launches.path("run")).events if event["event"] == "lineage"]
    assert [(event["parent"], event["lineage"]) for event in told] == [
        (*first, *second), (*second, *third)
    ]  # fmt: skip
    assert all(any("source.model/moe.py" in line for line in event["changes"]) for event in told)
    assert batches(launches, "run") == batches(launches, "straight")
    assert len(batches(launches, "run")) == 6
    # The environment was the same in truth, so not only the batches are.
    assert first_difference(launches.left("straight"), launches.left("run")) == ""
