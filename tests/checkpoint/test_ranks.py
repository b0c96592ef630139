"""All ranks save and load together: the same checkpoint whatever their number, and whole whoever fails."""

import shutil

import pytest

from nmoe import slices
from nmoe.checkpoint import format as layout
from nmoe.checkpoint import reader, writer
from nmoe.checkpoint.verify import read_manifest, verify
from tests.checkpoint import work

SHORT_S = 3.0  # where somebody is waited for in vain


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", work.SLICE_BYTES)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """ranks -> (directory, what each rank's saves of the steps 1, 2 and 3 came to)."""
    found = {}
    for number in (1, 2, 3, 4):
        directory = tmp_path_factory.mktemp("saved") / "run" / "checkpoints"
        answers = ranks.run("saving", number, directory=str(directory), steps=[1, 2, 3])
        assert [end for end, _ in answers] == ["done"] * number, answers
        found[number] = directory, [answer for _, answer in answers]
    return found


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_any_number_of_ranks_saves_the_same_checkpoint(saved, tool, tmp_path, number):
    alone = tool.save(tmp_path, 1, 2, 3)[-1]
    directory, answers = saved[number]
    report = verify(directory)
    assert not report.faults
    assert not report.notes
    assert [checked.step for checked in report.checkpoints if checked.ok] == [2, 3]
    assert report.head.state_digest == alone.state_digest
    assert report.head.tensors == read_manifest(tmp_path, 3)[0].tensors
    assert len(report.head.tensors["master/model.embedding.weight_VD"].slices) == 9
    step, _, digest, _, _, total = answers[0][-1]
    assert (step, digest, total) == (3, alone.state_digest, alone.total_bytes)
    assert all(answer == answers[0] for answer in answers), "the ranks were not told the same"


@pytest.mark.parametrize("loaded_by", [1, 2, 3, 4])
@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
def test_any_number_of_ranks_loads_what_any_number_saved(saved, ranks, saved_by, loaded_by):
    directory, _ = saved[saved_by]
    assert ranks.run("loading", loaded_by, directory=str(directory)) == [("done", True)] * loaded_by


def fail(ranks, directory, number, who, how, kind="tcp"):
    """A save of step 3 that fails on a rank after two that went well; the ends of the ranks and what they say."""
    patient = how in ("SIGKILL", "SIGSTOP", "before HEAD")
    timeout_s = SHORT_S if patient else work.TIMEOUT_S
    answers = ranks.run(
        "saving", number, directory=str(directory), steps=[1, 2, 3], who=who, how=how, timeout_s=timeout_s, kind=kind
    )
    return [end for end, _ in answers], [text for _, text in answers]


def stands(directory, tool, step):
    """HEAD is at `step` and all is whole; a later attempt goes on from there and leaves nothing of the failed save."""
    report = verify(directory)
    assert not report.faults
    assert report.head.step == step
    assert [checked.step for checked in report.checkpoints if checked.ok] == sorted({step - 1, step, 2})
    assert tool.holds(directory, step)
    tool.save(directory, 9)
    assert tool.holds(directory, 9)
    assert not verify(directory).notes


@pytest.mark.parametrize(
    ("who", "how", "own", "told"),
    [
        (1, "ENOSPC", "error[N0301]: cannot write `object.1.", "no space left on device (ENOSPC) [N0301]"),
        (0, "EIO", "error[N0301]: cannot write `object.0.", "input/output error (EIO) [N0301]"),
        (2, "EIO", "error[N0301]: cannot write `object.2.", "input/output error (EIO) [N0301]"),
        (0, "ledger", "Planned: the ledger is full", "Planned: the ledger is full"),
        (1, "unaligned", "ValueError: `model.frozen` of shape [6, 6] is not cut at", "`model.frozen` of shape [6, 6]"),
    ],
)
def test_what_fails_on_one_rank_is_raised_on_all(ranks, directory, tool, who, how, own, told):
    ends, said = fail(ranks, directory, 3, who, how)
    assert ends == ["raised"] * 3
    assert said[who].startswith(own)
    for rank in {0, 1, 2} - {who}:
        assert said[rank].startswith(f"error[N0811]: rank {who} failed first: ")
        assert told in said[rank]
        assert f"help: look at what rank {who} wrote" in said[rank]
    stands(directory, tool, 2)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("other state", ["the state of rank 1 is", '"rounding": 9', "of rank 0", '"rounding": 0']),
        ("other step", ["the step of rank 1 is 4, of rank 0 3"]),
    ],
)
def test_ranks_that_do_not_save_the_same(ranks, directory, tool, how, words):
    ends, said = fail(ranks, directory, 3, 1, how)
    assert ends == ["raised"] * 3
    assert len(set(said)) == 1
    assert said[0].startswith("error[N0321]: the ranks do not save the same: ")
    assert all(word in said[0] for word in words)
    stands(directory, tool, 2)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "slice {} of 3 of `model.frozen` is held by no rank"),
        ("twice", "of `model.frozen` is given by ranks"),
        ("other dtype", "`model.frozen` is float32 [6, 6] on rank 0, int32 [6, 6] on 1"),
    ],
)
def test_a_state_that_is_not_there_exactly_once(ranks, directory, tool, how, words):
    """Rank 0 says so in its own words, the others name it."""
    ends, said = fail(ranks, directory, 3, 1, how)
    assert ends == ["raised"] * 3
    assert said[0].startswith("error[N0320]: the ranks do not give every tensor of step 3 exactly once: ")
    assert words.format((1 + len("model.frozen")) % 3) in said[0]
    assert all(text.startswith("error[N0811]: rank 0 failed first: the ranks do not give") for text in said[1:])
    stands(directory, tool, 2)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_ends_or_hangs_while_it_saves(ranks, directory, tool, how):
    ends, said = fail(ranks, directory, 4, 1, how)
    assert ends == ["raised", "signal 9" if how == "SIGKILL" else "stopped", "raised", "raised"]
    late = "did not come to `the objects of step 3` within 3 s"
    for rank in (0, 2, 3):
        assert said[rank].startswith((f"error[N0812]: rank 1 {late}", f"error[N0811]: rank 1 failed first: {late}"))
    stands(directory, tool, 2)


