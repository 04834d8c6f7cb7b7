"""A GGUF file as a `StoredCheckpoint`: every tensor by its dense name, packed as it is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.hf.checkpoint import TensorHeader
from mixtura.hf.gguf import GgufModel, read_gguf
from mixtura.hf.gguf_tensors import COMPANIONS, LAYER, DenseTensor
from mixtura.hf.mapped import MappedFiles
from mixtura.hf.stored import Packed, StoredCheckpoint, StoredTensor
from mixtura.quant.codecs.contract import Decoded
from mixtura.quant.codecs.gguf import DENSE_TYPES
from mixtura.quant.matrix import QuantizedMatrix, stack_experts

ENDING = ".gguf"


class GgufCheckpoint(StoredCheckpoint):
    """A GGUF file, or the first of a split one.

    Raises:
        CheckpointError: the file is broken, or has layers that its keys do not speak of.
        UnsupportedModel: its architecture is not known.
    """

    def __init__(self, path: Path) -> None:
        self.family = "GGUF"
        self.mapped = MappedFiles(path.parent.glob(f"*{ENDING}"))
        self.model: GgufModel = read_gguf(path)
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
        self.tensors = self._tensors()
        self._decoded: tuple[str, Decoded] | None = None

    def _packed(self, dense: DenseTensor, number: int, count: int) -> Packed | None:
        if len(dense.stored) != 1:
            return None
        stored = dense.stored[0]
        tensor = self.model.file.tensors[stored]
        if len(tensor.shape) < 2 or tensor.type in DENSE_TYPES:
            return None
        num_rows = tensor.shape[-2]
        rows = dense.change.rows(num_rows)
        if rows is None:
            return None
        num_bytes = tensor.blocks.numel() // count * len(rows) // num_rows
        if torch.equal(rows, torch.arange(num_rows)):
            rows = None
        format, parts = self.model.format_of(stored)
        expert = number if dense.is_stack else None
        return Packed(stored, expert, rows, num_bytes, format, parts, tensor.type.name)

    def _tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the file; one that no dense tensor is made of has no names."""
        names: dict[str, list[str]] = {}
        for name, (dense, _) in self._dense.items():
            for stored in dense.stored:
                names.setdefault(stored, []).append(name)
        metadata = self.model.file.metadata
        num_layers = metadata[f"{metadata['general.architecture']}.block_count"]
        found = {}
        for stored, tensor in self.model.file.tensors.items():
            layer = LAYER.match(stored)
            if layer is not None and int(layer[1]) >= num_layers:
                raise CheckpointError(
                    f"{stored} must be of a layer in 0..{num_layers - 1}, as block_count says; got "
                    f"layer {layer[1]}. Fetch the file again."
                )
            part = next((end[1:] for end in COMPANIONS if stored.endswith(end)), "blocks")
            weight = stored if part == "blocks" else f"{stored.removesuffix(f'.{part}')}.weight"
            owners = tuple(names.get(stored, names.get(weight, [])))
            is_packed = any(owner in self.packed for owner in owners)
            found[stored] = StoredTensor(
                tensor.blocks.numel(), tensor.type.name, owners, part if is_packed else None
            )
        return found

    def decoded(self, stored: str) -> Decoded:
        # Experts of a stack are asked for one after the other.
        if self._decoded is None or self._decoded[0] != stored:
            self._decoded = (stored, self.model.matrix(stored))
        return self._decoded[1]

    def matrices(self, stored: str) -> Iterator[QuantizedMatrix]:
        shape = self.model.file.tensors[stored].shape
        if len(shape) == 2:
            yield self.model.matrix(stored).matrix
            return
        for expert in range(shape[0]):
            yield self.model.matrix(stored, expert).matrix

    def experts(self, stored: str, numbers: Sequence[int]) -> QuantizedMatrix:
        found = (self.model.matrix(stored, number).matrix for number in numbers)
        return stack_experts(found, len(numbers))

    def plain(self, name: str) -> Tensor:
        dense, number = self._dense[name]
        made = dense.make([self.model.values(stored) for stored in dense.stored])
        return made if number is None else made[number]

    def files(self) -> list[Path]:
        return list(self.model.file.paths)


def _expert_names(dense: DenseTensor, headers: Mapping[str, TensorHeader]) -> list[str]:
    names: list[str] = []
    while dense.expert(len(names)) in headers:
        names.append(dense.expert(len(names)))
    return names


def is_gguf(model: str | Path) -> bool:
    """Whether a path is a GGUF file, by its name."""
    return str(model).endswith(ENDING)
