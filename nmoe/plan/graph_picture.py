"""The model of a plan as a picture: FILE.svg for eyes, FILE.mmd (Mermaid) for documents.

A model of L layers has few distinct layers: global or local attention, a dense or a MoE feed-forward.
The picture shows the stack as a strip, one row for each layer, and beside it one card for each
distinct layer with its parts and sizes. It is a function of the plan: no time, host or font metrics.
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path

import attrs

from nmoe.errors import ConfigError, Diagnostic
from nmoe.plan.memory import size
from nmoe.plan.plan import Plan
from nmoe.plan.render import ascii_text, human
from nmoe.registry.attention import Attention, Gqa, Mla

INK, SOFT, LINE, PAPER = "#1d2733", "#5d6b7a", "#ccd5de", "#ffffff"
GLOBAL, LOCAL, DENSE, MOE, ENDS = "#3b6fb6", "#8fb8e8", "#9aa7b4", "#e08e3c", "#eef2f6"
CARD_WIDTH, CARD_HEIGHT, GAP = 560, 220, 22
LEFT, TOP = 40, 132


@attrs.frozen
class LayerType:
    """One distinct layer: what its attention and its feed-forward are. layers: the indexes that are so."""

    letter: str
    attention: Attention
    attention_kind: str
    window: int | None
    dense: bool
    layers: tuple[int, ...]
    parameters: int

    @property
    def attention_title(self) -> str:
        reach = "global" if self.window is None else f"window {self.window}"
        return f"{self.attention_kind} attention, {reach}"


def layer_types(plan: Plan) -> tuple[LayerType, ...]:
    """The distinct layers in the order in which they first occur."""
    model = plan.config.model
    sizes: dict[int, int] = {}
    for parameter in model.parameters():
        head, _, rest = parameter.name.partition(".")
        if head == "layers":
            layer = int(rest.partition(".")[0])
            sizes[layer] = sizes.get(layer, 0) + size(parameter.shape)
    found: dict[tuple[bool, int | None, bool], list[int]] = {}
    for layer in range(model.num_layers):
        local = model.attention_of(layer) is not model.attention
        found.setdefault((local, model.window_of(layer), layer < model.num_dense_layers), []).append(layer)
    types = []
    for number, ((_, window, dense), layers) in enumerate(found.items()):
        attention = model.attention_of(layers[0])
        kind = "MLA" if isinstance(attention, Mla) else "GQA"
        types.append(LayerType("ABCDEFGH"[number], attention, kind, window, dense, tuple(layers), sizes[layers[0]]))
    return tuple(types)


def draw(plan: Plan, path: Path) -> None:
    """Write the picture; the name's ending says which kind. Raises ConfigError for another ending."""
    if path.suffix not in (".svg", ".mmd"):
        message, way = f"cannot draw into `{path}`", "let the name end in .svg or .mmd"
        raise ConfigError(Diagnostic(code="N0121", message=message, place="--graph", help=way))
    text = svg(plan) if path.suffix == ".svg" else mermaid(plan)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            Diagnostic(code="N0121", message=f"cannot write `{path}`: {reason}", place="--graph", help="check the path")
        ) from error


def attention_lines(spec: Attention) -> list[str]:
    """The sizes of an attention, for a card."""
    stretched = [f"positions x {spec.rope_scaling.factor:g} (YaRN)"] if spec.rope_scaling else []
    if isinstance(spec, Mla):
        queries = f"queries through {spec.q_lora_rank}" if spec.q_lora_rank else "queries from x"
        return [
            f"{spec.num_heads} heads, {queries}",
            f"keys and values through {spec.kv_lora_rank}",
            f"{spec.qk_nope_head_dim} + {spec.qk_rope_head_dim} rotary, values {spec.v_head_dim}",
            *stretched,
        ]
    assert isinstance(spec, Gqa)
    return [f"{spec.num_heads} query heads of {spec.head_dim}", f"{spec.num_kv_heads} key and value heads", *stretched]


