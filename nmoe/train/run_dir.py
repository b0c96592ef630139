"""A run's directory: what it was asked to do, what has happened to it, and its checkpoints.

    RUN/config.toml      the config as its author wrote it         RUN/lock, owner.json   its one owner
    RUN/resolved.toml    every value of the plan, as a config      RUN/events.jsonl       its history
    RUN/plan.json        `nmoe build --json` of it                 RUN/checkpoints/       its states
    RUN/env.json         the environment of the newest attempt    RUN/error*.json      why it ended, if it failed

A directory belongs to one fingerprint. The same plan again continues it; keys outside the
fingerprint may differ from start to start, and then the three files and an event say so. Another
fingerprint is refused with the keys that differ. plan.json is written last: a directory that has
it is a whole run, one without it was killed while it was being made and is made again.
"""

import contextlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

from nmoe import platform
from nmoe.checkpoint import disk
from nmoe.checkpoint.manifest import Manifest
from nmoe.checkpoint.reader import head_step
from nmoe.checkpoint.verify import head_behind, read_kept
from nmoe.errors import fail
from nmoe.plan.diff import differing, flat
from nmoe.plan.fingerprint import is_outside
from nmoe.plan.plan import Plan
from nmoe.plan.toml import toml_of
from nmoe.report.run import CHECKPOINTS, ENVIRONMENT, PLAN, plan_way_out, read_plan
from nmoe.train import events, failure, run_lock

FILES = ("config.toml", "resolved.toml", PLAN, ENVIRONMENT, events.NAME, run_lock.LOCK, run_lock.OWNER)


@attrs.define(kw_only=True)
class FollowedRun:
    """A run as a rank sees it that does not own its directory: rank 0 does, and speaks for all."""

    path: Path
    lineage: str
    attempt: int

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def is_complete(self, total_steps: int) -> bool:
        """As of a `RunDir`."""
        return head_step(self.checkpoints) == total_steps

    def event(self, event: str, **fields: Any) -> None:
        """Rank 0 has it too, and adds it."""

    def record_environment(self, record: Mapping[str, Any]) -> None:
        """Rank 0's is the same, or the ranks would not go on."""

    def require_own(self, manifest: Manifest) -> None:
        """Rank 0 does."""

    def require_own_head(self) -> None:
        """Rank 0 does."""

    def continue_lineage(self, lineage: str) -> None:
        """Rank 0 does, and tells."""

    def begin_lineage(self, changes: list[str]) -> None:
        """Rank 0 does, and tells."""


