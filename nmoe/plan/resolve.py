"""From TOML to a Plan, or to every reason why not.

    layers -> structure -> cross-section checks -> target -> ranks -> what follows

The first three collect findings and go on; a plan is made only when there is none. Pure: it reads
the file and its parents, and nothing else of the machine.
"""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path as FilePath
from typing import Any

from nmoe.errors import ConfigError, Diagnostic
from nmoe.plan import fingerprint
from nmoe.plan.canonical import MAX_INT
from nmoe.plan.cost import Cost, cost_of
from nmoe.plan.families import stock_class
from nmoe.plan.groups import group_rows
from nmoe.plan.layers import Tree, load, load_text
from nmoe.plan.plan import Milestone, Plan
from nmoe.plan.positions import Path
from nmoe.plan.ranks import balance_of, traffic_of, transport_of
from nmoe.plan.rdep import arena_problems
from nmoe.plan.structure import Broken, BrokenPart, Findings, components, dotted, problems_of, structure
from nmoe.registry.component import Component
from nmoe.registry.config import Config
from nmoe.registry.table import TABLE


def resolve(
    path: "str | PathLike[str]", sets: Sequence[str] = (), *, ranks: int = 1, ranks_per_node: int = 1
) -> Plan:
    """The plan of a config file.

    sets: overrides, each "section.key=VALUE". ranks, ranks_per_node: only size the plan; they are
    not part of it. Raises ConfigError with every finding.
    """
    name = fspath(path)
    tree = load(FilePath(name), name, sets)
    return _plan(tree, ranks, ranks_per_node)


def resolve_text(
    text: str | bytes, name: str, sets: Sequence[str] = (), *, ranks: int = 1, ranks_per_node: int = 1
) -> Plan:
    """The plan of a text that messages call `name`; `extends` is relative to that name's directory."""
    return _plan(load_text(text, name, sets), ranks, ranks_per_node)


def _plan(tree: Tree, ranks: int, ranks_per_node: int) -> Plan:
    findings = Findings(tree)
    config = structure(tree, findings)
    _check(config, findings)
    if findings:
        raise ConfigError(findings.sorted())
    found = rank_problems(config, ranks, ranks_per_node)
    if found:
        raise ConfigError(found)
    return _complete(tree, config, ranks, ranks_per_node)


def _at(path: str) -> Path:
    """The path of a problem's dotted key; "data.stages.0" has an index."""
    return tuple(int(part) if part.isdigit() else part for part in path.split(".") if part)


def _check(config: Any, findings: Findings) -> None:
    """Cross-section checks of every part that structured, and whether the target has such a part."""
    if isinstance(config, Broken):
        return
    for path, spec in components(config):
        for problem in problems_of(spec, config, path):
            findings.add("N0117", _at(problem.path), problem.message, help=problem.help, notes=problem.notes)
        try:
            target = config.platform.target
            known = target in spec.supports
        except BrokenPart:
            continue
        if not known:
            named = [k for k, cls in TABLE[_table_of(path)].items() if k and target in cls.supports]
            other = f"a kind that has one: {', '.join(named)}; " if named else ""
            findings.add(
                "N0118", (*path, "kind"), f"{_name_of(path, spec)} is not defined on target `{target}`",
                help=f"{other}targets that have it: {', '.join(spec.supports)}",
            )  # fmt: skip


def _table_of(path: Path) -> str:
    return ".".join(part for part in path if isinstance(part, str))


def _kind_of(path: Path, spec: Component) -> str | None:
    return next(kind for kind, cls in TABLE[_table_of(path)].items() if cls is type(spec))


def _name_of(path: Path, spec: Component) -> str:
    kind = _kind_of(path, spec)
    return f"[{dotted(path)}]" + (f' of kind "{kind}"' if kind else "")


def _that_divide(count: int) -> str:
    """The way out: the numbers of ranks that would do, the small ones of very many."""
    return f"numbers that do: {', '.join(str(n) for n in range(1, min(count, 4096) + 1) if count % n == 0)}"


