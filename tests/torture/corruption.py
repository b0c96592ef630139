"""Files of a run are damaged, lost, swapped and put in each other's place, and `nmoe train` is started on what is left.

A start reads HEAD, its manifest and objects, the plan, the events, the newest metrics and the data. Damage to what
decides must stop it before a tensor is read into, with an error that names the file and has a help; nothing of the
checkpoints or metrics may then be touched, `nmoe verify` must find it, and the help, followed step by step as a person
would follow it, must lead to the end that the straight run came to. Damage that a start may overlook must not matter:
the run goes on to that same end. HEAD never goes back but by `nmoe verify --rewind`, to the newest checkpoint that is
whole, and no run that has been saved begins again.

Starts are `nmoe train` itself, in the batch's own process, and some of them in forked ranks.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import attrs

from nmoe.checkpoint import disk, reader
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import Head
from nmoe.checkpoint.verify import read_manifest
from nmoe.cli.main import run as nmoe
from nmoe.data import corpus, shards
from nmoe.data.prepare import Request, prepare
from nmoe.data.tokenizer import BytesTokenizer
from tests.torture import trainings
from tests.torture.blows import apart
from tests.torture.campaign import Batch, Tally
from tests.torture.damage import LINKED, LOST, befall, gone, put, restore
from tests.train.launches import first_difference

TITLE = "flips and other corruptions of every file that a run reads / not detected, or another end"
KEYS = ("schedule.stable_tokens=128", "output.keep_checkpoints=3")  # six steps
STOPPED, KEPT = 4, (2, 3, 4)
EACH = 250
SCENES = {"one rank": 16, "two ranks": 12, "shards": 8, "shards read lazily": 4}
"""name: batches of EACH corruptions"""
SAMPLE = {"one rank": 30, "two ranks": 12, "shards": 16}
FOLLOWED, REWOUND, FORKED = 0.12, 0.25, 0.01
"""Shares: of those that are stopped, whose help is followed to the end, or that are only rewound; of all, that forked
ranks start too."""


def batches(sample: bool) -> list[Batch]:
    if sample:
        return [Batch(name, partial(_batch, name, name, count)) for name, count in SAMPLE.items()]
    return [
        Batch(f"{name}, {part}/{parts}", partial(_batch, name, f"{name}, {part}", EACH))
        for name, parts in SCENES.items()
        for part in range(1, parts + 1)
    ]


@attrs.frozen(kw_only=True)
class Done:
    """What was done. names: one of them must be in the error, and in what verify says of it. must: "stop", "go on", or
    "either". bad: the kept steps whose checkpoints are no longer whole. seen: verify must find it, with --read-data.
    """

    what: str
    names: tuple[str, ...]
    must: str = "stop"
    bad: tuple[int, ...] = ()
    seen: bool = True


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


def _batch(scene: str, name: str, count: int, directory: Path) -> Tally:
    place, draw = Place(scene, directory), Random(f"corruption: {name}")
    lost, notes = [], dict.fromkeys(("flips", "without effect", "followed to the end", "forked"), 0)
    menu = OF_DATA if scene.startswith("shards") else OF_RUNS
    for _ in range(count):
        place.renew()
        befalls = draw.choices([act for _, act in menu], [weight for weight, _ in menu])[0]
        done = befalls(place, draw)
        notes["flips"] += "bit flipped" in done.what
        try:
            wrong = _judge(place, draw, done, notes)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            lost.append(f"{done.what}: {wrong}")
    return Tally(tried=count, lost=tuple(lost), notes=notes)


def _judge(place: Place, draw: Random, done: Done, notes: dict[str, float]) -> str:
    """What is not as it must be, if anything is."""
    if draw.random() < FORKED:
        notes["forked"] += 1
        restore(place.disk, aside := place.directory / "aside")
        ended = trainings.attempt(place.disk, place.ranks, sets=place.sets)
        stopped = "exit 1" in ended.ends
        if set(ended.ends) != {"exit 1" if stopped else "exit 0"} or any("Traceback" in said for said in ended.said):
            return f"forked: {ended.ends} {ended.said}"
        if stopped == (done.must == "go on") and done.must != "either":
            return f"forked: {ended.ends} {ended.said}"
        restore(aside, place.disk)
    found, verified = place.say("verify", str(place.run), "--read-data")
    if "Traceback" in verified or (done.seen and (found != 1 or not any(name in verified for name in done.names))):
        return f"verify does not find it: {found} {verified}"
    before = place.kept()
    status, said = place.train()
    if status == 0 and done.must != "stop":
        notes["without effect"] += 1
        return _at_the_end(place, said)
    if status != 1 or done.must == "go on":
        return f"the start ended with {status}: {said}"
    if not re.search(r"^error\[N\d{4}\]: ", said, re.MULTILINE) or "Traceback" in said or not _helps(said):
        return f"no error with a help: {said}"
    if not any(name in said for name in done.names):
        return f"the error does not name {done.names}: {said}"
    if place.kept() != before and done.must == "stop" and "after the check" not in done.what:
        return f"a start that was refused has touched {set(place.kept().items()) ^ set(before.items())}: {said}"
    if place.reads and "checkpoints" in done.what and "after the check" not in done.what:
        return f"tensors were read before it was found: {said}"
    if found == 0 and "after the check" not in done.what:
        return f"verify finds nothing, and the start does: {said}"
    if draw.random() < FOLLOWED:
        notes["followed to the end"] += 1
        return _follow(place, done, said)
    return _rewinds(place, done)[0] if "--rewind" in said and draw.random() < REWOUND else ""


def _helps(said: str) -> list[tuple[str, str]]:
    """(place, help) of each error."""
    return re.findall(r"^ *--> (.*)(?:\n(?! *= help).*)*\n *= help: (.*)$", said, re.MULTILINE)


def _at_the_end(place: Place, said: str, *, ledger: bool = True) -> str:
    """What is not as the straight run left it."""
    if "starting in" in said:
        return f"the run has begun again: {said}"
    left, wanted = trainings.left(place.disk), place.straight.left
    if not ledger:
        left, wanted = ([row for row in rows if "state" in row] for rows in (left, wanted))
    different = first_difference(left, wanted)
    return f"another end: {different}" if different else ""


def _rewinds(place: Place, done: Done) -> tuple[str, str]:
    """(what is wrong about --rewind, what it says): HEAD is then at the newest whole checkpoint, or where it was."""
    whole = [step for step in KEPT if step not in done.bad]
    status, said = place.say("verify", str(place.run), "--rewind")
    if "Traceback" in said:
        return said, said
    if status == 0:
        if not whole or place.head() != whole[-1] or "HEAD " not in said:
            return f"HEAD is at step {place.head()}, of {whole}: {said}", said
        return "", said
    blocked = "error[N0301]" in said or "error[N0316]" in said  # a directory in HEAD's place; events that are none
    return "" if (blocked or not whole) and _helps(said) else f"rewind ended with {status}: {said}", said


def _follow(place: Place, done: Done, said: str) -> str:
    """Do what the help says, until the run goes on; what is wrong with where it leads."""
    ledger = True
    for _ in range(8):
        ((where, way), *_) = _helps(said)
        if way.startswith("restore the data") or "`nmoe data prepare`" in way:
            place.restore_data()
        elif "move it away" in way or "move the file away" in way:
            if not Path(where).is_relative_to(place.disk):
                return f"what to move away is not said: {said}"
            ledger &= "metrics" not in where
            gone(Path(where))
        elif "remove the line" in way:
            (number,) = re.findall(r"line (\d+) of", said)
            lines = (place.run / "events.jsonl").read_bytes().splitlines(keepends=True)
            put(place.run / "events.jsonl", b"".join(lines[: int(number) - 1] + lines[int(number) :]))
        elif found := re.search(r"nmoe build (\S+) --json > (\S+)", way):
            status, plan = place.say("build", found[1], "--json")
            if status:
                return f"the help does not help: {way}: {plan}"
            put(Path(found[2]), plan.encode())
        if "--rewind" in way and "move it away" not in way:
            wrong, said = _rewinds(place, done)
            if wrong:
                return wrong
            if "error[" in said:
                continue
        elif way.startswith(("restore the directory from a copy", "restore `checkpoints` from a copy")) or (
            "put this run's own `checkpoints` back" in way
        ):
            restore(place.start / "run" / "checkpoints", place.checkpoints)
        status, said = place.train()
        if status == 0:
            return _at_the_end(place, said, ledger=ledger)
    return f"the help leads nowhere: {said}"


def _object(place: Place, draw: Random, *, of_head: bool) -> tuple[str, Path]:
    """An object that HEAD's checkpoint needs, or that only older ones need."""
    sha256 = draw.choice([one for one, steps in sorted(place.holders.items()) if (STOPPED in steps) == of_head])
    return sha256, layout.object_path(place.checkpoints, sha256)


