"""What identity experts add to the routed result, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from mixtura.cuda import on_device
from mixtura.kernels.triton.buffers import empty
from mixtura.kernels.triton.launch import cdiv, next_power_of_2

BLOCK_H = 1024
"""Columns of a program."""


@triton.jit
def bypass_kernel(
    routed_ptr,
    rows_ptr,
    weight_ptr,
    out_ptr,
    stride_routed,
    stride_rows,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """`out[m] = routed[m] + weight[m] * rows[m]`, in fp32, rounded once.

    Pointers: routed and rows (M, HIDDEN_SIZE) with strides, weight (M,), out (M, HIDDEN_SIZE).

    Example: weight .25 and a row of ones add .25 to every column.
    """
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_column = n < HIDDEN_SIZE
    routed = tl.load(routed_ptr + m * stride_routed + n, mask=is_column, other=0.0).to(tl.float32)
    row = tl.load(rows_ptr + m * stride_rows + n, mask=is_column, other=0.0).to(tl.float32)
    total = routed + tl.load(weight_ptr + m) * row
    tl.store(out_ptr + m * HIDDEN_SIZE + n, total.to(out_ptr.dtype.element_ty), mask=is_column)


def add_identity(routed: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """(M,H), (M,H), fp32 (M,) -> (M,H) in the dtype of `routed`."""
    num_rows, width = routed.shape
    out = empty(routed, "rows with what bypasses experts", (num_rows, width), routed.dtype)
    if num_rows == 0:
        return out
    routed, rows = (t if t.stride(1) == 1 else t.contiguous() for t in (routed, rows))
    with on_device(routed.device):
        bypass_kernel[(num_rows, cdiv(width, BLOCK_H))](
            routed,
            rows,
            weight.contiguous(),
            out,
            routed.stride(0),
            rows.stride(0),
            HIDDEN_SIZE=width,
            BLOCK_H=min(BLOCK_H, next_power_of_2(width)),
        )
    return out
