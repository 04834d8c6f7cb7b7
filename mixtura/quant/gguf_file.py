"""Opens a GGUF file, or the files of a split model: metadata, and tensors as views of the file.

    "GGUF" | version | number of tensors | number of keys
    keys: name, type, value
    tensors: name, dims (K first), type, offset
    data, from the next multiple of `general.alignment`; offsets count from there

Every size is compared with the length of the file before anything is made of it, so that a broken
file is an error and nothing else. Files are mapped: no tensor is read before it is used, and no
tensor may be written to.

Source: the GGUF specification (ggml, docs/gguf.md), version 2 and 3, little endian.
"""

from __future__ import annotations

import mmap
import re
import stat
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.ggml_types import GgmlType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_HEADER_BYTES = 2**26
"""Where keys and tensor infos must end. A vocabulary of 260,000 tokens with its merges takes 15 MB;
Python objects take up to ten times the bytes they are read from."""

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_UINT32, _UINT64 = _SCALARS[4], _SCALARS[10]
_STRING, _ARRAY = 8, 9
_TYPES = {type.number: type for type in GgmlType}
_SPLIT_NAME = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: its name there. type: of its blocks.
        shape: logical, K last: the file's dims the other way round.
        data: its bytes, uint8, a view of the mapped file: never to be written to.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    data: Tensor

    @property
    def blocks(self) -> Tensor:
        """The bytes by rows: (..., bytes of a row)."""
        return self.data.view(*self.shape[:-1], self.type.row_bytes(self.shape[-1]))


@dataclass(frozen=True, eq=False)
class GgufFile:
    """What GGUF files hold.

    Attributes:
        paths: the files, in order.
        metadata: values by key, of the first file: numbers, strings, and lists of them.
        tensors: of all files, by name, in the order of the files.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def open_gguf(path: str | Path) -> GgufFile:
    """Open a GGUF file; the first file of a split model opens all of them.

    Raises:
        CheckpointError: there is no such file, it is not a GGUF file, is truncated, contradicts
            itself, or uses what no current program writes; or a part of a split model is missing.
    """
    path = Path(path)
    first = parse_gguf(path, _map(path))
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return first
    names = _split_names(path, first.metadata)
    others = [path.with_name(name) for name in names[1:]]
    parts = [first, *(parse_gguf(other, _map(other)) for other in others)]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise _broken(part.paths[0], "split.no", part.metadata.get("split.no"), f"be {number}")
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise _broken(part.paths[0], "tensor", name, "be in one part only")
            tensors[name] = tensor
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise _broken(path, "split.tensors.count", total, f"be {len(tensors)}, what the parts hold")
    return GgufFile(tuple(part.paths[0] for part in parts), first.metadata, tensors)


def _split_names(path: Path, metadata: Mapping[str, Any]) -> list[str]:
    """The names of the files of a split model, whose first file `path` is."""
    count, number = metadata["split.count"], metadata.get("split.no")
    found = _SPLIT_NAME.match(path.name)
    if found is None or int(found[3]) != count:
        rule = f"be named NAME-00001-of-{count:05}.gguf" if isinstance(count, int) else "be split"
        raise _broken(path, "the file's name", path.name, rule)
    if number != 0:
        raise CheckpointError(
            f"{path} (part {found[2]}) must be the first part of its model; got another. Open "
            f"{found[1]}-00001-of-{found[3]}.gguf."
        )
    names = [f"{found[1]}-{part:05}-of-{found[3]}.gguf" for part in range(1, count + 1)]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} must hold all {count} parts of the model; got no {missing[0]}"
            f"{f' and {len(missing) - 1} others not either' if len(missing) > 1 else ''}. Fetch "
            f"the missing files."
        )
    return names


def parse_gguf(path: Path, data: mmap.mmap | bytes) -> GgufFile:
    """Read the bytes of one GGUF file.

    Args:
        path: for messages.
        data: the file; tensors are views of it.

    Raises:
        CheckpointError: see `open_gguf`.
    """
    cursor = _Cursor(path, data)
    num_tensors, num_keys = _read_counts(cursor)
    metadata = dict(_read_metadata(cursor, num_keys))
    infos = list(_read_infos(cursor, num_tensors))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _broken(path, "general.alignment", alignment, "be a power of two")
    start = -(-cursor.position // alignment) * alignment
    spans = [_span(path, info, start, alignment, len(data)) for info in infos]
    _check_apart(path, infos, spans)
    if not infos:
        return GgufFile((path,), metadata, {})
    with warnings.catch_warnings():  # that the file is not writable is as it should be
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        whole = torch.frombuffer(data, dtype=torch.uint8)
    tensors = {
        info.name: GgufTensor(info.name, info.type, info.shape, whole[span[0] : span[1]])
        for info, span in zip(infos, spans, strict=True)
    }
    return GgufFile((path,), metadata, tensors)


def _map(path: Path) -> mmap.mmap:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            raise OSError("it is not a regular file")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty, or the name has a NUL
        raise CheckpointError(
            f"{path} must be a readable GGUF file; got: {error}. Check the path, or fetch the file "
            f"again."
        ) from None


def _broken(path: Path, what: str, value: object, rule: str) -> CheckpointError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return CheckpointError(
        f"{what} ({shown}) in {path} must {rule}; got another value. Fetch the file again."
    )


class _Cursor:
    """Reads a file from the start on, never past its end."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path = path
        self.data = data
        self.position = 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def skip(self, num_bytes: int) -> int:
        """Move on by so many bytes, and say where they begin."""
        start = self.position
        if num_bytes > self.end - start:
            cause = "is truncated" if self.end == len(self.data) else "has a header above 64 MiB"
            raise CheckpointError(
                f"{self.path} must hold all that its header counts; got a file that {cause} at "
                f"byte {start}, where {num_bytes} bytes should be. Fetch the file again."
            )
        self.position = start + num_bytes
        return start

    def number(self, form: struct.Struct) -> Any:
        """A number of that form."""
        return form.unpack_from(self.data, self.skip(form.size))[0]

    def string(self, what: str) -> str:
        """A length and so many bytes of UTF-8."""
        length = self.number(_UINT64)
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            rule = f"be UTF-8 ({error.reason} at byte {start + error.start})"
            raise _broken(self.path, what, self.data[start : start + 16], rule) from None


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """The number of tensors and of keys."""
    magic = cursor.data[: len(MAGIC)]
    if magic != MAGIC:
        raise _broken(cursor.path, "the first four bytes", magic, "be GGUF")
    cursor.skip(len(MAGIC))
    version = cursor.number(_UINT32)
    if version not in VERSIONS:
        is_big_endian = version & 0xFFFF == 0 and version >> 24 in VERSIONS
        rule = "be 2 or 3, little endian" if is_big_endian else "be 2 or 3"
        raise _broken(cursor.path, "the version", version, rule)
    return cursor.number(_UINT64), cursor.number(_UINT64)


