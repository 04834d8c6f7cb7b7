"""Results as text: lines for who waits, and a table in plain characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mixtura.bench.chart import Points
from mixtura.bench.gpu.arithmetic import NAMES
from mixtura.bench.gpu.limits import Bandwidth, Peak
from mixtura.bench.gpu.results import LayerResult, Place
from mixtura.bench.gpu.rotation import Measure, Mode

COLUMNS = [(measure, mode) for measure in Measure for mode in Mode]


def place_summary(place: Place, bandwidth: Bandwidth, peak: Mapping[torch.dtype, Peak]) -> str:
    """Two lines: what the device is, and what its limits are."""
    device = place.device
    versions = ", ".join(f"{name} {version}" for name, version in place.versions.items() if version)
    peaks = ", ".join(
        f"{NAMES[dtype]} {found.rate / 1e12:.0f}{'' if found.note is None else ' (of bf16)'}"
        for dtype, found in peak.items()
    )
    return (
        f"{device['name']} ({device['capability']}, driver {device['driver'] or 'unknown'}); "
        f"{versions}; sources {place.sources}, commit {place.commit or 'unknown'}, "
        f"tuned blocks {place.tuned or 'none'}\n"
        f"copies {bandwidth.copy / 1e9:.0f} GB/s, reads {bandwidth.read / 1e9:.0f} GB/s; dense "
        f"products, TFLOP/s: {peaks}"
    )


def case_line(results: Sequence[LayerResult]) -> str:
    """A case as one line: each contender's best way through the layer."""
    first, said = results[0], []
    for name in dict.fromkeys(result.contender for result in results):
        timed = [
            result
            for result in results
            if result.contender == name and result.measure == Measure.LAYER and result.us
        ]
        best = min(timed, key=lambda result: result.us or 0.0, default=None)
        said.append(f"{name} -" if best is None else f"{name} {_time(best)} {best.mode}")
    return f"{first.shape}, {first.operands}, {first.routing}, T={first.T}: {'; '.join(said)}"


def results_table(results: Sequence[LayerResult]) -> str:
    """A line for each case and contender: microseconds a layer, and the share of the floor."""
    head = ["shape", "weights", "routing", "T", "contender", "floor us"]
    head += [f"{measure} {mode}" for measure, mode in COLUMNS]
    rows: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        case = (result.shape, result.operands, result.routing, str(result.T))
        key = (*case, result.contender)
        row = rows.setdefault(key, [*key, f"{result.floor_us:.1f}", *("-" for _ in COLUMNS)])
        row[6 + COLUMNS.index((Measure(result.measure), Mode(result.mode)))] = _time(result)
    lines = [head, *rows.values()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def notes(results: Sequence[LayerResult]) -> str:
    """Why times are missing, and what else must be known of them: a line for each."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for text in (result.refusal, result.note):
            if text is not None:
                case = f"{result.shape}, T={result.T}"
                found.setdefault((result.contender, text), []).append(case)
    return "\n".join(
        f"{name}: {text} ({cases[0] if len(set(cases)) == 1 else f'{len(set(cases))} cases'})"
        for (name, text), cases in found.items()
    )


def chart_lines(results: Sequence[LayerResult]) -> dict[tuple[str, str], Points]:
    """The layer's share of the floor in a graph: a panel for each shape, a line per contender."""
    found: dict[tuple[str, str], Points] = {}
    timed = [r for r in results if (r.measure, r.mode) == (Measure.LAYER, Mode.GRAPH)]
    kinds = {(result.operands, result.routing) for result in timed}
    for result in timed:
        if result.share_of_floor is not None and result.is_correct:
            several = f", {result.operands}, {result.routing}" if len(kinds) > 1 else ""
            line = found.setdefault((f"{result.shape}{several}", result.contender), [])
            line.append((result.T, result.share_of_floor, None))
    return {key: sorted(points) for key, points in found.items()}


def _time(of: LayerResult) -> str:
    if of.us is None or of.us_p10 is None or of.us_p90 is None:
        return "-"
    text = f"{of.us:.1f} ({of.us_p10:.1f}-{of.us_p90:.1f}) {of.share_of_floor:.2f}"
    if of.is_correct:
        return text
    alike = "" if of.rounded_error is None else f" ({of.rounded_error:.2g} with rows rounded alike)"
    return f"WRONG by {of.relative_error:.2g}{alike}: {text}"
