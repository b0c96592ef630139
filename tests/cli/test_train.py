"""`nmoe train` as a command: exit statuses and messages; no failure of the user's place ends in a traceback."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe.checkpoint.reader import require_head
from nmoe.cli.main import run as nmoe

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "train" / "tiny.toml")


def in_directory(path: Path, *sets: str) -> list[str]:
    keys = [f'output.run_dir="{path}"', *sets]
    return ["train", TINY, *(word for item in keys for word in ("--set", item))]


def test_a_run_and_its_repetition(tmp_path, capfd):
    """Results on stdout, everything else on stderr; the overrides are kept with the run."""
    arguments = in_directory(tmp_path / "run", "output.stop_after_step=2", "random.seed=7")
    assert nmoe(arguments) == 0
    captured = capfd.readouterr()
    assert captured.out.splitlines() == [
        "stopped after step 2 of 20, as [output] stop_after_step says; raise it to continue", f"run: {tmp_path}/run"
    ]  # fmt: skip
    lines = captured.err.splitlines()
    assert lines[0].startswith("tiny.toml: plan ")
    assert "20 steps of 64 tokens" in lines[0]
    assert lines[1] == f"starting in {tmp_path}/run, attempt 1"
    assert lines[2].startswith("step  1/20    5.0%  loss 5.")
    assert lines[2].endswith("    64 tokens")
    assert "seed = 7" in (tmp_path / "run" / "resolved.toml").read_text()
    assert (tmp_path / "run" / "config.toml").read_text() == Path(TINY).read_text()

    assert nmoe(arguments) == 0
    assert "continuing after step 2 (verified)" in capfd.readouterr().err


def test_sigterm_to_the_process_saves_and_exits_130(tmp_path):
    """The real signal to a real process, sent when its first step has been reported."""
    command = [sys.executable, "-m", "nmoe", *in_directory(tmp_path / "run", "output.progress_every=1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step  1/20"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        out = process.stdout.read()
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    step = require_head(tmp_path / "run" / "checkpoints").step
    assert out.splitlines()[0] == f"stopped by SIGTERM after step {step} of 20, saved; run again to continue"
    assert 1 <= step < 20


@pytest.mark.parametrize(
    "name, message",
    [("gone.toml", "no such file or directory"), ("", "is a directory"), ("binary.toml", "UTF-8")],
    ids=["missing", "directory", "binary"],
)
def test_a_config_that_cannot_be_read(tmp_path, capfd, name, message):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert nmoe(["train", str(tmp_path / name)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error[N01")
    assert message.lower() in error.lower()
    assert str(tmp_path / name) in error


def test_a_plan_for_other_hardware_says_why(capfd):
    assert nmoe(["train", str(ROOT / "configs" / "moonlet.toml")]) == 2
    error = capfd.readouterr().err
    assert "error[N0602]: `moonlet.toml` resolves, and does not run yet" in error
    assert 'of kind "nvfp4" has no kernels for sm_100a yet' in error


def test_ranks_that_the_plan_cannot_have(tmp_path, capfd, monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_PORT": 9}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert nmoe(in_directory(tmp_path / "run")) == 2
    assert "error[N0119]: 3 ranks do not divide the step's 2 microbatches" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_come(tmp_path, capfd, monkeypatch):
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 9}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert nmoe([*in_directory(tmp_path / "run"), "--set", "output.rank_timeout=1"]) == 1
    assert "error[N0805]: the ranks of the launch have not come together" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_variable_that_changes_arithmetic_is_refused(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert nmoe(in_directory(tmp_path / "run")) == 1
    assert "`MKL_CBWR` is set to 'COMPATIBLE'" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_somebody_elses(tmp_path, capfd):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert nmoe(in_directory(tmp_path)) == 1
    error = capfd.readouterr().err
    assert "error[N0313]" in error
    assert "thesis.tex" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("above", ["file", "/sys"], ids=["file-in-the-way", "read-only"])
@pytest.mark.parametrize("place", ["run", "metrics"])
def test_a_place_that_cannot_be_written(tmp_path, capfd, place, above):
    """Also for root: a file stands where a directory has to be made, or the file system takes none."""
    (tmp_path / "file").write_text("in the way")
    run = tmp_path / above / "run" if place == "run" else tmp_path / "run"
    sets = [] if place == "run" else [f'output.metrics_dir="{tmp_path / above}/metrics"']
    assert nmoe(in_directory(run, *sets)) == 1
    error = capfd.readouterr().err
    assert "error[N0301]: cannot make directory" in error if place == "run" else "error[N0402]: cannot " in error
    assert str(tmp_path / above) in error
    assert "= help: " in error
    assert "Traceback" not in error


def test_a_full_disk_stops_the_run_and_says_where(tmp_path, capfd, monkeypatch):
    """The disk has no room from the first checkpoint on; with room again the same command goes on."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert nmoe(in_directory(tmp_path / "run", "output.stop_after_step=2")) == 1
        error = capfd.readouterr().err
    assert "error[N0308]: two checkpoints, the least that a run has, need " in error
    assert "the file system has 1.0 MB free" in error
    assert "keep_checkpoints" in error
    assert nmoe(in_directory(tmp_path / "run", "output.stop_after_step=2")) == 0


def test_a_run_that_lost_its_checkpoints_does_not_begin_again_in_silence(tmp_path, capfd):
    assert nmoe(in_directory(tmp_path / "run", "output.stop_after_step=2")) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert nmoe(in_directory(tmp_path / "run", "output.stop_after_step=3")) == 1
    error = capfd.readouterr().err
    assert "error[N0314]: the run has been saved at step 2 and has no `checkpoints`" in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_new_lineage_without_a_change_is_refused(tmp_path, capfd):
    assert nmoe([*in_directory(tmp_path / "run"), "--new-lineage"]) == 2
    assert "error[N0505]" in capfd.readouterr().err
