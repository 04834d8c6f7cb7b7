"""Quantized checkpoints as if they were dense: every tensor by its dense name, packed or plain.

`StoredCheckpoint` is what the loader knows of a checkpoint, whatever its container: headers of all
tensors by *dense name*, the name that an unquantized checkpoint of the model has; where a tensor is
a packed matrix, how to get it; and every tensor as plain numbers. Nothing is read before it is
asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.hf.checkpoint import (
    TensorHeader,
    checkpoint_files,
    read_headers,
    read_json,
    tensor_files,
)
from mixtura.hf.contents import check_contents
from mixtura.hf.mapped import MappedFiles
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat
from mixtura.quant.codecs.registry import codec_for
from mixtura.quant.cuts import take, take_experts
from mixtura.quant.matrix import QuantizedMatrix, dequantize

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
        format: how it is stored. parts: the parts that it is stored in.
        label: the same in a few words.
    """

    stored: str
    expert: int | None
    rows: Tensor | None
    num_bytes: int
    format: MatrixFormat
    parts: tuple[str, ...]
    label: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, as it is called there.

    Attributes:
        num_bytes: in the file. dtype: as the file calls it.
        names: the dense names that it is (part of); none where no matrix is made of it.
        part: which part of a matrix it is; None where it is no packed matrix's.
    """

    num_bytes: int
    dtype: str
    names: tuple[str, ...]
    part: str | None = None


class StoredCheckpoint(ABC):
    """A checkpoint with packed matrices.

    Attributes:
        family: what its format is called.
        headers: of all tensors by dense name. packed: those that are packed matrices.
        tensors: of the files, by the names that they have there.
        mapped: the mappings of the files; pages that have been read can be given back.
    """

    family: str
    headers: Mapping[str, TensorHeader]
    packed: Mapping[str, Packed]
    tensors: Mapping[str, StoredTensor]
    mapped: MappedFiles

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

    def expects(self, name: str) -> bool | None:
        """Whether the configuration says that a matrix is packed; None where it says nothing."""
        return None

    def disagreements(self) -> Iterator[str]:
        """Packed matrices that the configuration says are not, in words."""
        for name in self.packed:
            if self.expects(name) is False:
                yield f"{name} is quantized, and the configuration says that it is not"

    def matrices(self, stored: str) -> Iterator[QuantizedMatrix]:
        """What is stored as one, a matrix (N, K) at a time where it is a stack in a GGUF file.

        Raises:
            CheckpointError: the contents of one are impossible.
        """
        yield self.decoded(stored).matrix

    def matrix(self, name: str) -> QuantizedMatrix:
        """A packed matrix (N, K) by its dense name, or a stack (E, N, K) where it is one.

        Raises:
            CheckpointError: its contents are impossible.
        """
        packed = self.packed[name]
        whole = self.decoded(packed.stored).matrix
        found = whole if packed.expert is None else whole.expert(packed.expert)
        check_contents(name, found)
        return found

    def has_input_scale(self, name: str) -> bool:
        """Whether the scale of static activations is stored beside a packed matrix."""
        packed = self.packed[name]
        return packed.format.input_part in packed.parts

    def input_scale(self, name: str) -> Tensor:
        """That scale, by the matrix's dense name: fp32 (), or (E,) for a stack.

        Raises:
            CheckpointError: it is not finite and above zero.
        """
        raise NotImplementedError  # only where there is one

    def experts(self, stored: str, numbers: Sequence[int]) -> QuantizedMatrix:
        """Some matrices of a stored stack (E, N, K), in the order given: (L, N, K).

        No others are read where the file lets them be told apart.

        Raises:
            CheckpointError: the contents of one are impossible.
        """
        return take_experts(self.decoded(stored).matrix, numbers)

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
        self.mapped = MappedFiles(self._files)
        self._where = tensor_files(self._files)
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
        tensors: dict[str, StoredTensor] = {}
        for name, parts in groups.items():
            entry = self._entry(name, parts, stored)
            if entry is None:
                headers |= {tensor: stored[tensor] for tensor in parts.values()}
                continue
            self._entries[name] = entry
            if name in headers:
                raise CheckpointError(
                    f"{name} must be stored once; got a tensor of that name, and the parts "
                    f"{', '.join(parts.values())}. Fetch the weights again."
                )
            headers[name] = TensorHeader(DENSE_DTYPE, entry.shape)
            for part, tensor in parts.items():
                size = num_bytes(stored[tensor])
                tensors[tensor] = StoredTensor(size, stored[tensor].dtype, (name,), part)
            size = sum(tensors[tensor].num_bytes for tensor in parts.values())
            label = entry.format.label
            packed[name] = Packed(name, None, None, size, entry.format, tuple(parts), label)
        self.headers, self.packed = headers, packed
        self.tensors = tensors | _dense_tensors(stored, headers.keys() - packed.keys())

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
        decoded = entry.format.read(stored, tensors, entry.shape)
        fault = entry.format.contradiction(tensors)
        if fault is not None:
            raise CheckpointError(f"{stored}: {fault}")
        return decoded

    def input_scale(self, name: str) -> Tensor:
        entry = self._entries[name]
        assert entry.format.input_part is not None
        stored = self._read(entry.parts[entry.format.input_part])
        try:
            return entry.format.read_input_scale(stored, entry.shape)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None

    def experts(self, stored: str, numbers: Sequence[int]) -> QuantizedMatrix:
        entry = self._entries[stored]
        shape = (len(numbers), *entry.shape[1:])
        if shape == entry.shape:
            return super().experts(stored, numbers)
        # A part that is of one expert each is as long as there are experts.
        whole, some = entry.format.parts(entry.shape), entry.format.parts(shape)
        index = torch.tensor(list(numbers))
        tensors = {part: self._read(tensor) for part, tensor in entry.parts.items()}
        tensors = {
            part: tensor if whole[part].shape == some[part].shape else take(tensor, 0, index)
            for part, tensor in tensors.items()
        }
        return entry.format.read(stored, tensors, shape).matrix

    def plain(self, name: str) -> Tensor:
        return self._read(name)

    def files(self) -> list[Path]:
        return self._files

    def expects(self, name: str) -> bool | None:
        return self.codec.expects(name)


class DenseCheckpoint(StoredCheckpoint):
    """Safetensors files of an unquantized model.

    Raises:
        CheckpointError: files are missing or broken, or two hold the same tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.family = "unquantized"
        self._files = checkpoint_files(directory)
        self.mapped = MappedFiles(self._files)
        self._where = tensor_files(self._files)
        self.headers, self.packed = read_headers(self._files), {}
        self.tensors = _dense_tensors(self.headers, self.headers.keys())

    def decoded(self, stored: str) -> Decoded:
        raise KeyError(stored)  # none is packed

    def plain(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as opened:
            value: Tensor = opened.get_tensor(name)
        return value

    def files(self) -> list[Path]:
        return self._files


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of a checkpoint that is read when it is indexed, as Transformers' loader does.

    Attributes:
        read: gives a tensor, by its name. header: of this one.
    """

    read: Callable[[str], Tensor]
    name: str
    header: TensorHeader

    def __getitem__(self, index: Any) -> Tensor:
        return self.read(self.name)[index]

    def get_shape(self) -> list[int]:
        """The shape, from the header."""
        return list(self.header.shape)


def num_bytes(header: TensorHeader) -> int:
    """What a tensor takes in a file."""
    itemsize = STORED_DTYPES[header.dtype].itemsize if header.dtype in STORED_DTYPES else 1
    return torch.Size(header.shape).numel() * itemsize


def _dense_tensors(
    headers: Mapping[str, TensorHeader], names: Iterable[str]
) -> dict[str, StoredTensor]:
    """Tensors that are no parts of packed matrices."""
    kept = set(names)
    return {
        name: StoredTensor(num_bytes(headers[name]), headers[name].dtype, (name,))
        for name in headers
        if name in kept
    }


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
