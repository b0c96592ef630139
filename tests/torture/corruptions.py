"""All that befalls a run's files and the data that it reads, and what must come of it.

Each act does one thing to a disk of `tests.torture.damaged`, by draws, and says what it has done.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

import attrs

from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import Head
from tests.torture.damage import LINKED, LOST, befall, gone, put, restore
from tests.torture.damaged import KEPT, STOPPED, Place

HEAD_OR_MANIFEST = ("HEAD", "manifest.json")
KINDS = ("objects", "manifests", "HEAD", "the whole", "data", "other files")


@attrs.frozen
class Done:
    """What was done to one of KINDS.

    names: one of them must be in the error, and in what verify says. must: a start must "stop", must "go on", or does
    "either". bad: the kept steps whose checkpoints are no longer whole. seen: verify --read-data must find it. late:
    nothing is damaged until tensors are read.
    """

    of: str
    what: str
    names: tuple[str, ...]
    must: str = attrs.field(default="stop", kw_only=True)
    bad: tuple[int, ...] = attrs.field(default=(), kw_only=True)
    seen: bool = attrs.field(default=True, kw_only=True)
    late: bool = attrs.field(default=False, kw_only=True)


def _object(place: Place, draw: Random, *, of_head: bool) -> tuple[str, Path]:
    """An object that HEAD's checkpoint needs, or that only older ones need."""
    sha256 = draw.choice([one for one, steps in sorted(place.holders.items()) if (STOPPED in steps) == of_head])
    return sha256, layout.object_path(place.checkpoints, sha256)


def an_object(place: Place, draw: Random) -> Done:
    sha256, path = _object(place, draw, of_head=True)
    way = befall(draw, path)
    return Done("objects", f"object {sha256} {way}", (sha256,), bad=place.holders[sha256])


def an_old_object(place: Place, draw: Random) -> Done:
    sha256, path = _object(place, draw, of_head=False)
    way = befall(draw, path)
    must = "either" if way == "a directory" else "go on"  # which nobody can take away but who has put it there
    return Done("objects", f"old object {sha256} {way}", (sha256,), must=must)


def an_object_after_the_check(place: Place, draw: Random) -> Done:
    """The disk gives other bytes the second time."""
    sha256, path = _object(place, draw, of_head=True)

    def damage() -> None:
        befall(draw, path)

    place.before_reading = damage
    return Done("objects", f"object {sha256} after the check", (sha256,), seen=False, late=True,
                bad=place.holders[sha256])  # fmt: skip


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
    return Done("objects", f"object {one} has the bytes of {other}", (one,), bad=tuple(sorted(bad)))


def a_manifest(place: Place, draw: Random) -> Done:
    name = f"step_{STOPPED:08d}/manifest.json"
    way = befall(draw, place.checkpoints / name)
    return Done("manifests", f"{name} {way}", (name,), bad=(STOPPED,))


def an_old_manifest(place: Place, draw: Random) -> Done:
    name = f"step_{draw.choice(KEPT[:-1]):08d}/manifest.json"
    way = befall(draw, place.checkpoints / name)
    return Done("manifests", f"old {name} {way}", (name,), must="go on")


def another_manifest(place: Place, draw: Random) -> Done:
    """Of another step, or of another run of the same plan."""
    name = f"step_{STOPPED:08d}/manifest.json"
    older = [layout.manifest_path(place.checkpoints, step) for step in KEPT[:-1]]
    elsewhere = draw.choice((place.other / name, *older))
    put(place.checkpoints / name, elsewhere.read_bytes())
    return Done("manifests", f"{name} is {elsewhere.parent.name}'s", (name,), bad=(STOPPED,))


def head(place: Place, draw: Random) -> Done:
    way = befall(draw, place.checkpoints / "HEAD")
    return Done("HEAD", f"HEAD {way}", HEAD_OR_MANIFEST, bad=_denied(place))


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
    return Done("HEAD", f"HEAD {which}", HEAD_OR_MANIFEST, bad=_denied(place))


