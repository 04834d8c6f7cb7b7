"""Prints a `WeightLedger`: a table of layers, what became of the tensors, what does not fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mixtura.cli.explain import size

if TYPE_CHECKING:
    from rich.console import Console

    from mixtura.hf.ledger import LayerLedger, ProjectionLedger, WeightLedger

NUM_SHOWN = 4
"""Names that are shown where there may be thousands."""
WIDTH = 120
"""Columns of the table where there is no terminal to ask."""


def as_data(model: str, ledger: WeightLedger) -> dict[str, Any]:
    """The ledger as JSON has it: numbers are bytes."""
    return {
        "model": model,
        **asdict(ledger),
        "packed_share": ledger.packed_share,
        "warnings": ledger.warnings(),
    }


def print_ledger(model: str, ledger: WeightLedger) -> None:
    """Print everything that a reader wants to know before trusting a checkpoint."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    total = sum(entry.num_bytes for entry in ledger.entries)
    console.print(
        f"[bold]{escape(model)}[/bold]: {escape(ledger.family)}, {len(ledger.entries):,} tensors, "
        f"{size(total)}, every one accounted for"
    )
    _print_layers(console, ledger)
    _print_uses(console, ledger)
    print(f"{ledger.packed_share:.1%} of the experts' bytes are packed")
    for line in _findings(ledger):
        print(line)


def _print_layers(console: Console, ledger: WeightLedger) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("experts of")
    table.add_column("projection")
    table.add_column("stored as", overflow="fold")
    for column in ("bytes", "packed", "zero scales"):
        table.add_column(column, justify="right")
    for layer in ledger.layers:
        for number, projection in enumerate(layer.projections):
            packed = projection.packed_bytes / max(projection.num_bytes, 1)
            table.add_row(
                escape(layer.name) if number == 0 else "",
                escape(projection.name),
                escape(_formats(layer, projection)),
                size(projection.num_bytes),
                f"{packed:.0%}",
                "" if not projection.packed_bytes else f"{projection.zero_scales or 0:,}",
            )
    console.print(table)


def _formats(layer: LayerLedger, projection: ProjectionLedger) -> str:
    """The one format, or each with its experts."""
    if not projection.is_mixed:
        return next(iter(projection.formats), "nothing")
    return "; ".join(
        f"{label} ({len(experts)} of {layer.num_experts}: {_some(list(map(str, experts)))})"
        for label, experts in projection.formats.items()
    )


def _print_uses(console: Console, ledger: WeightLedger) -> None:
    from rich import box
    from rich.table import Table

    counts = Counter((entry.use, entry.rule) for entry in ledger.entries)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tensors", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("become")
    for (use, rule), count in counts.items():
        entries = [e for e in ledger.entries if (e.use, e.rule) == (use, rule)]
        words = use.value if rule is None else f"{use.value}: {rule}"
        table.add_row(f"{count:,}", size(sum(e.num_bytes for e in entries)), words)
    console.print(table)


def _findings(ledger: WeightLedger) -> list[str]:
    """What does not fit, or runs otherwise than the files ask for; a line each."""
    found = [f"warning: {message}" for message in ledger.warnings()]
    for layer in ledger.layers:
        found += [
            f"warning: experts of {layer.name} ({p.name}) are stored in {len(p.formats)} ways: "
            f"all of them are made dense"
            for p in layer.projections
            if p.is_mixed
        ]
    others = [name for name in ledger.not_packed if "expert" not in name]
    if others:
        found.append(f"note: the configuration would have packed {_some(others)}")
    asked = dict.fromkeys(filter(None, (ledger.asked(layer.name) for layer in ledger.layers)))
    if asked:
        found.append(
            f"note: the files ask for {'; '.join(asked)} activations; stored scales of int8 and "
            f"e4m3 are used, others run as the kernel has them, as they come or with scales that "
            f"it finds while running: see mixtura explain"
        )
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NUM_SHOWN])
    return shown if len(names) <= NUM_SHOWN else f"{shown} and {len(names) - NUM_SHOWN} others"
