"""What a load refuses: arguments that contradict each other, and weights that were not filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtura.errors import CheckpointError, InputError
from mixtura.hf.stored import StoredCheckpoint

NOT_WITH_FORMATS = ("quantization_config", "distributed_config", "tp_plan")
"""Arguments of Transformers' `from_pretrained` that split or quantize weights in their own way."""


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise `InputError` for an argument of Transformers' that does not go with packed weights."""
    for name in NOT_WITH_FORMATS:
        if arguments.get(name) is not None:
            raise InputError(
                f"{name} must not be given along with weights=, linears= or parallel=; got both. "
                f"Drop one of them."
            )
    places = arguments.get("device_map")
    if isinstance(places, dict) and "disk" in places.values():
        raise InputError(
            "device_map must keep weights in memory along with weights= or linears=; got disk in "
            "it. Leave device_map out: packed weights are small."
        )


def check_spread(arguments: dict[str, Any]) -> None:
    """Raise `InputError` for an argument of Transformers' that a rank's own reading cannot do."""
    for name in ("key_mapping", "device_map"):
        if arguments.get(name) is not None:
            raise InputError(
                f"{name} must be left out with parallel=, as ranks read their experts by "
                f"themselves; got one. Move the model when it is loaded."
            )


def check_no_formats(checkpoint: StoredCheckpoint, formats: object) -> None:
    """Raise `InputError` where a quantized checkpoint is to be quantized again."""
    if formats:
        raise InputError(
            f"weights= and linears= must be left out for a quantized checkpoint; got one of "
            f"{checkpoint.family}. Drop them, or load the original weights."
        )


def check_complete(
    model: str | Path, missing: set[str], mismatched: set[tuple[str, Any, Any]]
) -> None:
    """Raise `CheckpointError` where Transformers has left weights at random values."""
    for name, stored, needed in sorted(mismatched, key=str):
        raise CheckpointError(
            f"{name} of {model} ({tuple(stored)}) must have the shape that config.json gives; got "
            f"{tuple(needed)} from it. Fetch config.json and the weights again, both of one model."
        )
    if missing:
        first, *others = sorted(missing)
        raise CheckpointError(
            f"the weights of {model} must hold every tensor of the model; got no {first}"
            f"{f' and {len(others)} others not either' if others else ''}. Fetch the weights again."
        )
