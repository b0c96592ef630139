"""Rows as a picture: a bar for each, grouped by case and part, drawn as SVG without any library.

A group has a scale of its own, since the parts of a work differ by orders of magnitude: its longest bar fills the
width. The floor is a line through the group's bars.
"""

from collections.abc import Sequence
from itertools import groupby
from xml.sax.saxutils import escape

from nmoe.bench.rows import Row, amount, number

NAMES, BARS, VALUES, MARGIN = 190, 460, 250, 16
BAR, GAP, HEAD, TITLE = 18, 6, 24, 40
OURS, PEER, FLOOR = "#2166ac", "#b8c4d0", "#b2182b"


def to_svg(rows: Sequence[Row], title: str) -> str:
    """An SVG document of all rows that have a figure."""
    width, y, body = MARGIN * 2 + NAMES + BARS + VALUES, TITLE, []
    for (case, part), found in groupby((row for row in rows if _length(row) is not None), lambda r: (r.case, r.part)):
        group = list(found)
        y += HEAD
        body.append(_text(MARGIN, y - 7, f"{case}: {part}", weight="bold"))
        longest = max([length for row in group if (length := _length(row))] or [1.0])
        for row in group:
            length = BARS * (_length(row) or 0.0) / longest
            middle = y + BAR - 5
            body.append(_text(MARGIN + NAMES - 8, middle, row.who, anchor="end"))
            body.append(
                f'<rect x="{MARGIN + NAMES}" y="{y}" width="{length:.1f}" height="{BAR}" '
                f'fill="{OURS if row.who == "ours" else PEER}"/>'
            )
            if row.floor and row.milliseconds:
                x = MARGIN + NAMES + BARS * row.floor / longest
                body.append(
                    f'<line x1="{x:.1f}" y1="{y - 2}" x2="{x:.1f}" y2="{y + BAR + 2}" stroke="{FLOOR}" '
                    f'stroke-width="2"/>'
                )
            body.append(_text(MARGIN + NAMES + int(length) + 8, middle, _label(row)))
            y += BAR + GAP
        y += GAP
    legend = f'<tspan fill="{OURS}">ours</tspan>, others, <tspan fill="{FLOOR}">the floor</tspan>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + MARGIN}" '
        f'viewBox="0 0 {width} {y + MARGIN}" font-family="sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{MARGIN}" y="26" font-size="16" font-weight="bold">{escape(title)}</text>\n'
        f'<text x="{width - MARGIN}" y="26" text-anchor="end">{legend}</text>'
    )
    return "\n".join([head, *body, "</svg>", ""])


def _length(row: Row) -> float | None:
    """Shorter is better where the row is a time; an amount otherwise."""
    return row.rate if row.milliseconds is None else row.milliseconds


def _label(row: Row) -> str:
    figures = [] if row.milliseconds is None else [f"{number(row.milliseconds)} ms"]
    return ", ".join(filter(None, [*figures, amount(row)]))


def _text(x: int, y: int, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
