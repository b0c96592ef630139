"""nmoe verify --read-data: whether anything that a run reads is no longer what its checkpoints were trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nmoe.checkpoint.manifest import Identity
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.cli import verify as cli_verify
from nmoe.cli.main import run as nmoe
from nmoe.data import corpus
from nmoe.data.prepare import Request, prepare
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.part import Part
from nmoe.plan.resolve import resolve
from nmoe.rdep.control import Control
from nmoe.train.run_dir import RunDir
from tests.train.launches import TINY


def shards(directory: Path, *, first: int = 0, texts: int = 12) -> Path:
    """Several shards of so many documents."""
    source = directory.with_suffix(".txt")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("\x1e".join(f"document {number} " * 9 for number in range(first, first + texts)))
    request = Request(separator=b"\x1e", shard_tokens=300)
    prepare([source], directory, BytesTokenizer(), request, workers=1)
    return directory / "train"


def flip(path: Path, at: int = 5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 2
    path.write_bytes(content)


class Run:
    """A run with a checkpoint of step 3 that has seen the data that its keys name; nothing was trained."""

    def __init__(self, directory: Path, *sets: str, started_in: Path | None = None) -> None:
        self.path = directory / "run"
        plan = resolve(TINY, [f'output.run_dir="{self.path}"', *sets])
        config = plan.config
        mixture = config.data.build(seed=config.random.seed, sequence_length=config.batch.sequence_length)
        heldout = config.eval.bpb.build(config.data, config.batch.sequence_length).source
        with RunDir.open(plan, config_text="") as run:
            recorded = {} if started_in is None else {"working_directory": str(started_in)}
            run.record_environment({"exact": {}, "recorded": recorded})
            writer = CheckpointWriter(run.checkpoints, keep=2, threads=1, control=Control.alone())
            identity = Identity(
                run=run.name, lineage=run.lineage, attempt=run.attempt, fingerprint=plan.fingerprint,
                sections=plan.sections, tree_digest=plan.tree_digest,
                data={"train": mixture.digest, "heldout": heldout.digest}, environment={"exact": {}, "recorded": {}},
            )  # fmt: skip
            writer.save(step=3, tensors={"w": Part.whole(torch.ones(4))}, state={}, identity=identity)
            writer.wait()

    def faults(self, capsys, *more: str) -> list[tuple[str, str]]:
        """(path, message) of each, of which there must be one at least."""
        assert nmoe(["verify", str(self.path), "--read-data", "--json", *more]) == 1
        found = json.loads(capsys.readouterr().out)
        assert not found["ok"] and not found["data"]["ok"]
        return [(fault["path"], fault["message"]) for fault in found["faults"]]


def keys(train: object, heldout: object) -> list[str]:
    return ['data.kind="shards"', f'data.train="{train}"', f'eval.bpb.heldout="{heldout}"']


@pytest.fixture
def run(tmp_path):
    train, heldout = shards(tmp_path / "data"), shards(tmp_path / "held", first=50, texts=4)
    made = Run(tmp_path, *keys(train, heldout))
    made.train, made.heldout = train, heldout
    return made


def test_nothing_has_changed(run, capsys):
    assert nmoe(["verify", str(run.path), "--read-data"]) == 0
    out = capsys.readouterr().out
    assert f"ok      {run.train}, " in out and f"ok      {run.heldout}, " in out
    assert out.endswith("1 checkpoint, every byte verified; nothing that the run reads has changed\n")
    assert nmoe(["verify", str(run.path), "--read-data", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert found["ok"] is True
    manifest = json.loads((run.train / "manifest.json").read_bytes())
    assert [one["path"] for one in found["texts"]] == [str(run.train), str(run.heldout)]
    assert found["texts"][0]["tokens"] == manifest["num_tokens"]
    assert nmoe(["verify", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] is None, "it was not read"


def test_every_damaged_file_is_named(run, capsys):
    flip(run.train / "shard_000000.bin")
    flip(run.train / "shard_000002.bin")
    (run.heldout / "shard_000001.bin").unlink()
    (run.heldout / "blocks.bin").write_bytes(b"")
    assert nmoe(["verify", str(run.path)]) == 0, "the checkpoints are whole"
    capsys.readouterr()
    assert [(path, message[:40]) for path, message in run.faults(capsys)] == [
        (str(run.train), "the content of `shard_000000.bin` is not"),
        (str(run.train), "the content of `shard_000002.bin` is not"),
        (str(run.heldout), "`shard_000001.bin` is missing"),
        (str(run.heldout), "`blocks.bin` has 0 bytes where the manif"),
    ]


def test_what_no_start_reads_is_read_here(run, capsys):
    flip(run.train / "documents.bin", 8)
    ((path, message),) = run.faults(capsys)
    assert path == str(run.train) and "`documents.bin`" in message
    assert nmoe(["verify", str(run.path), "--read-data"]) == 1
    printed = capsys.readouterr()
    assert f"DAMAGED {run.train}" in printed.out
    assert "--rewind" not in printed.err, "which would not help"


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_other_data_that_is_whole_is_no_less_a_fault(run, capsys, tmp_path, part):
    place = getattr(run, part)
    shutil.rmtree(place)
    shutil.move(shards(tmp_path / "other", first=99), place)
    ((path, message),) = run.faults(capsys)
    assert path == str(place)
    what = {"train": "the training data", "heldout": "the held-out text"}[part]
    assert message.startswith(f"{what} is not what the checkpoint of step 3 has seen: ")


def test_each_source_of_a_mixture_is_read(tmp_path, capsys):
    sources = [shards(tmp_path / name, first=number) for number, name in enumerate("abc")]
    names = json.dumps([str(source) for source in sources])
    run = Run(
        tmp_path, 'data.kind="mixture"', f"data.sources={names}", "data.stages=[{weights=[1, 2, 1]}]",
        f'eval.bpb.heldout="{shards(tmp_path / "held", first=70)}"',
    )  # fmt: skip
    assert nmoe(["verify", str(run.path), "--read-data"]) == 0
    capsys.readouterr()
    flip(sources[1] / "shard_000001.bin")
    flip(sources[2] / "token_bytes.bin")
    assert [path for path, _ in run.faults(capsys)] == [str(sources[1]), str(sources[2])]


def test_relative_paths_start_where_the_run_was_started(tmp_path, capsys, monkeypatch):
    there = tmp_path / "there"
    train, heldout = shards(there / "data"), shards(there / "held", first=50, texts=4)
    monkeypatch.chdir(there)
    run = Run(tmp_path, *keys(train.relative_to(there), heldout.relative_to(there)), started_in=there)
    monkeypatch.chdir(tmp_path)
    assert nmoe(["verify", "run", "--read-data"]) == 0
    assert Path.cwd() == tmp_path
    capsys.readouterr()
    flip(train / "shard_000000.bin")
    assert [path for path, _ in run.faults(capsys)] == ["data/train"]


def test_the_tokenizer_of_a_packaged_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "documents", lambda name, part: [f"To be, or not to be: {part}. " * 9])
    file = tmp_path / "tokenizer.json"
    file.write_bytes(Path(corpus.__file__).with_name("shakespeare.tokenizer.json").read_bytes())
    tokenizer = f'{{kind="huggingface", path="{file}", end_of_document="<|end|>"}}'
    run = Run(
        tmp_path, 'data.kind="corpus"', 'data.name="shakespeare"', f"data.tokenizer={tokenizer}",
        "model.vocab_size=2048",
    )  # fmt: skip
    assert nmoe(["verify", str(run.path), "--read-data"]) == 0
    assert "ok      packaged text, train" in capsys.readouterr().out
    content = file.read_bytes()
    file.write_bytes(content + b" ")
    assert [(path, message[:45]) for path, message in run.faults(capsys)] == [
        (str(file), "the training data is not what the checkpoint "),
        (str(file), "the held-out text is not what the checkpoint "),
    ]
    file.write_bytes(content[:-40])
    assert {path for path, _ in run.faults(capsys)} == {str(file)}


def test_the_metrics_are_read(run, capsys):
    ledger = run.path.parent / "metrics" / "run"
    ledger.mkdir(parents=True)
    (ledger / "step_00000001.parquet").write_bytes(b"PAR1")
    ((path, message),) = run.faults(capsys)
    assert path == str(ledger / "step_00000001.parquet")
    assert message.startswith("the metrics file `step_00000001.parquet` cannot be read")


def test_long_reading_says_how_far_it_is(run, capsys, monkeypatch):
    assert nmoe(["verify", str(run.path), "--read-data"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cli_verify, "EVERY_S", 0)
    assert nmoe(["verify", str(run.path), "--read-data"]) == 0
    tokens = json.loads((run.train / "manifest.json").read_bytes())["num_tokens"]
    assert f"{run.train}: {tokens:,} of {tokens:,} tokens read\n" in capsys.readouterr().err


def test_with_rewind_the_data_count_too(run, capsys):
    assert nmoe(["verify", str(run.path), "--read-data", "--rewind"]) == 0
    capsys.readouterr()
    flip(run.train / "shard_000000.bin")
    assert nmoe(["verify", str(run.path), "--rewind"]) == 0
    capsys.readouterr()
    run.faults(capsys, "--rewind")


def test_without_a_plan_nothing_can_be_read(run, capsys):
    (run.path / "plan.json").write_text("{}")
    ((path, _),) = run.faults(capsys)
    assert path == "plan.json"
