"""A picture of how near the floor each case comes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtura.bench.results import CaseResult, ContenderResult
from mixtura.errors import InputError, MissingDependency

DPI = 150
PANEL = (4.2, 3.4)
"""Inches of one panel."""
LEAST_WIDTH = 6.4
"""Inches of the figure, so that its title and legend have room."""
LEGEND_ENTRY = 1.3
"""Inches of one entry."""
MOST_COLUMNS = 3
INK, FAINT = "#1a1d24", "#c9ccd3"
COLOURS = ("#2f6fbb", "#d1622b", "#3a8f4d", "#8a4fa3", "#b8860b", "#4b5563", "#c2336b", "#1f8f8f")
"""One for each weight format, in the order in which they come."""


Points = list[tuple[int, float, float | None]]
"""Tokens, a fraction of the floor, and the best peer's where that is drawn beside it."""


def require_matplotlib() -> None:
    """Raise `MissingDependency` unless charts can be drawn."""
    _matplotlib("figure")


def check_writable(path: Path) -> None:
    """Find a directory that is not there before time is spent.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.open("ab").close()
    except OSError as error:
        raise InputError(
            f"the chart ({path}) must be writable; got {error.strerror}. Choose another path."
        ) from None


def save_chart(results: Sequence[CaseResult], path: str | Path) -> None:
    """Draw fraction of the floor against T: a panel for each shape, a line for each weight format.

    Several of our kernels get a line each. The best peer's line is thin and dashed.

    Args:
        results: at least one; those that were not run are left out.
        path: of the PNG file.

    Raises:
        MissingDependency: matplotlib is not installed.
        InputError: nothing was measured, or the file cannot be written.
    """
    draw_lines(_lines(results), path, "Experts of one layer: fraction of the machine's floor")


def draw_lines(lines: dict[tuple[str, str], Points], path: str | Path, title: str) -> None:
    """Draw lines, by panel and label, into a PNG file.

    Raises: as `save_chart` does.
    """
    if not lines:
        raise InputError("a chart must have a case to show; got none. Measure one first.")
    shapes = list(dict.fromkeys(shape for shape, _ in lines))
    labels = list(dict.fromkeys(label for _, label in lines))
    columns = min(MOST_COLUMNS, len(shapes))
    rows = -(-len(shapes) // columns)
    width = max(LEAST_WIDTH, PANEL[0] * columns)
    figure = _matplotlib("figure").Figure(
        figsize=(width, PANEL[1] * rows + 0.7), layout="constrained"
    )
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    for number, shape in enumerate(shapes):
        axes = figure.add_subplot(rows, columns, number + 1)
        for label in labels:
            if (shape, label) in lines:
                _draw(axes, lines[shape, label], label, COLOURS[labels.index(label) % len(COLOURS)])
        _finish(axes, shape, lines)
    handles = {
        text: handle
        for axes in figure.axes
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=min(len(handles), int(width / LEGEND_ENTRY)),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title, color=INK, fontsize=12)
    try:
        figure.savefig(path, dpi=DPI, format="png", facecolor="#ffffff")
    except OSError as error:
        raise InputError(
            f"the chart ({path}) must be writable; got {error.strerror}. Choose another path."
        ) from None


def _lines(results: Sequence[CaseResult]) -> dict[tuple[str, str], Points]:
    """Points by shape and label; kernels are named where there are several."""
    several = len({c.kernel for result in results for c in result.subjects}) > 1
    found: dict[tuple[str, str], Points] = {}
    for result in results:
        for subject in result.subjects:
            fraction = result.fraction_of_floor(subject)
            if fraction is None:
                continue
            weights = result.case.weights.value
            label = f"{weights}, {subject.kernel}" if several else weights
            points = found.setdefault((result.case.shape.name, label), [])
            points.append((result.case.num_tokens, fraction, _best(result, subject)))
    return {key: sorted(points) for key, points in found.items()}


def _best(result: CaseResult, subject: ContenderResult) -> float | None:
    best = result.best_peer
    return None if best is None or not subject.is_ours else result.fraction_of_floor(best)


def _draw(axes: Any, points: Points, label: str, colour: str) -> None:
    tokens = [point[0] for point in points]
    axes.plot(tokens, [point[1] for point in points], "o-", color=colour, label=label, ms=4)
    peers = [(count, best) for count, _, best in points if best is not None]
    if peers:
        axes.plot(*zip(*peers, strict=True), "--", color=colour, lw=0.9, alpha=0.7)


def _finish(axes: Any, shape: str, lines: dict[tuple[str, str], Points]) -> None:
    here = [point for (name, _), points in lines.items() if name == shape for point in points]
    tokens = sorted({point[0] for point in here})
    if any(point[2] is not None for point in here):
        axes.plot([], [], "--", color=INK, lw=0.9, label="best peer")
    axes.set_title(shape, color=INK, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens", color=INK, fontsize=9)
    axes.set_ylabel("floor / time", color=INK, fontsize=9)
    highest = max(max(point[1], point[2] or 0.0) for point in here)
    axes.set_ylim(0, max(1.05, 1.05 * highest))
    axes.axhline(1.0, color=FAINT, lw=1, zorder=0)
    axes.grid(axis="y", color=FAINT, lw=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _matplotlib(module: str) -> Any:
    """A module of matplotlib."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise MissingDependency(
            f"matplotlib (not installed) must be there to draw a chart; got: {error}. pip install "
            f"'mixtura[plot]', or leave --png out."
        ) from None
