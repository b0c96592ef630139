"""nmoe verify: is every checkpoint of a run what was saved, and which one to go on from if not."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nmoe.checkpoint.manifest import Manifest

EVERY_S = 10.0


@click.command("verify", epilog="Exit status: 0 everything verifies, 1 something does not, 2 RUN is not a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--rewind", is_flag=True, help="Move HEAD to the newest checkpoint that verifies, and say so.")
@click.option("--read-data", is_flag=True, help="Read every byte of the run's data and metrics too.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(run: Path, rewind: bool, read_data: bool, as_json: bool) -> None:
    """Hash every byte of RUN's checkpoints and compare.

    Checked are HEAD, each kept manifest (its own seal, and the hash that HEAD or the next checkpoint
    holds of it), each object that a manifest names (its size, and its SHA-256, which is its name), the
    plan, and that HEAD stands where the run's events say that it has come. Each fault is named with the
    file and the step. What an unfinished save has left is noted, and is no fault. Nothing is changed,
    and the run may be training meanwhile.

    With --read-data also all else that the run reads: every shard that its plan names, for training and
    for evaluation, against the manifests of the shards, and these, the packaged text and the tokenizer
    against what HEAD's checkpoint was trained on; and every file of its metrics. Relative paths start
    where the run was started. If all is well, nothing that this run reads has changed.

    The state digest names the training state itself: two runs that stand at the same state have
    the same one, whenever and however often they were saved.

    With --rewind HEAD is moved to the newest checkpoint that verifies and the run's events.jsonl
    says so; the next `nmoe train` repeats the steps from there. It needs the run to itself, and exits
    with 0 if HEAD then verifies, whatever older checkpoints are like (and the data, if it is read).

    \b
      nmoe verify runs/quickstart
      nmoe verify runs/quickstart --json | jq .state_digest
      nmoe verify runs/quickstart --read-data
      nmoe verify runs/quickstart --rewind
    """
    from nmoe.report.run import require_run

    require_run(run)
    # First, so that the report shows what there is after it.
    moved = _rewind(run) if rewind else ""
    result = _check(run, read_data=read_data)
    if as_json:
        click.echo(json.dumps({**result, "rewound": moved} if rewind else result, indent=2))
    else:
        _print(result, moved)
    raise SystemExit(0 if result["ok"] or (rewind and (result["data"] is None or result["data"]["ok"])) else 1)


def _check(run: Path, *, read_data: bool) -> dict[str, Any]:
    """The whole finding, as --json prints it."""
    from nmoe.checkpoint import verify
    from nmoe.errors import NmoeError
    from nmoe.report.run import read_plan
    from nmoe.train import events

    faults: list[dict[str, Any]] = []

    def fault(path: str, message: str, step: int = 0) -> None:
        faults.append({"step": step or None, "path": path, "message": message})

    past = events.Past(lineage="", attempt=0, events=())
    try:
        past = events.read(run)
    except NmoeError as error:
        fault(events.NAME, error.diagnostics[0].message)
    else:
        if not past.attempt:
            fault(events.NAME, "is missing")
    report = verify.verify(run / "checkpoints", saved=past.saved)
    for found in report.faults:
        fault(f"checkpoints/{found.path}", found.message, found.step)
    saved = None if report.head is None else report.head.identity
    lineages = {event["lineage"] for event in past.events}
    if saved is not None and lineages and saved.lineage not in lineages:
        fault(events.NAME, f"never tells of the line of states {saved.lineage}, of which HEAD's checkpoint is")
    plan = None
    if (run / "plan.json").exists():
        try:
            plan = read_plan(run)
        except NmoeError as error:
            fault("plan.json", error.diagnostics[0].message)
        else:
            if saved is not None and saved.fingerprint != plan["fingerprint"]:
                here, there = plan["fingerprint"][:16], saved.fingerprint[:16]
                fault("plan.json", f"is the plan {here}..., and HEAD was saved by {there}...")
    else:
        fault("plan.json", "is missing")
    data = None
    if read_data:
        known = len(faults)
        texts = [] if plan is None else _read_data(run, plan, report.head, fault)
        data = {"ok": plan is not None and len(faults) == known, "texts": texts}
    head = report.head
    return {
        "ok": not faults,
        "run": str(run),
        "step": None if head is None else head.step,
        "state_digest": None if head is None else head.state_digest,
        "fingerprint": None if head is None else head.identity.fingerprint,
        "lineage": None if head is None else head.identity.lineage,
        "attempt": None if head is None else head.identity.attempt,
        "checkpoints": [
            {
                "step": checked.step,
                "ok": checked.ok,
                "manifest_sha256": checked.manifest_sha256 or None,
                "state_digest": checked.state_digest or None,
            }
            for checked in report.checkpoints
        ],
        "data": data,
        "faults": faults,
        "notes": list(report.notes),
    }


def _read_data(
    run: Path, plan: dict[str, Any], head: "Manifest | None", fault: Callable[[str, str], None]
) -> list[dict[str, Any]]:
    """What else the run reads: its ledger, and the texts that its plan names, as from where it was started."""
    from nmoe.errors import NmoeError
    from nmoe.metrics import ledger
    from nmoe.plan.resolve import resolve_text
    from nmoe.plan.toml import toml_of
    from nmoe.report.run import ledger_of, read_environment
    from nmoe.train.read_data import read_data

    environment = read_environment(run)
    _, metrics = ledger_of(run, plan, environment)
    try:
        ledger.verify(metrics)
    except NmoeError as error:
        for one in error.diagnostics:
            fault(one.place, one.message)
    started_in = Path(str(environment.get("recorded", {}).get("working_directory", "")))
    try:
        config = resolve_text(toml_of(plan["resolved"]), "plan.json").config
    except NmoeError as error:
        for one in error.diagnostics:
            fault("plan.json", f"does not resolve here: {one.message}")
        return []
    with contextlib.chdir(started_in if started_in.is_dir() else Path()):
        report = read_data(
            config, {} if head is None else head.identity.data, step=0 if head is None else head.step,
            progress=_Reading(),
        )  # fmt: skip
    for one in report.faults:
        fault(one.path or one.place, one.message)
    return [{"path": text.name, "ok": bool(text.digest), "tokens": text.tokens, "digest": text.digest or None}
            for text in report.texts]  # fmt: skip


class _Reading:
    """Says on stderr how far the reading of a text is, from time to time."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= EVERY_S:
            self.last = now
            click.echo(f"{name}: {done:,} of {total:,} tokens read", err=True)


