"""`mixtura quantize`: a dense checkpoint becomes a quantized one, on disk."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtura.cli.loading import quiet
from mixtura.cli.options import Debug, Model, model_or_demo
from mixtura.errors import InputError

if TYPE_CHECKING:
    from mixtura.hf.quantize_plan import QuantizePlan
    from mixtura.hf.quantize_report import LayerReport, Progress

GB = 1_000_000_000
SHOWN_STARVED = 8
"""Starved experts that are named for each layer; of others the number is told."""


class MethodName(StrEnum):
    """What `--method` can be."""

    NEAREST = "nearest"
    SEARCH = "search"


def quantize(
    scheme: Annotated[
        str,
        typer.Option(
            help="Weight format: int4, int8, fp8, fp8-block, mxfp4, nvfp4, ...", metavar="FORMAT"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write, new or empty.", metavar="DIR")],
    model: Model = None,
    linears: Annotated[
        bool, typer.Option("--linears", help="Quantize attention projections, too.")
    ] = False,
    method: Annotated[
        MethodName,
        typer.Option(help="Round to nearest, or search the scale that loses least."),
    ] = MethodName.NEAREST,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text whose activations weigh the errors of a search.", metavar="FILE"),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval", help="Text to measure bits per byte on, before and after.", metavar="FILE"
        ),
    ] = None,
    shard_gb: Annotated[float, typer.Option(help="GB of an output file at most.")] = 5.0,
    debug: Debug = False,
) -> None:
    """Quantize a checkpoint on disk.

    It goes through memory a matrix at a time. An interrupted run goes on when it is started again.
    """
    name = model_or_demo(model)
    out = out.expanduser()
    if not 0 < shard_gb < float("inf"):
        raise InputError(
            f"--shard-gb ({shard_gb:g}) must be a positive number; got another. Use 5."
        )
    calibration_text = None if calibration is None else read_text(calibration)
    evaluation_text = None if evaluation is None else read_text(evaluation)
    with quiet(debug):
        from mixtura.hf.activation_moments import Calibration
        from mixtura.hf.load import load_tokenizer
        from mixtura.hf.quantize_checkpoint import (
            Method,
            QuantizeOptions,
            dense_directory,
            quantize_checkpoint,
        )
        from mixtura.hf.quantize_work import work_path
        from mixtura.quant.formats import WeightFormat

        options = QuantizeOptions(
            format=WeightFormat.parse(scheme),
            method=Method(method.value),
            packs_linears=linears,
            shard_bytes=max(1, round(shard_gb * GB)),
            calibration=None if calibration_text is None else Calibration(calibration_text),
        )
        directory = dense_directory(name)
        if evaluation_text is not None:
            load_tokenizer(directory)  # what is wrong with it is told before the work
        try:
            quantize_checkpoint(directory, out, options, progress_on_terminal())
        except KeyboardInterrupt:
            print(
                f"interrupted: finished files are kept in {work_path(out)}. Run the same command "
                f"again to go on.",
                file=sys.stderr,
            )
            raise
        print(f"written to {out}")
        if evaluation_text is not None:
            print_bits("before", directory, evaluation_text)
            print_bits("after", out, evaluation_text)


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        InputError: it cannot be read, or is no text.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are no UTF-8"
        raise InputError(
            f"the text ({path}) must be a readable UTF-8 file; got {reason}. Check the path."
        ) from None
    if not text.strip():
        raise InputError(f"the text ({path}) must hold words; got none. Give some text.")
    return text


def progress_on_terminal() -> Progress:
    """Says on standard output what is planned and done."""
    from mixtura.hf.quantize_report import Progress

    def calibrated(path: str) -> None:
        print(f"calibration: {path}", file=sys.stderr)

    return Progress(print_plan, calibrated, print_layer)


def print_plan(plan: QuantizePlan, num_files: int, num_kept: int) -> None:
    """Every rule with what it means for how many tensors, then the files."""
    quantized = plan.quantized
    for rule, (before, after) in plan.num_bytes.items():
        became = plan.output.format.value if rule in quantized else "as it is"
        sizes = (
            f"{megabytes(before)} -> {megabytes(after)}" if before != after else megabytes(after)
        )
        print(f"{rule.value:<22} {plan.num_tensors[rule]:>7,} tensors  {became:<12}  {sizes}")
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    kept = f", {num_kept} of them kept from an earlier run" if num_kept else ""
    print(f"{num_files:,} {'file' if num_files == 1 else 'files'}{kept}")


def print_layer(report: LayerReport) -> None:
    """One line on a module that is done."""
    line = (
        f"{report.module}  {report.num_matrices} matrices  error {report.error:.5f}, "
        f"of one at most {report.worst:.5f}"
    )
    tokens = report.tokens_per_expert
    if tokens is not None:
        line += f"  tokens per expert {min(tokens):,} to {max(tokens):,}"
    if report.starved:
        from mixtura.hf.activation_moments import STARVED

        named = ", ".join(map(str, report.starved[:SHOWN_STARVED]))
        more = len(report.starved) - SHOWN_STARVED
        line += (
            f"  fewer than {STARVED} tokens, searched with all columns alike: {named}"
            f"{f' and {more} more' if more > 0 else ''}"
        )
    print(line, flush=True)


def megabytes(num_bytes: int) -> str:
    """A size to read."""
    return f"{num_bytes / 1e6:,.1f} MB"


def print_bits(when: str, directory: Path, text: str) -> None:
    """Bits per byte of a text under a model, which runs a layer at a time."""
    from mixtura.bench.perplexity import evaluate
    from mixtura.hf.load import load_tokenizer
    from mixtura.hf.streamed import stream_checkpoint
    from mixtura.hf.trace import window_size

    streamed = stream_checkpoint(directory)
    model = streamed.model
    found = evaluate(model, load_tokenizer(directory), [text], window_size(model), streamed.run)
    print(f"{when:<6}  {found.bits_per_byte:.4f} bits per byte, {found.num_tokens:,} tokens")
