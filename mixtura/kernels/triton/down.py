"""The down projection: sorted tiles of hidden rows -> the experts' outputs, slot by slot.

T rows of a tile, N columns of the output, K columns of the hidden layer.
"""

import triton
import triton.language as tl

from mixtura.kernels.triton.steps import multiply_add, read_rows, read_tile, tile_entry, tile_of


@triton.jit
def down_tile(
    hidden_ptr,
    weight,
    bias_ptr,
    out_ptr,
    sort_order_ptr,
    expert,
    first,
    num_rows,
    block,
    SIZES: tl.constexpr,
    STRIDES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    READ: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Block `block` of columns of one tile of at most BLOCK_T rows; see `down_kernel`."""
    HIDDEN_SIZE: tl.constexpr = SIZES[0]
    INTERMEDIATE_SIZE: tl.constexpr = SIZES[1]
    t = tl.arange(0, BLOCK_T)
    is_row = t < num_rows
    rows = hidden_ptr + (first + t).to(tl.int64)[:, None] * INTERMEDIATE_SIZE
    row = block * BLOCK_N
    if SWAP_AB:
        total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, INTERMEDIATE_SIZE, BLOCK_K):
        x = read_rows(rows, is_row, k, INTERMEDIATE_SIZE, BLOCK_K, BLOCK_K, INTERPRET)
        w = read_tile(
            weight, expert, row, k, HIDDEN_SIZE, HIDDEN_SIZE, INTERMEDIATE_SIZE, STRIDES, BLOCK_N,
            BLOCK_K, READ, INTERPRET,
        )  # fmt: skip
        total = multiply_add(x, w, total, SWAP_AB)
    if SWAP_AB:
        total = tl.trans(total)
    n = row + tl.arange(0, BLOCK_N)
    is_column = n < HIDDEN_SIZE
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * HIDDEN_SIZE + n, mask=is_column, other=0.0)
        total += bias.to(tl.float32)[None, :]
    slot = tl.load(sort_order_ptr + first + t, mask=is_row, other=0).to(tl.int64)
    out = out_ptr + slot[:, None] * HIDDEN_SIZE + n[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def down_kernel(
    hidden_ptr,
    weight,
    bias_ptr,
    out_ptr,
    sort_order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    SIZES: tl.constexpr,
    STRIDES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAIL_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP_AB: tl.constexpr,
    READ: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`out[sort_order[r]] = hidden[r] @ W[e].T + b[e]` of sorted rows r.

    SIZES are hidden size H and intermediate size I. Pointers: hidden (rows, I), weight (L, H, I)
    with STRIDES or a descriptor (`read_tile`), bias (L, H), out (slots, H), sort_order, tiles and
    num_tiles of `ExpertOrder`. TAIL_T as in `gate_up_kernel`.

    Example: tile (expert 3, first row 40, 5 rows) makes the output of the five slots
    sort_order[40:45], a token's slots next to each other in `out`, ready to be added.
    """
    num_tiles = tl.load(num_tiles_ptr)
    num_blocks = tl.cdiv(SIZES[0], BLOCK_N)
    start, step = tl.program_id(0), tl.num_programs(0)
    for item in tl.range(start, num_tiles * num_blocks, step, flatten=not SWAP_AB and TAIL_T == 0):
        tile, block = tile_of(item, num_tiles, num_blocks, GROUP)
        expert, first, num_rows = tile_entry(tiles_ptr, tile)
        if TAIL_T > 0 and num_rows <= TAIL_T:
            down_tile(
                hidden_ptr, weight, bias_ptr, out_ptr, sort_order_ptr, expert, first, num_rows,
                block, SIZES, STRIDES, TAIL_T, BLOCK_N, BLOCK_K, SWAP_AB, READ, INTERPRET,
            )  # fmt: skip
        else:
            down_tile(
                hidden_ptr, weight, bias_ptr, out_ptr, sort_order_ptr, expert, first, num_rows,
                block, SIZES, STRIDES, BLOCK_T, BLOCK_N, BLOCK_K, SWAP_AB, READ, INTERPRET,
            )  # fmt: skip