def _print(result: dict[str, Any], moved: str) -> None:
    if moved:
        click.echo(moved)
    for checked in result["checkpoints"]:
        mark = "ok     " if checked["ok"] else "DAMAGED"
        head = "  <- HEAD" if checked["step"] == result["step"] else ""
        click.echo(f"{mark} step {checked['step']:>9}  state {checked['state_digest'] or '?'}{head}")
    for text in result["data"]["texts"] if result["data"] else ():
        click.echo(f"{'ok     ' if text['ok'] else 'DAMAGED'} {text['path']}, {text['tokens']:,} tokens")
    for note in result["notes"]:
        click.echo(f"note: {note}")
    for fault in result["faults"]:
        step = f"step {fault['step']}: " if fault["step"] else ""
        click.echo(f"fault: {step}{fault['path']} {fault['message']}", err=True)
    if result["ok"]:
        count = len(result["checkpoints"])
        verified = f"{count} checkpoint{'s' if count != 1 else ''}, every byte verified"
        unchanged = "; nothing that the run reads has changed" if result["data"] else ""
        click.echo((verified if count else "no checkpoint yet") + unchanged)
    else:
        # HEAD alone can be at fault. Where no checkpoint is whole there is nothing to go back to.
        whole = any(checked["ok"] for checked in result["checkpoints"])
        lost_events = {"step": None, "path": "events.jsonl", "message": "is missing"}
        mended = whole and any(
            fault["path"].startswith("checkpoints/") or fault == lost_events for fault in result["faults"]
        )
        way_out = f"; nmoe verify {result['run']} --rewind goes back to the newest that verifies" if mended else ""
        count = len(result["faults"])
        click.echo(f"{count} fault{'s' if count != 1 else ''}{way_out}", err=True)


def _rewind(run: Path) -> str:
    """Moves HEAD as the run's owner, with an event; what was done, in a line."""
    from nmoe.checkpoint import verify
    from nmoe.train import events
    from nmoe.train.run_lock import owned

    with owned(run, "nmoe verify --rewind"):
        events.repair(run)
        past = events.read(run)
        before, now, faults = verify.rewind(run / "checkpoints", saved=past.saved)
        if before == now and past.attempt and past.saved <= now.step:
            return f"HEAD stays at step {now.step}: it verifies"
        was = None if before is None else before.step
        identity = verify.read_manifest(run / "checkpoints", now.step)[0].identity
        events.append(
            run, "rewind", lineage=past.lineage or identity.lineage, attempt=past.attempt or identity.attempt,
            step=now.step, manifest=now.manifest, before=was, faults=[str(fault) for fault in faults],
        )  # fmt: skip
        if before == now:
            return f"HEAD stays at step {now.step}, the newest that verifies, and the run's events tell so now"
        came_from = "unreadable" if was is None else f"at step {was}"
        return f"HEAD was {came_from} and is now at step {now.step}, the newest that verifies"
