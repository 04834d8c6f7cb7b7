"""The heat map of expert load as a PNG file."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

from mixtura.errors import InputError, MissingDependency
from mixtura.observe.colour import TIMES, ColourScale, colour_at
from mixtura.observe.usage import ExpertUsage

DPI = 160
MIN_MAP, MAX_MAP, MAX_CELL, MIN_CELL = 880, 1840, 60, 3
"""Pixels: width of the map where possible, and of one cell."""
MIN_ROW, MAX_ROW, MAX_ROWS = 16, 52, 1180
"""Pixels: height of a row, and of all rows where possible."""
LEFT, RIGHT, ABOVE, BELOW, GAP = 130, 190, 150, 110, 36
"""Pixels around the map, and between experts and choices without arithmetic."""
LABEL_WIDTH = 13
"""Pixels of one character of a row's label."""
MIN_TICK_ROW, MIN_TICK_COLUMN = 22, 40
"""Pixels between two labels."""
INK, FAINT, NEVER, PAPER = "#1a1d24", "#626977", "#eceef2", "#ffffff"


def save_picture(usage: ExpertUsage, path: str | Path, *, title: str, subtitle: str = "") -> None:
    """Draw layers x experts, coloured by load relative to the layer's mean, as a PNG.

    Choices without arithmetic stand apart, to the right. A choice that no token made is pale grey.

    Args:
        usage: what to draw.
        path: of the file.
        title, subtitle: lines above the map; plain text.

    Raises:
        MissingDependency: matplotlib is not installed.
        InputError: there is no layer, or the file cannot be written.
    """
    if not usage.layers:
        raise InputError(
            "a picture must have a layer to show; got none. Capture some routing first."
        )
    figure = _Drawing(usage).draw(_line(title), _line(subtitle))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in another script
            figure.savefig(path, dpi=DPI, format="png", facecolor=PAPER)
    except OSError as error:
        raise InputError(
            f"the picture ({path}) must be writable; got {error}. Choose another path."
        ) from None


def _line(text: str) -> str:
    return " ".join(text.split())


def require_matplotlib() -> None:
    """Raise `MissingDependency` unless pictures can be drawn."""
    _matplotlib("matplotlib.figure")


