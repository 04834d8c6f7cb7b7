"""One linear map per expert over rows sorted by expert, where no graph is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.quant.scheme import QuantizedMatrix, dequantize

GROUPED_MM_DTYPES = {"cpu": (torch.bfloat16, torch.float16, torch.float32)}
"""Where `grouped_mm` is known to be faster than a loop here: dtypes by device type."""

GROUPED_MM_MIN_SHARE = 0.25
"""Of the experts that have rows. `grouped_mm` visits all, at 1.4 us for one without rows; a loop
visits those with rows, at 3.7 us more for each (EPYC 9004, torch 2.13)."""

STRIDE_BYTES = 16
"""`grouped_mm` asks that rows start at multiples of this."""


def linear_by_expert(
    rows: Tensor, weight: QuantizedMatrix, tokens_per_expert: Sequence[int]
) -> Tensor:
    """`rows[r] @ W[e].T` for the rows r of expert e; experts without rows are not read.

    Args:
        rows: (N, in) sorted by expert. weight: (L, out, in). tokens_per_expert: L counts, sum N.

    Returns:
        (N, out) in the rows' dtype.
    """
    num_visited = sum(map(bool, tokens_per_expert))
    is_worth_it = num_visited >= GROUPED_MM_MIN_SHARE * len(tokens_per_expert)
    if is_worth_it and _fits_grouped_mm(rows, weight):
        ends = torch.tensor(
            list(accumulate(tokens_per_expert)), dtype=torch.int32, device=rows.device
        )
        return F.grouped_mm(rows, weight.values.transpose(1, 2), offs=ends)
    stack = None if weight.is_quantized else weight.values
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    start = 0
    for expert, count in enumerate(tokens_per_expert):
        if count == 0:
            continue
        stop = start + count
        if stack is None:
            matrix = dequantize(weight.expert(expert), rows.dtype)
        else:
            matrix = stack[expert].to(rows.dtype)
        torch.mm(rows[start:stop], matrix.T, out=out[start:stop])
        start = stop
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


LONE_ROW_MIN_ELEMENTS = 2**20
"""Of one expert's matrix; with smaller ones the time to prepare a second row is not regained."""


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
