"""`make torture`: every campaign to its end. It may be stopped and run again: it goes on where it was.

`python -m tests.torture [SUBJECT ...] [--jobs J] [--minutes M]`. Hours; see tests/torture/campaign.py.
"""

import argparse
import datetime
import json
import math
import re
import sys
import time

import attrs

from tests.torture.campaign import RESULTS, ROOT, SUBJECTS, Total, code, read_results, run, subject, table

NOTES = ROOT / ".torture"
MARKED = re.compile(r"(<!-- torture -->\n).*?(<!-- /torture -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no batch of a subject is begun")
    options = parser.parse_args()
    unknown = set(options.subjects) - set(SUBJECTS)
    if unknown:
        parser.error(f"no campaign is called {sorted(unknown)[0]}; there are: {', '.join(SUBJECTS)}")
    import torch

    torch.set_num_threads(1)
    lost, totals = 0, read_results()
    for name in options.subjects or SUBJECTS:
        total = campaign(name, options.jobs, options.minutes)
        lost += len(total.lost)
        totals = read_results() | {name: total}
        RESULTS.write_text(json.dumps({key: attrs.asdict(one) for key, one in totals.items()}, indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(MARKED.sub(lambda found: found[1] + table(totals) + "\n" + found[2], readme.read_text()))
    print(table(totals))
    return 1 if lost else 0


def campaign(name: str, jobs: int, minutes: float) -> Total:
    """All batches of a subject, or as many as there is time for: of earlier runs on this code from their notes."""
    module, now = subject(name), code()
    notes = NOTES / f"{name}.jsonl"
    NOTES.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    done = {line["batch"]: line for line in lines if line["code"] == now}
    batches = module.batches(sample=False)
    rest = [batch for batch in batches if batch.name not in done]
    print(f"{name}: {len(batches)} batches, {len(rest)} to do", file=sys.stderr)
    with notes.open("a") as file:
        for batch, tally, seconds in run(rest, jobs, time.monotonic() + 60 * minutes):
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            line = {"code": now, "batch": batch.name, **attrs.asdict(tally), "seconds": seconds, "date": date}
            file.write(json.dumps(line) + "\n")
            file.flush()
            done[batch.name] = line
            said = "".join(f"\n  lost: {one}" for one in tally.lost[:5])
            print(f"{name}: {batch.name}: {tally.tried} tried, {len(tally.lost)} lost, {seconds:.0f} s{said}",
                  file=sys.stderr, flush=True)  # fmt: skip
    counted = [done[batch.name] for batch in batches if batch.name in done]
    figures: dict[str, float] = {}
    for line in counted:
        for key, value in line["notes"].items():
            figures[key] = figures.get(key, 0) + value
    return Total(
        title=module.TITLE,
        tried=sum(line["tried"] for line in counted),
        lost=tuple(f"{line['batch']}: {one}" for line in counted for one in line["lost"]),
        notes=figures,
        seconds=sum(line["seconds"] for line in counted),
        code=now,
        date=max((line["date"] for line in counted), default=""),
        share=len(counted) / len(batches),
    )


if __name__ == "__main__":
    sys.exit(main())
