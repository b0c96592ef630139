"""A state in another environment, or one that is somebody else's: what can change bits is refused and shown."""

import copy
import json
import shutil

import pytest

from nmoe.checkpoint import environment
from nmoe.data import corpus
from nmoe.errors import ConfigError, RunError
from nmoe.train import events

STOP, NEXT = 2, "output.stop_after_step=3"
KEYS = (f"output.stop_after_step={STOP}", "eval.bpb.max_tokens=32")


@pytest.fixture(scope="module")
def halfway(module_runs):
    """`run`, stopped after step 2; `straight`, which did step 3; `twin`, another run of the same plan, and `seed`."""
    module_runs.train("run", *KEYS)
    module_runs.train("straight", NEXT, *KEYS[1:])
    module_runs.train("twin", *KEYS)
    module_runs.train("seed", *KEYS, "random.seed=7")
    return module_runs


@pytest.fixture
def run(halfway, runs):
    """A copy of `run`, with all runs beside it; under another path, so its machine might be another too."""
    for name in ("run", "twin", "seed"):
        halfway.copy(name, runs.directory)
    return runs


def set_at(record: dict, path: str, value) -> None:
    section, _, name = path.rpartition("/") if not path.startswith("source/") else path.partition("/")
    place = record[section] if section else record
    assert place[name] != value
    place[name] = value


EXACT = {
    "another commit": ("source/model/moe.py", "0" * 64),
    "an upgrade of torch": ("libraries/torch", "2.99"),
    "another build of it": ("torch/build", "0" * 64),
    "another Python": ("python", "3.99"),
    "another C library": ("libc", "musl 1.2"),
    "another CPU": ("cpu/model", "another"),
    "fewer vector extensions": ("cpu/isa", ["sse2"]),
    "the same CPU, less of it in use": ("torch/cpu_capability", "DEFAULT"),
    "other caches": ("cpu/caches", ["Data 1K"]),
    "threads": ("torch/threads", 77),
    "a switch of precision": ("torch/float32_matmul_precision", "high"),
    "code that a library chose otherwise": ("arithmetic/product_fp32", "0" * 16),
}
RECORDED = {
    "another machine": ("host", "elsewhere"),
    "another kernel": ("kernel", "9.9"),
    "another driver": ("nvidia_driver", "999"),
    "another commit, of the same arithmetic": ("git_commit", "0" * 40),
    "a variable that changes no bit": ("variables", {"OMP_PROC_BIND": "true"}),
}


def now(monkeypatch, part: str, path: str, value) -> None:
    """From here on this process's environment is another."""
    record = environment.record

    def other(target):
        found = copy.deepcopy(record(target))
        set_at(found[part], path, value)
        return found

    monkeypatch.setattr(environment, "record", other)


@pytest.mark.parametrize("case", EXACT)
def test_what_can_change_bits_is_refused_and_shown(run, monkeypatch, case):
    path, value = EXACT[case]
    now(monkeypatch, "exact", path, value)
    before = run.digest("run")
    with pytest.raises(RunError, match="N0309") as caught:
        run.train("run", NEXT, *KEYS[1:])
    (finding,) = caught.value.diagnostics
    assert [note.split()[0] for note in finding.notes] == ["what", path.replace("/", ".", 1)]
    assert "--new-lineage" in finding.help
    assert run.digest("run") == before


@pytest.mark.parametrize("case", RECORDED)
def test_what_cannot_is_said_and_goes_on(run, halfway, monkeypatch, capfd, case):
    path, value = RECORDED[case]
    now(monkeypatch, "recorded", path, value)
    assert run.train("run", NEXT, *KEYS[1:]).exit_code == 0
    assert run.digest("run") == halfway.digest("straight")
    what = "variables.OMP_PROC_BIND" if path == "variables" else path
    moved = [event for event in events.read(run.path("run")).events if event["event"] == "moved"]
    assert [what in {line.split()[0] for line in event["changes"]} for event in moved] == [True]
    assert what in capfd.readouterr().err


