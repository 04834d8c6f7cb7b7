"""Gate and up projections with the activation between: sorted tiles of rows -> hidden rows.

T rows of a tile, N columns of the hidden layer, K columns of the input.
"""

import triton
import triton.language as tl

from mixtura.kernels.triton.steps import (
    finish_hidden,
    multiply_add,
    read_rows,
    read_tile,
    tile_entry,
    tile_of,
)


@triton.jit
def gate_up_tile(
    x_ptr,
    weight,
    up_weight,
    bias_ptr,
    slot_weights_ptr,
    out_ptr,
    sort_order_ptr,
    expert,
    first,
    num_rows,
    block,
    TOP_K: tl.constexpr,
    SIZES: tl.constexpr,
    STRIDES: tl.constexpr,
    UP_STRIDES: tl.constexpr,
    GATE_UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    READ: tl.constexpr,
    UP_READ: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Block `block` of columns of one tile of at most BLOCK_T rows; see `gate_up_kernel`.

    Two sums are kept, of gate and of up, so that weights stay as they are stored; only interleaved
    ones are one sum of twice the width, taken apart at the end.
    """
    HIDDEN_SIZE: tl.constexpr = SIZES[0]
    INTERMEDIATE_SIZE: tl.constexpr = SIZES[1]
    UP_SIZE: tl.constexpr = SIZES[2]
    IS_INTERLEAVED: tl.constexpr = GATE_UP == "interleaved"
    IS_ONE_SUM: tl.constexpr = GATE_UP == "interleaved" or GATE_UP == "ungated"
    WIDTH: tl.constexpr = 2 * BLOCK_N if IS_INTERLEAVED else BLOCK_N
    END: tl.constexpr = UP_SIZE if IS_ONE_SUM else INTERMEDIATE_SIZE
    UP_START: tl.constexpr = INTERMEDIATE_SIZE if GATE_UP == "stacked" else 0

    t = tl.arange(0, BLOCK_T)
    is_row = t < num_rows
    slot = tl.load(sort_order_ptr + first + t, mask=is_row, other=0)
    x_rows = x_ptr + (slot // TOP_K).to(tl.int64)[:, None] * HIDDEN_SIZE
    row = block * WIDTH
    if SWAP_AB:
        gate = tl.zeros((WIDTH, BLOCK_T), dtype=tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    else:
        gate = tl.zeros((BLOCK_T, WIDTH), dtype=tl.float32)
        up = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, HIDDEN_SIZE, BLOCK_K):
        x = read_rows(x_rows, is_row, k, HIDDEN_SIZE, BLOCK_K, BLOCK_K, INTERPRET)
        w = read_tile(
            weight, expert, row, k, END, UP_SIZE, HIDDEN_SIZE, STRIDES, WIDTH, BLOCK_K, READ,
            INTERPRET,
        )  # fmt: skip
        gate = multiply_add(x, w, gate, SWAP_AB)
        if not IS_ONE_SUM:
            w = read_tile(
                up_weight, expert, UP_START + row, k, UP_START + END, UP_SIZE, HIDDEN_SIZE,
                UP_STRIDES, BLOCK_N, BLOCK_K, UP_READ, INTERPRET,
            )  # fmt: skip
            up = multiply_add(x, w, up, SWAP_AB)

    if SWAP_AB:
        gate = tl.trans(gate)
        up = tl.trans(up)
    if IS_INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_T, BLOCK_N, 2)))
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = n < INTERMEDIATE_SIZE
    hidden = finish_hidden(
        gate, up, n, slot, is_row, is_column, slot_weights_ptr, bias_ptr, expert, SIZES, GATE_UP,
        ACTIVATION,
    )  # fmt: skip
    out = out_ptr + (first + t).to(tl.int64)[:, None] * INTERMEDIATE_SIZE + n[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(out, hidden.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_up_kernel(
    x_ptr,
    weight,
    up_weight,
    bias_ptr,
    slot_weights_ptr,
    out_ptr,
    sort_order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    TOP_K: tl.constexpr,
    SIZES: tl.constexpr,
    STRIDES: tl.constexpr,
    UP_STRIDES: tl.constexpr,
    GATE_UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAIL_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP_AB: tl.constexpr,
    READ: tl.constexpr,
    UP_READ: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`out[r] = f(x[t] @ Wg[e].T + b_gate[e]) * (x[t] @ Wu[e].T + b_up[e])` of sorted rows r.

    Row r is flat slot s = sort_order[r] of token t = s // TOP_K. SIZES are hidden size H,
    intermediate size I and rows of a matrix U. Pointers: x (M, H), weight (L, U, H) with STRIDES or
    a descriptor (`read_tile`), up_weight the same where there are two sums, bias (L, U),
    slot_weights (M, TOP_K), which scale the input, out (rows, I), sort_order, tiles and num_tiles
    of `ExpertOrder`. Tiles of at most TAIL_T rows are computed as such, right after their expert's
    others, while the L2 cache has its weights; without tails the next tile's reads begin before
    this one is written.

    Example: tile (expert 3, first row 40, 5 rows) and BLOCK_N 64 make, with block of columns 2,
    out[40:45, 128:192] of x at the tokens of slots sort_order[40:45].
    """
    num_tiles = tl.load(num_tiles_ptr)
    num_blocks = tl.cdiv(SIZES[1], BLOCK_N)
    start, step = tl.program_id(0), tl.num_programs(0)
    for item in tl.range(start, num_tiles * num_blocks, step, flatten=not SWAP_AB and TAIL_T == 0):
        tile, block = tile_of(item, num_tiles, num_blocks, GROUP)
        expert, first, num_rows = tile_entry(tiles_ptr, tile)
        if TAIL_T > 0 and num_rows <= TAIL_T:
            gate_up_tile(
                x_ptr, weight, up_weight, bias_ptr, slot_weights_ptr, out_ptr, sort_order_ptr,
                expert, first, num_rows, block, TOP_K, SIZES, STRIDES, UP_STRIDES, GATE_UP,
                ACTIVATION, TAIL_T, BLOCK_N, BLOCK_K, SWAP_AB, READ, UP_READ, INTERPRET,
            )  # fmt: skip
        else:
            gate_up_tile(
                x_ptr, weight, up_weight, bias_ptr, slot_weights_ptr, out_ptr, sort_order_ptr,
                expert, first, num_rows, block, TOP_K, SIZES, STRIDES, UP_STRIDES, GATE_UP,
                ACTIVATION, BLOCK_T, BLOCK_N, BLOCK_K, SWAP_AB, READ, UP_READ, INTERPRET,
            )  # fmt: skip
