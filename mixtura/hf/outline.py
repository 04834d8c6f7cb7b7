"""A checkpoint without its data: what a load would make of it, from headers alone.

Where a header does not tell what a matrix will be (columns may be ordered or not), one matrix of
its kind is read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from mixtura.hf.stored import STORED_DTYPES, StoredCheckpoint
from mixtura.quant.codecs.contract import Decoded
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.scheme import QuantScheme, TensorSpec


class Outline(StoredCheckpoint):
    """A checkpoint whose tensors are all on the meta device.

    Args:
        checkpoint: the real one.
    """

    def __init__(self, checkpoint: StoredCheckpoint) -> None:
        self.family = checkpoint.family
        self.headers, self.packed = checkpoint.headers, checkpoint.packed
        self.tensors, self.mapped = checkpoint.tensors, checkpoint.mapped
        self._checkpoint = checkpoint
        self._kinds: dict[tuple[object, ...], QuantizedMatrix] = {}
        self._owner = {packed.stored: name for name, packed in checkpoint.packed.items()}
        self._num_experts = Counter(
            packed.stored
            for packed in {(p.stored, p.expert): p for p in checkpoint.packed.values()}.values()
        )

    def decoded(self, stored: str) -> Decoded:
        packed = self.packed[self._owner[stored]]
        kind = (packed.format, packed.parts, self.headers[self._owner[stored]].shape)
        if kind not in self._kinds:
            self._kinds[kind] = next(iter(self._checkpoint.matrices(stored)))
            self.mapped.release()
        like = self._kinds[kind]
        return Decoded(_empty(like, self._shape(stored, like)))

    def _shape(self, stored: str, like: QuantizedMatrix) -> tuple[int, ...]:
        """Of what is stored, which is a stack where its experts have names of their own."""
        packed = self.packed[self._owner[stored]]
        if packed.expert is None:
            return tuple(self.headers[self._owner[stored]].shape)
        return (self._num_experts[stored], *like.shape[-2:])

    def input_scale(self, name: str) -> Tensor:
        stack = self.headers[name].shape[:-2]
        return torch.empty(stack, dtype=torch.float32, device="meta")

    def expects(self, name: str) -> bool | None:
        return self._checkpoint.expects(name)

    def plain(self, name: str) -> Tensor:
        header = self.headers[name]
        return torch.empty(header.shape, dtype=STORED_DTYPES[header.dtype], device="meta")

    def files(self) -> list[Path]:
        return self._checkpoint.files()


def _empty(like: QuantizedMatrix, shape: tuple[int, ...]) -> QuantizedMatrix:
    """A matrix of a scheme, without memory."""
    specs: dict[str, TensorSpec] = like.scheme.tensors_for(shape)
    parts = {
        name: torch.empty(spec.shape, dtype=like.tensors[name].dtype, device="meta")
        for name, spec in specs.items()
    }
    return QuantizedMatrix(like.scheme, shape, **parts)


def formats_in_words(matrices: dict[str, QuantizedMatrix]) -> str:
    """The schemes of experts' projections, those that are alike together.

    >>> from mixtura.quant.matrix import dense
    >>> formats_in_words({"down_proj": dense(torch.empty(1, 1, 1))})
    'float32'
    """
    schemes: dict[QuantScheme, list[str]] = {}
    for role, matrix in matrices.items():
        schemes.setdefault(matrix.scheme, []).append(role)
    if len(schemes) == 1:
        return str(next(iter(schemes)))
    return "; ".join(f"{' and '.join(roles)} {scheme}" for scheme, roles in schemes.items())
