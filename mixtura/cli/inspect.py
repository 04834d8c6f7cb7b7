"""`mixtura inspect`: which experts a text visits, as a table, a picture and a page.

With `--ledger` instead: what the files of a checkpoint hold, and what becomes of each tensor.
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.cli.balance import balance_ranks, print_balance
from mixtura.cli.ledger import as_data, print_ledger
from mixtura.cli.loading import DtypeName, LoadOptions, load, quiet
from mixtura.cli.options import Debug, Device, Kernel, Model, Weights, model_or_demo
from mixtura.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from mixtura.hf.trace import EncodedText
    from mixtura.observe import ExpertUsage, RoutingTrace

STDIN = "-"
SAMPLE = "layer.py"
"""The text that is read without --text: the source of mixtura's own layer."""
MAX_TOKENS = 4096
NUM_TOP = 3
"""Experts that the table names for each layer."""
WIDTH = 96
"""Columns of the table where there is no terminal to ask."""


def inspect(
    model: Model = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="File to read; - reads standard input. Default: the source of mixtura's layer.",
            metavar="FILE",
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the load as a picture.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to look around in.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Keep every choice in a safetensors file.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = MAX_TOKENS,
    ep: Annotated[
        int | None,
        typer.Option(min=1, help="Spread the experts over so many ranks: the load of each."),
    ] = None,
    redundant: Annotated[
        int | None,
        typer.Option(min=0, help="--ep: slots of a layer beyond one for each expert. Default: 0."),
    ] = None,
    device: Device = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="Dtype of the weights; auto is the checkpoint's.")
    ] = DtypeName.AUTO,
    weights: Weights = None,
    kernel: Kernel = None,
    ledger: Annotated[
        bool,
        typer.Option(
            "--ledger", help="Read and check the files instead: what becomes of every tensor."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --ledger, print JSON, for a program.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Count and draw which experts a text visits.

    With --ledger nothing is run: the checkpoint's files are read once, and every tensor is named
    or counted.
    """
    if ledger:
        inspect_files(model, as_json=as_json, debug=debug)
        return
    if as_json:
        raise typer.TyperException("--json goes with --ledger. Give both.")
    if redundant is not None and ep is None:
        raise typer.TyperException("--redundant goes with --ep. Give both.")
    source, name = read_text(text)
    for target in (png, html, trace):
        check_target(target)
    with quiet(debug):
        from mixtura.hf.trace import encode_text, window_size
        from mixtura.observe import ExpertUsage, PageText, render_page, save_picture
        from mixtura.observe.picture import require_matplotlib

        if png is not None:
            require_matplotlib()
    loaded, tokenizer = load(
        LoadOptions(
            model=model, device=device, dtype=dtype, weights=weights, kernel=kernel, debug=debug
        )
    )
    with quiet(debug):
        encoded = encode_text(tokenizer, source, max_tokens=max_tokens)
        found = run(loaded, encoded)
    usage = ExpertUsage.from_trace(found)
    shown = model if model is not None else "the model in the box"
    balance = None if ep is None else balance_ranks(shown, found, usage, ep, redundant or 0)
    console = table_console()
    print_usage(console, usage, (shown, name), encoded)
    if balance is not None:
        print_balance(console, balance)
    window = window_size(loaded)
    note = f"Run in windows of {window:,} tokens." if len(encoded.ids) > window else ""
    if png is not None:
        tokens = f"{len(encoded.ids):,} tokens of {name}"
        save_picture(usage, png, title=f"Expert load, {shown}", subtitle=tokens)
        print(f"picture  {png}")
    if html is not None:
        page = render_page(found, model=shown, text=PageText(name, encoded.pieces, note))
        write_page(html, page)
        print(f"page     {html}")
    if trace is not None:
        found.save(trace)
        print(f"trace    {trace}")


def inspect_files(model: str | None, *, as_json: bool, debug: bool) -> None:
    """Read and check the files of a checkpoint, and print its ledger."""
    name = model_or_demo(model)
    with quiet(debug):
        from mixtura.hf.audit import read_ledger

        found = read_ledger(name)
    shown = name if model is not None else "the model in the box"
    if as_json:
        typer.echo(json.dumps(as_data(shown, found), indent=2))
    else:
        print_ledger(shown, found)


def read_text(text: str | None) -> tuple[str, str]:
    """The text that `--text` names, and its name.

    Raises:
        InputError: there is none, it is empty, or it is not UTF-8.
    """
    if text is None:
        return files("mixtura").joinpath(SAMPLE).read_text("utf-8"), f"mixtura/{SAMPLE}"
    name = "standard input" if text == STDIN else text
    try:
        raw = sys.stdin.buffer.read() if text == STDIN else Path(text).read_bytes()
        found = raw.decode("utf-8")
    except OSError as error:
        raise InputError(
            f"the text ({name}) must be a readable file; got {error.strerror}. Check the path."
        ) from None
    except UnicodeDecodeError:
        raise InputError(
            f"the text ({name}) must be UTF-8; got other bytes. Convert it first."
        ) from None
    if not found:
        raise InputError(f"the text ({name}) must not be empty. Give some text.")
    return found, name


def check_target(path: Path | None) -> None:
    """Raise `InputError` where a file cannot be written later: before the model runs, not after."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(
            f"the output ({path}) must be a file in a directory that exists; got neither. Choose "
            f"another path."
        )


def run(model: Any, encoded: EncodedText) -> RoutingTrace:
    """Trace the text, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from mixtura.hf.trace import trace_text

    console = Console(stderr=True)
    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bar:
        task = bar.add_task("tokens", total=len(encoded.ids))
        return trace_text(model, encoded.ids, on_tokens=lambda n: bar.advance(task, n))


def table_console() -> Console:
    """Where tables go: as wide as the terminal, or `WIDTH` where there is none."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def print_usage(
    console: Console, usage: ExpertUsage, names: tuple[str, str], encoded: EncodedText
) -> None:
    """Print the names of model and text, the table of layers and the sum of slots."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    model, text = names
    console.print(f"[bold]{escape(model)}[/bold] on {escape(text)}")
    if encoded.num_left_out:
        console.print(
            f"the first {len(encoded.ids):,} tokens; --max-tokens takes more of the "
            f"{encoded.num_left_out:,} that follow",
            style="dim",
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer")
    for column in ("entropy", "of highest", "max / mean", "never used"):
        table.add_column(column, justify="right")
    table.add_column("busiest experts", no_wrap=True)
    for label, layer in zip(usage.labels, usage.layers, strict=True):
        busiest = "  ".join(f"{e} ({layer.share[e]:.1%})" for e in layer.top(NUM_TOP))
        table.add_row(
            escape(label),
            f"{layer.entropy_bits:.2f} bits",
            f"{layer.normalized_entropy:.1%}",
            f"{layer.max_over_mean:.2f}",
            f"{len(layer.never_used)} of {len(layer.counts)}",
            busiest if layer.num_slots else "no token came here",
        )
    console.print(table)
    console.print(sum_of_slots(usage, len(encoded.ids)))


def sum_of_slots(usage: ExpertUsage, num_tokens: int) -> str:
    """ "tokens x top-k x layers = slots", and which layers saw another number of tokens."""
    sizes = {(layer.num_tokens, layer.top_k) for layer in usage.layers}
    counted = sum(sum(layer.counts) for layer in usage.layers)
    if sizes == {(num_tokens, next(iter(sizes))[1])}:
        top_k = next(iter(sizes))[1]
        assert counted == num_tokens * top_k * len(usage.layers)
        return (
            f"{num_tokens:,} tokens x {top_k} experts x {len(usage.layers)} layers = "
            f"{counted:,} slots"
        )
    others = [
        f"{label} ({layer.num_tokens:,})"
        for label, layer in zip(usage.labels, usage.layers, strict=True)
        if layer.num_tokens != num_tokens
    ]
    said = f"; another number of tokens came to {', '.join(others)}" if others else ""
    return f"{num_tokens:,} tokens, {counted:,} slots in {len(usage.layers)} layers{said}"


def write_page(path: Path, page: str) -> None:
    """Write the page.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the page ({path}) must be writable; got {error.strerror}. Choose another path."
        ) from None