def _matplotlib(module: str) -> Any:
    """A module of matplotlib."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"matplotlib (not installed) must be there to draw a picture; got: {error}. pip "
            f"install 'mixtura[plot]', or write the page (--html), which needs nothing."
        ) from None


class _Drawing:
    """The sizes of one picture, in pixels, and its parts."""

    def __init__(self, usage: ExpertUsage) -> None:
        self.usage = usage
        self.num_rows = len(usage.layers)
        columns = usage.num_experts + usage.num_no_compute
        widest = max(MAX_MAP // columns, MIN_CELL)
        self.cell = min(widest, max(MAX_CELL, MIN_MAP // columns))
        self.row = max(min(MAX_ROWS // self.num_rows, MAX_ROW), MIN_ROW)
        self.left = LEFT + LABEL_WIDTH * max(len(label) for label in usage.labels)
        gap = GAP if usage.num_no_compute else 0
        self.width = self.left + columns * self.cell + gap + RIGHT
        self.height = ABOVE + self.num_rows * self.row + BELOW
        self.scale = ColourScale.over(
            max(max(layer.relative_load, default=0.0) for layer in usage.layers)
        )
        steps = [colour_at(step / 32) for step in range(33)]
        colour_map = _matplotlib("matplotlib.colors").LinearSegmentedColormap.from_list("", steps)
        self.colour_map = colour_map.with_extremes(bad=NEVER)

    def draw(self, title: str, subtitle: str) -> Any:
        figure = _matplotlib("matplotlib.figure").Figure(
            figsize=(self.width / DPI, self.height / DPI), dpi=DPI
        )
        _matplotlib("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        usage = self.usage
        experts = self._panel(figure, self.left, 0, usage.num_experts)
        experts.set_xlabel("expert", color=INK, fontsize=9)
        experts.set_ylabel("layer", color=INK, fontsize=9)
        self._label_rows(experts)
        if usage.num_no_compute:
            start = self.left + usage.num_experts * self.cell + GAP
            apart = self._panel(figure, start, usage.num_experts, usage.num_no_compute)
            apart.set_yticks([])
            apart.set_xlabel("no-compute", color=INK, fontsize=9)
        self._scale_bar(figure)
        across = self.left / self.width
        text = {"ha": "left", "va": "baseline", "parse_math": False}
        figure.text(across, self._up(58), title, color=INK, fontsize=13, fontweight="bold", **text)
        figure.text(across, self._up(100), subtitle, color=FAINT, fontsize=9, **text)
        return figure

    def _up(self, pixels_from_top: float) -> float:
        return 1 - pixels_from_top / self.height

    def _box(self, x: float, y_from_top: float, width: float, height: float) -> list[float]:
        """A box in fractions of the figure, as matplotlib wants it."""
        bottom = self._up(y_from_top + height)
        return [x / self.width, bottom, width / self.width, height / self.height]

    def _panel(self, figure: Any, x: float, first: int, columns: int) -> Any:
        """The map of `columns` choices from `first` on, counted from the experts' own number."""
        axes = figure.add_axes(self._box(x, ABOVE, columns * self.cell, self.num_rows * self.row))
        nan = float("nan")
        rows = []
        for layer in self.usage.layers:
            offset = 0 if first == 0 else layer.num_experts
            size = layer.num_experts if first == 0 else len(layer.counts)
            loads = layer.relative_load[offset:size]
            places = [self.scale.position(load) if load else nan for load in loads]
            rows.append(places + [nan] * (columns - len(places)))
        has_lines = self.cell >= 9
        axes.pcolormesh(
            rows,
            cmap=self.colour_map,
            vmin=0,
            vmax=1,
            edgecolors=PAPER if has_lines else "none",
            linewidth=0.9 if has_lines else 0,
        )
        axes.invert_yaxis()
        axes.tick_params(length=0, colors=FAINT, labelsize=7.5, pad=4)
        for spine in axes.spines.values():
            spine.set_visible(False)
        step = _step(MIN_TICK_COLUMN / self.cell)
        ticks = range(0, columns, step)
        axes.set_xticks([tick + 0.5 for tick in ticks], [str(first + tick) for tick in ticks])
        return axes

    def _label_rows(self, axes: Any) -> None:
        step = _step(MIN_TICK_ROW / self.row)
        ticks = range(0, self.num_rows, step)
        axes.set_yticks([tick + 0.5 for tick in ticks], [self.usage.labels[t] for t in ticks])

    def _scale_bar(self, figure: Any) -> None:
        height = min(self.num_rows * self.row, 340)
        x = self.width - RIGHT + 40
        axes = figure.add_axes(self._box(x, ABOVE, 18, height))
        axes.imshow(
            [[i / 255] for i in range(256)],
            aspect="auto",
            origin="lower",
            cmap=self.colour_map,
            extent=(0, 1, 0, 1),
        )
        marks = self.scale.marks
        axes.set_xticks([])
        axes.set_yticks([self.scale.position(m) for m in marks], [f"{m:.2g}{TIMES}" for m in marks])
        axes.yaxis.tick_right()
        axes.tick_params(length=0, colors=FAINT, labelsize=7.5, pad=4)
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.text(
            x / self.width,
            self._up(ABOVE - 16),
            "load / mean",
            color=INK,
            fontsize=8,
            va="baseline",
        )
        swatch = figure.add_axes(self._box(x, ABOVE + height + 26, 18, 18))
        swatch.set_facecolor(NEVER)
        swatch.set_xticks([])
        swatch.set_yticks([])
        for spine in swatch.spines.values():
            spine.set_visible(False)
        place = (x + 28) / self.width
        figure.text(place, self._up(ABOVE + height + 41), "never used", color=FAINT, fontsize=7.5)


def _step(least: float) -> int:
    """The smallest of 1, 2, 4, 8, ... that is at least `least`."""
    step = 1
    while step < least:
        step *= 2
    return step
