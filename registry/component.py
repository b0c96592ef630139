"""The base of every spec, and the two ways a spec declares what it takes: `key` and `section`.

A spec is an attrs class, frozen and keyword-only. Its annotations are the schema: `int`, `float`,
`bool`, `str`, `tuple[float, ...]`, a nested spec, each possibly `| None` where absence has a
meaning. `key` adds what an annotation cannot say (bounds, choices, help, whether the key stands
outside the fingerprint); the resolver reads both and reports everything at once.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

if TYPE_CHECKING:
    from nmoe.registry.config import Config

TARGETS = ("sm_100a", "sm_90a", "cpu")


@attrs.frozen(kw_only=True)
class Problem:
    """One finding of a cross-section check, before it has a line.

    path: the dotted key at fault; the resolver turns it into a position in the file.
    """

    path: str
    message: str
    help: str = ""
    notes: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Parameter:
    """One trainable tensor of the model, known without building it.

    role: embedding | head | tied (both at once) | norm | matrix | router | expert; the optimizer groups follow it.
    init: normal (std `init_std`) | residual (normal, times `residual_init_scale`) | ones.
    An expert tensor's first axis is the experts, of which a token uses top_k.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    init: str = "normal"


@attrs.frozen(kw_only=True)
class Component:
    """Base of all specs.

    supports: targets on which this component is defined; any other is an error at `nmoe build`.
    runs_on: those of them for which its kernels exist; on the others a plan resolves and counts,
    says `runnable: no`, and `nmoe train` refuses it.
    """

    supports: ClassVar[tuple[str, ...]] = TARGETS
    runs_on: ClassVar[tuple[str, ...]] = TARGETS

    def check(self, config: "Config", path: str) -> Iterator[Problem]:
        """Contradictions between this section (found at `path`) and the rest of the tree."""
        yield from ()


def key(
    help: str,
    *,
    default: Any = attrs.NOTHING,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    outside: bool = False,
    unit: str = "",
) -> Any:
    """One key of a section.

    minimum, maximum are inclusive, above, below exclusive; on a tuple they hold for each element.
    outside: the key cannot change a bit of training (a path), so it is not in the fingerprint.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "choices": choices,
        "outside": outside,
        "unit": unit,
    }
    return attrs.field(default=default, metadata=metadata)


def section(help: str, *, optional: bool = False, implied: bool = False) -> Any:
    """One sub-table, of a class that the closed table names.

    optional: it may be absent and is then None. implied: absent means all its defaults.
    """
    default: Any = None if optional else attrs.NOTHING
    return attrs.field(default=default, metadata={"help": help, "section": True, "implied": implied})


def divisible(path: str, value: int, name: str, divisor: int, divisor_name: str) -> Iterator[Problem]:
    """The finding that `value` is not a multiple of `divisor`, if it is not."""
    if value % divisor:
        below, above = value - value % divisor, value - value % divisor + divisor
        options = f"{below} or {above}" if below else f"{above}"
        yield Problem(
            path=path,
            message=f"`{name}` = {value} is not a multiple of {divisor_name} = {divisor}",
            help=f"the nearest values that work: {options}",
        )