def directories(place: Place, draw: Random) -> Done:
    """Whole parts of the checkpoints are gone."""
    what = draw.choice(("HEAD and all steps", "everything", "the directory", "objects", "a folder of objects", "step"))
    own = place.checkpoints
    if what == "the directory":
        gone(own)
        return Done("the whole", "the directory is gone", ("checkpoints",), bad=KEPT)
    if what in ("HEAD and all steps", "everything"):
        for entry in own.iterdir():
            if what == "everything" or entry.name not in ("objects", "tmp"):
                gone(entry)
        return Done("the whole", f"{what} is gone", ("HEAD",), bad=KEPT)
    if what == "step":
        gone(layout.step_directory(own, STOPPED))
        return Done("the whole", "HEAD's step is gone", ("manifest.json",), bad=(STOPPED,))
    folder = own / "objects" if what == "objects" else _object(place, draw, of_head=True)[1].parent
    lost = {sha256 for sha256 in place.holders if layout.object_path(own, sha256).is_relative_to(folder)}
    gone(folder)
    bad = tuple(step for step in KEPT if any(step in place.holders[sha256] for sha256 in lost))
    return Done("the whole", f"{what} is gone", tuple(lost), bad=bad)


def of_another_run(place: Place, draw: Random) -> Done:
    restore(place.other, place.checkpoints)
    return Done("the whole", "those of another run", ("line of states",), bad=KEPT)


def the_plan(place: Place, draw: Random) -> Done:
    way = befall(draw, place.run / "plan.json")
    return Done("other files", f"plan.json {way}", ("plan.json",), must="either", seen=False)


def the_events(place: Place, draw: Random) -> Done:
    way = befall(draw, place.run / "events.jsonl")
    return Done("other files", f"events.jsonl {way}", ("events", "HEAD"), must="either", seen=False)


def for_people(place: Place, draw: Random) -> Done:
    name = draw.choice(("config.toml", "resolved.toml", "env.json", "lock"))
    if not (place.run / name).stat().st_size:
        put(place.run / name, draw.randbytes(9))
        way = "filled"
    else:
        way = befall(draw, place.run / name)
    return Done("other files", f"{name} {way}", (name,), must="stop" if way == "a directory" else "go on", seen=False)


def metrics(place: Place, draw: Random) -> Done:
    """All of them are read at a start. What stands around the pages may have lost a bit that says nothing."""
    path = draw.choice(sorted(place.metrics.glob("*.parquet")))
    way = befall(draw, path, but=(LOST,))
    must = "either" if way == "bit flipped" else "stop"
    return Done("other files", f"{path.name} {way}", (path.name,), must=must, seen=must == "stop")


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
    return Done("other files", f"{name} is there too", (name,), must="go on", seen=False)


def data(place: Place, draw: Random) -> Done:
    path = draw.choice(sorted(place.origin))
    part, also = path.parts[-3], ()
    if draw.random() < 0.1:
        like = [one for one in sorted(place.origin) if one.parent == path.parent and one.name.startswith("shard")]
        path, other = draw.sample(like, 2)
        put(path, place.origin[other]), put(other, place.origin[path])
        way = "swapped"
        also = (other.name,)
    elif draw.random() < 0.05:
        path = path.with_name("shard_000099.bin")
        path.write_bytes(b"12")
        way = "is there too"
    else:
        way = befall(draw, path)
    names = (path.name, *also, "training data", "held-out text")
    if path.name == "manifest.json":
        names += ("what the manifest says",)  # it and a file differ, and nobody can tell which of the two is damaged
    if way == LINKED:
        return Done("data", f"{part}: {path.name} {way}", names, must="go on", seen=False)
    whole = place.scene == "shards" and path.name != "documents.bin"
    must = "stop" if whole and (part == "train" or path.name.startswith("shard")) else "either"
    return Done("data", f"{part}: {path.name} {way}", names, must=must)


Act = Callable[[Place, Random], Done]
OF_RUNS: list[tuple[int, Act]] = [
    (40, an_object), (3, an_old_object), (1, an_object_after_the_check), (8, objects_swapped), (14, a_manifest),
    (2, an_old_manifest), (3, another_manifest), (12, head), (4, another_head), (4, directories), (1, of_another_run),
    (5, the_plan), (4, the_events), (2, for_people), (4, metrics), (2, more_files),
]  # fmt: skip
OF_DATA: list[tuple[int, Act]] = [(85, data), (10, an_object), (5, a_manifest)]