def test_other_heldout_text_is_said_and_goes_on(run, halfway, monkeypatch, capfd):
    documents = corpus.documents
    monkeypatch.setattr(
        corpus, "documents", lambda name, part: [*documents(name, part), "more"][:: -1 if part == "heldout" else 1]
        if part == "heldout" else documents(name, part),
    )  # fmt: skip
    assert run.train("run", NEXT, *KEYS[1:]).exit_code == 0
    assert run.digest("run") == halfway.digest("straight")
    assert "held-out text" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("random.seed=7", "random.seed: 20261122 there, 7 here"),
        ("platform.threads=3", "platform.threads: "),
        ("optimizer.dense.lr=2e-3", "optimizer.dense.lr: 0.003 there, 0.002 here"),
    ],
)
def test_another_plan_is_refused_with_its_keys(run, key, words):
    with pytest.raises(RunError, match="N0315") as caught:
        run.train("run", NEXT, key)
    assert any(note.startswith(words) for note in caught.value.diagnostics[0].notes)


def test_other_data_is_refused(run, monkeypatch):
    documents = corpus.documents
    monkeypatch.setattr(corpus, "documents", lambda name, part: [*documents(name, part), "a new end"])
    with pytest.raises(RunError, match=r"N0504.*training data"):
        run.train("run", NEXT, *KEYS[1:])


@pytest.mark.parametrize(
    ("other", "words"),
    [("seed", "is of another plan, which differs in [random]"), ("twin", "a line of states that this run never had")],
)
@pytest.mark.parametrize("new_lineage", [False, True])
def test_the_checkpoints_of_another_run_are_refused(run, other, words, new_lineage):
    """Whole ones, swapped in: of another seed, and of a run of the same plan."""
    shutil.rmtree(run.path("run") / "checkpoints")
    shutil.copytree(run.path(other) / "checkpoints", run.path("run") / "checkpoints")
    with pytest.raises(RunError, match="N0513") as caught:
        run.train("run", NEXT, *KEYS[1:], new_lineage=new_lineage)
    (finding,) = caught.value.diagnostics
    assert finding.message == f"the checkpoint of step {STOP} {words}" or words in finding.message
    assert f"saved by `{other}`" in finding.help


def test_a_run_is_not_complete_by_the_checkpoint_of_another(run):
    for name in ("run", "twin"):
        run.train(name, "eval.bpb.max_tokens=32")
    shutil.rmtree(run.path("run") / "checkpoints")
    shutil.copytree(run.path("twin") / "checkpoints", run.path("run") / "checkpoints")
    with pytest.raises(RunError, match="N0513"):
        run.train("run", "eval.bpb.max_tokens=32")


def test_the_copies_for_people_decide_nothing(run, halfway):
    """config.toml, resolved.toml and env.json of another plan and machine: they are written again."""
    for name in ("config.toml", "resolved.toml"):
        (run.path("run") / name).write_text("[random]\nseed = 7\n")
    (run.path("run") / "env.json").write_text("{}")
    assert run.train("run", NEXT, *KEYS[1:]).exit_code == 0
    assert run.digest("run") == halfway.digest("straight")
    assert json.loads((run.path("run") / "env.json").read_text()).keys() == {"exact", "recorded"}


def test_a_run_under_another_name_goes_on(run, halfway):
    run.path("run").rename(run.path("moved"))
    assert run.train("moved", NEXT, *KEYS[1:]).exit_code == 0
    assert run.digest("moved") == halfway.digest("straight")
    (changed,) = (event for event in events.read(run.path("moved")).events if event["event"] == "changed")
    assert any(key.startswith("output.run_dir: ") for key in changed["keys"])


def lineages(runs, name) -> list[tuple[str, str | None]]:
    """Of the begun and resumed lines, in order."""
    found = events.read(runs.path(name)).events
    return [(one["lineage"], one.get("parent")) for one in found if one["event"] in ("lineage", "lineage_back")]


def test_a_new_line_that_has_saved_nothing_is_left_again(run, halfway, monkeypatch):
    """Back in the old environment the run goes on as what it was; a newer line has the saved one as its parent."""
    first = run.head("run").identity.lineage

    def stop(step: int, phase: str) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            now(patch, "exact", *EXACT["another commit"])
            with pytest.raises(KeyboardInterrupt):
                run.train("run", NEXT, *KEYS[1:], new_lineage=True, observe=stop)
    (second, parent), back, (third, parent_too) = lineages(run, "run")
    assert (parent, parent_too, back) == (first, first, (first, None))
    assert len({first, second, third}) == 3
    assert run.train("run", NEXT, *KEYS[1:]).exit_code == 0
    assert run.head("run").identity.lineage == first
    assert run.digest("run") == halfway.digest("straight")
    with pytest.raises(ConfigError, match="N0505"):
        run.train("run", "output.stop_after_step=4", *KEYS[1:], new_lineage=True)
