"""`nmoe data` as a user meets it, in processes of its own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from nmoe.data import corpus
from nmoe.data.shards import open_shards


def nmoe(*arguments, cwd, expect=0):
    """Run the command line; its stdout and stderr."""
    command = [sys.executable, "-m", "nmoe", "data", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stderr
    return done.stdout, done.stderr


def python(code, cwd):
    """Run a few lines of Python."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def books(tmp_path):
    """Six plays, one of them packed."""
    import lzma

    folder = tmp_path / "books"
    folder.mkdir()
    texts = corpus.documents("shakespeare", "train")[:6]
    for index, text in enumerate(texts[:5]):
        (folder / f"{index}.txt").write_text(text)
    (folder / "5.txt.xz").write_bytes(lzma.compress(texts[5].encode()))
    (folder / "notes.md").write_text("not read")
    return texts


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_prepare_then_inspect(books, tmp_path):
    out, err = nmoe("prepare", "books", "-o", "made", "--tokenizer", "bytes", "--heldout-every", 3, cwd=tmp_path)
    train, heldout = out.splitlines()
    assert train.startswith("made/train: 4 documents, ") and heldout.startswith("made/heldout: 2 documents, ")
    assert "neither .txt nor .jsonl: 1 files (notes.md)" in err
    source = open_shards(tmp_path / "made" / "train")
    assert source.manifest.text_bytes == sum(len(books[i]) for i in (0, 1, 3, 4)) and source.digest in train

    out, _ = nmoe("inspect", "made/heldout", "--verify", "--json", cwd=tmp_path)
    facts = json.loads(out)
    assert facts["verified"] is True and facts["documents"] == 2
    assert facts["first_text"] == books[2][:63] and facts["first_tokens"][:3] == [256, *books[2].encode()[:2]]
    out, _ = nmoe("inspect", "made/heldout", cwd=tmp_path)
    assert f"text bytes         {len(books[2]) + len(books[5]):,}\n" in out and "verified" not in out

    shard = tmp_path / "made" / "heldout" / "shard_000000.bin"
    content = bytearray(shard.read_bytes())
    content[9] ^= 1
    shard.write_bytes(content)
    _, err = nmoe("inspect", "made/heldout", cwd=tmp_path, expect=1)
    assert "error[N0243]: the content of `shard_000000.bin`" in err and "Traceback" not in err


def test_killed_and_continued_is_the_straight_run(books, tmp_path):
    """kill -9 when the second shard is reported; then the same command, with other workers."""
    arguments = ["prepare", "books", "--tokenizer", "bytes", "--heldout-every", "3", "--shard-tokens", "90000"]
    nmoe(*arguments, "-o", "straight", cwd=tmp_path)
    command = [sys.executable, "-m", "nmoe", "data", *arguments, "-o", "killed"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        reported = [line for line in iter(run.stderr.readline, "") if " shards, " in line and run.kill() is None]
    assert reported and run.returncode == -signal.SIGKILL
    left = files(tmp_path / "killed")
    assert "prepare.json" in left and "train/shard_000000.bin" in left and "train/manifest.json" not in left
    nmoe(*arguments, "-o", "killed", "--workers", 1, cwd=tmp_path)
    assert files(tmp_path / "killed") == files(tmp_path / "straight")


def test_interrupted_says_so(tmp_path):
    """Ctrl-C while it reads."""
    (tmp_path / "in.txt").write_text("text")
    code = (
        "import nmoe.data.documents as d, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job has it ignored
        "def stop(*_): signal.raise_signal(signal.SIGINT)\n"
        "d._parts = stop\n"
        "from nmoe.cli.main import main\n"
        "main(['data', 'prepare', 'in.txt', '-o', 'out', '--tokenizer', 'bytes'])\n"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_tokenizer_files(books, tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([books[0]], trainer)
    made.save(str(tmp_path / "t.json"))
    options = ["--tokenizer", "t.json", "--end-of-document", "<end>"]
    nmoe("prepare", "books/1.txt", "-o", "made", *options, cwd=tmp_path)
    out, _ = nmoe("inspect", "made/train", *options, "--json", cwd=tmp_path)
    facts = json.loads(out)
    assert facts["first_tokens"][1:] == made.encode(books[1]).ids[:63] and facts["altered_documents"] == 0
    assert books[1].startswith(facts["first_text"]) and len(facts["first_text"]) > 63
    _, err = nmoe("inspect", "made/train", "--tokenizer", "bytes", cwd=tmp_path, expect=2)
    assert "N0232" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "books", "-o", "x"], "--tokenizer"),
        (["prepare", "books", "--tokenizer", "bytes"], "--output"),
        (["prepare", "-o", "x", "--tokenizer", "bytes"], "INPUT"),
        (["prepare", "absent", "-o", "x", "--tokenizer", "bytes"], "N0250"),
        (["prepare", "books", "-o", "x", "--tokenizer", "t.json"], "needs --end-of-document"),
        (["prepare", "books", "-o", "x", "--tokenizer", "t.tiktoken"], "needs --pattern"),
        (["prepare", "books", "-o", "x", "--tokenizer", "bytes", "--pattern", "gpt2"], "is for a .tiktoken"),
        (["prepare", "books", "-o", "x", "--tokenizer", "word2vec"], "give `bytes`"),
        (["prepare", "books", "-o", "x", "--tokenizer", "t.tiktoken", "--pattern", "gpt2"], "N0230"),
        (["prepare", "books", "-o", "x", "--tokenizer", "bytes", "--separator", ""], "it is empty"),
        (["prepare", "books", "-o", "x", "--tokenizer", "bytes", "--separator", "\\x"], "cannot be read"),
        (["prepare", "books", "-o", "x", "--tokenizer", "bytes", "--heldout-every", "1"], "--heldout-every"),
        (["prepare", "books", "-o", "x", "--tokenizer", "bytes", "--heldout-fraction", "nan"], "--heldout-fraction"),
        (["prepare", "books", "-o", "x", "--tokenizer", "bytes", "--heldout-every", "2", "--heldout-fraction", "0.5"],
         "exclude each other"),
        (["prepare", "books", "-o", "books", "--tokenizer", "bytes"], "N0260"),
    ],
)  # fmt: skip
def test_bad_arguments(books, tmp_path, monkeypatch, capsys, arguments, words):
    from nmoe.cli.main import run

    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    assert run(["data", *arguments]) == 2
    assert words in capsys.readouterr().err and files(tmp_path) == before


def test_separator_escapes(tmp_path):
    (tmp_path / "in.txt").write_text("one\n\ntwo — é\n\nthree")
    nmoe("prepare", "in.txt", "-o", "a", "--tokenizer", "bytes", "--separator", r"\n\n", cwd=tmp_path)
    assert open_shards(tmp_path / "a" / "train").manifest.num_documents == 3
    nmoe("prepare", "in.txt", "-o", "b", "--tokenizer", "bytes", "--separator", "— é", cwd=tmp_path)
    assert open_shards(tmp_path / "b" / "train").manifest.num_documents == 2


def test_neither_help_nor_prepare_imports_torch(books, tmp_path):
    code = (
        "import sys\nfrom nmoe.cli.main import run\n"
        "assert run(['data', 'prepare', 'books', '-o', 'out', '--tokenizer', 'bytes']) == 0\n"
        "assert run(['data', 'inspect', 'out/train']) == 0\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out, _ = nmoe("prepare", "--help", cwd=tmp_path)
    assert "nmoe data prepare books/ -o data/books" in out and "Exit status" in out