def rank_problems(config: Config, ranks: int, ranks_per_node: int) -> list[Diagnostic]:
    """What is wrong with a number of ranks for a config (N0119).

    Ranks take whole microbatches, nodes whole ranks, and each rank of a node the same number of experts.
    """
    found = []
    if ranks < 1 or ranks_per_node < 1:
        found.append((f"{ranks} ranks, {ranks_per_node} per node", "both are at least 1"))
    elif ranks % ranks_per_node:
        found.append((f"{ranks} ranks are not whole nodes of {ranks_per_node}", "let --ranks-per-node divide --ranks"))
    else:
        parts = config.batch.microbatches
        if parts % ranks:
            found.append((f"{ranks} ranks do not divide the step's {parts} microbatches", _that_divide(parts)))
        moe = config.model.moe
        if moe is not None and moe.router.num_experts % ranks_per_node:
            message = f"{ranks_per_node} ranks of a node cannot share {moe.router.num_experts} experts evenly"
            found.append((message, _that_divide(moe.router.num_experts)))
        else:
            found += arena_problems(config, ranks_per_node)
    return [Diagnostic(code="N0119", message=m, place="--ranks", help=h) for m, h in found]


def _check_sizes(tree: Tree, cost: Cost) -> None:
    """Everything that a plan counts has to be an integer that every reader of its JSON keeps exactly."""
    findings = Findings(tree)
    counts = {
        "parameters": cost.parameters_total,
        "FLOPs for a token": cost.flops_per_token,
        "bytes of memory": max(memory.at_peak["total"] for memory in cost.memory.values()),
    }
    for name, count in counts.items():
        if count > MAX_INT:
            message = f"the model has {float(count):.3g} {name}, more than 2^53 - 1"
            findings.add("N0120", ("model",), message, at="key", help="make it smaller")
    if findings:
        raise ConfigError(findings.sorted())


def _complete(tree: Tree, config: Config, ranks: int, ranks_per_node: int) -> Plan:
    plain = fingerprint.tree_of(config)
    sections = fingerprint.digests(config)
    kinds = {name: plain["optimizer"][name]["kind"] for name in config.optimizer.groups()}
    cost = cost_of(config, kinds, ranks=ranks, ranks_per_node=ranks_per_node)
    _check_sizes(tree, cost)
    per_step, total = config.batch.tokens_per_step, config.schedule.total_tokens
    reasons = tuple(
        f"{_name_of(path, spec)} has no kernels for {config.platform.target} yet"
        for path, spec in components(config)
        if config.platform.target not in spec.runs_on
    )
    origins = {dotted(path): _origin(tree, path) for path in _leaves(plain, ())}
    return Plan(
        name=tree.main.label,
        config=config,
        tree=plain,
        origins=origins,
        extended=tree.extended,
        sections=sections,
        fingerprint=fingerprint.fingerprint(sections),
        tree_digest=fingerprint.digest(plain),
        parameters_total=cost.parameters_total,
        parameters_active=cost.parameters_active,
        flops_per_token=cost.flops_per_token,
        tokens_per_step=per_step,
        total_tokens=total,
        total_steps=-(-total // per_step),
        schedule=_milestones(config, per_step),
        groups=group_rows(config, kinds),
        memory=cost.memory,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        transport=transport_of(config, ranks_per_node),
        balance=balance_of(config, ranks, ranks_per_node),
        traffic=traffic_of(config, ranks, ranks_per_node),
        runnable=not reasons,
        reasons=reasons,
        stock_class=stock_class(config.model),
    )


def _milestones(config: Config, per_step: int) -> tuple[Milestone, ...]:
    schedule = config.schedule
    ends = (
        ("warmup ends", schedule.warmup_tokens),
        ("decay begins", schedule.warmup_tokens + schedule.stable_tokens),
        ("end", schedule.total_tokens),
    )
    return tuple(Milestone(name, tokens, -(-tokens // per_step)) for name, tokens in ends)


def _leaves(value: Any, path: Path) -> list[Path]:
    """The paths of a plain tree's values; an array of values is one."""
    if isinstance(value, dict):
        return [leaf for name, item in value.items() for leaf in _leaves(item, (*path, name))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, (*path, index))]
    return [path]


def _origin(tree: Tree, path: Path) -> str:
    place = tree.places.get(path)
    return "default" if place is None else place.origin
