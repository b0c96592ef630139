"""The plan: a frozen, complete answer to "what will this config do", and its forms for programs.

A Plan is made by `resolve` alone. It holds the specs that the run is built from, the same values
as plain data, where each came from, and what follows from them. It is the same for the same config
wherever and whenever it is resolved: it knows no time, host or absolute path.
"""

from typing import Any

import attrs

from nmoe.plan.families import StockClass
from nmoe.plan.groups import GroupRow
from nmoe.plan.memory import Memory
from nmoe.plan.ranks import Balance, Traffic
from nmoe.registry.config import Config


@attrs.frozen
class Milestone:
    """A boundary of the schedule. step: the first one whose tokens reach it."""

    name: str
    tokens: int
    step: int


@attrs.frozen(kw_only=True)
class Plan:
    """A resolved config and what follows from it.

    name: the config's file name.
    config: the specs, built and checked. tree: their values as plain nested dicts, in the table's
    order, every default filled in, absent optional keys left out.
    origins: for each dotted key of the tree "default", "file.toml:12" (relative to the config) or "--set".
    extended: whether a parent took part, so that origins name more than one file.
    sections: the digest of each section. fingerprint: over those that training depends on.
    tree_digest: over everything.
    flops_per_token: of training, forward and backward. memory: what a rank needs, for each value of [output]
    recompute. transport: how tokens travel between that many ranks. balance: what each keeps. traffic: between nodes.
    runnable, reasons: whether every part has its kernels on the target, and which has not.
    stock_class: what `nmoe export` writes the model as, or why it cannot.
    """

    name: str
    config: Config
    tree: dict[str, Any]
    origins: dict[str, str]
    extended: bool
    sections: dict[str, str]
    fingerprint: str
    tree_digest: str
    parameters_total: int
    parameters_active: int
    flops_per_token: int
    tokens_per_step: int
    total_tokens: int
    total_steps: int
    schedule: tuple[Milestone, ...]
    groups: tuple[GroupRow, ...]
    memory: dict[str, Memory]
    ranks: int
    ranks_per_node: int
    transport: str
    balance: tuple[Balance, ...]
    traffic: Traffic
    runnable: bool
    reasons: tuple[str, ...]
    stock_class: StockClass

    @property
    def optimizer_kinds(self) -> dict[str, str]:
        """The kind of each optimizer group, by its name."""
        return {name: self.tree["optimizer"][name]["kind"] for name in self.config.optimizer.groups()}

    @property
    def memory_bytes_per_rank(self) -> dict[str, int]:
        """What is alive at the peak of a step, by kind, and `total`."""
        return self.memory[self.config.output.recompute].at_peak

    def to_json(self) -> dict[str, Any]:
        """The plan as data for `json.dumps`: nothing but dicts, lists, strings, numbers and booleans."""
        return {
            "fingerprint": self.fingerprint,
            "tree_digest": self.tree_digest,
            "sections": dict(self.sections),
            "runnable": self.runnable,
            "reasons": list(self.reasons),
            "export": {
                "as": self.stock_class.name,
                "nearest": self.stock_class.nearest,
                "reasons": list(self.stock_class.reasons),
            },
            "parameters": {"total": self.parameters_total, "active": self.parameters_active},
            "flops_per_token": self.flops_per_token,
            "tokens_per_step": self.tokens_per_step,
            "total_tokens": self.total_tokens,
            "total_steps": self.total_steps,
            "schedule": [attrs.asdict(milestone) for milestone in self.schedule],
            "ranks": self.ranks,
            "ranks_per_node": self.ranks_per_node,
            "transport": self.transport,
            "balance": [attrs.asdict(one) for one in self.balance],
            "traffic": attrs.asdict(self.traffic),
            "memory_bytes_per_rank": dict(self.memory_bytes_per_rank),
            "memory": {recompute: attrs.asdict(memory) for recompute, memory in self.memory.items()},
            "groups": [{**attrs.asdict(row), "shape": list(row.shape)} for row in self.groups],
            "resolved": self.tree,
            "origins": dict(self.origins),
        }

    def to_toml(self) -> str:
        """The resolved tree as a config of its own: it resolves to the same fingerprint and tree_digest."""
        from nmoe.plan.toml import toml_of

        head = f"# resolved from {self.name}\n# fingerprint {self.fingerprint}\n# tree_digest {self.tree_digest}\n"
        return head + toml_of(self.tree)
