"""Which optimizer group takes which parameter, collapsed over the layers.

`layers.0.attention.o_proj.weight`, `layers.1.attention.o_proj.weight`, ... are one pattern,
`layers.*.attention.o_proj.weight`, as long as shape, group and decay agree; where they do not
(local and global layers of different sizes) a pattern has a line for each.
"""

import re

import attrs

from nmoe.registry.config import Config

LAYER = re.compile(r"^layers\.(\d+)\.")


@attrs.frozen
class GroupRow:
    """One line of the table: `count` tensors of one shape that one group trains in one way.

    rate, floor: learning rates at s = 1 and s = 0. decay: decoupled weight decay; 0 for norms, which
    never decay. parameters: elements of one tensor.
    """

    pattern: str
    group: str
    kind: str
    rate: float
    floor: float
    decay: float
    shape: tuple[int, ...]
    count: int
    parameters: int


def group_rows(config: Config, kinds: dict[str, str]) -> tuple[GroupRow, ...]:
    """The table in the order of the model. kinds: the kind of each group, by its name."""
    rows: dict[tuple[str, tuple[int, ...]], GroupRow] = {}
    groups = config.optimizer.groups()
    for parameter in config.model.parameters():
        pattern = LAYER.sub("layers.*.", parameter.name)
        row = rows.get((pattern, parameter.shape))
        if row is not None:
            rows[pattern, parameter.shape] = attrs.evolve(row, count=row.count + 1)
            continue
        name = config.optimizer.group_of(parameter)
        group = groups[name]
        size = 1
        for axis in parameter.shape:
            size *= axis
        rows[pattern, parameter.shape] = GroupRow(
            pattern=pattern, group=name, kind=kinds[name], rate=group.lr, floor=group.lr_floor,
            decay=0.0 if parameter.role == "norm" else group.weight_decay,
            shape=parameter.shape, count=1, parameters=size,
        )  # fmt: skip
    return tuple(rows.values())
