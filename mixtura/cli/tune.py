"""`mixtura tune`: which blocks the kernels of a model's experts are fastest with on this GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtura.cli.inspect import check_target
from mixtura.cli.loading import quiet
from mixtura.cli.options import Debug, Model, model_or_demo
from mixtura.cli.tuning_report import progress, show_outcomes, show_plan
from mixtura.errors import InputError

if TYPE_CHECKING:
    from mixtura.kernels.triton.candidates import Case
    from mixtura.kernels.triton.device import Device
    from mixtura.kernels.triton.journal import Journal
    from mixtura.kernels.triton.tune import Outcome

DEFAULT_MINUTES = 30.0


class TunedDtype(StrEnum):
    """What `--dtype` can be."""

    BF16 = "bf16"
    FP16 = "fp16"


def tune(
    model: Model = None,
    dtype: Annotated[
        TunedDtype | None,
        typer.Option(help="Of rows and dense weights. Default: the checkpoint's, else bf16."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Tune for dense experts that are kept in this format: int4, fp8-block, mxfp4, ... "
            "Default: as they are stored.",
            metavar="FORMAT",
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Time to spend.")] = DEFAULT_MINUTES,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Numbers of tokens in a batch to measure at, with commas. Default: the fewest and "
            "the most that call for each kernel."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write what wins here, where no kernel looks. Default: the user's cache.",
            metavar="FILE",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what was measured on this GPU before.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured; needs no GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")] = False,
    debug: Debug = False,
) -> None:
    """Look for faster blocks for a model's experts on this GPU.

    Reads the model's configuration, and headers of quantized weights. An interrupted run goes on
    when it is started again. What wins by 3 % twice is kept, for experts of exactly these sizes on
    this GPU.
    """
    numbers = parse_rows(rows)
    check_target(out)
    name = model_or_demo(model)
    with quiet(debug):
        import torch

        from mixtura.hf.layer_shapes import layer_shapes
        from mixtura.kernels.triton.candidates import cases_of

        wanted = {None: None, TunedDtype.BF16: torch.bfloat16, TunedDtype.FP16: torch.float16}
        cases = cases_of(layer_shapes(name, wanted[dtype], weights), numbers)
        device = gpu(dry_run)
    if dry_run:
        show_plan(cases, device, as_json=as_json)
        return
    sweep_cases(name, cases, device, minutes, out, is_fresh=fresh, as_json=as_json)


def parse_rows(text: str | None) -> list[int]:
    """The numbers in "1,64,4096"; none without a text.

    Raises:
        InputError: something in it is no whole number.
    """
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdecimal()):
            raise InputError(
                f"rows ({text}) must be whole numbers with commas between; got {part!r}. Write, "
                f"for example, 1,64,4096."
            )
    return [int(part) for part in parts]


def gpu(is_dry_run: bool) -> Device:
    """The current GPU; where there is none, a dry run is as if for a Hopper.

    Raises:
        InputError: there is no GPU that the kernels run on.
    """
    import torch

    from mixtura.kernels.triton.device import HOPPER, device_of, missing

    reason = missing()
    if reason is None and not torch.cuda.is_available():
        reason = "no GPU that torch can use"
    if reason is None:
        return device_of(torch.device("cuda", torch.cuda.current_device()))
    if is_dry_run:
        return HOPPER
    raise InputError(
        f"the device (cuda) must be a GPU that the Triton kernels run on; got none: {reason}. Run "
        f"this where there is one, or give --dry-run to see what would be measured."
    )


def sweep_cases(
    name: str,
    cases: Sequence[Case],
    device: Device,
    minutes: float,
    out: Path | None,
    *,
    is_fresh: bool,
    as_json: bool,
) -> None:
    """Sweep, keep what wins as soon as it has won, and show all of it, however it ends."""
    from mixtura.kernels.triton.child import ChildMeasuring
    from mixtura.kernels.triton.measuring import cuda_measuring
    from mixtura.kernels.triton.tune import Sweep, Verdict
    from mixtura.kernels.triton.tuned import read_tuned, tuned_path

    path = out or tuned_path(device)
    deadline = time.monotonic() + 60 * minutes
    measure = ChildMeasuring(cuda_measuring)
    outcomes: list[Outcome] = []
    with open_journal(device, is_fresh=is_fresh) as journal, progress(cases, device) as report:
        before = read_tuned(path, device)
        if before.problem is not None:
            report.say(f"{path} {before.problem}; it will be written anew")
        sweep = Sweep(
            device=device,
            measure=measure,
            journal=journal,
            known=before.entries,
            is_over=lambda: time.monotonic() >= deadline,
            tell=report.tried,
        )
        try:
            for outcome in sweep.run(cases):
                outcomes.append(outcome)
                keep(path, device, outcome)
                report.done(outcome)
        except KeyboardInterrupt:
            report.say("interrupted: run the same command again to go on")
            raise
        finally:
            measure.close()
            report.close()
            show_outcomes(name, outcomes, device, path, as_json=as_json)
    if any(outcome.verdict is Verdict.FAILED for outcome in outcomes):
        raise typer.Exit(1)


def keep(path: Path, device: Device, outcome: Outcome) -> None:
    """Write what an outcome changes, at once: another sweep may have written meanwhile, too.

    Raises:
        InputError: the file cannot be written.
    """
    from mixtura.kernels.triton.tune import updated
    from mixtura.kernels.triton.tuned import read_tuned, write_tuned

    entries = read_tuned(path, device).entries
    changed = updated(entries, outcome)
    if changed == entries:
        return
    try:
        write_tuned(path, device, changed)
    except OSError as error:
        raise InputError(
            f"the file of tuned blocks ({path}) must be writable; got {error.strerror}. What was "
            f"measured is in the journal: give --out another place, and run this again."
        ) from None


@contextmanager
def open_journal(device: Device, *, is_fresh: bool) -> Iterator[Journal]:
    """The journal of a GPU.

    Raises:
        InputError: it cannot be written.
    """
    from mixtura.kernels.triton.journal import Journal, journal_path

    path = journal_path(device)
    try:
        journal = Journal(path, device, is_fresh=is_fresh)
    except OSError as error:
        raise InputError(
            f"the journal ({path}) must be writable; got {error.strerror}. Set XDG_CACHE_HOME to a "
            f"directory that is."
        ) from None
    try:
        yield journal
    finally:
        journal.close()