def mermaid(plan: Plan) -> str:
    """A flow chart: runs of equal layers between the embedding and the head."""
    model = plan.config.model
    kind_of = {layer: t for t in layer_types(plan) for layer in t.layers}
    lines = ["flowchart TD", f'  embedding["embedding {model.vocab_size} x {model.hidden_size}"]']
    previous, start = "embedding", 0
    while start < model.num_layers:
        stop = start
        while stop + 1 < model.num_layers and kind_of[stop + 1] is kind_of[start]:
            stop += 1
        called = f"layer {start}" if stop == start else f"layers {start} to {stop}"
        shared = f" + {model.moe.num_shared_experts} shared" if model.moe and not kind_of[start].dense else ""
        title = f"{called}<br/>{kind_of[start].attention_title}<br/>{_ffn_title(plan, kind_of[start])}{shared}"
        lines += [f'  layer{start}["{title}"]', f"  {previous} --> layer{start}"]
        previous, start = f"layer{start}", stop + 1
    head = "the table as head" if model.tie_embeddings else f"head {model.vocab_size} x {model.hidden_size}"
    lines += [
        f'  head["norm and {head}"]', f"  {previous} --> head", '  loss(["cross-entropy"])', "  head --> loss",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _ffn_title(plan: Plan, layer: LayerType) -> str:
    model = plan.config.model
    if layer.dense or model.moe is None:
        return f"dense SwiGLU {model.mlp.intermediate_size if model.mlp else ''}"
    moe = model.moe
    return f"MoE: {moe.router.top_k} of {moe.router.num_experts} experts"


def text(
    x: float, y: float, words: str, *, big: float = 13, ink: str = INK, bold: bool = False, end: str = "start"
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" font-size="{big:g}" fill="{ink}" text-anchor="{end}"{weight}'
    return f"<text {place}>{escape(words)}</text>"


def box(x: float, y: float, w: float, h: float, fill: str, *, edge: str = "none", corner: float = 6) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{corner:g}" fill="{fill}" stroke="{edge}"/>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return stroke(f"M{x:g} {y:g} L{to_x:g} {to_y:g}", tip=True)


def stroke(path: str, *, tip: bool = False) -> str:
    marker = ' marker-end="url(#tip)"' if tip else ""
    return f'<path d="{path}" stroke="{SOFT}" stroke-width="1.4" fill="none"{marker}/>'


def svg(plan: Plan) -> str:
    """The picture, 940 wide and as high as its strip or its cards need."""
    types = layer_types(plan)
    rows_high = max(len(types) * (CARD_HEIGHT + GAP) - GAP, 320)
    height = TOP + rows_high + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 {height}" width="940" height="{height}" '
        'font-family="Inter, Helvetica, Arial, sans-serif">',
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{SOFT}"/></marker></defs>',
        box(0, 0, 940, height, PAPER, corner=0),
        *_title(plan),
        *_strip(plan, types, rows_high),
    ]
    for number, layer in enumerate(types):
        parts += _card(plan, layer, LEFT + 300, TOP + number * (CARD_HEIGHT + GAP))
    return "\n".join([*parts, "</svg>", ""])


def _title(plan: Plan) -> Iterator[str]:
    share = plan.parameters_active / plan.parameters_total
    yield text(LEFT, 52, ascii_text(plan.name.removesuffix(".toml")), big=28, bold=True)
    active = f"{human(plan.parameters_active)} ({share:.0%}) active for a token"
    work = human(plan.flops_per_token).replace("B", "G")
    said = f"{human(plan.parameters_total)} parameters, {active}, {work}FLOP a token in training"
    yield text(LEFT, 80, said, big=14, ink=SOFT)
    yield text(LEFT, 102, f"fingerprint {plan.fingerprint[:16]}", big=12, ink=SOFT)


def _strip(plan: Plan, types: tuple[LayerType, ...], high: float) -> Iterator[str]:
    """Embedding, every layer as two cells (attention, feed-forward), head."""
    model = plan.config.model
    letters = {layer: t for t in types for layer in t.layers}
    end_high = 40.0
    row = min(34.0, (high - 2 * end_high - 28) / model.num_layers)
    wide, x, y = 200, LEFT, float(TOP)
    yield box(x, y, wide, end_high, ENDS, edge=LINE)
    yield text(x + wide / 2, y + 25, f"embedding {model.vocab_size:,} x {model.hidden_size:,}", end="middle")
    y += end_high + 14
    yield arrow(x + wide / 2, y - 13, x + wide / 2, y - 2)
    for layer in range(model.num_layers):
        kind = letters[layer]
        gap = 3 if row > 9 else 1
        yield box(x, y, 98, row - gap, GLOBAL if kind.window is None else LOCAL, corner=min(4, row / 4))
        yield box(x + 102, y, 98, row - gap, DENSE if kind.dense else MOE, corner=min(4, row / 4))
        every = 1 if row >= 12 else 10
        if layer % every == 0 or layer == model.num_layers - 1:
            yield text(x - 8, y + row / 2 + 2.5, str(layer), big=10, ink=SOFT, end="end")
            yield text(x + wide + 8, y + row / 2 + 2.5, kind.letter, big=11, ink=SOFT, bold=True)
        y += row
    y += 14
    yield arrow(x + wide / 2, y - 15, x + wide / 2, y - 2)
    yield box(x, y, wide, end_high, ENDS, edge=LINE)
    head = "the table as head" if model.tie_embeddings else f"head {model.hidden_size:,} x {model.vocab_size:,}"
    yield text(x + wide / 2, y + 25, f"norm, {head}", end="middle")


def _card(plan: Plan, layer: LayerType, x: float, y: float) -> Iterator[str]:
    """One distinct layer: attention on the left, feed-forward on the right, both added to the stream."""
    count = len(layer.layers)
    yield box(x, y, CARD_WIDTH, CARD_HEIGHT, "#fbfcfd", edge=LINE, corner=10)
    yield text(x + 18, y + 30, layer.letter, big=18, bold=True)
    yield text(x + 42, y + 29, f"{count} layer{'s' if count > 1 else ''}", big=14)
    yield text(x + CARD_WIDTH - 18, y + 29, f"{human(layer.parameters)} parameters each", big=12, ink=SOFT, end="end")
    top, high = y + 48, CARD_HEIGHT - 90
    left, right, wide = x + 18, x + 290, 252
    color = GLOBAL if layer.window is None else LOCAL
    yield box(left, top, wide, high, PAPER, edge=color)
    yield box(left, top, 6, high, color, corner=3)
    yield text(left + 20, top + 24, layer.attention_title, big=14, bold=True)
    for number, words in enumerate(attention_lines(layer.attention)):
        yield text(left + 20, top + 48 + 21 * number, words, big=12, ink=SOFT)
    stream = y + CARD_HEIGHT - 20
    yield arrow(x + 18, stream, x + CARD_WIDTH - 18, stream)
    for at in (left + wide / 2, right + wide / 2):
        yield stroke(f"M{at - 60:g} {stream:g} V{top + high + 2:g}", tip=True)
        yield stroke(f"M{at + 60:g} {top + high:g} V{stream - 9:g}")
        yield f'<circle cx="{at + 60:g}" cy="{stream:g}" r="8" fill="{PAPER}" stroke="{SOFT}" stroke-width="1.4"/>'
        yield text(at + 60, stream + 4.5, "+", ink=SOFT, end="middle")
        yield text(at - 66, stream - 6, "norm", big=10, ink=SOFT, end="end")
    yield from _feed_forward(plan, layer, right, top, wide, high)


def _feed_forward(plan: Plan, layer: LayerType, x: float, y: float, wide: float, high: float) -> Iterator[str]:
    model = plan.config.model
    color = DENSE if layer.dense else MOE
    yield box(x, y, wide, high, PAPER, edge=color)
    yield box(x, y, 6, high, color, corner=3)
    yield text(x + 20, y + 24, _ffn_title(plan, layer), big=14, bold=True)
    if layer.dense or model.moe is None:
        wide_to = model.mlp.intermediate_size if model.mlp else 0
        yield text(x + 20, y + 48, f"{model.hidden_size:,} to {wide_to:,} and back", big=12, ink=SOFT)
        return
    moe = model.moe
    kind = plan.tree["model"]["moe"]
    shared = f", {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
    precision, width = kind["experts"]["kind"], moe.experts.intermediate_size
    said = f"{kind['router']['kind']}{shared}, {precision}, width {width:,}"
    yield text(x + 20, y + 46, said, big=12, ink=SOFT)
    yield from _experts(
        moe.router.num_experts, moe.router.top_k, moe.num_shared_experts, x + 20, y + 58, wide - 36, high - 68
    )


def _experts(count: int, chosen: int, shared: int, x: float, y: float, wide: float, high: float) -> Iterator[str]:
    """A square for each expert (at most 512), those that one token might use filled; shared ones before them."""
    drawn = min(count, 512)
    ahead = min(shared, 4)
    cells = drawn + ahead
    side = min(16.0, high)
    while side > 2 and int(wide // side) * int(high // side) < cells + (1 if ahead else 0):
        side -= 0.5
    columns = max(int(wide // side), 1)
    # A spread that looks like a router's choice: multiples of the golden ratio.
    picked = {int(drawn * ((0.35 + 0.618034 * k) % 1)) for k in range(min(chosen, drawn))}
    extra = (k for k in range(drawn) if k not in picked)
    while len(picked) < min(chosen, drawn):
        picked.add(next(extra))
    for cell in range(cells):
        place = cell if cell < ahead else cell + (1 if ahead else 0)
        fill = INK if cell < ahead else MOE if cell - ahead in picked else "#f6e3cf"
        at_x, at_y = x + place % columns * side, y + place // columns * side
        yield box(at_x, at_y, side * 0.82, side * 0.82, fill, corner=side * 0.15)
