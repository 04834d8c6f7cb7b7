"""What a row travels as: one record of bytes with its values, ids, weights and adapter.

| bytes | what |
|---|---|
| 4 K | ids, int32 |
| 4 K | weights, fp32 |
| 4 | LoRA adapter, int32; -1 is none |
| 4 ceil(H / 128) | scales, fp32; with 8-bit codes only |
| H x itemsize | values in the model's dtype, or 8-bit codes |
| up to 15 | padding to a multiple of 16 |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import WireFormat
from mixtura.types import ExpertBatch

COLUMNS_PER_SCALE = 128
"""As DeepSeek-V3's 8-bit activations have it: the largest value of a row spoils no more columns."""

RECORD_ALIGNMENT = 16
LARGEST_INT8 = 127.0
LARGEST_E4M3 = 448.0


@dataclass(frozen=True, slots=True)
class Wire:
    """How rows of one layer are written and read.

    Attributes:
        format: of the values. dtype: of the rows here. hidden_size: H. top_k: ids of a row, K.
    """

    format: WireFormat
    dtype: torch.dtype
    hidden_size: int
    top_k: int

    @property
    def num_scales(self) -> int:
        """Scales of a row."""
        if self.format is WireFormat.MODEL:
            return 0
        return -(-self.hidden_size // COLUMNS_PER_SCALE)

    @property
    def values_offset(self) -> int:
        """Where in a record the values begin; a multiple of 16, so that they can be viewed."""
        return _aligned(4 * self._scales.stop)

    @property
    def _scales(self) -> slice:
        """The words of a record behind ids, weights and adapter."""
        start = 2 * self.top_k + 1
        return slice(start, start + self.num_scales)

    @property
    def row_bytes(self) -> int:
        """Bytes of a record."""
        itemsize = self.dtype.itemsize if self.format is WireFormat.MODEL else 1
        return _aligned(self.values_offset + self.hidden_size * itemsize)

    def write(
        self,
        hidden_states: Tensor,
        ids: Tensor,
        weights: Tensor,
        adapter_ids: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Ids (M,K) and weights (M,K), with their tokens' rows -> (M, row_bytes) uint8.

        Args:
            hidden_states: (T,H). ids: (M,K) int32. weights: (M,K) fp32.
            adapter_ids: (M,) int32; None is -1.
            tokens: (M,) int64 whose row each record has; None: one after the other.
        """
        records = hidden_states.new_empty((ids.shape[0], self.row_bytes), dtype=torch.uint8)
        words = records.view(torch.int32)
        k = self.top_k
        words[:, :k] = ids
        words[:, k : 2 * k] = weights.to(torch.float32).view(torch.int32)
        words[:, 2 * k] = -1 if adapter_ids is None else adapter_ids
        values = hidden_states
        if self.format is not WireFormat.MODEL:
            codes, scales = quantize_rows(hidden_states, self.format)
            of_records = scales if tokens is None else scales[tokens]
            words[:, self._scales] = of_records.view(torch.int32)
            values = codes.view(torch.uint8)
        if tokens is None:
            self._values(records)[:] = values
        else:
            torch.index_select(values, 0, tokens, out=self._values(records))
        return records

    def read(self, records: Tensor) -> ExpertBatch:
        """The inverse of `write`, but for the rounding of 8-bit codes."""
        words = records.view(torch.int32)
        k = self.top_k
        values = self._values(records)
        if self.format is not WireFormat.MODEL:
            scales = words[:, self._scales].view(torch.float32)
            values = dequantize_rows(values, scales, self.format, self.dtype)
        weights = words[:, k : 2 * k].view(torch.float32)
        return ExpertBatch(
            values.contiguous(),
            words[:, :k].contiguous(),
            weights.contiguous(),
            adapter_ids=words[:, 2 * k].contiguous(),
        )

    def _values(self, records: Tensor) -> Tensor:
        """The values' part of records, as a view: (M,H)."""
        dtype = self.dtype if self.format is WireFormat.MODEL else torch.uint8
        start = self.values_offset // dtype.itemsize
        return records.view(dtype)[:, start : start + self.hidden_size]


def quantize_rows(rows: Tensor, wire: WireFormat) -> tuple[Tensor, Tensor]:
    """Round 128 columns at a time to the nearest code: (M,H) -> codes (M,H), scales fp32 (M,G).

    `codes = round(x / s)` with `s = max|x| / largest code`; a group of zeros has s = 0.
    """
    count, hidden = rows.shape
    groups = -(-hidden // COLUMNS_PER_SCALE)
    padded = F.pad(rows.to(torch.float32), (0, groups * COLUMNS_PER_SCALE - hidden))
    blocks = padded.view(count, groups, COLUMNS_PER_SCALE)
    largest = LARGEST_INT8 if wire is WireFormat.INT8 else LARGEST_E4M3
    scales = blocks.abs().amax(2) / largest
    scaled = blocks / torch.where(scales == 0, 1.0, scales).unsqueeze(2)
    if wire is WireFormat.INT8:
        codes = scaled.round().clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
    else:
        codes = scaled.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, :hidden], scales


def dequantize_rows(codes: Tensor, scales: Tensor, wire: WireFormat, dtype: torch.dtype) -> Tensor:
    """`codes * scale`: uint8 bytes (M,H) and fp32 scales (M,G) -> (M,H) of a dtype."""
    values = codes.contiguous().view(torch.int8 if wire is WireFormat.INT8 else torch.float8_e4m3fn)
    whole = scales.repeat_interleave(COLUMNS_PER_SCALE, 1)[:, : codes.shape[1]]
    return (values.to(torch.float32) * whole).to(dtype)


def _aligned(count: int) -> int:
    return -(-count // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
