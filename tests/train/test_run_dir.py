"""A run's directory: one owner, one fingerprint, a history that a kill cannot bend."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from nmoe.checkpoint import disk
from nmoe.checkpoint.manifest import Head
from nmoe.cli.main import run as nmoe
from nmoe.errors import RunError
from nmoe.plan.resolve import resolve
from nmoe.report.run import read_plan
from nmoe.train import events, run_lock
from nmoe.train.run_dir import RunDir
from tests.train.directories import CONFIG, history, open_run, plan_for


def test_a_new_run_holds_what_it_was_asked_to_do(tmp_path):
    plan = plan_for(tmp_path / "a" / "run")
    with RunDir.open(plan, config_text="# as written\n") as run:
        assert (run.name, run.attempt, run.continues) == ("run", 1, False)
        run.record_environment({"exact": {}, "recorded": {}})
        path = run.path
    assert (path / "config.toml").read_text() == "# as written\n"
    assert resolve(path / "resolved.toml").fingerprint == plan.fingerprint
    assert resolve(path / "resolved.toml").tree_digest == plan.tree_digest
    assert json.loads((path / "plan.json").read_text()) == json.loads(json.dumps(plan.to_json()))
    assert json.loads((path / "env.json").read_text()) == {"exact": {}, "recorded": {}}
    assert sorted(entry.name for entry in path.iterdir()) == [
        "config.toml", "env.json", "events.jsonl", "lock", "plan.json", "resolved.toml",
    ]  # fmt: skip


def test_each_start_is_an_attempt_of_one_lineage(tmp_path):
    seen = []
    for _ in range(3):
        with open_run(tmp_path / "run") as run:
            seen.append((run.lineage, run.attempt, run.continues))
    assert [(attempt, continues) for _, attempt, continues in seen] == [(1, False), (2, True), (3, True)]
    assert len({lineage for lineage, _, _ in seen}) == 1
    with open_run(tmp_path / "other") as run:
        assert run.lineage != seen[0][0]


def test_a_new_lineage_stays(tmp_path):
    with open_run(tmp_path / "run") as run:
        first = run.lineage
        run.begin_lineage(["libraries.torch 2.11 2.13"])
        second = run.lineage
    with open_run(tmp_path / "run") as run:
        assert run.lineage == second != first
        assert run.attempt == 2
    event = next(event for event in events.read(tmp_path / "run").events if event["event"] == "lineage")
    assert (event["parent"], event["lineage"], event["changes"]) == (first, second, ["libraries.torch 2.11 2.13"])


def test_keys_outside_the_fingerprint_may_change_and_the_files_follow(tmp_path):
    open_run(tmp_path / "run").close()
    plan = plan_for(tmp_path / "run", "output.checkpoint_every=7")
    RunDir.open(plan, config_text="new").close()
    assert read_plan(tmp_path / "run")["tree_digest"] == plan.tree_digest
    assert (tmp_path / "run" / "config.toml").read_text() == "new"
    changed = events.read(tmp_path / "run").events[-1]
    assert changed["event"] == "changed"
    assert len(changed["keys"]) == 1
    assert changed["keys"][0].startswith("output.checkpoint_every: ")
    assert changed["keys"][0].endswith(" there, 7 here")


def test_another_fingerprint_is_refused_with_sections_and_keys(tmp_path):
    open_run(tmp_path / "run").close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunError, match="N0315") as caught:
        open_run(tmp_path / "run", "random.seed=99", "schedule.decay_shape='linear'", "output.checkpoint_every=7")
    text = caught.value.render()
    assert "it differs in [random], [schedule]" in text
    assert "random.seed: " in text
    assert ", 99 here" in text
    assert "output.checkpoint_every" not in text
    assert "name another `run_dir`" in text
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with open_run(tmp_path / "run") as run:
        assert run.attempt == 2, "a refused start counts as none"


def test_nothing_is_put_into_a_directory_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"N0313.*`thesis.tex`"):
        open_run(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match=r"N0313.*not a directory"):
        open_run(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "plan.json").write_text("{"), "plan.json cannot be read"),
        (lambda run: (run / "plan.json").write_text('{"fingerprint": 3}'), "plan.json cannot be read"),
        (lambda run: (run / "plan.json").write_text("[" * 100_000), "plan.json cannot be read"),
        (lambda run: ((run / "plan.json").unlink(), (run / "checkpoints").mkdir()), "checkpoints and no plan.json"),
        (lambda run: (run / "events.jsonl").unlink(), "no events.jsonl"),
    ],
)
def test_a_run_that_lacks_its_own_files_is_refused(tmp_path, damage, words):
    open_run(tmp_path / "run").close()
    damage(tmp_path / "run")
    with pytest.raises(RunError, match="N0314") as caught:
        open_run(tmp_path / "run")
    assert words in caught.value.render()
    assert not (tmp_path / "run" / "owner.json").exists(), "the lock was kept"


@pytest.mark.parametrize("how", ["unlink", "damage", "another tree"])
def test_a_damaged_plan_is_made_again_as_the_help_says(tmp_path, capsys, how):
    open_run(tmp_path / "run").close()
    (tmp_path / "run" / "checkpoints").mkdir()
    path = tmp_path / "run" / "plan.json"
    plan = json.loads(path.read_text())
    plan["resolved"]["random"]["seed"] += 1
    path.unlink()
    if how != "unlink":
        path.write_text("{" if how == "damage" else json.dumps(plan))
    with pytest.raises(RunError, match="N0314") as caught:
        open_run(tmp_path / "run")
    path.unlink(missing_ok=True)  # "move it away"
    command, target = caught.value.diagnostics[0].help.partition("nmoe build ")[2].removesuffix(
        " makes it again").split(" > ")  # fmt: skip
    assert target == str(path)
    assert nmoe(["build", *command.split()]) == 0
    path.write_text(capsys.readouterr().out)
    with open_run(tmp_path / "run") as run:
        assert run.attempt == 2


def test_a_directory_that_was_killed_while_it_was_made_is_made_again(tmp_path, monkeypatch):
    real = disk.replace
    for name in ("owner.json", "config.toml", "resolved.toml", "plan.json"):
        path = tmp_path / name / "run"

        def dying(target, data, name=name):
            if target.name == name:
                raise KeyboardInterrupt
            real(target, data)

        with monkeypatch.context() as patched:
            patched.setattr(disk, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                open_run(path)
        assert not (path / "plan.json").exists()
        with open_run(path) as run:
            assert run.attempt == (1 if name == "owner.json" else 2)
        assert (path / "plan.json").exists()


# Another process: opens the run, says so, and waits until it is killed or its input is closed.
HOLDER = """
import sys
from pathlib import Path
from nmoe.plan.resolve import resolve
from nmoe.train.run_dir import RunDir
with RunDir.open(resolve(sys.argv[1], [sys.argv[2]]), config_text="") as run:
    print(run.attempt, flush=True)
    sys.stdin.read()
