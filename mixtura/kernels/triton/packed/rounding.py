"""Rows as codes of 8 bits, as `quantize_activations` and `round_activations` mean them."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """Rows that a product reads or writes.

    Attributes:
        data: (rows, columns), as they come or as codes. scales: fp32, (rows,) or (rows, groups);
        None for rows as they come.
    """

    data: Tensor
    scales: Tensor | None


@triton.jit
def found_scale(x, AXIS: tl.constexpr, IS_INT: tl.constexpr):
    """The scale of values (fp32) along an axis, which stays; NaN where one of them is."""
    LIMIT: tl.constexpr = 127.5 if IS_INT else 448.0
    magnitude = tl.max(tl.abs(x), AXIS, keep_dims=True)
    scale = tl.div_rn(magnitude, tl.full(magnitude.shape, LIMIT, tl.float32))
    scale = tl.maximum(scale, 1.1920928955078125e-07)
    is_nan = tl.max((x != x).to(tl.int32), AXIS, keep_dims=True) > 0
    return tl.where(is_nan, float("nan"), scale)


@triton.jit
def as_codes(x, scale, IS_INT: tl.constexpr, INTERPRET: tl.constexpr):
    """Codes of values (fp32) with a scale that broadcasts, rounded to even: int8 or e4m3.

    What is not a number gets some code: its scale, which is none either, speaks for it.
    """
    quotient = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    if IS_INT:
        # Numbers of 2^23 and more have no fraction.
        rounded = (tl.minimum(tl.maximum(quotient, -128.0), 127.0) + 12582912.0) - 12582912.0
        codes = rounded.to(tl.int32).to(tl.int8)
    else:
        limited = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
        if INTERPRET:
            # Its cast rounds otherwise. A number whose last digit is that of x's codes is added.
            power = (limited.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            digit = tl.maximum(power, 0.015625) * 1572864.0
            limited = (limited + digit) - digit
        codes = limited.to(tl.float8e4nv)
    return codes


@triton.jit
def round_rows_kernel(
    x_ptr,
    rows,
    local_ids_ptr,
    expert_scales_ptr,
    slot_weights_ptr,
    NUM_EXPERTS: tl.constexpr,
    DIVISOR: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Codes and one scale of row x[i // DIVISOR] for each i: rows.data (n, STRIDE), scales (n,).

    x (n // DIVISOR, NUM_COLUMNS). With local_ids (n,), rows i of no expert are left out; with
    expert_scales (NUM_EXPERTS,), a row's scale is its expert's where that has one. Rows are
    multiplied by slot_weights (n,) first.

    Example: DIVISOR 8, ids[9] = 3 and expert_scales[3] = 0.5 make row 9, the codes of x[1] / 0.5.
    """
    i = tl.program_id(0).to(tl.int64)
    stored = 0.0
    if local_ids_ptr is not None:
        expert = tl.load(local_ids_ptr + i)
        if (expert < 0) | (expert >= NUM_EXPERTS):
            return
        if expert_scales_ptr is not None:
            stored = tl.load(expert_scales_ptr + expert)
    weight = 1.0
    if slot_weights_ptr is not None:
        weight = tl.load(slot_weights_ptr + i)
    x_row = x_ptr + i // DIVISOR * NUM_COLUMNS
    k = tl.arange(0, BLOCK)
    scale = tl.zeros((1,), tl.float32)
    for start in tl.range(0, NUM_COLUMNS, BLOCK):
        x = tl.load(x_row + start + k, mask=start + k < NUM_COLUMNS, other=0.0).to(tl.float32)
        x *= weight
        found = found_scale(x, 0, IS_INT)
        scale = tl.maximum(scale, found, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where(stored > 0.0, stored, scale)
    tl.store(rows.scales + i + tl.arange(0, 1), scale)
    for start in tl.range(0, NUM_COLUMNS, BLOCK):
        mask = start + k < NUM_COLUMNS
        x = tl.load(x_row + start + k, mask=mask, other=0.0).to(tl.float32)
        x *= weight
        codes = as_codes(x, scale, IS_INT, INTERPRET)
        tl.store(rows.data + i * STRIDE + start + k, codes, mask=mask)


@triton.jit
def round_groups_kernel(
    x_ptr,
    rows,
    slot_weights_ptr,
    DIVISOR: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Codes of row x[i // DIVISOR] for each i, a scale for GROUP columns: (n, STRIDE), (n, groups).

    x (n // DIVISOR, NUM_COLUMNS); rows are multiplied by slot_weights (n,) first.

    Example: BLOCK 1024 and GROUP 128: program (5, 1) makes codes[5, 1024:2048], scales[5, 8:16].
    """
    i = tl.program_id(0).to(tl.int64)
    NUM_GROUPS: tl.constexpr = (NUM_COLUMNS + GROUP - 1) // GROUP
    group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x_row = x_ptr + i // DIVISOR * NUM_COLUMNS
    x = tl.load(x_row + k, mask=k < NUM_COLUMNS, other=0.0).to(tl.float32)
    if slot_weights_ptr is not None:
        x *= tl.load(slot_weights_ptr + i)
    scale = found_scale(x, 1, IS_INT)
    codes = as_codes(x, scale, IS_INT, INTERPRET)
    tl.store(rows.data + i * STRIDE + k, codes, mask=k < NUM_COLUMNS)
    scales = rows.scales + i * NUM_GROUPS + group[:, None]
    tl.store(scales, scale, mask=group[:, None] < NUM_GROUPS)