def _read_metadata(cursor: _Cursor, num_keys: int) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for _ in range(num_keys):
        key = cursor.string("a key")
        if key in seen:
            raise _broken(cursor.path, "the key", key, "be there once")
        seen.add(key)
        yield key, _read_value(cursor, key, cursor.number(_UINT32))


def _read_value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string(key)
    if kind != _ARRAY:
        raise _broken(cursor.path, f"the type of {key}", kind, "be one of 0 to 12")
    item, count = cursor.number(_UINT32), cursor.number(_UINT64)
    if item == _STRING:
        return [cursor.string(key) for _ in range(count)]
    if item not in _SCALARS:
        raise _broken(cursor.path, f"the type of items of {key}", item, "be a number or a string")
    size = _SCALARS[item].size
    start = cursor.skip(count * size)
    return list(struct.unpack_from(f"<{count}{_SCALARS[item].format[1:]}", cursor.data, start))


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int


def _read_infos(cursor: _Cursor, num_tensors: int) -> Iterator[_Info]:
    seen: set[str] = set()
    for _ in range(num_tensors):
        name = cursor.string("a tensor's name")
        if name in seen:
            raise _broken(cursor.path, "the tensor", name, "be there once")
        seen.add(name)
        num_dims = cursor.number(_UINT32)
        if not 1 <= num_dims <= MAX_DIMS:
            raise _broken(cursor.path, f"the number of dims of {name}", num_dims, "be 1 to 4")
        dims = [cursor.number(_UINT64) for _ in range(num_dims)]
        number = cursor.number(_UINT32)
        if number not in _TYPES:
            raise CheckpointError(
                f"the ggml type of {name} ({number}) in {cursor.path} must be one of "
                f"{', '.join(f'{t.number} ({t.name})' for t in GgmlType)}; got another, which "
                f"llama.cpp does not write. Use another file."
            )
        yield _Info(name, tuple(reversed(dims)), _TYPES[number], cursor.number(_UINT64))


def _span(path: Path, info: _Info, start: int, alignment: int, end: int) -> tuple[int, int]:
    """Where a tensor's bytes lie in the file."""
    block = info.type.block_columns
    if min(info.shape) < 1 or info.shape[-1] % block:
        rule = f"have positive sizes, the last a multiple of {block} ({info.type.name})"
        raise _broken(path, f"the shape of {info.name}", info.shape, rule)
    num_bytes = prod(info.shape[:-1]) * info.type.row_bytes(info.shape[-1])
    if info.offset % alignment:
        rule = f"be a multiple of {alignment}"
        raise _broken(path, f"the offset of {info.name}", info.offset, rule)
    first = start + info.offset
    if first + num_bytes > end:
        raise CheckpointError(
            f"{info.name} ({num_bytes} bytes at {first}) must lie within {path}; got a file of "
            f"{end} bytes, which is truncated. Fetch the file again."
        )
    return first, first + num_bytes


def _check_apart(path: Path, infos: list[_Info], spans: list[tuple[int, int]]) -> None:
    """Raise `CheckpointError` where two tensors share bytes."""
    order = sorted(range(len(infos)), key=lambda index: spans[index])
    for left, right in pairwise(order):
        if spans[left][1] > spans[right][0]:
            rule = f"lie outside {infos[left].name}"
            raise _broken(path, "the tensor", infos[right].name, rule)
