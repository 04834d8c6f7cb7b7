"""One linear map per expert over rows sorted by expert, where no graph is recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.quant.matrix import QuantizedMatrix, dequantize

GROUPED_MM_DTYPES = {"cpu": (torch.bfloat16, torch.float16, torch.float32)}
"""Where `grouped_mm` is known to be faster than a loop here: dtypes by device type."""

GROUPED_MM_MIN_SHARE = 0.25
"""Of the experts that have rows. `grouped_mm` visits all, at 1.4 us for one without rows; a loop
visits those with rows, at 3.7 us more for each (EPYC 9004, torch 2.13)."""

STRIDE_BYTES = 16
"""`grouped_mm` asks that rows start at multiples of this."""

LONE_ROW_MIN_ELEMENTS = 2**20
"""Of one expert's matrix; with smaller ones the time to prepare a second row is not regained."""


def linear_by_expert(
    rows: Tensor,
    weight: QuantizedMatrix,
    bias: Tensor | None,
    *,
    first_expert: int,
    tokens_per_expert: Sequence[int],
) -> Tensor:
    """`rows[r] @ W[e].T + bias[e]` for the rows r of expert e; experts without rows are not read.

    Args:
        rows: (N, in) sorted by expert.
        weight: (L, out, in).
        bias: (L, out) or None.
        first_expert: the expert that the first of the counts is of.
        tokens_per_expert: rows of this expert and those that follow it; their sum is N.

    Returns:
        (N, out) in the rows' dtype.
    """
    num_experts = len(tokens_per_expert)
    num_visited = num_experts - tokens_per_expert.count(0)
    is_worth_it = num_visited >= GROUPED_MM_MIN_SHARE * num_experts
    if is_worth_it and _fits_grouped_mm(rows, weight):
        span = slice(first_expert, first_expert + num_experts)
        repeats = torch.tensor(tokens_per_expert, device=rows.device)
        ends = repeats.cumsum(0, dtype=torch.int32)
        out = F.grouped_mm(rows, weight.values[span].transpose(1, 2), offs=ends)
        if bias is not None:
            out += bias[span].to(rows.dtype).repeat_interleave(repeats, 0)
        return out
    experts = [e for e, count in enumerate(tokens_per_expert, first_expert) if count]
    counts = [count for count in tokens_per_expert if count]
    dense = None if weight.is_quantized else weight.values.transpose(1, 2)
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    rows_of, out_of = rows.split_with_sizes(counts), out.split_with_sizes(counts)
    for expert, x, y in zip(experts, rows_of, out_of, strict=True):
        if dense is None:
            matrix = dequantize(weight.expert(expert), rows.dtype).T
        else:
            matrix = dense[expert].to(rows.dtype)
        torch.mm(x, matrix, out=y)
        if bias is not None:
            y += bias[expert].to(rows.dtype)
    return out


def _fits_grouped_mm(rows: Tensor, weight: QuantizedMatrix) -> bool:
    return (
        not weight.is_quantized
        and rows.dtype == weight.values.dtype
        and rows.dtype in GROUPED_MM_DTYPES.get(rows.device.type, ())
        and _is_aligned(rows)
        and _is_aligned(weight.values)
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether one of the last two dims is contiguous and the other has aligned strides."""
    *_, outer, inner = tensor.stride()
    return min(outer, inner) == 1 and max(outer, inner) * tensor.itemsize % STRIDE_BYTES == 0


def is_lone_row_slow(rows: Tensor, weight: QuantizedMatrix) -> bool:
    """Whether the product of one row takes longer than that of two, so that it had better be two.

    oneDNN's bf16 product does on CPUs: 693 against 541 us for a 2048 x 2048 matrix on two cores
    (EPYC 9004, torch 2.13).
    """
    return (
        rows.device.type == "cpu"
        and rows.dtype is torch.bfloat16
        and weight.shape[1] * weight.shape[2] >= LONE_ROW_MIN_ELEMENTS
    )
