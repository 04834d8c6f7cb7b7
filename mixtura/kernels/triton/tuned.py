"""The file of blocks that `mixtura tune` has found for a GPU: one for each, in the user's cache.

It holds for the GPU, the version of Triton, the kernels and the experts that it was measured with.
A file that does not is left alone: kernels then run with the table's blocks (table.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mixtura.config import GateUp
from mixtura.env import cache_directory
from mixtura.kernels.triton.device import Device, triton_version
from mixtura.kernels.triton.table import (
    DIRECT_TILE,
    MAX_STAGES,
    MIN_COLUMNS,
    MIN_DEPTH,
    Blocks,
    Key,
    Packing,
    Product,
)

FORMAT, VERSION = "mixtura.tuned", 2

MAX_WARPS = 16
MAX_SIDE = 4096
"""Of blocks, in columns and in depth; more is no entry of ours."""

MIN_TAIL = 16
"""Rows of the smallest tile."""

KERNELS_DIRECTORY = Path(__file__).parent
KERNELS = (
    *("gate_up.py", "down.py", "direct.py", "steps.py"),
    *("packed/gate_up.py", "packed/down.py", "packed/products.py", "packed/decode.py"),
    *("packed/rounding.py", "packed/layout.py"),
)
"""What blocks are measured with."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class TunedFileWarning(UserWarning):
    """A file of tuned blocks that is there is not used."""


@dataclass(frozen=True, slots=True)
class TunedFile:
    """What a file of tuned blocks says for a GPU.

    Attributes:
        entries: none where there is no file, or it is not used.
        problem: why a file that is there is not used, in words that follow its name.
    """

    path: Path
    entries: Mapping[Key, Blocks] = field(default_factory=dict)
    problem: str | None = None

    def __str__(self) -> str:
        if self.problem is not None:
            return f"none: {self.path} {self.problem}"
        return f"{len(self.entries)} entries in {self.path}" if self.entries else "none"


_read: dict[Device, Mapping[Key, Blocks]] = {}


def tuned_for(device: Device) -> Mapping[Key, Blocks]:
    """The entries for a GPU; the file is read when they are first asked for, once in a process."""
    entries = _read.get(device)
    if entries is None:
        found = read_tuned(tuned_path(device), device)
        # Kept before the warning, which may be an error: the next call must not stumble again.
        entries = _read[device] = found.entries
        if found.problem is not None:
            warnings.warn(
                f"the tuned blocks in {found.path} are not used: it {found.problem}. Run 'mixtura "
                f"tune' again, or remove the file.",
                TunedFileWarning,
                stacklevel=2,
            )
    return entries


def forget_tuned() -> None:
    """Read files again when their entries are next asked for."""
    _read.clear()


def tuned_path(device: Device) -> Path:
    """Where the entries for a GPU are: a file by its name."""
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return cache_directory() / "tuned" / f"{name}.json"


def read_tuned(path: Path, device: Device) -> TunedFile:
    """Read a file; one that is broken, or was not made for what runs here, has a problem."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return TunedFile(path)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        return TunedFile(path, problem=f"cannot be read ({reason})")
    try:
        problem = _foreign(data, device)
        if problem is not None:
            return TunedFile(path, problem=problem)
        entries = {}
        for one in data["entries"]:
            key = key_from(one["key"])
            entries[key] = blocks_from(one["blocks"], key)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return TunedFile(path, problem=f"is broken ({type(error).__name__}: {error})")
    return TunedFile(path, entries)


def _foreign(data: Any, device: Device) -> str | None:
    """Why a file's entries say nothing here, or None."""
    if data["format"] != FORMAT:
        return f"is no file of the format {FORMAT}"
    if data["version"] != VERSION:
        return f"is of version {data['version']}, and this mixtura reads version {VERSION}"
    if data["device"] != device_data(device):
        return f"was made on another GPU, {data['device']['name']}, with other limits"
    if data["triton"] != triton_version():
        return f"was made with Triton {data['triton']}, and {triton_version()} runs"
    if data["kernels"] != kernels_digest():
        return "was measured with other kernels than this mixtura has"
    return None


