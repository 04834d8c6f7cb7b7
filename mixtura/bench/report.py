"""Results as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.table import Table

from mixtura.bench.experts import Result
from mixtura.bench.machine import Machine


def machine_summary(machine: Machine) -> str:
    """Two lines: what the machine is, and what its limits are."""
    peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in machine.peak_flops.items())
    return (
        f"{machine.cpu}, {machine.num_cores} cores, {machine.num_threads} threads; "
        f"torch {machine.torch}, transformers {machine.transformers}\n"
        f"reads {machine.bandwidth / 1e9:.1f} GB/s (one thread "
        f"{machine.bandwidth_one_thread / 1e9:.1f}); peak GFLOP/s: {peaks}"
    )


def results_table(results: Sequence[Result]) -> Table:
    """One line per case: the limit, and each contender's median, share of the limit and spread."""
    names = list(dict.fromkeys(result.contender for result in results))
    table = Table(title="Experts of one layer: median ms, fraction of the limit (minimum-maximum)")
    for column in ("shape", "dtype", "tokens", "limit ms", *names, "ours / best other"):
        table.add_column(column, justify="right" if column == "tokens" else "left")
    for (shape, dtype, tokens), group in groupby(
        results, key=lambda r: (r.shape, r.dtype, r.num_tokens)
    ):
        case = {result.contender: result for result in group}
        first = next(iter(case.values()))
        limit = f"{first.limit_seconds * 1e3:.3g} {first.limited_by}"
        cells = [_cell(case[name]) if name in case else "" for name in names]
        table.add_row(shape, dtype, str(tokens), limit, *cells, _ratio(list(case.values())))
    return table


def _cell(result: Result) -> str:
    timing = result.timing
    if timing is None:
        return result.refusal or "not run"
    text = (
        f"{timing.median * 1e3:.3g}, {result.fraction_of_limit:.0%} "
        f"({timing.minimum * 1e3:.3g}-{timing.maximum * 1e3:.3g})"
    )
    return text if result.is_correct else f"WRONG by {result.relative_error:.2g}: {text}"


def _ratio(results: list[Result]) -> str:
    def best(is_ours: bool) -> float | None:
        medians = [r.timing.median for r in results if r.timing and r.is_ours is is_ours]
        return min(medians, default=None)

    ours, others = best(True), best(False)
    return f"{ours / others:.2f}" if ours and others else ""