def an_object(place: Place, draw: Random) -> Done:
    sha256, path = _object(place, draw, of_head=True)
    way = befall(draw, path)
    return Done(what=f"checkpoints: object {sha256} {way}", names=(sha256,), bad=place.holders[sha256])


def an_old_object(place: Place, draw: Random) -> Done:
    sha256, path = _object(place, draw, of_head=False)
    way = befall(draw, path)
    must = "either" if way == "a directory" else "go on"  # which nobody can take away but who has put it there
    return Done(what=f"checkpoints: old object {sha256} {way}", names=(sha256,), must=must)


def an_object_after_the_check(place: Place, draw: Random) -> Done:
    """The disk gives other bytes the second time."""
    sha256, path = _object(place, draw, of_head=True)
    place.before_reading = lambda: void(befall(draw, path))
    return Done(what=f"checkpoints: object {sha256} after the check", names=(sha256,), seen=False,
                  bad=place.holders[sha256])  # fmt: skip


def void(_: object) -> None:
    return


def objects_swapped(place: Place, draw: Random) -> Done:
    """Two of HEAD's in each other's place, of the same size where there are such; or one in place of another's."""
    names = sorted(sha256 for sha256, steps in place.holders.items() if STOPPED in steps)
    one = draw.choice(names)
    paths = {name: layout.object_path(place.checkpoints, name) for name in place.holders}
    size = paths[one].stat().st_size
    pool = sorted(place.holders) if draw.random() < 0.5 else names
    like = [name for name in pool if name != one and paths[name].stat().st_size == size]
    other = draw.choice(like or [name for name in pool if name != one])
    content = paths[one].read_bytes()
    put(paths[one], paths[other].read_bytes())
    bad = set(place.holders[one])
    if draw.random() < 0.5:
        put(paths[other], content)
        bad |= set(place.holders[other])
    return Done(what=f"checkpoints: object {one} has the bytes of {other}", names=(one,), bad=tuple(sorted(bad)))


