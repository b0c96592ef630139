"""A batch depends on the plan and the step alone, with and without the thread that works ahead."""

import hashlib
import threading

import numpy as np
import pytest
import torch

from nmoe.data.loader import Loader, Prefetcher
from nmoe.data.mixture import Mixture, MixtureStage
from nmoe.errors import RunError, fail


@pytest.fixture
def loader(memory_source):
    """Three sources, two stages, more than three epochs in 40 steps."""
    sources = [memory_source(3, 1), memory_source(8, 2), memory_source(5, 3)]
    stages = [
        MixtureStage(end_sequence=36, weights=(2, 1, 0)),
        MixtureStage(end_sequence=None, weights=(1, 3, 2)),
    ]
    mixture = Mixture(sources, stages, seed=4, sequence_length=32)
    assert max(mixture.epochs(40 * 6)) > 3
    return Loader(mixture, sequences=6, microbatch=2)


def same(a, b):
    return (
        a.step == b.step
        and a.digest == b.digest
        and a.num_bytes == b.num_bytes
        and torch.equal(a.input_ids_BS, b.input_ids_BS)
        and torch.equal(a.targets_BS, b.targets_BS)
        and torch.equal(a.document_ids_BS, b.document_ids_BS)
    )


def test_batches_are_the_mixture_s_windows(loader):
    tokens, _ = loader.mixture.windows(0, 12)
    for step in (1, 2):
        batch, rows = loader.batch(step), tokens[(step - 1) * 6 : step * 6]
        assert batch.input_ids_BS.dtype == batch.targets_BS.dtype == batch.document_ids_BS.dtype == torch.int64
        assert np.array_equal(batch.input_ids_BS, rows[:, :-1]) and np.array_equal(batch.targets_BS, rows[:, 1:])
        assert batch.digest == hashlib.sha256(rows.astype("<u4").tobytes()).hexdigest()
        assert batch.num_bytes == int((rows[:, 1:] != 256).sum())
        for ids, documents in zip(rows[:, :-1].tolist(), batch.document_ids_BS.tolist(), strict=True):
            assert documents == [ids[: i + 1].count(256) for i in range(len(ids))]


def test_another_batch_size_reads_the_same_order(loader):
    """The order is global: three microbatches of two are the rows of one batch of six."""
    small = Loader(loader.mixture, sequences=2, microbatch=2)
    for step in (1, 7):
        rows = torch.cat([small.batch(3 * (step - 1) + i).input_ids_BS for i in (1, 2, 3)])
        assert torch.equal(rows, loader.batch(step).input_ids_BS)


@pytest.mark.parametrize("depth", [0, 1, 4, 16])
@pytest.mark.parametrize("first_step", [1, 6, 23])
def test_prefetching_never_shifts_the_stream(loader, depth, first_step):
    with Prefetcher(loader, depth=depth, first_step=first_step) as batches:
        for step in range(first_step, 41):
            assert same(batches.next(), loader.batch(step))


def test_not_consumed_is_made_again(loader):
    """Stop with a full queue, go on with another depth: nothing is lost or doubled."""
    digests = []
    step = 1
    for depth, steps in ((16, 3), (1, 4), (0, 2), (4, 9)):
        with Prefetcher(loader, depth=depth, first_step=step) as batches:
            digests += [batches.next().digest for _ in range(steps)]
        step += steps
    assert digests == [loader.batch(i).digest for i in range(1, step)]


class Failing:
    """A loader that raises at one step."""

    def __init__(self, loader, at, error):
        self.loader, self.at, self.error = loader, at, error

    def batch(self, step):
        if step == self.at:
            raise self.error
        return self.loader.batch(step)


@pytest.mark.parametrize("depth", [1, 4])
def test_the_thread_s_failure_surfaces_at_its_step(loader, depth):
    cause = ZeroDivisionError("by zero")
    with Prefetcher(Failing(loader, 3, cause), depth=depth, first_step=1) as batches:
        assert [batches.next().step for _ in range(2)] == [1, 2]
        with pytest.raises(RunError, match=r"N0221.*ZeroDivisionError: by zero\n.*step 3") as caught:
            batches.next()
        assert caught.value.__cause__ is cause


def test_an_understood_failure_keeps_its_words(loader):
    with Prefetcher(Failing(loader, 1, fail("N0243", "damaged")), depth=2, first_step=1) as batches:
        with pytest.raises(RunError, match=r"N0243.*damaged"):
            batches.next()
        with pytest.raises(RunError, match=r"N0220.*dead and left no cause"):
            batches.next()


def test_a_batch_of_another_step_is_refused(loader):
    class Off(Failing):
        def batch(self, step):
            return self.loader.batch(step + (step == 2))

    for depth in (0, 3):
        with Prefetcher(Off(loader, 0, None), depth=depth, first_step=1) as batches:
            batches.next()
            with pytest.raises(RunError, match=r"N0222.*step 3 where step 2 was due"):
                batches.next()


def test_close_ends_the_thread(loader):
    batches = Prefetcher(loader, depth=2, first_step=1)
    batches.next()
    batches.close()
    batches.close()
    assert not any(thread.name == "nmoe-prefetch" for thread in threading.enumerate())
    with pytest.raises(ValueError, match="closed"):
        batches.next()


def test_steps_count_from_one(loader):
    with pytest.raises(ValueError, match="from 1"):
        loader.batch(0)
    with pytest.raises(ValueError):
        Loader(loader.mixture, sequences=6, microbatch=4)
