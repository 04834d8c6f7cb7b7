"""Values of a `quantization_config` that are lists or nested objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixtura.errors import CheckpointError
from mixtura.quant.codecs.checks import read_setting

_REMEDY = "Fetch config.json again."


def read_names(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """A list of names, by its first key that is there; () where none is.

    Raises:
        CheckpointError: it is no list of strings.
    """
    names = read_setting(config, *keys)
    if names is None:
        return ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{keys[0]} ({names!r}) must be a list of names; got {names!r}. {_REMEDY}"
        )
    return tuple(names)


def read_block(config: Mapping[str, Any], *keys: str) -> tuple[int, int] | None:
    """Rows and columns of a block, as `[128, 128]` or `"128x128"`; None where there is none.

    Raises:
        CheckpointError: it is something else.
    """
    block = read_setting(config, *keys)
    if block is None:
        return None
    match block.split("x") if isinstance(block, str) else block:
        case [rows, columns] if _is_size(rows) and _is_size(columns):
            return int(rows), int(columns)
    raise CheckpointError(
        f"{keys[0]} ({block!r}) must be two positive integers; got {block!r}. {_REMEDY}"
    )


def _is_size(value: object) -> bool:
    return str(value).isdecimal() and int(str(value)) > 0


def read_object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested object; empty where it is missing or null.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{key} ({value!r}) must be an object; got {value!r}. {_REMEDY}")
    return value
