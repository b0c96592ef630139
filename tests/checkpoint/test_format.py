"""The layout on disk: names that may become paths, and none else."""

import pytest

from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "/x", "a b", "a\n", "é", "x" * 600, ".hidden"])
def test_names_that_are_no_logical_names(name):
    with pytest.raises(Damage):
        layout.check_tensor(name, (1,), "float32")


@pytest.mark.parametrize("shape", [(2**49,), (2**30, 2**30), (1,) * 17])
def test_absurd_shapes(shape):
    with pytest.raises(Damage, match="absurd"):
        layout.check_tensor("x", shape, "float32")


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "a" * 65])
def test_no_digest_becomes_a_path_unchecked(sha256, tmp_path):
    with pytest.raises(ValueError, match="not a SHA-256"):
        layout.object_path(tmp_path, sha256)


def test_steps_on_disk_are_those_with_canonical_names(tmp_path):
    for name in ("step_00000010", "step_00000002", "step_123456789", "step_10", "step_000000003", "step_0000000a", "x"):
        (tmp_path / name).mkdir()
    assert layout.steps_on_disk(tmp_path) == [2, 10, 123456789]
