"""A page of expert usage: one HTML file that loads nothing, readable without its script."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mixtura.errors import InputError
from mixtura.observe.colour import ON_DARK, TIMES, ColourScale, colour_at
from mixtura.observe.trace import RoutingTrace
from mixtura.observe.usage import ExpertUsage, LayerUsage

NUM_LEVELS = 24
"""Colours of the map; their differences are just visible side by side."""

MAX_TOKENS_SHOWN, MAX_IDS_SHOWN = 4096, 400_000
"""Of the text: what a browser lays out at once, and about half a megabyte of ids."""

HINT = "Point at a cell for its numbers{}; click to keep it."
HINT_TEXT = " and, in the text below, its tokens"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
ROW_HEIGHTS = ((12, 34), (32, 22), (10_000, 14))
"""Pixels of a row while there are at most so many."""
MIN_COLUMN = 2
"""Pixels; a narrower screen scrolls."""
MAX_LABELS = 16
"""Of columns: what fits beneath the map."""
GAP_PART = 40
"""Experts without arithmetic stand apart by one column for so many."""


@dataclass(frozen=True, slots=True)
class PageText:
    """The text that was run.

    Attributes:
        name: where it comes from.
        pieces: the tokens' own parts of it, in order; empty where they are not known.
        note: how it was run.
    """

    name: str
    pieces: tuple[str, ...] = ()
    note: str = ""


def render_page(trace: RoutingTrace, *, model: str, text: PageText) -> str:
    """HTML that shows a trace: numbers, a map of load, a table, and the text.

    Args:
        trace: what the routers chose.
        model: the model's name.
        text: what was run; each layer with as many tokens as it has pieces shows them.

    Raises:
        InputError: the trace has no layer.
    """
    usage = ExpertUsage.from_trace(trace)
    if not usage.layers:
        raise InputError("a page must have a layer to show; got none. Capture some routing first.")
    title = escape(f"Expert usage · {_line(model)}")
    drawn = _Map(usage)
    shown = _num_shown(trace, text)
    hint = HINT.format(HINT_TEXT if shown else "")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{_asset('page.css')}{drawn.colours()}</style></head><body><main>",
        f"<h1>{escape(_line(model))}</h1>",
        f'<p class="faint source">Which experts it visits on {escape(_line(text.name))}</p>',
        _facts(usage),
        "<h2>Load</h2>",
        '<p class="faint">Slots that each expert received, relative to the mean of its layer.</p>',
        drawn.html(),
        f'<p id="readout" class="faint" role="status">{hint}</p>',
        _text(text, shown),
        "<h2>Layers</h2>",
        '<p class="faint">Entropy of the choice: 100&nbsp;% is all experts alike. '
        "Max / mean: the busiest expert's load.</p>",
        _table(usage),
        "<footer>Written by <code>mixtura inspect</code>. One file, nothing is loaded from "
        "anywhere.</footer></main>",
        '<script type="application/json" id="data">',
        f"{_data(trace, usage, drawn, text, shown)}</script>",
        f"<script>{_asset('page.js')}</script></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _line(text: str) -> str:
    return " ".join(text.split())


def _facts(usage: ExpertUsage) -> str:
    facts = {
        "tokens": _numbers(layer.num_tokens for layer in usage.layers),
        "layers": f"{len(usage.layers):,}",
        "experts": _numbers(layer.num_experts for layer in usage.layers),
        "no-compute": _numbers(len(u.counts) - u.num_experts for u in usage.layers),
        "top-k": _numbers(layer.top_k for layer in usage.layers),
        "slots": f"{usage.num_slots:,}",
    }
    if not usage.num_no_compute:
        del facts["no-compute"]
    cards = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{cards}</dl>'


def _numbers(values: Iterable[int]) -> str:
    """One number, or the range of several."""
    found = set(values)
    low, high = min(found), max(found)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


class _Map:
    """The map of load as SVG: a path for each colour, in a box of one unit per cell."""

    def __init__(self, usage: ExpertUsage) -> None:
        self.usage = usage
        self.scale = ColourScale.over(
            max(max(layer.relative_load, default=0.0) for layer in usage.layers)
        )
        experts, no_compute = usage.num_experts, usage.num_no_compute
        gap = max(1, (experts + no_compute) // GAP_PART) if no_compute else 0
        self.apart = experts + gap
        self.columns = experts + gap + no_compute
        rows = len(usage.layers)
        self.row_height = next(height for most, height in ROW_HEIGHTS if rows <= most)

    def column(self, layer: LayerUsage, expert: int) -> int:
        """Where a choice stands."""
        return expert if expert < layer.num_experts else self.apart + expert - layer.num_experts

    def colours(self) -> str:
        """Style rules of the levels, for light and dark paper."""
        positions = [level / (NUM_LEVELS - 1) for level in range(NUM_LEVELS)]

        def rules(colours: Iterable[str]) -> str:
            return "".join(
                f".k{level}{{fill:{colour};background:{colour}}}"
                for level, colour in enumerate(colours)
            )

        light = rules(colour_at(p) for p in positions)
        dark = rules(colour_at(p, on=ON_DARK) for p in positions)
        width = f":root{{--map:{self.columns * MIN_COLUMN}px}}"
        return f"{width}\n{light}\n@media (prefers-color-scheme: dark) {{{dark}}}\n"

    def level(self, load: float) -> str:
        """The style of a cell."""
        return f"k{round(self.scale.position(load) * (NUM_LEVELS - 1))}" if load else "never"

    def html(self) -> str:
        """Labels, map and legend."""
        labels = "".join(f"<span>{escape(label)}</span>" for label in self.usage.labels)
        height = self.row_height * len(self.usage.layers)
        width = self.columns * MIN_COLUMN
        return (
            f'<div class="map"><div class="rows" style="height:{height}px" '
            f'aria-label="layer">{labels}</div><div class="scroll">'
            f'<div class="cells" style="min-width:{width}px">{self._svg(height)}'
            f'<div class="columns">{self._column_labels()}</div></div></div></div>{self._legend()}'
        )

    def _svg(self, height: int) -> str:
        paths: dict[str, list[str]] = {}
        is_wide = self.columns > 96
        side = 1 if is_wide else 0.96
        for row, layer in enumerate(self.usage.layers):
            for expert, load in enumerate(layer.relative_load):
                x = self.column(layer, expert)
                paths.setdefault(self.level(load), []).append(f"M{x} {row}h{side}v.94h-{side}z")
        drawn = "".join(f'<path class="{name}" d="{"".join(d)}"/>' for name, d in paths.items())
        rows = len(self.usage.layers)
        return (
            f'<svg id="heat" viewBox="0 0 {self.columns} {rows}" height="{height}" '
            f'preserveAspectRatio="none" role="img" aria-label="Load of {self.usage.num_experts} '
            f'experts in {rows} layers; the table below sums it up.">{drawn}'
            f'<path id="chosen"/><path id="here"/></svg>'
        )

    def _column_labels(self) -> str:
        usage = self.usage
        step = 1
        while (usage.num_experts + usage.num_no_compute) / step > MAX_LABELS:
            step *= 2
        spans = [
            (offset + place + 0.5, str(first + place), "")
            for first, offset, count in (
                (0, 0, usage.num_experts),
                (usage.num_experts, self.apart, usage.num_no_compute),
            )
            for place in range(0, count, step)
        ]
        spans.append((usage.num_experts / 2, "expert", ' class="title"'))
        if usage.num_no_compute:
            middle = self.apart + usage.num_no_compute / 2
            spans.append((middle, "no-compute", ' class="title"'))
        return "".join(
            f'<span{style} style="left:{100 * x / self.columns:.3f}%">{label}</span>'
            for x, label, style in spans
        )

    def _legend(self) -> str:
        width = 100 / NUM_LEVELS
        steps = "".join(
            f'<i class="k{level}" style="left:{level * width:.3f}%;width:{width + 0.1:.3f}%"></i>'
            for level in range(NUM_LEVELS)
        )
        marks = "".join(
            f'<span style="left:{100 * self.scale.position(mark):.2f}%">{mark:.2g}{TIMES}</span>'
            for mark in self.scale.marks
        )
        return (
            f'<div class="legend"><span>load / mean</span><div class="scale">{steps}{marks}</div>'
            f'<span><b class="never"></b>never used</span></div>'
        )


def _table(usage: ExpertUsage) -> str:
    has_tokens = len({layer.num_tokens for layer in usage.layers}) > 1
    head = ["layer", "tokens", "entropy, bits", "of highest", "max / mean", "never used", "busiest"]
    styles = ["", "", "", "", "", "", ' class="left"']
    rows = []
    for label, layer in zip(usage.labels, usage.layers, strict=True):
        part = 100 * layer.normalized_entropy
        busiest = ", ".join(
            f"{e} ({100 * layer.share[e]:.1f}&nbsp;%)" for e in layer.top(4) if layer.counts[e]
        )
        rows.append(
            [
                escape(label),
                f"{layer.num_tokens:,}",
                f"{layer.entropy_bits:.2f}",
                f'{part:.1f}&nbsp;%<span class="even"><i style="width:{part:.1f}%"></i></span>',
                f"{layer.max_over_mean:.2f}",
                f"{len(layer.never_used):,}",
                busiest,
            ]
        )
    kept = [i for i in range(len(head)) if has_tokens or head[i] != "tokens"]
    header = "".join(f"<th{styles[i]}>{head[i]}</th>" for i in kept)
    body = "".join(
        "<tr>" + "".join(f"<td{styles[i]}>{row[i]}</td>" for i in kept) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _num_shown(trace: RoutingTrace, text: PageText) -> int:
    """Tokens of the text that the page shows."""
    ids_per_token = sum(layer.top_k for layer in trace.layers.values())
    return min(len(text.pieces), MAX_TOKENS_SHOWN, MAX_IDS_SHOWN // max(ids_per_token, 1))


def _text(text: PageText, num_shown: int) -> str:
    if not num_shown:
        return f'<p class="faint">{escape(text.note)}</p>' if text.note else ""
    total = len(text.pieces)
    said = (
        f"All {total:,} tokens."
        if num_shown == total
        else f"The first {num_shown:,} of {total:,} tokens; the numbers above are of all."
    )
    spans = "".join(f"<span>{escape(piece)}</span>" for piece in text.pieces[:num_shown])
    return (
        f'<h2>Text</h2><p class="faint">{said} {escape(text.note)} Point at a token to see its '
        f'experts in the map.</p><div id="text">{spans}</div>'
    )


def _data(trace: RoutingTrace, usage: ExpertUsage, drawn: _Map, text: PageText, shown: int) -> str:
    """What the script reads, as JSON that cannot end its element."""
    layers: list[dict[str, Any]] = []
    for label, layer, counted in zip(
        usage.labels, trace.layers.values(), usage.layers, strict=True
    ):
        ids = layer.ids[: shown if layer.num_tokens == len(text.pieces) else 0]
        layers.append(
            {
                "label": label,
                "experts": layer.num_experts,
                "top_k": layer.top_k,
                "counts": counted.counts,
                "width": ids.element_size(),
                "ids": base64.b64encode(ids.contiguous().numpy().tobytes()).decode(),
            }
        )
    value = {"columns": drawn.columns, "apart": drawn.apart, "layers": layers}
    text_of_it = json.dumps(value, separators=(",", ":"))
    return text_of_it.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
