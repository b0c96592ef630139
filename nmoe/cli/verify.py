"""nmoe verify: is every checkpoint of a run what was saved, and which one to go on from if not."""

import json
from pathlib import Path
from typing import Any

import click


@click.command("verify", epilog="Exit status: 0 everything verifies, 1 something does not, 2 RUN is not a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--rewind", is_flag=True, help="Move HEAD to the newest checkpoint that verifies, and say so.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(run: Path, rewind: bool, as_json: bool) -> None:
    """Hash every byte of RUN's checkpoints and compare.

    Checked are HEAD, each kept manifest (its own seal, and the hash that HEAD or the next checkpoint
    holds of it), and each object that a manifest names (its size, and its SHA-256, which is its
    name). Each fault is named with the file and the step. What an unfinished save has left is
    noted, and is no fault. Nothing is changed, and the run may be training meanwhile.

    The state digest names the training state itself: two runs that stand at the same state have
    the same one, whenever and however often they were saved.

    With --rewind HEAD is moved to the newest checkpoint that verifies and the run's events.jsonl
    says so; the next `nmoe train` repeats the steps from there. It needs the run to itself, and exits
    with 0 if HEAD then verifies, whatever older checkpoints are like.

    \b
      nmoe verify runs/quickstart
      nmoe verify runs/quickstart --json | jq .state_digest
      nmoe verify runs/quickstart --rewind
    """
    from nmoe.report.run import require_run

    require_run(run)
    # First, so that the report shows what there is after it.
    moved = _rewind(run) if rewind else ""
    result = _check(run)
    if as_json:
        click.echo(json.dumps({**result, "rewound": moved} if rewind else result, indent=2))
    else:
        _print(result, moved)
    raise SystemExit(0 if result["ok"] or rewind else 1)


def _check(run: Path) -> dict[str, Any]:
    """The whole finding, as --json prints it."""
    from nmoe.checkpoint import verify
    from nmoe.errors import RunError
    from nmoe.report.run import read_plan

    report = verify.verify(run / "checkpoints")
    faults = [
        {"step": fault.step or None, "path": f"checkpoints/{fault.path}", "message": fault.message}
        for fault in report.faults
    ]
    if (run / "plan.json").is_file():
        try:
            planned = read_plan(run)["fingerprint"]
        except RunError as error:
            message = error.diagnostics[0].message
            faults.append({"step": None, "path": "plan.json", "message": message})
        else:
            saved = planned if report.head is None else report.head.identity.fingerprint
            if saved != planned:
                message = f"is the plan {planned[:16]}..., and HEAD was saved by {saved[:16]}..."
                faults.append({"step": None, "path": "plan.json", "message": message})
    else:
        faults.append({"step": None, "path": "plan.json", "message": "is missing"})
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
        "faults": faults,
        "notes": list(report.notes),
    }


def _print(result: dict[str, Any], moved: str) -> None:
    if moved:
        click.echo(moved)
    for checked in result["checkpoints"]:
        mark = "ok     " if checked["ok"] else "DAMAGED"
        head = "  <- HEAD" if checked["step"] == result["step"] else ""
        click.echo(f"{mark} step {checked['step']:>9}  state {checked['state_digest'] or '?'}{head}")
    for note in result["notes"]:
        click.echo(f"note: {note}")
    for fault in result["faults"]:
        step = f"step {fault['step']}: " if fault["step"] else ""
        click.echo(f"fault: {step}{fault['path']} {fault['message']}", err=True)
    if result["ok"]:
        count = len(result["checkpoints"])
        verified = f"{count} checkpoint{'s' if count != 1 else ''}, every byte verified"
        click.echo(verified if count else "no checkpoint yet")
    else:
        # HEAD alone can be at fault. Where no checkpoint is whole there is nothing to go back to.
        whole = any(checked["ok"] for checked in result["checkpoints"])
        mended = whole and any(fault["path"].startswith("checkpoints/") for fault in result["faults"])
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
        before, now, faults = verify.rewind(run / "checkpoints")
        if before == now:
            return f"HEAD stays at step {now.step}: it verifies"
        was = "unreadable" if before is None else f"at step {before.step}"
        events.append(
            run, "rewind", lineage=past.lineage, attempt=past.attempt,
            step=now.step, manifest=now.manifest, before=None if before is None else before.step,
            faults=[str(fault) for fault in faults],
        )  # fmt: skip
        return f"HEAD was {was} and is now at step {now.step}, the newest that verifies"
