"""Rounds of talk between all ranks: everybody hears everybody, and the first failure is everybody's."""

import pytest

from nmoe.rdep.control import Control
from tests.rdep.talk import TIMEOUT_S

SHORT_S = 3.0  # where somebody is waited for in vain


@pytest.mark.parametrize("kind", ["tcp", "file"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_everybody_hears_everybody_and_the_store_does_not_grow(ranks, number, kind):
    for rank, (end, answer) in enumerate(ranks.run("talking", number, kind=kind)):
        assert end == "done", answer
        found, keys = answer
        assert found == [
            [[peer, "\u00e9", None] for peer in range(number)],
            [{"r": peer} for peer in range(number)] if rank == 0 else [],
            "from 0",
            "by 0",
            [9 << 20] * number,
        ]
        # A rank's answer to the last round of each of the two threads, and to the round before: two keys each.
        assert keys <= number * 8 + 2, "old rounds are still there"


def fail(ranks, how, timeout_s):
    answers = ranks.run("going wrong", 4, how=how, timeout_s=timeout_s)
    return [end for end, _ in answers], [text for _, text in answers]


@pytest.mark.parametrize(("how", "end"), [("SIGKILL", "signal 9"), ("SIGSTOP", "stopped")])
def test_a_rank_that_does_not_come_is_named_by_all(ranks, how, end):
    ends, said = fail(ranks, how, SHORT_S)
    assert ends == ["raised", end, "raised", "raised"]
    late = "did not come to `after` within 3 s"
    for text in (said[0], *said[2:]):
        assert text.startswith((f"error[N0812]: rank 1 {late}", f"error[N0811]: rank 1 failed first: {late}"))


@pytest.mark.parametrize(
    ("how", "end", "what"), [("SIGKILL", "signal 9", ""), ("SIGSTOP", "stopped", "it has not answered within 3 s")]
)
def test_a_store_that_goes_or_hangs_with_rank_0(ranks, how, end, what):
    """A call of a store whose server is stopped never returns: whoever made it must not wait for it."""
    ends, said = fail(ranks, f"server {how}", SHORT_S)
    assert ends == [end, "raised", "raised", "raised"]
    for text in said[1:]:
        assert text.startswith(f"error[N0814]: the store of the launch is gone: {what}")
        assert "help: look at what rank 0 and the launcher wrote" in text


def test_a_rank_at_work_is_waited_for(ranks):
    assert ranks.run("going wrong", 2, how="at work", timeout_s=SHORT_S) == [("done", [0, 1])] * 2


def test_the_first_of_two_failures_is_everybodys(ranks):
    """Each that fails raises its own; the others wait for both, and hear of the same one."""
    ends, said = fail(ranks, "two fail", TIMEOUT_S)
    assert ends == ["raised"] * 4
    assert said[2:] == [f"error[N0301]: the disk of rank {rank} is on fire" for rank in (2, 3)]
    first = "2" if "rank 2" in said[0] else "3"
    for rank in (0, 1):
        assert said[rank] == (
            f"error[N0811]: rank {first} failed first: the disk of rank {first} is on fire [N0301]\n"
            f" --> rank {rank} at `after`\n  = help: look at what rank {first} wrote"
        )


def test_ranks_in_different_rounds(ranks):
    ends, said = fail(ranks, "other round", TIMEOUT_S)
    assert ends == ["raised"] * 4
    for rank in (0, 2, 3):
        assert said[rank].startswith(f"error[N0813]: rank 1 has come to `another`, and rank {rank} to `after`")
    assert said[1].startswith("error[N0813]: rank 0 has come to `after`, and rank 1 to `another`")


def test_a_waiting_thread_ends_when_its_process_gives_up(ranks):
    answers = ranks.run("going wrong", 2, how="given up", timeout_s=TIMEOUT_S)
    assert [end for end, _ in answers] == ["done", "done"]
    assert answers[0][1].startswith(
        "error[N0815]: rank 0 has stopped waiting: rank 1 failed first: ended without a word [N0802]"
    )


def test_one_rank_needs_no_store_and_several_do():
    alone = Control.alone()
    assert alone.clone().gather("anything", (1, 2)) == [[1, 2]]
    with pytest.raises(ValueError, match="rank 0 of 2 without a store"):
        Control(None, rank=0, ranks=2, timeout_s=1.0)
