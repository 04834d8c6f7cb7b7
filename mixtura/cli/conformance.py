"""`mixtura conformance`: whether a plug-in, or what is built in, keeps its contract."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mixtura.cli.options import Debug
from mixtura.entry_points import Group

if TYPE_CHECKING:
    from rich.console import Console

    from mixtura.conformance import Report

STYLES = {"passed": "green", "failed": "bold red", "refused": "yellow", "not claimed": "dim"}


def conformance(
    name: Annotated[str, typer.Argument(help="A plug-in, or a built-in of that name.")],
    group: Annotated[
        Group | None,
        typer.Option(
            help="kernels, codecs, routers, policies or families. Default: the one that has the "
            "name.",
            metavar="GROUP",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where kernels, routers and families run: cpu, cuda, cuda:1.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")] = False,
    debug: Debug = False,
) -> None:
    """Try every promise of a plug-in's contract; exit with 1 where one is not kept."""
    from mixtura.conformance import group_of, run_suite
    from mixtura.hf.load import parse_device

    found = group_of(name) if group is None else group
    report = run_suite(name, found, device=str(parse_device(device)))
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        from rich.console import Console

        print_report(Console(highlight=False), report)
    if report.failed:
        raise typer.Exit(1)


def print_report(console: Console, report: Report) -> None:
    """A line for each check, what was refused and what went wrong, and the sum of it."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{escape(report.name)}[/bold] of {report.group.value}, {report.origin}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("check", style="bold")
    table.add_column("outcome", no_wrap=True)
    table.add_column("cases", justify="right")
    table.add_column("refused", justify="right")
    table.add_column("which, and why", overflow="fold")
    for check in report.checks:
        outcome = f"[{STYLES[check.outcome.value]}]{check.outcome.value}[/]"
        refused = str(check.num_refused or "")
        detail = escape(check.detail or "")
        table.add_row(check.name, outcome, str(check.num_cases), refused, detail)
    console.print(table)
    count = len(report.failed)
    failed = f"{count} of {len(report.checks)} checks failed"
    console.print(failed if count else "the contract is kept")