@lru_cache(maxsize=1)
def kernels_digest() -> str:
    """Tells kernels from those of another mixtura: of their sources, read once in a process."""
    digest = hashlib.sha256()
    for name in KERNELS:
        digest.update((KERNELS_DIRECTORY / name).read_bytes())
    return digest.hexdigest()


def write_tuned(path: Path, device: Device, entries: Mapping[Key, Blocks]) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: the directory cannot be made or written.
    """
    data = {
        "format": FORMAT,
        "version": VERSION,
        "device": device_data(device),
        "triton": triton_version(),
        "kernels": kernels_digest(),
        "entries": [
            {"key": key_data(key), "blocks": asdict(blocks)} for key, blocks in entries.items()
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def device_data(device: Device) -> dict[str, Any]:
    """A GPU as files have it."""
    capability = None if device.capability is None else list(device.capability)
    return {
        "name": device.name,
        "capability": capability,
        "num_processors": device.num_processors,
        "shared_bytes": device.shared_bytes,
    }


def key_data(key: Key) -> dict[str, Any]:
    """A key as files have it."""
    dtype = str(key.dtype).removeprefix("torch.")
    return {
        **asdict(key),
        "dtype": dtype,
        "product": key.product.value,
        "gate_up": str(key.gate_up),
    }


def key_from(data: dict[str, Any]) -> Key:
    """The inverse of `key_data`.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    names = ("tile_rows", "num_experts", "hidden_size", "intermediate_size")
    sizes = {name: _count(data[name], 2**31) for name in names}
    if not isinstance(data["is_transposed"], bool):
        raise ValueError("is_transposed")
    return Key(
        DTYPES[data["dtype"]],
        Product(data["product"]),
        **sizes,
        gate_up=GateUp(data["gate_up"]),
        is_transposed=data["is_transposed"],
        packing=None if data["packing"] is None else _packing_from(data["packing"]),
    )


def _packing_from(data: dict[str, Any]) -> Packing:
    packing = Packing(**data)
    if not isinstance(packing.name, str) or not packing.name:
        raise ValueError("a packing's name")
    _power(packing.depth, MAX_SIDE, MIN_DEPTH)
    _power(packing.bits, 8)
    _power(packing.operand_bytes, 2)
    _count(packing.scale_words, packing.depth, 0)
    if _count(packing.columns, MAX_SIDE, 0):
        _power(packing.columns, MAX_SIDE, MIN_COLUMNS)
    return packing


def blocks_from(data: dict[str, Any], key: Key) -> Blocks:
    """Blocks for a product, from what `asdict` makes of them.

    Raises:
        KeyError, TypeError, ValueError: it is none, or none that a kernel could be compiled for.
    """
    blocks, tile_rows = Blocks(**data), key.tile_rows
    _count(blocks.num_stages, MAX_STAGES)
    has_vectors = tile_rows == DIRECT_TILE and key.packing is None
    _power(blocks.columns, MAX_SIDE, 1 if has_vectors else MIN_COLUMNS)
    _power(blocks.depth, MAX_SIDE, MIN_DEPTH)
    _power(blocks.num_warps, MAX_WARPS)
    if _count(blocks.tail_rows, tile_rows - 1, 0):
        _power(blocks.tail_rows, tile_rows - 1, MIN_TAIL)
    if not isinstance(blocks.uses_descriptors, bool) or not isinstance(blocks.is_persistent, bool):
        raise ValueError("uses_descriptors and is_persistent")
    if key.packing is not None and (blocks.uses_descriptors or blocks.is_persistent):
        raise ValueError("quantized weights have neither descriptors nor persistent programs")
    return blocks


def _power(value: Any, most: int, least: int = 1) -> None:
    if _count(value, most, least) & (value - 1):
        raise ValueError(f"{value} is no power of two")


def _count(value: Any, most: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r} is no number from {least} to {most}")
    return value