def a_manifest(place: Place, draw: Random) -> Done:
    name = f"step_{STOPPED:08d}/manifest.json"
    way = befall(draw, place.checkpoints / name)
    return Done(what=f"checkpoints: {name} {way}", names=(name,), bad=(STOPPED,))


def an_old_manifest(place: Place, draw: Random) -> Done:
    name = f"step_{draw.choice(KEPT[:-1]):08d}/manifest.json"
    way = befall(draw, place.checkpoints / name)
    return Done(what=f"checkpoints: old {name} {way}", names=(name,), must="go on")


def another_manifest(place: Place, draw: Random) -> Done:
    """Of another step, or of another run of the same plan."""
    name = f"step_{STOPPED:08d}/manifest.json"
    older = [layout.manifest_path(place.checkpoints, step) for step in KEPT[:-1]]
    elsewhere = draw.choice((place.other / name, *older))
    put(place.checkpoints / name, elsewhere.read_bytes())
    return Done(what=f"checkpoints: {name} is {elsewhere.parent.name}'s", names=(name,), bad=(STOPPED,))


def head(place: Place, draw: Random) -> Done:
    way = befall(draw, place.checkpoints / "HEAD")
    return Done(what=f"checkpoints: HEAD {way}", names=HEAD_OR_MANIFEST, bad=_denied(place))


HEAD_OR_MANIFEST = ("HEAD", "manifest.json")


def _denied(place: Place) -> tuple[int, ...]:
    """The step whose manifest is not the one that HEAD names: nobody can tell which of the two is damaged."""
    try:
        named = Head.parse(disk.read(place.checkpoints / "HEAD", limit=layout.HEAD_LIMIT))
    except Damage:
        return ()
    return (named.step,) if named.step in KEPT and named.manifest != place.manifests[named.step][1] else ()


def another_head(place: Place, draw: Random) -> Done:
    """One that could be one: of an older step, of none, of another run, of one step with another's manifest."""
    older, right = draw.choice(KEPT[:-1]), Head.parse((place.checkpoints / "HEAD").read_bytes())
    theirs = Head.parse((place.other / "HEAD").read_bytes())
    heads = {
        "of an older step": Head(step=older, manifest=place.manifests[older][1]),
        "of no checkpoint": Head(step=0, manifest=None),
        "of another run": theirs,
        "with an older manifest": Head(step=STOPPED, manifest=place.manifests[older][1]),
        "of a step to come": Head(step=STOPPED + 1, manifest=right.manifest),
    }
    which = draw.choice(sorted(heads))
    put(place.checkpoints / "HEAD", heads[which].encode())
    return Done(what=f"checkpoints: HEAD {which}", names=HEAD_OR_MANIFEST, bad=_denied(place))


