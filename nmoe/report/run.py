"""What a run has left for whoever looks at it later: plan, ledger, checkpoints, environment.

Everything is checked as it is read: a step's file of the ledger page by page, manifests by their seals and the hashes
that HEAD and the next checkpoint hold of them. Nothing is changed, and the run may be training meanwhile.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from nmoe import strict_json
from nmoe.checkpoint import disk, verify
from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import Manifest
from nmoe.checkpoint.verify import Fault
from nmoe.errors import ConfigError, Diagnostic, fail
from nmoe.metrics import ledger
from nmoe.metrics.schema import METRICS
from nmoe.plan import fingerprint
from nmoe.plan.diff import flat

PLAN, ENVIRONMENT, CHECKPOINTS = "plan.json", "env.json", "checkpoints"
LIMIT = 1 << 26

TOKENS_SEEN = "tokens_seen"

Key = tuple[str, int | None, int | None, str | None]
"""A figure of a step: metric, layer, expert, and the label where it tells rows apart."""


@attrs.frozen(kw_only=True)
class Rows:
    """One step of the ledger. values: of each figure, the tokens seen among them, or the text of a text metric.

    ranks: 0 where it does not say.
    """

    lineage: str
    attempt: int
    ranks: int
    values: dict[Key, float | str | None]


@attrs.frozen(kw_only=True)
class Run:
    """A run's parts. name: what the metrics go by. plan: of plan.json. environment: the newest attempt's record, {}
    where there is none. ledger: the directory of its metrics alone. steps: of the ledger, rising. manifests: of the
    kept checkpoints that are whole, by step, rising; faults: of the others.
    """

    path: Path
    name: str
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    ledger: Path
    steps: dict[int, Path]
    manifests: dict[int, Manifest]
    faults: tuple[Fault, ...]

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def rows(self, step: int) -> Rows:
        """One of `steps`; RunError N0403 unless the file is whole."""
        table = ledger.read(self.steps[step], step=step, run=self.name)
        columns = [table.column(name).to_pylist() for name in ("name", "layer", "expert", "rank", "label", "value")]
        first = {name: table.column(name)[0].as_py() for name in ("lineage", "attempt", "tokens_seen")}
        values: dict[Key, float | str | None] = {(TOKENS_SEEN, None, None, None): first.pop("tokens_seen")}
        ranks = 0
        for name, layer, expert, rank, label, value in zip(*columns, strict=True):
            ranks += name == "memory/resident" and rank is not None
            is_text = name in METRICS and METRICS[name].text
            values[name, layer, expert, None if is_text else label] = label if is_text else value
        return Rows(**first, ranks=ranks, values=values)

    def environment_at(self, step: int) -> Mapping[str, Any]:
        """The record in force at a step: that of the first checkpoint from there on, else the newest attempt's."""
        for saved, manifest in self.manifests.items():
            if saved >= step:
                return manifest.identity.environment
        return self.environment


def read_run(path: Path, *, metrics: Path | None = None) -> Run:
    """The run in that directory. metrics: of all runs; None: where the run has put them, or beside it, if it was moved.

    ConfigError N0318 if it is none, RunError N0314 if its plan.json cannot be read.
    """
    require_run(path)
    plan = read_plan(path)
    environment = read_environment(path)
    name, directory = ledger_of(path, plan, environment, metrics=metrics)
    steps = ledger.files(directory) if _is_directory(directory) else {}
    kept = verify.read_kept(path / CHECKPOINTS)
    faulty = {fault.step for fault in kept.faults}
    return Run(
        path=path,
        name=name,
        plan=plan,
        environment=environment,
        ledger=directory,
        steps=steps,
        manifests={step: kept.manifests[step][0] for step in kept.steps if step not in faulty},
        faults=kept.faults,
    )


def ledger_of(
    path: Path, plan: Mapping[str, Any], environment: Mapping[str, Any], *, metrics: Path | None = None
) -> tuple[str, Path]:
    """(what a run's metrics go by, the directory of them alone); metrics: as `read_run`."""
    output = flat(plan["resolved"])
    run_dir, metrics_dir = (output.get(f"output.{key}") for key in ("run_dir", "metrics_dir"))
    name = Path(run_dir if isinstance(run_dir, str) else path.resolve()).name
    if metrics is None:
        metrics = _metrics(path, metrics_dir if isinstance(metrics_dir, str) else None, environment, name)
    return name, metrics / name


def require_run(path: Path) -> None:
    """ConfigError N0318 unless that is a run's directory, or what is left of one."""
    if not (path / PLAN).is_file() and not (path / CHECKPOINTS).is_dir():
        raise ConfigError(
            Diagnostic(
                code="N0318",
                message=f"`{path}` is not a run's directory",
                help="name the directory that [output] run_dir says, such as runs/quickstart",
            )
        )


def read_plan(run: Path) -> dict[str, Any]:
    """The content of plan.json, its identity checked for shape and against its digests; RunError N0314 if it is none.

    What follows from the resolved tree (memory, groups) is for people, and not looked at.
    """
    path = run / PLAN
    try:
        stored = strict_json.loads(disk.read(path, limit=LIMIT))
        for key, kind in (("fingerprint", str), ("tree_digest", str), ("sections", dict), ("resolved", dict)):
            if not isinstance(stored[key], kind):
                raise ValueError(f"`{key}` is no {kind.__name__}")
        if fingerprint.fingerprint(stored["sections"]) != stored["fingerprint"]:
            raise ValueError("its sections do not have its fingerprint")
        if fingerprint.digest(stored["resolved"]) != stored["tree_digest"]:
            raise ValueError("its resolved tree does not have its tree_digest")
    except (Damage, ValueError, KeyError, TypeError) as cause:
        raise fail(
            "N0314", f"the run's plan.json cannot be read: {cause}", place=str(path),
            help="move it away; " + plan_way_out(path),
        ) from cause  # fmt: skip
    return dict(stored)


def plan_way_out(path: Path) -> str:
    """What to do where plan.json is damaged or lost: the plan stands beside it as a config, too."""
    return f"nmoe build {path.parent / 'resolved.toml'} --json > {path} makes it again"


def metrics_directory(run_dir: Path, metrics_dir: str | None) -> Path:
    """Where the metrics of all runs lie: [output] metrics_dir, or `metrics` beside the run's directory."""
    return Path(metrics_dir) if metrics_dir else run_dir.resolve().parent / "metrics"


def _metrics(path: Path, metrics_dir: str | None, environment: Mapping[str, Any], name: str) -> Path:
    """Of all runs. A relative `metrics_dir` starts where the run was started."""
    beside = metrics_directory(path, None)
    started_in = Path(str(environment.get("recorded", {}).get("working_directory", "")))
    told = started_in / metrics_directory(path, metrics_dir)
    return told if _is_directory(told / name) or not _is_directory(beside / name) else beside


def _is_directory(path: Path) -> bool:
    """A name that no file can have is none either: a damaged plan.json may say it."""
    try:
        return path.is_dir()
    except OSError:
        return False


def read_environment(path: Path) -> Mapping[str, Any]:
    """The content of env.json; {} where it is not there, or is no record: people alone read it."""
    try:
        found = strict_json.loads(disk.read(path / ENVIRONMENT, limit=LIMIT))
    except (Damage, ValueError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in ("exact", "recorded"))
    return found if whole else {}