class RunDir:
    """An open run that this process owns, until `close` or the end of a with block.

    path: absolute. name: the directory's, which the metrics go by. lineage: of the states, 32 hex
    digits drawn from the system when the run is made or a new line is begun. attempt: counts starts
    from 1. continues: whether an attempt has been here before.
    """

    def __init__(self, path: Path, plan: Plan, config_text: str):
        self.path = path
        self.name = path.name
        self._stack = contextlib.ExitStack()
        self._stack.__enter__()
        try:
            before = self._claim()
            past = events.read(path)
            stored = self._stored_plan(past)
            if stored is not None:
                _check_same(path, stored, plan)
            self.continues = past.attempt > 0
            self.fingerprint, self.sections = plan.fingerprint, plan.sections
            self.lineages = {event["lineage"] for event in past.events}
            self.lineage = past.lineage or uuid.uuid4().hex
            self.attempt = past.attempt + 1
            try:
                self._start(plan, config_text, before, stored)
            except BaseException as error:
                # From here on the directory is this run's own, and the place where people look for the reason.
                failure.record(
                    path, error, rank=0, ranks=platform.process().world_size,
                    lineage=self.lineage, attempt=self.attempt, step=0,
                )  # fmt: skip
                raise
        except BaseException:
            self._stack.close()
            raise

    def _start(
        self, plan: Plan, config_text: str, before: run_lock.Owner | None, stored: dict[str, Any] | None
    ) -> None:
        """Makes the directory that of this attempt: what the one before has left goes, events and files say what is."""
        torn = events.repair(self.path)
        failure.clear(self.path)
        self.event("start", fingerprint=plan.fingerprint, tree_digest=plan.tree_digest)
        if torn:
            self.event("repair", file=events.NAME, removed=torn[:1000])
        if before is not None:
            self.event("takeover", owner=str(before))
        if stored is not None and stored["tree_digest"] != plan.tree_digest:
            self.event("changed", keys=[_line(*item) for item in _differing(stored, plan)])
        self._write("config.toml", config_text)
        self._write("resolved.toml", toml_of(plan.tree))
        self._write(PLAN, json.dumps(plan.to_json(), indent=1) + "\n")

    @classmethod
    def open(cls, plan: Plan, *, config_text: str) -> "RunDir":
        """Makes the run of `plan` in its [output] run_dir, or opens it to go on; either way a new attempt.

        config_text: the config as written, kept for people. RunError N0311 or N0312 if the run has
        another owner, N0313 if the directory holds something else, N0314 if it lacks files of its
        own, N0315 if it holds a run of another fingerprint.
        """
        return cls(Path(plan.config.output.run_dir).resolve(), plan, config_text)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def is_complete(self, total_steps: int) -> bool:
        """Whether HEAD names the plan's last step."""
        return head_step(self.checkpoints) == total_steps

    def event(self, event: str, **fields: Any) -> None:
        """Adds a line to events.jsonl, durably."""
        events.append(self.path, event, lineage=self.lineage, attempt=self.attempt, **fields)

    def record_environment(self, record: Mapping[str, Any]) -> None:
        """Writes env.json: the environment record of this attempt."""
        self._write(ENVIRONMENT, json.dumps(record, indent=1) + "\n")

    def require_own(self, manifest: Manifest) -> None:
        """RunError N0513 unless a checkpoint is this run's: of its plan, and of a line of states that it has had."""
        identity, notes = manifest.identity, []
        if identity.fingerprint != self.fingerprint:
            found = differing(dict(identity.sections), dict(self.sections))
            names = [f"[{name}]" for name, _, _ in found if not is_outside(name)]
            what = f"is of another plan, which differs in {', '.join(names) or 'the table of sections'}"
            notes = [f"there {identity.fingerprint}", f"here  {self.fingerprint}"]
        elif identity.lineage not in self.lineages:
            what = "is of a line of states that this run never had"
            notes = [f"there {identity.lineage}", *(f"here  {lineage}" for lineage in sorted(self.lineages))]
        else:
            return
        raise fail(
            "N0513", f"the checkpoint of step {manifest.step} {what}", place=str(self.checkpoints),
            help=f"it was saved by `{identity.run}`: put this run's own `{CHECKPOINTS}` back",
            notes=notes,
        )  # fmt: skip

    def require_own_head(self) -> None:
        """The same of the checkpoint that HEAD names; whether it is whole is not looked at."""
        kept = read_kept(self.checkpoints)
        if kept.head is not None and kept.head.step in kept.manifests:
            self.require_own(kept.manifests[kept.head.step][0])

    def continue_lineage(self, lineage: str) -> None:
        """Goes on in the line of the checkpoint: not in one that was begun after it and has left none, or was left."""
        if lineage != self.lineage:
            left, self.lineage = self.lineage, lineage
            self.event("lineage_back", left=left)

    def begin_lineage(self, changes: list[str]) -> None:
        """Goes on openly as a new line of states; `changes` says what is no longer as it was."""
        parent, self.lineage = self.lineage, uuid.uuid4().hex
        self.event("lineage", parent=parent, changes=changes)

    def close(self) -> None:
        """Gives the run back."""
        self._stack.close()

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _claim(self) -> run_lock.Owner | None:
        """Makes the directory if there is none and becomes its owner; nothing is put into a foreign one."""
        with disk.naming("look at", self.path):
            in_the_way = self.path.exists() and not self.path.is_dir()
        if in_the_way:
            raise fail("N0313", "`run_dir` is not a directory", place=str(self.path), help="name another one")
        disk.make_directory(self.path)
        known = {CHECKPOINTS, *FILES, *(f"{name}.tmp" for name in FILES)}
        names = (entry.name for entry in self.path.iterdir() if not any(map(entry.match, failure.PATTERNS)))
        foreign = sorted(name for name in names if name not in known)
        if foreign and not (self.path / PLAN).exists():
            raise fail(
                "N0313", f"`run_dir` holds something that is no run: `{foreign[0]}`"
                + (f" and {len(foreign) - 1} more" if foreign[1:] else ""),
                place=str(self.path), help="name an empty or new directory as run_dir in [output]",
            )  # fmt: skip
        return self._stack.enter_context(run_lock.owned(self.path, "nmoe train"))

    def _stored_plan(self, past: events.Past) -> dict[str, Any] | None:
        """What plan.json holds, None in a directory that has never been finished being made."""
        path = self.path / PLAN
        if not path.exists():
            if self.checkpoints.exists():
                raise fail(
                    "N0314", "the run has checkpoints and no plan.json", place=str(self.path), help=plan_way_out(path)
                )
            return None
        rewind = f"nmoe verify {self.path} --rewind"
        if not past.attempt:
            raise fail(
                "N0314", f"the run has a plan.json and no {events.NAME}", place=str(self.path),
                help=f"restore {events.NAME} from a copy; or {rewind} begins it anew from the checkpoints",
            )  # fmt: skip
        # To go on from an earlier step than the run has come to, or from none, would hide a loss.
        if past.saved and not self.checkpoints.exists():
            raise fail(
                "N0314", f"the run has been saved at step {past.saved} and has no `{CHECKPOINTS}`",
                place=str(self.path),
                help=f"restore `{CHECKPOINTS}` from a copy, or name another `run_dir` to begin anew",
            )  # fmt: skip
        behind = head_behind(self.checkpoints, past.saved)
        if behind:
            raise fail(
                "N0314", f"`HEAD` {behind}", place=str(self.checkpoints),
                help=f"{rewind} goes on openly from the newest checkpoint that verifies",
            )  # fmt: skip
        return read_plan(self.path)

    def _write(self, name: str, text: str) -> None:
        """Makes a file hold `text`, durably; one that does so already is left alone."""
        path, content = self.path / name, text.encode()
        if not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content:
            disk.replace(path, content)


def _check_same(path: Path, stored: Mapping[str, Any], plan: Plan) -> None:
    """RunError N0315 with the sections and keys that differ, if the fingerprints do."""
    if stored["fingerprint"] == plan.fingerprint:
        return
    sections = [
        name
        for name, _, _ in differing(dict(stored["sections"]), dict(plan.sections))
        if not is_outside(name)
    ]
    keys = [item for item in _differing(stored, plan) if not is_outside(item[0])]
    raise fail(
        "N0315", "the directory holds a run of another fingerprint; it differs in "
        + (", ".join(f"[{name}]" for name in sections) or "the table of sections"),
        place=str(path), help="name another `run_dir` in [output], or go back to the plan in its resolved.toml",
        notes=[f"there {stored['fingerprint']}", f"here  {plan.fingerprint}", *(_line(*item) for item in keys[:24])],
    )  # fmt: skip


def _differing(stored: Mapping[str, Any], plan: Plan) -> list[tuple[str, Any, Any]]:
    return differing(flat(stored["resolved"]), flat(plan.tree))


def _line(key: str, there: Any, here: Any) -> str:
    texts = ["absent" if value is None else json.dumps(value) for value in (there, here)]
    return f"{key}: {texts[0]} there, {texts[1]} here"