@pytest.mark.parametrize("kind", ["file", "tcp"])
def test_rank_0_killed_between_manifest_and_head(ranks, directory, tool, kind):
    """file: the store outlives rank 0, as a launcher's does. tcp: it goes with it."""
    ends, said = fail(ranks, directory, 3, 0, "before HEAD", kind)
    assert ends == ["signal 9", "raised", "raised"]
    assert layout.steps_on_disk(directory) == [1, 2, 3], "not between the two"
    for text in said[1:]:
        if kind == "tcp":
            assert text.startswith("error[N0814]: the store of the launch is gone: ")
            assert "what rank 0 and the launcher wrote" in text
        else:
            assert "rank 0" in text
            assert "did not come to `the end of saving step 3` within 3 s" in text
    stands(directory, tool, 2)


def test_a_failure_after_head_has_moved_is_raised_on_all_too(ranks, directory, tool):
    ends, said = fail(ranks, directory, 3, 0, "retention")
    assert ends == ["raised"] * 3
    assert said[1].startswith("error[N0811]: rank 0 failed first: Planned")
    stands(directory, tool, 3)


def test_the_room_of_all_ranks_is_counted_once(ranks, tool, tmp_path):
    """To the byte: the elements of the whole state, a block for each slice, and what is spare."""
    need = writer.SPARE_BYTES
    for name, tensor in tool.state(1).items():
        count = slices.slice_count(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        need += tensor.numel() * tensor.element_size() + count * writer.BLOCK_BYTES
    enough = ranks.run("room", 3, directory=str(tmp_path / "enough"), free=need)
    assert [end for end, _ in enough] == ["done"] * 3
    short = ranks.run("room", 3, directory=str(tmp_path / "short"), free=need - 1)
    assert [end for end, _ in short] == ["raised"] * 3
    assert all(text.startswith(f"error[N0308]: a checkpoint needs {need / 1e6:.1f} MB") for _, text in short)
    assert not list((tmp_path / "short" / "objects").iterdir())


def test_what_a_rank_writes_where_rank_0_does_not_see_it(ranks, directory, tool):
    """Two nodes with a directory of that name each: the other one has had a run in it before."""
    tool.save(directory.parent / "stale", 1)
    (directory.parent / "stale" / "tmp").mkdir(exist_ok=True)
    answers = ranks.run("saving", 2, directory=str(directory), steps=[1], who=1, how="elsewhere")
    assert [end for end, _ in answers] == ["raised"] * 2
    assert answers[0][1].startswith("error[N0319]: a rank has written what rank 0 does not see: is missing")
    assert "put `run_dir` on a file system that all nodes share" in answers[0][1]
    assert reader.head_step(directory) == 0


def test_a_failed_save_does_not_put_the_ranks_out_of_step(ranks, directory, tool):
    answers = ranks.run("going on", 3, directory=str(directory))
    assert answers == [("done", ["N0811", 2]), ("done", ["N0301", 2]), ("done", ["N0811", 2])]
    assert tool.holds(directory, 2)


@pytest.mark.parametrize("number", [2, 3])
def test_a_damaged_object_is_raised_on_all_ranks(saved, ranks, tmp_path, number):
    directory = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved[3][0], directory)
    objects = sorted(read_manifest(directory, 3)[0].objects)
    for sha256 in (objects[0], objects[-1]):
        work.damage(directory, sha256)
    answers = ranks.run("loading", number, directory=str(directory))
    assert [end for end, _ in answers] == ["raised"] * number
    assert len({text for _, text in answers}) == 1
    assert answers[0][1].startswith("error[N0303]: the checkpoint of step 3 is damaged: object ")
    assert "and 1 more" in answers[0][1]
    assert all(sha256 in answers[0][1] for sha256 in (objects[0], objects[-1]))