"""


def holder(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(CONFIG), f"output.run_dir={json.dumps(str(path))}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, int(process.stdout.readline())


def test_a_second_process_is_refused_and_a_killed_one_is_taken_over(tmp_path):
    process, attempt = holder(tmp_path / "run")
    try:
        with pytest.raises(RunError, match=rf"N0311.*nmoe train, pid {process.pid} on host .*, since 20") as caught:
            open_run(tmp_path / "run")
        assert "wait for it, stop it, or give this one another `run_dir`" in caught.value.render()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    with open_run(tmp_path / "run") as run:
        assert run.attempt == attempt + 1
    takeover = events.read(tmp_path / "run").events[-1]
    assert takeover["event"] == "takeover"
    assert f"pid {process.pid} " in takeover["owner"]


def test_an_owner_that_ended_well_is_followed_without_a_word(tmp_path):
    process, _ = holder(tmp_path / "run")
    process.communicate("")
    assert process.returncode == 0
    open_run(tmp_path / "run").close()
    assert history(tmp_path / "run") == ["start", "start"]


def test_one_process_cannot_own_a_run_twice(tmp_path):
    with open_run(tmp_path / "run"), pytest.raises(RunError, match=f"N0311.*pid {os.getpid()} "):
        open_run(tmp_path / "run")


def test_a_lock_that_cannot_be_closed_is_named_and_hides_no_other_failure(tmp_path, monkeypatch):
    """As on a file system that tells of a failed write when a file is closed."""
    close = os.close

    def failing(descriptor: int) -> None:
        is_lock = Path(f"/proc/self/fd/{descriptor}").readlink().name == "lock"
        close(descriptor)
        if is_lock:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", failing)
    with pytest.raises(RunError, match="cannot close `lock`"), run_lock.owned(tmp_path, "a test"):
        pass
    with pytest.raises(ZeroDivisionError) as found, run_lock.owned(tmp_path, "a test"):
        raise ZeroDivisionError
    assert "cannot close `lock`" in found.value.__notes__[0]


def test_a_failure_inside_gives_the_run_back(tmp_path):
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "run"):
        raise ZeroDivisionError
    with open_run(tmp_path / "run") as run:
        assert run.attempt == 2
    assert history(tmp_path / "run") == ["start", "start"]


@pytest.mark.parametrize(
    ("changes", "dead"),
    [
        ({}, True),  # the same kernel
        ({"host": "a-container"}, True),  # the same kernel under another name
        ({"boot_id": "before-the-reboot"}, True),  # this machine, another boot
        ({"boot_id": "x", "host": "elsewhere"}, False),
        ({"boot_id": "x", "machine_id": "other"}, False),
        ({"boot_id": "", "host": "elsewhere"}, False),
    ],
)
def test_who_is_proven_dead_by_the_lock(tmp_path, changes, dead):
    open_run(tmp_path / "run").close()
    left = attrs.evolve(run_lock.this_process("nmoe train"), pid=1, **changes)
    (tmp_path / "run" / "owner.json").write_text(json.dumps(attrs.asdict(left)))
    if dead:
        open_run(tmp_path / "run").close()
        assert history(tmp_path / "run")[-1] == "takeover"
        return
    with pytest.raises(RunError, match=r"N0312.*another host: nmoe train, pid 1 on host") as caught:
        open_run(tmp_path / "run")
    assert f"rm {tmp_path / 'run' / 'owner.json'}" in caught.value.render()
    (tmp_path / "run" / "owner.json").unlink()
    open_run(tmp_path / "run").close()


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000 + "b"])
def test_a_directory_that_no_disk_can_have_is_refused(tmp_path, name):
    with pytest.raises(RunError, match=r"N0301.*name too long"):
        open_run(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"pid": 1}', "[" * 100_000])
def test_a_broken_record_of_the_owner_is_no_proof(tmp_path, text):
    open_run(tmp_path / "run").close()
    (tmp_path / "run" / "owner.json").write_text(text)
    with pytest.raises(RunError, match=r"N0312.*cannot be read"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("change", [{"pid": "7"}, {"pid": True}, {"host": ["here"]}, {"purpose": None}, {"boot_id": 1}])
def test_a_record_of_the_owner_with_values_of_other_types_is_no_proof(tmp_path, change):
    open_run(tmp_path / "run").close()
    left = attrs.asdict(run_lock.this_process("nmoe train")) | change
    (tmp_path / "run" / "owner.json").write_text(json.dumps(left))
    with pytest.raises(RunError, match=r"N0312.*cannot be read: its values"):
        open_run(tmp_path / "run")


def test_a_record_of_the_owner_that_is_a_link_to_nothing_is_no_proof(tmp_path):
    open_run(tmp_path / "run").close()
    (tmp_path / "run" / "owner.json").symlink_to("gone")
    with pytest.raises(RunError, match=r"N0312.*cannot be read"):
        open_run(tmp_path / "run")


def test_a_start_that_fails_leaves_its_reason_in_the_run_that_it_owns(tmp_path, monkeypatch):
    full = disk.cannot("write", tmp_path / "run" / "plan.json", OSError(errno.ENOSPC, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "_write", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(RunError, match="N0301"):
            open_run(tmp_path / "run")
    said = json.loads((tmp_path / "run" / "error.json").read_text())
    assert (said["attempt"], said["step"], said["rank"], said["errors"][0]["code"]) == (1, 0, 0, "N0301")
    assert said["errors"][0]["message"].endswith("no space left on device (ENOSPC)")
    (tmp_path / "run" / "error.rank1.json.tmp").write_bytes(b"{")  # as a full disk leaves it
    open_run(tmp_path / "run").close()
    assert not list((tmp_path / "run").glob("error*"))
    # A refused plan is not the run's own failure, and leaves no word in it.
    with pytest.raises(RunError, match="N0315"):
        open_run(tmp_path / "run", "random.seed=1")
    assert not (tmp_path / "run" / "error.json").exists()


@pytest.mark.parametrize("text", ['{"x": "a", "x": "b", ', '{"x": NaN, ', '{"x": 1e999, ', '{"x": "\\ud800", '])
def test_a_plan_that_two_readers_could_read_differently_is_refused(tmp_path, text):
    open_run(tmp_path / "run").close()
    path = tmp_path / "run" / "plan.json"
    path.write_text(text + path.read_text().lstrip()[1:])
    with pytest.raises(RunError, match=r"N0314.*cannot be read"):
        open_run(tmp_path / "run")


def test_complete_is_what_head_says(tmp_path):

    with open_run(tmp_path / "run") as run:
        assert not run.is_complete(4)
        run.checkpoints.mkdir()
        disk.replace(run.checkpoints / "HEAD", Head(step=4, manifest="a" * 64).encode())
        assert run.is_complete(4)
        assert not run.is_complete(5)