def directories(place: Place, draw: Random) -> Done:
    """Whole parts of the checkpoints are gone."""
    what = draw.choice(("HEAD and all steps", "everything", "the directory", "objects", "a folder of objects", "step"))
    own = place.checkpoints
    if what == "the directory":
        gone(own)
        return Done(what="checkpoints: the directory is gone", names=("checkpoints",), bad=KEPT)
    if what in ("HEAD and all steps", "everything"):
        for entry in own.iterdir():
            if what == "everything" or entry.name not in ("objects", "tmp"):
                gone(entry)
        return Done(what=f"checkpoints: {what} is gone", names=("HEAD",), bad=KEPT)
    if what == "step":
        gone(layout.step_directory(own, STOPPED))
        return Done(what="checkpoints: HEAD's step is gone", names=("manifest.json",), bad=(STOPPED,))
    folder = own / "objects" if what == "objects" else _object(place, draw, of_head=True)[1].parent
    lost = {sha256 for sha256 in place.holders if layout.object_path(own, sha256).is_relative_to(folder)}
    gone(folder)
    bad = tuple(step for step in KEPT if any(step in place.holders[sha256] for sha256 in lost))
    return Done(what=f"checkpoints: {what} is gone", names=tuple(lost), bad=bad)


def of_another_run(place: Place, draw: Random) -> Done:
    restore(place.other, place.checkpoints)
    return Done(what="checkpoints: those of another run", names=("line of states",), bad=KEPT)


def the_plan(place: Place, draw: Random) -> Done:
    way = befall(draw, place.run / "plan.json")
    return Done(what=f"plan.json {way}", names=("plan.json",), must="either", seen=False)


def the_events(place: Place, draw: Random) -> Done:
    way = befall(draw, place.run / "events.jsonl")
    return Done(what=f"events.jsonl {way}", names=("events", "HEAD"), must="either", seen=False)


def for_people(place: Place, draw: Random) -> Done:
    name = draw.choice(("config.toml", "resolved.toml", "env.json", "lock"))
    if not (place.run / name).stat().st_size:
        put(place.run / name, draw.randbytes(9))
        way = "filled"
    else:
        way = befall(draw, place.run / name)
    return Done(what=f"{name} {way}", names=(name,), must="stop" if way == "a directory" else "go on", seen=False)


def metrics(place: Place, draw: Random) -> Done:
    """All of them are read at a start. What stands around the pages may have lost a bit that says nothing."""
    path = draw.choice(sorted(place.metrics.glob("*.parquet")))
    way = befall(draw, path, but=(LOST,))
    must = "either" if way == "bit flipped" else "stop"
    return Done(what=f"{path.name} {way}", names=(path.name,), must=must, seen=must == "stop")


def more_files(place: Place, draw: Random) -> Done:
    """What is nobody's, and what an unfinished save may leave."""
    name = draw.choice((
        "checkpoints/notes.txt", "checkpoints/tmp/half", "checkpoints/objects/zz/odd",
        f"checkpoints/objects/00/00{'a' * 62}", f"checkpoints/step_{STOPPED:08d}/more", "checkpoints/HEAD.tmp",
        f"checkpoints/step_{STOPPED + 1:08d}/manifest.json", "notes.txt", "plan.json.tmp",
    ))  # fmt: skip
    path = place.run / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(draw.randbytes(draw.randrange(100)))
    return Done(what=f"{name} is there too", names=(name,), must="go on", seen=False)


def data(place: Place, draw: Random) -> Done:
    path = draw.choice(sorted(place.origin))
    part = path.parts[-3]
    if draw.random() < 0.1:
        like = [one for one in sorted(place.origin) if one.parent == path.parent and one.name.startswith("shard")]
        path, other = draw.sample(like, 2)
        put(path, place.origin[other]), put(other, place.origin[path])
        way = "swapped"
    elif draw.random() < 0.05:
        path = path.with_name("shard_000099.bin")
        path.write_bytes(b"12")
        way = "is there too"
    else:
        way = befall(draw, path)
    names = (path.name, "training data", "held-out text", str(path.parent))
    if way == LINKED:
        return Done(what=f"{part}: {path.name} {way}", names=names, must="go on", seen=False)
    whole = place.scene == "shards" and path.name != "documents.bin"
    must = "stop" if whole and (part == "train" or path.name.startswith("shard")) else "either"
    return Done(what=f"{part}: {path.name} {way}", names=names, must=must)


Act = Callable[[Place, Random], Done]
OF_RUNS: list[tuple[int, Act]] = [
    (40, an_object), (3, an_old_object), (1, an_object_after_the_check), (8, objects_swapped), (14, a_manifest),
    (2, an_old_manifest), (3, another_manifest), (12, head), (4, another_head), (4, directories), (1, of_another_run),
    (5, the_plan), (4, the_events), (2, for_people), (4, metrics), (2, more_files),
]  # fmt: skip
OF_DATA: list[tuple[int, Act]] = [(85, data), (10, an_object), (5, a_manifest)]
