"""Safetensors files read and written one tensor at a time, without mapping them into memory.

A mapped file counts as memory of the process where memory is limited, all of it; here only the
tensor at hand does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.hf.checkpoint import TensorHeader, tensor_files
from mixtura.hf.stored import STORED_DTYPES, num_bytes

HEADER_ALIGNMENT = 8
"""The data of a safetensors file begin at a multiple of this; the header is filled with spaces."""

METADATA = {"format": "pt"}
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    start: int


class TensorReader:
    """The tensors of safetensors files.

    Args:
        files: whole safetensors files.

    Attributes:
        headers: of all tensors.

    Raises:
        CheckpointError: a file is broken, two hold a tensor of one name, or a tensor is of a dtype
            that torch does not have.
    """

    def __init__(self, files: list[Path]) -> None:
        self.headers: dict[str, TensorHeader] = {}
        self._places: dict[str, _Place] = {}
        tensor_files(files)  # which refuses tensors that are stored twice
        for file in files:
            for name, header, start in _entries(file):
                self.headers[name] = header
                self._places[name] = _Place(file, start)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor in memory of its own; with `index` that part of its first dim, kept 1 long."""
        header, place = self.headers[name], self._places[name]
        shape, size, start = header.shape, num_bytes(header), place.start
        if index is not None:
            size //= shape[0]
            start += index * size
            shape = (1, *shape[1:])
        dtype = STORED_DTYPES[header.dtype]
        if not size:
            return torch.empty(shape, dtype=dtype)
        content = bytearray(size)
        with place.file.open("rb", buffering=0) as opened:
            opened.seek(start)
            _read_into(opened, content, name)
        return torch.frombuffer(content, dtype=dtype).view(shape)


def _entries(file: Path) -> Iterator[tuple[str, TensorHeader, int]]:
    """Name, header and first byte of every tensor; `safe_open` would map the file."""
    num_left = file.stat().st_size
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(size, num_left)))
        found = []
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found.append((name, entry["dtype"], tuple(entry["shape"]), first, last))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(file, f"{type(error).__name__}: {error}") from None
    for name, dtype, shape, first, last in found:
        if dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{name} ({dtype}) must be of a dtype that torch has; got another. Fetch the "
                f"weights again."
            )
        wanted = TensorHeader(dtype, shape)
        if last - first != num_bytes(wanted) or 8 + size + last > num_left:
            raise _broken(file, f"{name} in bytes {first} to {last} of {num_left - 8 - size}")
        yield name, wanted, 8 + size + first


def _broken(file: Path, fact: str) -> CheckpointError:
    return CheckpointError(
        f"{file} must be a whole safetensors file; got {fact}. Fetch the file again."
    )


def _read_into(opened: Any, content: bytearray, name: str) -> None:
    view, done = memoryview(content), 0
    while done < len(view):
        count = opened.readinto(view[done:])
        if not count:
            raise CheckpointError(
                f"{name} ({len(view)} bytes) must be in the file as long as it is read; got "
                f"{done}. Do not change the model while it is read, and try again."
            )
        done += count


class ShardWriter:
    """A safetensors file that is written tensor by tensor, in the order of its header.

    Args:
        path: of the file.
        headers: of its tensors, in order.
    """

    def __init__(self, path: Path, headers: Mapping[str, TensorHeader]) -> None:
        self._left = dict(headers)
        self._digest = hashlib.sha256()
        self._file = path.open("wb")
        self.num_bytes = 0
        entries: dict[str, Any] = {"__metadata__": METADATA}
        offset = 0
        for name, header in headers.items():
            stop = offset + num_bytes(header)
            entries[name] = {
                "dtype": header.dtype,
                "shape": list(header.shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        self._write(len(text).to_bytes(8, "little"))
        self._write(text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        expected, header = next(iter(self._left.items()))
        found = TensorHeader(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert (name, found) == (expected, header), f"{name} {found}, not {expected} {header}"
        del self._left[name]
        if tensor.numel():
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self._write(flat.numpy().data)

    def close(self) -> str:
        """Bring the whole file to the disk.

        Returns:
            Its SHA-256.
        """
        assert not self._left, f"{len(self._left)} tensors have not been written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file, which is not whole."""
        self._file.close()

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.num_bytes += len(content)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
