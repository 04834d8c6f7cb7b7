"""Quantized checkpoints as if they were dense: every tensor by its dense name, packed or plain.

`StoredCheckpoint` is what the loader knows of a checkpoint, whatever its container: headers of all
tensors by *dense name*, the name that an unquantized checkpoint of the model has; where a tensor is
a packed matrix, how to get it; and every tensor as plain numbers. Nothing is read before it is
asked for.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.hf.checkpoint import TensorHeader, checkpoint_files, read_headers, read_json
from mixtura.hf.gguf import GgufModel, read_gguf
from mixtura.hf.gguf_tensors import DenseTensor
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat
from mixtura.quant.codecs.registry import codec_for
from mixtura.quant.scheme import QuantizedMatrix, dequantize

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in safetensors headers."""

QUANT_CONFIGS = ("hf_quant_config.json", "quantize_config.json")
"""Files that hold a quantization configuration where config.json has none."""

DENSE_DTYPE = "BF16"
"""What a packed matrix counts as in headers: any float would do, as it is never stored so."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Where a packed matrix of a checkpoint comes from.

    Attributes:
        stored: the stored matrix, or stack of all experts; several dense names may share one.
        expert: which of the stack; None for all of what is stored.
        rows: the stored row that each row is; None for all, in order.
        num_bytes: of all parts, shares of a stack.
        label: how it is stored, in a few words.
    """

    stored: str
    expert: int | None
    rows: Tensor | None
    num_bytes: int
    label: str


class StoredCheckpoint(ABC):
    """A checkpoint with packed matrices.

    Attributes:
        family: what its format is called.
        headers: of all tensors by dense name. packed: those that are packed matrices.
    """

    family: str
    headers: Mapping[str, TensorHeader]
    packed: Mapping[str, Packed]

    @abstractmethod
    def decoded(self, stored: str) -> Decoded:
        """A stored matrix or stack, packed.

        Raises:
            CheckpointError: its contents are impossible.
        """

    @abstractmethod
    def plain(self, name: str) -> Tensor:
        """A tensor that is not packed, by its dense name, as it is stored."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that are mapped."""

    @abstractmethod
    def disagreements(self) -> Iterator[str]:
        """Where the configuration says otherwise than the files, in words."""

    def matrix(self, name: str) -> QuantizedMatrix:
        """A packed matrix (N, K) by its dense name, or a stack (E, N, K) where it is one.

        Raises:
            CheckpointError: its contents are impossible.
        """
        packed = self.packed[name]
        whole = self.decoded(packed.stored).matrix
        return whole if packed.expert is None else whole.expert(packed.expert)

    def tensor(self, name: str) -> Tensor:
        """Any tensor by its dense name, dequantized where it is packed, in fp32 then."""
        if name not in self.packed:
            return self.plain(name)
        packed = self.packed[name]
        weight = dequantize(self.matrix(name))
        return weight if packed.rows is None else weight[packed.rows]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A packed matrix of safetensors files: its format, names of its parts, logical shape."""

    format: MatrixFormat
    parts: Mapping[str, str]
    shape: tuple[int, ...]


class SafetensorsCheckpoint(StoredCheckpoint):
    """Safetensors files and a `quantization_config`.

    Args:
        directory: of the checkpoint.
        config: the quantization configuration.

    Raises:
        CheckpointError: the configuration is of no family that is read, files are missing or
            broken, or a matrix's parts do not fit each other.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.codec: Codec = codec_for(config)
        self.family = self.codec.name
        self._files = checkpoint_files(directory)
        self._where = _owners(self._files)
        stored = read_headers(self._files)
        groups: dict[str, dict[str, str]] = {}
        headers: dict[str, TensorHeader] = {}
        for tensor, header in stored.items():
            found = self.codec.split(tensor)
            if found is None:
                headers[tensor] = header
            else:
                groups.setdefault(found[0], {})[found[1]] = tensor
        self._entries: dict[str, _Entry] = {}
        packed: dict[str, Packed] = {}
        for name, parts in groups.items():
            entry = self._entry(name, parts, stored)
            if entry is None:
                headers |= {tensor: stored[tensor] for tensor in parts.values()}
                continue
            self._entries[name] = entry
            headers[name] = TensorHeader(DENSE_DTYPE, entry.shape)
            num_bytes = sum(_num_bytes(stored[tensor]) for tensor in parts.values())
            label = str(getattr(entry.format, "label", type(entry.format).__name__))
            packed[name] = Packed(name, None, None, num_bytes, label)
        self.headers, self.packed = headers, packed

    def _entry(
        self, name: str, parts: Mapping[str, str], stored: Mapping[str, TensorHeader]
    ) -> _Entry | None:
        headers = {
            part: Header(STORED_DTYPES[stored[tensor].dtype], stored[tensor].shape)
            for part, tensor in parts.items()
            if stored[tensor].dtype in STORED_DTYPES
        }
        if len(headers) < len(parts):
            odd = next(t for t in parts.values() if stored[t].dtype not in STORED_DTYPES)
            raise CheckpointError(
                f"{odd} ({stored[odd].dtype}) must be of a dtype that torch has; got another. "
                f"Fetch the weights again."
            )
        try:
            format = self.codec.format_of(name, headers)
        except CheckpointError:
            # Norms have a `weight` too, and are no matrices.
            if set(parts) == {"weight"} and len(headers["weight"].shape) < 2:
                return None
            raise
        if format is None:
            return None
        # Views of the mapped files: only a format that states its shape there reads any of it.
        contents = {part: self._read(tensor) for part, tensor in parts.items()}
        try:
            stated = format.stored_shape(contents)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        return _Entry(format, dict(parts), format.check_headers(name, headers, stated))

    @cached_property
    def _open(self) -> dict[Path, Any]:
        return {file: safe_open(file, framework="pt") for file in self._files}

    def _read(self, tensor: str) -> Tensor:
        value: Tensor = self._open[self._where[tensor]].get_tensor(tensor)
        return value

    def decoded(self, stored: str) -> Decoded:
        entry = self._entries[stored]
        tensors = {part: self._read(tensor) for part, tensor in entry.parts.items()}
        return entry.format.read(stored, tensors, entry.shape)

    def plain(self, name: str) -> Tensor:
        return self._read(name)

    def files(self) -> list[Path]:
        return self._files

    def disagreements(self) -> Iterator[str]:
        for name, header in self.headers.items():
            if len(header.shape) < 2 or not name.endswith(".weight"):
                continue
            if name in self.packed and not self.codec.expects(name):
                yield f"{name} is quantized, and the configuration says that it is not"


