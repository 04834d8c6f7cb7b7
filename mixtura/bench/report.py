"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mixtura.bench.generation import GenerationResult
from mixtura.bench.machine import Machine
from mixtura.bench.parts import Part
from mixtura.bench.results import CaseResult, ContenderResult

UNSTEADY = 0.1
"""Bandwidth probes before and after a case that differ by more than this are marked with ~."""


def machine_summary(machine: Machine) -> str:
    """Two lines: what the machine is, and what its limits are."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in machine.peak.items())
    peaks = f"; peak GFLOP/s: {rates}" if rates else ""
    return (
        f"{machine.cpu}, {machine.num_cores} cores, {machine.num_threads} threads; mixtura "
        f"{machine.mixtura}, torch {machine.torch}, transformers {machine.transformers}\n"
        f"reads {machine.bandwidth / 1e9:.1f} GB/s (one thread "
        f"{machine.bandwidth_one_thread / 1e9:.1f}){peaks} (probes: {machine.probes})"
    )


def results_table(results: Sequence[CaseResult]) -> Table:
    """One line per case: the floor, ours beside it, and the peers' times."""
    peers = [c.name for result in results for c in result.contenders if c not in result.subjects]
    names = list(dict.fromkeys(peers))
    table = Table(title="Experts of one layer: median ms (minimum-maximum)")
    heads = ("shape", "weights", "T", "kernel", "ms", "GB/s", "GFLOP/s", "of floor", "floor ms")
    for head in (*heads, "to best peer", *names):
        table.add_column(
            head, justify="left" if head in ("shape", "weights", "kernel") else "right"
        )
    for result in results:
        for subject in result.subjects:
            table.add_row(*_row(result, subject, names))
    return table


def refusal_notes(results: Sequence[CaseResult]) -> str:
    """Why contenders have no time, a line for each and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for contender in result.contenders:
            if contender.refusal is not None:
                reason = (contender.name, contender.refusal)
                found.setdefault(reason, []).append(str(result.case))
    return "\n".join(
        f"{name} was not run on {cases[0] if len(cases) == 1 else f'{len(cases)} cases'}: {reason}"
        for (name, reason), cases in found.items()
    )


def case_line(result: CaseResult) -> str:
    """A case as one line, for who waits."""
    said = []
    for subject in result.subjects:
        fraction = result.fraction_of_floor(subject)
        share = "" if fraction is None else f", {fraction:.2f} of the floor"
        said.append(f"{subject.kernel} {_time(subject)}{share}")
    return f"{result.case}: {'; '.join(said)}"


def generation_summary(result: GenerationResult) -> str:
    """A few lines: how fast, and how near what memory gives."""
    formats = [f"experts {result.weights}"] if result.weights else []
    formats += [f"linear layers {result.linears}"] if result.linears else []
    kernels = ", ".join(f"{name} ({count})" for name, count in result.kernels.items())
    timed = result.timed
    lines = [
        f"{result.model}: {', '.join(formats) or 'weights as stored'}; kernel {kernels}",
        f"prompt   {timed.prompt_rate:.1f} tokens/s ({timed.num_prompt_tokens} tokens)",
        f"decode   {timed.decode_rate:.1f} tokens/s ({min(timed.decode_rates):.1f}-"
        f"{max(timed.decode_rates):.1f}, {timed.num_new_tokens} tokens)",
        f"weights  {result.active_bytes / 1e9:.3g} GB a token = {result.fraction_of_bandwidth:.2f} "
        f"of {timed.bandwidth / 1e9:.1f} GB/s",
    ]
    if not timed.is_valid:
        faults = max(run.major_faults for run in timed.runs)
        lines.append(
            f"REJECTED: up to {faults} pages a run came from the disk. End other programs, or take "
            f"narrower weights, and run again."
        )
    return "\n".join(lines)


def parts_table(result: GenerationResult) -> Table:
    """Where the time goes, in milliseconds per token and in percent."""
    table = Table(title="Where the time goes, in a run with hooks: ms per token (share)")
    table.add_column("part")
    table.add_column("prompt", justify="right")
    table.add_column("decode", justify="right")
    phases = (
        (result.prompt_parts, result.timed.num_prompt_tokens),
        (result.decode_parts, result.timed.num_new_tokens - 1),
    )
    for part in Part:
        cells = []
        for seconds, count in phases:
            share = seconds[part] / sum(seconds.values())
            cells.append(f"{seconds[part] / count * 1e3:.3g} ({share:.0%})")
        if any(seconds[part] for seconds, _ in phases):
            table.add_row(part.value, *cells)
    totals = [f"{sum(seconds.values()) / count * 1e3:.3g}" for seconds, count in phases]
    table.add_row("all", *totals)
    return table


def _row(result: CaseResult, subject: ContenderResult, peers: Sequence[str]) -> list[str]:
    floor, case = result.floor, result.case
    fraction, ratio = result.fraction_of_floor(subject), result.ratio_to_best_peer(subject)
    rates = ["", ""]
    if subject.timing is not None:
        amounts = (floor.weight_bytes, floor.flops)
        rates = [f"{amount / subject.timing.median / 1e9:.3g}" for amount in amounts]
    drift = abs(floor.bandwidth_after - floor.bandwidth_before) / floor.bandwidth
    steady = "~" if drift > UNSTEADY else ""
    return [
        case.shape.name,
        subject.weights,
        str(case.num_tokens),
        subject.kernel,
        _time(subject),
        *rates,
        "" if fraction is None else f"{fraction:.2f}",
        f"{steady}{floor.seconds * 1e3:.3g} {floor.limited_by}",
        "" if ratio is None else f"{ratio:.2f}",
        *(_time(c) if c else "" for c in (_find(result, name) for name in peers)),
    ]


def _find(result: CaseResult, name: str) -> ContenderResult | None:
    return next((c for c in result.contenders if c.name == name), None)


def _time(of: ContenderResult) -> str:
    timing = of.timing
    if timing is None:
        return "-"
    times = (timing.median, timing.minimum, timing.maximum)
    median, least, most = (f"{seconds * 1e3:.3g}" for seconds in times)
    text = f"{median} ({least}-{most})"
    return text if of.is_correct else f"WRONG by {of.relative_error:.2g}: {text}"
