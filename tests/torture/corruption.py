"""Files of a run are damaged, lost, swapped and put in each other's place, and `nmoe train` is started on what is left.

A start reads HEAD, its manifest and objects, the plan, the events, the newest metrics and the data. Damage to what
decides must stop it before a tensor is read into, with an error that names the file and has a help; nothing of the
checkpoints or metrics may then be touched, `nmoe verify` must find it, and the help, followed step by step as a person
would follow it, must lead to the end that the straight run came to. Damage that a start may overlook must not matter:
the run goes on to that same end. HEAD never goes back but by `nmoe verify --rewind`, to the newest checkpoint that is
whole, and no run that has been saved begins again.

Starts are `nmoe train` itself, in the batch's own process, and some of them in forked ranks.
"""

import re
from functools import partial
from pathlib import Path
from random import Random

from nmoe.errors import RunError
from tests.torture import trainings
from tests.torture.campaign import Batch, Tally
from tests.torture.corruptions import KINDS, OF_DATA, OF_RUNS, Done
from tests.torture.damage import gone, put, restore
from tests.torture.damaged import KEPT, STOPPED, Place
from tests.train.launches import first_difference

TITLE = "flips and other corruptions of every file that a run reads / not detected, or another end"
EACH = 250
SCENES = {"one rank": 17, "two ranks": 12, "shards": 8, "shards read lazily": 3}
"""name: batches of EACH corruptions"""
SAMPLE = {"one rank": 30, "two ranks": 12, "shards": 16}
FOLLOWED, REWOUND, FORKED = 0.1, 0.2, 0.01
"""Shares: of those that are stopped, whose help is followed to the end, or that are only rewound; of all, that forked
ranks start too."""

CHECKED_FIRST = ("objects", "manifests", "HEAD", "the whole")
OUTCOMES = ("without effect", "help followed to the end", "started by forked ranks too")


def batches(sample: bool) -> list[Batch]:
    if sample:
        return [Batch(name, partial(_batch, name, name, count)) for name, count in SAMPLE.items()]
    return [
        Batch(f"{name}, {part}/{parts}", partial(_batch, name, f"{name}, {part}", EACH))
        for name, parts in SCENES.items()
        for part in range(1, parts + 1)
    ]


def _batch(scene: str, name: str, count: int, directory: Path) -> Tally:
    place, draw = Place(scene, directory), Random(f"corruption: {name}")
    lost, notes = [], dict.fromkeys(("bits flipped", *(f"of {one}" for one in KINDS), *OUTCOMES), 0)
    menu = OF_DATA if scene.startswith("shards") else OF_RUNS
    for _ in range(count):
        place.renew()
        befalls = draw.choices([act for _, act in menu], [weight for weight, _ in menu])[0]
        done = befalls(place, draw)
        notes["bits flipped"] += "bit flipped" in done.what
        notes[f"of {done.of}"] += 1
        try:
            wrong = _judge(place, draw, done, notes)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            lost.append(f"{done.what}: {wrong}")
    return Tally(tried=count, lost=tuple(lost), notes=notes)


def _judge(place: Place, draw: Random, done: Done, notes: dict[str, float]) -> str:
    """What is not as it must be, if anything is."""
    if draw.random() < FORKED and not done.late:
        notes[OUTCOMES[2]] += 1
        if wrong := _forked(place, done):
            return wrong
    found, verified = place.say("verify", str(place.run), "--read-data")
    faults = " ".join(line for line in verified.splitlines() if line.startswith("fault: "))
    if "Traceback" in verified or (done.seen and (found != 1 or not any(name in faults for name in done.names))):
        return f"verify does not find it: {found} {verified}"
    before = place.kept()
    status, said = place.train()
    if status == 0 and done.must != "stop":
        notes[OUTCOMES[0]] += 1
        if f"continuing after step {STOPPED} (verified)" not in said:
            return f"it does not go on from HEAD: {said}"
        try:
            return _at_the_end(place, said)
        except RunError as error:  # who reads the metrics is stricter about what stands around their pages than a start
            return "" if any(name in str(error) for name in done.names) else str(error)
    if status != 1 or done.must == "go on":
        return f"the start ended with {status}: {said}"
    if not re.search(r"^error\[N\d{4}\]: ", said, re.MULTILINE) or "Traceback" in said or not _helps(said):
        return f"no error with a help: {said}"
    if not any(name in said for name in done.names):
        return f"the error does not name {done.names}: {said}"
    if place.kept() != before and done.must == "stop" and not done.late:
        return f"a start that was refused has touched {set(place.kept().items()) ^ set(before.items())}: {said}"
    if place.reads and done.of in CHECKED_FIRST and done.must == "stop" and not done.late:
        return f"tensors were read before it was found: {said}"
    if found == 0 and not done.late and (done.seen or done.must != "stop"):  # a directory where a file is for people
        return f"verify finds nothing, and the start does: {said}"
    if draw.random() < FOLLOWED:
        notes[OUTCOMES[1]] += 1
        return _follow(place, done, said)
    return _rewinds(place, done)[0] if "--rewind" in said and draw.random() < REWOUND else ""


def _forked(place: Place, done: Done) -> str:
    """The same start by ranks of their own, all of which must come to the same; the disk is then as it was."""
    restore(place.disk, aside := place.directory / "aside")
    ended = trainings.attempt(place.disk, place.ranks, sets=place.sets)
    restore(aside, place.disk)
    allowed = {"stop": ("exit 1",), "go on": ("exit 0",), "either": ("exit 0", "exit 1")}[done.must]
    alike = len(set(ended.ends)) == 1 and ended.ends[0] in allowed
    return "" if alike and not any("Traceback" in said for said in ended.said) else f"forked: {ended}"


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