class GgufCheckpoint(StoredCheckpoint):
    """A GGUF file, or the first of a split one.

    Raises:
        CheckpointError: the file is broken.
        UnsupportedModel: its architecture is not known.
    """

    def __init__(self, path: Path) -> None:
        self.family = "GGUF"
        self.model: GgufModel = read_gguf(path)
        self._path = path
        self._dense: dict[str, tuple[DenseTensor, int | None]] = {}
        headers = self.model.headers()
        packed: dict[str, Packed] = {}
        for dense in self.model.dense.values():
            names = _expert_names(dense, headers) if dense.is_stack else [dense.name]
            for number, name in enumerate(names):
                self._dense[name] = (dense, number if dense.is_stack else None)
                found = self._packed(dense, number, len(names))
                if found is not None:
                    packed[name] = found
        self.headers, self.packed = headers, packed
        self._decoded: tuple[str, Decoded] | None = None

    def _packed(self, dense: DenseTensor, number: int, count: int) -> Packed | None:
        if len(dense.stored) != 1:
            return None
        stored = dense.stored[0]
        tensor = self.model.file.tensors[stored]
        if len(tensor.shape) < 2 or tensor.type.name in ("F32", "F16", "BF16", "F64"):
            return None
        num_rows = tensor.shape[-2]
        rows = dense.change.rows(num_rows)
        if rows is None:
            return None
        if torch.equal(rows, torch.arange(num_rows)):
            rows = None
        expert = number if dense.is_stack else None
        num_bytes = tensor.blocks.numel() // count
        return Packed(stored, expert, rows, num_bytes, tensor.type.name)

    def decoded(self, stored: str) -> Decoded:
        # Experts of a stack are asked for one after the other.
        if self._decoded is None or self._decoded[0] != stored:
            self._decoded = (stored, self.model.matrix(stored))
        return self._decoded[1]

    def plain(self, name: str) -> Tensor:
        dense, number = self._dense[name]
        made = dense.make([self.model.values(stored) for stored in dense.stored])
        return made if number is None else made[number]

    def files(self) -> list[Path]:
        return [self._path]

    def disagreements(self) -> Iterator[str]:
        return iter(())


def _expert_names(dense: DenseTensor, headers: Mapping[str, TensorHeader]) -> list[str]:
    names: list[str] = []
    while dense.expert(len(names)) in headers:
        names.append(dense.expert(len(names)))
    return names


def _num_bytes(header: TensorHeader) -> int:
    return torch.Size(header.shape).numel() * STORED_DTYPES[header.dtype].itemsize


def _owners(files: list[Path]) -> dict[str, Path]:
    """The file of every tensor.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
    """
    found: dict[str, Path] = {}
    for file in files:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = opened.read(min(size, file.stat().st_size))
        try:
            names = [name for name in json.loads(header) if name != "__metadata__"]
        except ValueError:
            continue  # `read_headers` says what is wrong with it
        for name in names:
            if name in found:
                raise CheckpointError(
                    f"{name} must be in one file; got {found[name].name} and {file.name}. Fetch "
                    f"the weights again, into an empty directory."
                )
            found[name] = file
    return found


def quantization_config(directory: Path) -> dict[str, Any] | None:
    """What a checkpoint's files say of its quantization; None where it is not quantized."""
    config = read_json(directory / "config.json")
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        if holder.get("quantization_config") is not None:
            return config
    for name in QUANT_CONFIGS:
        if (directory / name).is_file():
            return read_json(directory / name)
    return None


def is_gguf(model: str | Path) -> bool:
    """Whether a path is a GGUF file, by its name."""
    return str(model).endswith(".gguf")
