"""The picture of a simulation: how even ranks were, step by step, and what was moved."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from mixtura.eplb.simulation import EVERY_POLICY, OFF, Replay, Simulation
from mixtura.errors import InputError, MissingDependency

DPI = 150
SIZE = (9.6, 5.6)
"""Inches."""
INK, FAINT = "#1a1d24", "#c9ccd3"
COLOURS = ("#2f6fbb", "#d1622b", "#3a8f4d", "#8a4fa3", "#b8860b", "#c2336b", "#1f8f8f")
"""One for each policy, whichever are shown."""
DASHES = ("-", "--", "-.", ":")
"""Policies that plan alike lie on each other; dashes let the lower ones through."""


def require_matplotlib() -> None:
    """Raise `MissingDependency` unless pictures can be drawn."""
    _matplotlib("figure")


def save_chart(simulation: Simulation, path: str | Path, *, title: str) -> None:
    """Draw balancedness over steps, a line for each policy, and below it the bytes moved so far.

    Args:
        path: of the PNG file.
        title: which routing it is; plain text.

    Raises:
        MissingDependency: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    figure = _matplotlib("figure").Figure(figsize=SIZE, layout="constrained")
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    most = max((int(replay.moved_bytes.sum()) for replay in simulation.replays), default=0)
    unit, divisor = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    _draw(upper, simulation.off, "--", INK, lw=1.6)
    for replay in simulation.replays:
        number = EVERY_POLICY.index(replay.policy)
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        _draw(upper, replay, dash, colour, lw=1.3)
        moved = np.cumsum(replay.moved_bytes) / divisor
        if moved[-1] > 0:
            lower.step(range(len(moved)), moved, dash, where="post", color=colour, lw=1.3)
    _finish(upper, "balancedness")
    _finish(lower, f"{unit} moved")
    upper.axhline(1.0, color=FAINT, lw=1, zorder=0)
    lower.set_ylim(bottom=0)
    lower.set_xlabel("step", color=INK, fontsize=9)
    lower.set_xlim(0, max(simulation.num_steps - 1, 1))
    lower.xaxis.get_major_locator().set_params(integer=True)
    config = simulation.config
    subtitle = (
        f"{config.num_ranks} ranks, {simulation.num_experts} experts and {config.num_redundant} "
        f"redundant slots a layer, {simulation.num_layers} layers; a plan every "
        f"{config.eplb.interval} steps"
    )
    upper.set_title(subtitle, color=INK, fontsize=9, loc="left")
    figure.suptitle(
        f"Balancing simulated: {' '.join(title.split())}",
        color=INK,
        fontsize=12,
        x=0.01,
        ha="left",
        parse_math=False,
    )
    legend = figure.legend(
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        title="policy, mean",
        title_fontsize=9,
        alignment="left",
    )
    for line in legend.get_lines():
        line.set_linewidth(2)
    try:
        figure.savefig(path, dpi=DPI, format="png", facecolor="#ffffff")
    except OSError as error:
        raise InputError(
            f"the chart ({path}) must be writable; got {error.strerror}. Choose another path."
        ) from None


def _draw(axes: Any, replay: Replay, dash: str, colour: str, *, lw: float) -> None:
    name = "no balancing" if replay.policy == OFF else replay.policy
    label = f"{name}  {replay.balancedness.mean():.3f}"
    over = 2.5 if dash == "-" else 3.0
    axes.plot(replay.balancedness, dash, color=colour, label=label, lw=lw, zorder=over)


def _finish(axes: Any, label: str) -> None:
    axes.set_ylabel(label, color=INK, fontsize=9)
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
