"""Looks at a checkpoint directory before a weight is read: what is missing is said at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mixtura.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor of a checkpoint by its header: dtype as safetensors spells it, and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"the model directory ({path.parent}) must hold {path.name}; got none. Point --model "
            f"at a directory that save_pretrained or a hub download has written."
        ) from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} must be readable JSON; got {type(error).__name__}: {error}. Fetch the file "
            f"again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object; got {type(value).__name__}. Fetch the file again."
        )
    return value


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, all of them present.

    Raises:
        CheckpointError: none, some missing, or only pickles.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise CheckpointError(
                f"{index} must map tensors to files of its directory; got something else. Fetch it "
                f"again."
            )
        files = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            shown = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
            raise CheckpointError(
                f"the model directory ({directory}) must hold every file of its index; got no "
                f"{shown}. Fetch the missing files."
            )
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickles = [file.name for pattern in PICKLES for file in sorted(directory.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"weights must be in safetensors files; got {pickles[0]}, a pickle, which can run code "
            f"when it is read. Convert it where you trust it: AutoModelForCausalLM"
            f".from_pretrained(DIR).save_pretrained(NEW_DIR)."
        )
    raise CheckpointError(
        f"the model directory ({directory}) must hold {SINGLE} or {INDEX}; got neither. Fetch the "
        f"weights."
    )


def tensor_files(files: list[Path]) -> dict[str, Path]:
    """The file of every tensor.

    Raises:
        CheckpointError: two files, or two places in one, are called the same; or a file is no
            safetensors file.
    """
    found: dict[str, Path] = {}
    for file in files:
        for name in _tensor_names(file):
            if name in found:
                raise CheckpointError(
                    f"{name} must be stored once; got it in {found[name].name} and {file.name}. "
                    f"Fetch the weights again, into an empty directory."
                )
            found[name] = file
    return found


def _tensor_names(file: Path) -> list[str]:
    """The names in the header as often as they are there; `read_headers` checks all else."""
    pairs: list[tuple[str, Any]] = []
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = opened.read(min(size, file.stat().st_size))
        pairs = json.loads(header, object_pairs_hook=list)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} must be a whole safetensors file; got {type(error).__name__}: {error}. Fetch "
            f"the file again."
        ) from None
    return [name for name, _ in pairs if name != "__metadata__"]


def read_headers(files: list[Path]) -> dict[str, TensorHeader]:
    """Name, dtype and shape of every tensor; no data is read.

    Raises:
        CheckpointError: a file is truncated or is not a safetensors file, or two hold the same
            tensor.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    if name in headers:
                        tensor_files(files)  # which says where else it is
                    part = opened.get_slice(name)
                    headers[name] = TensorHeader(part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} must be a whole safetensors file; got {error}. Fetch the file again."
            ) from None
    return headers
