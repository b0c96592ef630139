"""What `nmoe bench` gives, whatever it measures: rows of one type, and the two ways in which they are written.

A subject is a module that gives an iterable of `Row`. Nothing here imports torch.
"""

import json
from collections.abc import Sequence

import attrs


@attrs.frozen(kw_only=True)
class Row:
    """One part of a work, done by somebody.

    work: the subject. case: the sizes or the config. part: what of it was timed. who: `ours`, a peer, or another name
    that the subject explains. milliseconds: of one call; None where the row is no time. floor: the least milliseconds
    that the bytes and FLOPs of the part can take on this device, at the rates of a copy and of a dense product that
    were measured in the same run; None where there is none. rate, unit: the same figure per second (TFLOP/s, GB/s,
    tokens/s), or an amount (bytes). note: what differs, and what else was found.
    """

    work: str
    case: str
    part: str
    who: str
    milliseconds: float | None = None
    floor: float | None = None
    rate: float | None = None
    unit: str = ""
    note: str = ""

    @property
    def of_floor(self) -> float | None:
        """floor / milliseconds: 1 is as fast as can be."""
        return None if not self.floor or not self.milliseconds else self.floor / self.milliseconds


def to_json(row: Row) -> str:
    """One JSON object on one line, with every field."""
    return json.dumps(attrs.asdict(row))


def to_table(rows: Sequence[Row]) -> str:
    """A table for each case, rows in their order."""
    lines: list[str] = []
    cases = list(dict.fromkeys((row.work, row.case) for row in rows))
    for work, case in cases:
        cells = [_cells(row) for row in rows if (row.work, row.case) == (work, case)]
        widths = [max(len(cell[column]) for cell in cells) for column in range(5)]
        lines += [""] * bool(lines) + [f"{work} {case}"]
        for part, who, milliseconds, floor, rate, note in cells:
            left = f"  {part:{widths[0]}}  {who:{widths[1]}}"
            right = f"{milliseconds:>{widths[2]}}  {floor:>{widths[3]}}  {rate:>{widths[4]}}"
            lines.append(f"{left}  {right}  {note}".rstrip())
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, str, str, str, str, str]:
    share = row.of_floor
    return (
        row.part,
        row.who,
        "" if row.milliseconds is None else f"{row.milliseconds:,.3f} ms",
        "" if share is None else f"{share:.0%} of the floor",
        amount(row),
        row.note,
    )


def amount(row: Row) -> str:
    """The rate with its unit; a small TFLOP/s as GFLOP/s. Empty where there is none."""
    if row.rate is None:
        return ""
    if row.unit == "TFLOP/s" and row.rate < 1:
        return f"{number(1e3 * row.rate)} GFLOP/s"
    return f"{number(row.rate)} {row.unit}"


def number(value: float) -> str:
    """Whole from a thousand on, or four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