def test_a_rank_that_sees_another_head_is_named(saved, ranks, tool, tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved[2][0], directory)
    tool.save(tmp_path / "run" / "stale", 1, 2)
    answers = ranks.run("loading", 3, directory=str(directory), how="elsewhere")
    assert [end for end, _ in answers] == ["raised"] * 3
    for _, text in answers:
        assert text.startswith("error[N0322]: rank 1 reads another HEAD than rank 0")
        assert "note: rank 0: step 3, manifest" in text
        assert "note: rank 1: step 2, manifest" in text


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("not held", "of `model.frozen` is held by no rank"),
        ("left over", "`more` is in this program and not in the checkpoint"),
        ("other shape", "`a.mask` is bool [3] in the checkpoint, bool [4] on rank 1"),
    ],
)
def test_what_the_ranks_hold_has_to_be_the_checkpoint(saved, ranks, how, words):
    answers = ranks.run("loading", 3, directory=str(saved[2][0]), how=how)
    assert [end for end, _ in answers] == ["raised"] * 3
    for _, text in answers:
        assert text.startswith("error[N0305]: the checkpoint of step 3 does not have this program's tensors")
        assert words in text


def test_an_object_that_changes_after_it_was_verified_stops_all(saved, ranks, tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved[2][0], directory)
    answers = ranks.run("loading", 3, directory=str(directory), how="changed")
    assert [end for end, _ in answers] == ["raised"] * 3
    assert all("error[N0303]" in text and "model.frozen" in text for _, text in answers)


@pytest.mark.parametrize("number", [2, 3])
def test_a_bit_that_flips_where_a_shard_of_experts_lands_stops_all(saved, ranks, number):
    """The files are whole: what is held against the checkpoint's digests is the memory that a training goes on with."""
    directory = saved[2][0]
    answers = ranks.run("loading", number, directory=str(directory), how="flipped")
    assert [end for end, _ in answers] == ["raised"] * number
    for _, text in answers:
        assert text.startswith("error[N0303]: the checkpoint of step 3 is damaged: object ")
        assert "has other content than its name; tensor `model.layers.0.moe.experts.w_down_EDF`, read by rank 1" in text
    assert not verify(directory).faults


def test_one_process_reads_what_ranks_saved(saved, tool):
    for directory, _ in saved.values():
        assert tool.holds(directory, 3)
        assert reader.require_head(directory).step == 3
