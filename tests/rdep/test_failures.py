"""A rank that dies, hangs, raises or goes another way: the others end, and say who was first, where and why."""

import pytest

AT_LAYER = 4


def fail(ranks, number, how, timeout_s=60.0):
    """The ends of all ranks, and what the others than rank 1 say."""
    answers = ranks.run("failing", number, who=1, how=how, at_layer=AT_LAYER, timeout_s=timeout_s)
    return [end for end, _ in answers], [text for rank, (_, text) in enumerate(answers) if rank != 1]


def test_without_a_failure_all_get_to_the_end(ranks):
    assert ranks.run("failing", 4, who=-1, how="", at_layer=0, timeout_s=60.0) == [("done", "whole")] * 4


@pytest.mark.parametrize(("how", "end"), [("kill", "signal 9"), ("exit", "exit 7")])
@pytest.mark.parametrize("number", [2, 4])
def test_a_dead_peer(ranks, number, how, end):
    ends, said = fail(ranks, number, how)
    assert ends == ["raised", end] + ["raised"] * (number - 2)
    for text in said:
        assert text.startswith("error[N0802]: rank 1 failed first: ended without a word")
        assert "`counts` of layer 4" in text
        assert "help: look at what rank 1 wrote" in text


def test_a_stopped_peer(ranks):
    """The others wait for their time-out, one finds out first and tells the others: all name rank 1."""
    ends, said = fail(ranks, 4, "stop", timeout_s=3.0)
    assert ends == ["raised", "stopped", "raised", "raised"]
    phase = "phase 13, `counts` of layer 4"
    for text in said:
        assert f"did not come to {phase} within 3 s" in text
        assert text.startswith(("error[N0803]: rank 1 did not", "error[N0802]: rank 1 failed first: did not"))
        assert "seen of rank 1: phase 12, `outputs` of layer 3" in text
        assert f"expected: {phase}" in text
    assert any(text.startswith("error[N0803]") for text in said)


def test_an_exception_on_one_rank(ranks):
    ends, said = fail(ranks, 4, "raise")
    assert ends == ["raised"] * 4
    for text in said:
        assert text.startswith("error[N0802]: rank 1 failed first: Planned: the disk is on fire")
        assert "in phase 12, `outputs` of layer 3" in text


def test_an_error_of_ours_on_one_rank(ranks):
    ends, said = fail(ranks, 3, "grow")
    assert ends == ["raised"] * 3
    assert all("rank 1 failed first: a microbatch of 78 tokens" in text and "[N0807]" in text for text in said)


def test_a_rank_that_leaves_early(ranks):
    ends, said = fail(ranks, 3, "return")
    assert ends == ["raised", "done", "raised"]
    for text in said:
        assert "rank 1 has ended" in text
        assert "`counts` of layer 4" in text


def test_a_rank_that_runs_other_phases(ranks):
    """Whoever compares first tells the others: rank 1 found itself one layer ahead of them, or they found it."""
    ends, said = fail(ranks, 3, "skip")
    assert ends == ["raised"] * 3
    for text in said:
        assert "N0804" in text
        assert "`counts` of layer 5" in text
        assert "`counts` of layer 4" in text


def test_ranks_of_other_models_do_not_meet(ranks):
    answers = ranks.run("meeting", 3, who=1, timeout_s=20.0)
    assert {end for end, _ in answers} == {"raised"}
    assert any("other sizes" in text and "3 of 12 experts" in text and "2 of 12 experts" in text for _, text in answers)
    assert all(text.startswith("error[N0805]") for _, text in answers)


def test_a_rank_that_never_comes(ranks):
    answers = ranks.run("meeting", 3, who=-1, timeout_s=2.0)
    assert [end for end, _ in answers] == ["raised", "raised", "done"]
    assert any("rank 2" in text for _, text in answers[:2])
    assert all(text.startswith("error[N0805]") for _, text in answers[:2])
