"""Options that several verbs share: one spelling, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixtura.errors import CheckpointError

DEMO = Path(__file__).parent.parent / "demo"
"""The model in the box."""

DEBUG = "--debug"

Model = Annotated[
    str | None,
    typer.Option(help="Directory of a model, GGUF file, or hub id. Default: the model in the box."),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where the model runs: cpu, cuda, cuda:1. Default: a GPU if there is one."),
]
Kernel = Annotated[str | None, typer.Option(help="Insist on one experts kernel by name.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Keep the experts in this format: int4, int8, mxfp4, bf16, ... Default: as --dtype.",
        metavar="FORMAT",
    ),
]
Linears = Annotated[
    str | None,
    typer.Option(
        help="Keep attention projections and output head in this format, such as int8.",
        metavar="FORMAT",
    ),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Same row, whatever else is in the batch.")
]


def _only_one(given: list[str] | None) -> list[str] | None:
    if given is not None and len(given) > 1:
        raise typer.BadParameter(
            f"an adapter is for all rows here, so there must be one; got {len(given)}. "
            f"mixtura.select_adapters gives rows adapters of their own."
        )
    return given


Lora = Annotated[
    list[str] | None,
    typer.Option(
        callback=_only_one,
        help="Load a LoRA adapter of PEFT beside the weights, from this directory; =NAME names it.",
        metavar="DIR[=NAME]",
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        DEBUG,
        help="Check router and ids on every call, and show the traceback of an error.",
    ),
]


def model_or_demo(model: str | None) -> str:
    """What `--model` names; without it, the model in the box.

    Raises:
        CheckpointError: there is no model in the box.
    """
    if model is not None:
        return str(Path(model).expanduser()) if model.startswith("~") else model
    if not (DEMO / "config.json").is_file():
        raise CheckpointError(
            f"the model in the box ({DEMO}) must be there when --model is not given; got none. "
            f"Give --model, or install mixtura again."
        )
    return str(DEMO)
