"""The down projection of packed experts: hidden rows by slot -> the experts' outputs by slot.

T rows of a tile, N columns of the output.
"""

import triton
import triton.language as tl

from mixtura.kernels.triton.packed.products import (
    add_step,
    finished,
    is_within,
    num_steps,
    slots_of,
    zero_sums,
)
from mixtura.kernels.triton.steps import tile_entry, tile_of


@triton.jit
def down_tile(
    hidden,
    matrix,
    bias_ptr,
    out_ptr,
    sort_order_ptr,
    expert,
    first,
    num_rows,
    block,
    SIZES: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
    SWAP_AB: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Block `block` of columns of one tile of at most BLOCK_T rows; see `packed_down_kernel`."""
    HIDDEN_SIZE: tl.constexpr = SIZES[0]
    INTERMEDIATE_SIZE: tl.constexpr = SIZES[1]
    is_row = tl.arange(0, BLOCK_T) < num_rows
    slot = slots_of(sort_order_ptr, first, is_row).to(tl.int64)
    rows = hidden.data + slot[:, None] * STRIDE
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = is_within(n, HIDDEN_SIZE, BLOCK_N)
    total = zero_sums(BLOCK_N, BLOCK_T, FORMAT, SWAP_AB, INTERPRET)
    for step in tl.range(0, num_steps(INTERMEDIATE_SIZE, FORMAT)):
        total = add_step(
            total, hidden, rows, slot, is_row, matrix, expert, step, n, is_column,
            INTERMEDIATE_SIZE, FORMAT, SWAP_AB, INTERPRET,
        )  # fmt: skip
    total = finished(total, hidden, slot, is_row, matrix, expert, n, is_column, FORMAT, SWAP_AB)
    if SWAP_AB:
        total = tl.trans(total)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * HIDDEN_SIZE + n, mask=is_column, other=0.0)
        total += bias.to(tl.float32)[None, :]
    out = out_ptr + slot[:, None] * HIDDEN_SIZE + n[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def packed_down_kernel(
    hidden,
    matrix,
    bias_ptr,
    out_ptr,
    local_ids_ptr,
    sort_order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    NUM_EXPERTS: tl.constexpr,
    SIZES: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAIL_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    SWAP_AB: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`out[s] = hidden[s] @ W[e].T + b[e]` of slots s.

    SIZES are hidden size H and intermediate size I. hidden: `Rows` (slots, I) with STRIDE; matrix:
    `Matrix`; bias (L, H); out (slots, H); others as in `packed_gate_up_kernel`.

    Example: tile (expert 3, first row 40, 5 rows) makes the output of the five slots
    sort_order[40:45].
    """
    num_blocks = tl.cdiv(SIZES[0], BLOCK_N)
    if sort_order_ptr is None:
        num_slots = tl.num_programs(0) // num_blocks
        slot = tl.program_id(0) % num_slots
        expert = tl.load(local_ids_ptr + slot).to(tl.int64)
        if (expert < 0) | (expert >= NUM_EXPERTS):
            return
        down_tile(
            hidden, matrix, bias_ptr, out_ptr, sort_order_ptr, expert, slot, 1,
            tl.program_id(0) // num_slots, SIZES, STRIDE, BLOCK_T, BLOCK_N, FORMAT, SWAP_AB,
            INTERPRET,
        )  # fmt: skip
    else:
        num_tiles = tl.load(num_tiles_ptr)
        if tl.program_id(0) >= num_tiles * num_blocks:
            return
        tile, block = tile_of(tl.program_id(0), num_tiles, num_blocks, GROUP)
        expert, first, num_rows = tile_entry(tiles_ptr, tile)
        if TAIL_T > 0 and num_rows <= TAIL_T:
            down_tile(
                hidden, matrix, bias_ptr, out_ptr, sort_order_ptr, expert, first, num_rows, block,
                SIZES, STRIDE, TAIL_T, BLOCK_N, FORMAT, SWAP_AB, INTERPRET,
            )  # fmt: skip
        else:
            down_tile(
                hidden, matrix, bias_ptr, out_ptr, sort_order_ptr, expert, first, num_rows, block,
                SIZES, STRIDE, BLOCK_T, BLOCK_N, FORMAT, SWAP_AB, INTERPRET,
            )  # fmt: skip
