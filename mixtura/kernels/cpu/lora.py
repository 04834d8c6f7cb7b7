"""Adapters as the C++ kernels read them: where they are, or in the order of the hidden columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixtura.kernels.cpu.extension import extension
from mixtura.kernels.cpu.panels import ROW_DTYPES
from mixtura.kernels.lora import LORA_LANES
from mixtura.lora import Adapters, LoraWeights, LowRank, adapter_tensors


@dataclass(frozen=True, eq=False)
class CpuLora:
    """The adapters of a layer for the extension.

    Attributes:
        adapters: as they came.
        read: what is read: the same, or copies in the order of the experts' hidden columns.
        handle: the `Adapters` of csrc/experts.h; it points into `read`.
    """

    adapters: Adapters
    read: Adapters
    handle: Any

    @classmethod
    def of(cls, adapters: Adapters, order: Tensor | None = None) -> CpuLora:
        """Adapters laid out as `LORA_LANES` says.

        Args:
            order: (L, I) which hidden columns come first; None: as they are.
        """
        read = adapters
        if order is not None:
            read = tuple(one and _reordered(one, order) for one in adapters)
        numbers = [
            _numbers(part)
            for one in read
            for part in ((None, None, None) if one is None else (one.gate, one.up, one.down))
        ]
        return cls(adapters, read, extension().adapters(numbers))

    def slots(self) -> dict[str, Tensor]:
        """The factors, (L, ...) each, by number and name."""
        found = adapter_tensors(self.adapters)
        if self.read is not self.adapters:
            copies = adapter_tensors(self.read)
            found |= {f"read.{name}": tensor for name, tensor in copies.items()}
        return found


def _reordered(adapter: LoraWeights, order: Tensor) -> LoraWeights:
    columns = order[:, None]

    def taken(rows: Tensor) -> Tensor:
        """(L, r, I) in the order; the zeros behind every row stay."""
        whole = torch.zeros_like(rows.as_strided((*rows.shape[:2], rows.stride(1)), rows.stride()))
        whole[..., : rows.shape[2]] = rows.take_along_dim(columns, 2)
        return whole[..., : rows.shape[2]]

    def first(part: LowRank | None) -> LowRank | None:
        return None if part is None else LowRank(part.a, taken(part.b.mT).mT)

    down = adapter.down
    return LoraWeights(
        gate=first(adapter.gate),
        up=first(adapter.up),
        down=None if down is None else LowRank(taken(down.a), down.b),
    )


def _numbers(part: LowRank | None) -> list[int]:
    """A part as `make_adapters` of csrc/module.cpp takes it."""
    if part is None:
        return []
    found = [part.rank]
    for rows in (part.a, part.b.mT):
        _, rank, size = rows.shape
        stride = rows.stride(1)
        is_whole = rows.stride() == (rank * stride, stride, 1) and size < stride
        assert is_whole and stride % LORA_LANES == 0, "adapters are laid out by experts/lora.py"
        found += [rows.data_ptr(), ROW_DTYPES[rows.dtype], stride]
    return found
