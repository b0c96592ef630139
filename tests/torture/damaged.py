"""The disk of a run that has been stopped, and can be damaged and made whole again; and `nmoe` on it, in this process.

The run stands at step STOPPED of six and has the checkpoints of KEPT. Its scene says how many ranks have saved them,
and whether it trains on the packaged text or on shards, which lie beside the disk.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from nmoe.checkpoint import reader
from nmoe.checkpoint.manifest import Head
from nmoe.checkpoint.verify import read_manifest
from nmoe.cli.main import run as nmoe
from nmoe.data import corpus, shards
from nmoe.data.prepare import Request, prepare
from nmoe.data.tokenizer import BytesTokenizer
from tests.torture import trainings
from tests.torture.blows import apart
from tests.torture.damage import restore

KEYS = ("schedule.stable_tokens=128", "output.keep_checkpoints=3")  # six steps
STOPPED, KEPT = 4, (2, 3, 4)


class Place:
    """A scene: the disk on which each corruption is tried, and all that has to be known of it."""

    def __init__(self, scene: str, directory: Path) -> None:
        self.scene, self.directory = scene, directory
        self.disk, self.start, self.data = directory / "disk", directory / "start", directory / "data"
        self.ranks = 2 if scene == "two ranks" else 1
        self.sets = (*KEYS, *(self._shards() if scene.startswith("shards") else ()))
        if scene == "shards read lazily":
            shards.WHOLE_CHECK_BYTES = 0
        self.straight = trainings.begin(directory, *self.sets)
        self.log = (directory / "straight.txt").open("rb")
        self.origin = {path: path.read_bytes() for path in sorted(self.data.rglob("*")) if path.is_file()}
        if self.origin:
            restore(self.data, directory / "origin")
        stop = f"output.stop_after_step={STOPPED}"
        other = directory / "other"
        assert self.say(*trainings.command(other, *self.sets, stop))[0] == 0
        self.other = other / "run" / "checkpoints"
        ended = trainings.attempt(self.disk, self.ranks, sets=(*self.sets, stop))
        assert ended.ends == ["exit 0"] * self.ranks, ended
        self.disk.rename(self.start)
        saved = self.start / "run" / "checkpoints"
        self.manifests = {step: read_manifest(saved, step) for step in KEPT}
        self.holders: dict[str, tuple[int, ...]] = {}
        for step in KEPT:
            for sha256 in self.manifests[step][0].objects:
                self.holders[sha256] = (*self.holders.get(sha256, ()), step)
        self.reads = 0
        self.before_reading: Callable[[], None] = lambda: None
        real = reader.read_into

        def counted(*given, **more):
            self.reads += 1
            self.before_reading()
            real(*given, **more)

        reader.read_into = counted

    @property
    def run(self) -> Path:
        return self.disk / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.disk / "metrics" / "run"

    def _shards(self) -> list[str]:
        """Keys of shards of a page or two each, and of others that are held out; they are made here."""

        def prepared() -> None:
            text = corpus.documents("shakespeare", "train")[0]
            for part, size in (("train", 9000), ("heldout", 3000)):
                source = self.directory / f"{part}.txt"
                source.write_text(text[:size].replace("\n\n", "\x1e"))
                request = Request(separator=b"\x1e", shard_tokens=2500)
                prepare([source], self.data / part, BytesTokenizer(), request, workers=1)

        apart(prepared, self.directory / "prepared.json")
        train, heldout = (json.dumps(str(self.data / part / "train")) for part in ("train", "heldout"))
        return ['data.kind="shards"', f"data.train={train}", f"eval.bpb.heldout={heldout}"]

    def renew(self) -> None:
        """The disk and the data as they were before anything befell them."""
        restore(self.start, self.disk)
        self.restore_data()
        self.before_reading, self.reads = lambda: None, 0

    def restore_data(self) -> None:
        if self.origin:
            restore(self.directory / "origin", self.data)

    def say(self, *words: str) -> tuple[int, str]:
        """The status of a command line, and all that it said."""
        self.log.seek(0, 2)
        status = nmoe(words)
        sys.stdout.flush(), sys.stderr.flush()
        return status, self.log.read().decode()

    def train(self) -> tuple[int, str]:
        return self.say(*trainings.command(self.disk, *self.sets))

    def head(self) -> int:
        return Head.parse((self.checkpoints / "HEAD").read_bytes()).step

    def kept(self) -> dict[str, tuple[int, int, int]]:
        """What nobody may touch while a start is refused: every file of checkpoints and metrics."""
        return {
            str(path): (found.st_ino, found.st_size, found.st_mtime_ns)
            for directory in (self.checkpoints, self.metrics)
            for path in directory.rglob("*")
            if (found := path.lstat()) and not path.is_dir()
        }
