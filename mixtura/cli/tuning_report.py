"""What `mixtura tune` shows: how a sweep goes, what it would measure, and what it found."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mixtura.kernels.triton.candidates import Case
    from mixtura.kernels.triton.device import Device
    from mixtura.kernels.triton.table import Blocks
    from mixtura.kernels.triton.trials import Trial
    from mixtura.kernels.triton.tune import Outcome

SHOWN_REASONS = 3
"""Reasons for which candidates failed that are told of a case; of others the number is."""

WIDTH = 200
"""Columns of the table where it does not go to a terminal."""


class Report:
    """Says on stderr how a sweep goes: a bar on a terminal, and a line for each case."""

    def __init__(self, cases: Sequence[Case], num_candidates: Sequence[int]) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._console = console
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("candidates", total=sum(num_candidates))
        self._bar.start()
        self._ends = [sum(num_candidates[: n + 1]) for n in range(len(cases))]
        self._num_done = 0

    def tried(self, case: Case, blocks: Blocks, trial: Trial) -> None:
        """A candidate was measured."""
        self._bar.update(self._task, advance=1, description=_label(case))

    def done(self, outcome: Outcome) -> None:
        """A case is done."""
        self._num_done += 1
        self._bar.update(self._task, completed=self._ends[self._num_done - 1])
        self.say(f"{self._num_done}/{len(self._ends)}  {outcome_line(outcome)}")

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, markup=False)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


@contextmanager
def progress(cases: Sequence[Case], device: Device) -> Iterator[Report]:
    """A report of these cases."""
    from mixtura.kernels.triton.candidates import candidates

    report = Report(cases, [len(candidates(case.key, device)) for case in cases])
    try:
        yield report
    finally:
        report.close()


def _label(case: Case) -> str:
    tile = "unsorted" if case.tile_rows == 1 else f"tiles of {case.tile_rows}"
    return f"{case.product.value}, {tile}"


def outcome_line(outcome: Outcome) -> str:
    """A case in one line."""
    line = (
        f"{_label(outcome.case)}: {outcome.num_measured} of {outcome.num_candidates} candidates, "
        f"{outcome.verdict.value}"
    )
    if outcome.timed is not None:
        line += f", best {outcome.timed.ratio:.3f} of the table's time"
    return line if outcome.note is None else f"{line}: {outcome.note}"


def show_outcomes(
    name: str, outcomes: Sequence[Outcome], device: Device, path: Path, *, as_json: bool
) -> None:
    """What was found, as a table or as JSON on stdout; failures go to stderr."""
    from mixtura.kernels.triton.device import triton_version
    from mixtura.kernels.triton.tune import Verdict

    for outcome in outcomes:
        for line in failure_lines(outcome):
            print(line, file=sys.stderr)
    if as_json:
        data = {
            "model": name,
            "device": device.name,
            "triton": triton_version(),
            "file": str(path),
            "outcomes": [as_data(outcome) for outcome in outcomes],
        }
        typer.echo(json.dumps(data, indent=2))
        return
    if not outcomes:
        return
    headers = ("experts", "product", "tile rows", "rows", "table, µs", "best, µs", "ratio", "", "")
    print_table(headers, [_row(outcome) for outcome in outcomes])
    num_kept = sum(outcome.verdict is Verdict.KEPT for outcome in outcomes)
    print(f"{num_kept} of {len(outcomes)} kept in {path}" if num_kept else "nothing new is kept")


def failure_lines(outcome: Outcome) -> list[str]:
    """Why candidates of a case were passed over, the most frequent reasons first."""
    reasons = Counter(reason for _, reason in outcome.failures)
    lines = [
        f"{_label(outcome.case)}: {count} passed over: {reason}"
        for reason, count in reasons.most_common(SHOWN_REASONS)
    ]
    if len(reasons) > SHOWN_REASONS:
        lines.append(f"{_label(outcome.case)}: {len(reasons) - SHOWN_REASONS} other reasons")
    return lines


def _row(outcome: Outcome) -> tuple[str, ...]:
    timed = outcome.timed
    blocks = "" if outcome.blocks is None else in_words(outcome.blocks)
    times = ("", "", "")
    if timed is not None:
        times = (_times(timed.shipped), _times(timed.tried), f"{timed.ratio:.3f}")
    return (*_case_columns(outcome.case), *times, outcome.verdict.value, blocks)


def _case_columns(case: Case) -> tuple[str, ...]:
    config, quantization = case.shape.config, case.shape.quantization
    experts = f"{config.num_experts} of {config.hidden_size} x {config.intermediate_size}"
    if quantization is not None:
        experts += f", {quantization}"
    rows = ", ".join(f"{number:,}" for number in case.rows)
    return experts, case.product.value, str(case.tile_rows), rows


def _times(seconds: Sequence[float]) -> str:
    return ", ".join(f"{one * 1e6:.1f}" for one in seconds)


def in_words(blocks: Blocks) -> str:
    """Blocks as a table shows them."""
    words = [f"{blocks.columns} x {blocks.depth}, {blocks.num_warps} warps"]
    words.append(f"{blocks.num_stages} stages")
    words += ["descriptors"] * blocks.uses_descriptors
    words += ["persistent"] * blocks.is_persistent
    words += [f"tails of {blocks.tail_rows}"] * (blocks.tail_rows > 0)
    return ", ".join(words)


def as_data(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON has it; times are µs."""
    from mixtura.kernels.triton.tuned import key_data

    timed, blocks = outcome.timed, outcome.blocks
    return {
        **key_data(outcome.case.key),
        "top_k": outcome.case.shape.top_k,
        "rows": list(outcome.case.rows),
        "verdict": outcome.verdict.value,
        "shipped_us": None if timed is None else [one * 1e6 for one in timed.shipped],
        "best_us": None if timed is None else [one * 1e6 for one in timed.tried],
        "ratio": None if timed is None else timed.ratio,
        "blocks": None if blocks is None else asdict(blocks),
        "num_measured": outcome.num_measured,
        "num_candidates": outcome.num_candidates,
        "failures": [{"blocks": asdict(one), "reason": why} for one, why in outcome.failures],
        "note": outcome.note,
    }


def show_plan(cases: Sequence[Case], device: Device, *, as_json: bool) -> None:
    """What would be measured on a device."""
    from mixtura.kernels.triton.candidates import candidates
    from mixtura.kernels.triton.table import blocks_for
    from mixtura.kernels.triton.tuned import key_data

    if as_json:
        plan = [
            {
                **key_data(case.key),
                "top_k": case.shape.top_k,
                "rows": list(case.rows),
                "shipped": asdict(blocks_for(case.key, device)),
                "candidates": [asdict(blocks) for blocks in candidates(case.key, device)],
            }
            for case in cases
        ]
        typer.echo(json.dumps({"device": device.name, "cases": plan}, indent=2))
        return
    print(f"on {device.name}")
    headers = ("experts", "product", "tile rows", "rows", "candidates", "the table's blocks")
    rows = [
        (
            *_case_columns(case),
            str(len(candidates(case.key, device))),
            in_words(blocks_for(case.key, device)),
        )
        for case in cases
    ]
    print_table(headers, rows)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
