"""Gate and up projections of packed experts: tiles of rows -> hidden rows, slot by slot.

T rows of a tile, N columns of the hidden layer.
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
from mixtura.kernels.triton.packed.rounding import as_codes, found_scale
from mixtura.kernels.triton.steps import finish_hidden, tile_entry, tile_of


@triton.jit
def gate_up_tile(
    x,
    matrix,
    bias_ptr,
    slot_weights_ptr,
    out,
    sort_order_ptr,
    expert,
    first,
    num_rows,
    block,
    DIVISOR: tl.constexpr,
    SIZES: tl.constexpr,
    ROW_STRIDES: tl.constexpr,
    GATE_UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUNDS_OUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
    SWAP_AB: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Block `block` of columns of one tile of at most BLOCK_T rows; see `packed_gate_up_kernel`.

    Rows of gate and those of up below them are one sum, which is taken apart at the end; operands
    that come from shared memory are two, whose parts are added one after the other.
    """
    HIDDEN_SIZE: tl.constexpr = SIZES[0]
    INTERMEDIATE_SIZE: tl.constexpr = SIZES[1]
    IS_GATED: tl.constexpr = GATE_UP != "ungated"
    WIDTH: tl.constexpr = 2 * BLOCK_N if IS_GATED else BLOCK_N

    t = tl.arange(0, BLOCK_T)
    is_row = t < num_rows
    slot = slots_of(sort_order_ptr, first, is_row)
    x_row = (slot // DIVISOR).to(tl.int64)
    x_rows = x.data + x_row[:, None] * ROW_STRIDES[0]
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = is_within(n, INTERMEDIATE_SIZE, BLOCK_N)
    if IS_GATED and FORMAT.fields == 1:
        n_up = INTERMEDIATE_SIZE + n
        gate = zero_sums(BLOCK_N, BLOCK_T, FORMAT, SWAP_AB, INTERPRET)
        up = zero_sums(BLOCK_N, BLOCK_T, FORMAT, SWAP_AB, INTERPRET)
        for step in tl.range(0, num_steps(HIDDEN_SIZE, FORMAT)):
            gate = add_step(
                gate, x, x_rows, x_row, is_row, matrix, expert, step, n, is_column,
                HIDDEN_SIZE, FORMAT, SWAP_AB, INTERPRET,
            )  # fmt: skip
            up = add_step(
                up, x, x_rows, x_row, is_row, matrix, expert, step, n_up, is_column,
                HIDDEN_SIZE, FORMAT, SWAP_AB, INTERPRET,
            )  # fmt: skip
        gate = finished(gate, x, x_row, is_row, matrix, expert, n, is_column, FORMAT, SWAP_AB)
        up = finished(up, x, x_row, is_row, matrix, expert, n_up, is_column, FORMAT, SWAP_AB)
        if SWAP_AB:
            gate = tl.trans(gate)
            up = tl.trans(up)
    else:
        tl.static_assert(SWAP_AB or not IS_GATED)
        w = tl.arange(0, WIDTH)
        column = block * BLOCK_N + w % BLOCK_N
        is_weight = is_within(column, INTERMEDIATE_SIZE, BLOCK_N)
        weight = column + w // BLOCK_N * INTERMEDIATE_SIZE
        total = zero_sums(WIDTH, BLOCK_T, FORMAT, SWAP_AB, INTERPRET)
        for step in tl.range(0, num_steps(HIDDEN_SIZE, FORMAT)):
            total = add_step(
                total, x, x_rows, x_row, is_row, matrix, expert, step, weight, is_weight,
                HIDDEN_SIZE, FORMAT, SWAP_AB, INTERPRET,
            )  # fmt: skip
        total = finished(
            total, x, x_row, is_row, matrix, expert, weight, is_weight, FORMAT, SWAP_AB
        )  # fmt: skip
        if IS_GATED:
            pairs = tl.reshape(total, (2, BLOCK_N, BLOCK_T))
            gate, up = tl.split(tl.permute(pairs, (2, 1, 0)))
        else:
            gate = tl.trans(total) if SWAP_AB else total
            up = gate
    hidden = finish_hidden(
        gate, up, n, slot, is_row, is_column, slot_weights_ptr, bias_ptr, expert, SIZES, GATE_UP,
        ACTIVATION,
    )  # fmt: skip
    out_row = slot.to(tl.int64)[:, None]
    mask = is_row[:, None] & is_column[None, :]
    pointers = out.data + out_row * ROW_STRIDES[1] + n[None, :]
    if ROUNDS_OUT:
        hidden = tl.where(is_column[None, :], hidden, 0.0)
        IS_INT: tl.constexpr = out.data.dtype.element_ty == tl.int8
        scale = found_scale(hidden, 1, IS_INT)
        NUM_GROUPS: tl.constexpr = (INTERMEDIATE_SIZE + BLOCK_N - 1) // BLOCK_N
        tl.store(out.scales + out_row * NUM_GROUPS + block, scale, mask=is_row[:, None])
        tl.store(pointers, as_codes(hidden, scale, IS_INT, INTERPRET), mask=mask)
    else:
        tl.store(pointers, hidden.to(out.data.dtype.element_ty), mask=mask)


@triton.jit
def packed_gate_up_kernel(
    x,
    matrix,
    bias_ptr,
    slot_weights_ptr,
    out,
    local_ids_ptr,
    sort_order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    NUM_EXPERTS: tl.constexpr,
    DIVISOR: tl.constexpr,
    SIZES: tl.constexpr,
    ROW_STRIDES: tl.constexpr,
    GATE_UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUNDS_OUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAIL_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    SWAP_AB: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`out[s] = f(x[r] @ Wg[e].T + b_gate[e]) * (x[r] @ Wu[e].T + b_up[e])` of slots s, r = s //
    DIVISOR.

    SIZES are hidden size H, intermediate size I and rows of bias U. x: `Rows` (r, H), out: `Rows`
    (slots, I), with strides ROW_STRIDES; matrix: `Matrix`, gate's rows before up's; bias (L, U),
    slot_weights (slots,), which scale the input. With sort_order, tiles and num_tiles of
    `ExpertOrder` as in `gate_up_kernel`; without, every slot is a tile, of expert local_ids[s].
    With ROUNDS_OUT, columns of a block are a group of the codes in `out`.

    Example: tile (expert 3, first row 40, 5 rows) and BLOCK_N 64 make, with block of columns 2,
    out[s, 128:192] of the five slots sort_order[40:45].
    """
    num_blocks = tl.cdiv(SIZES[1], BLOCK_N)
    if sort_order_ptr is None:
        num_slots = tl.num_programs(0) // num_blocks
        slot = tl.program_id(0) % num_slots
        expert = tl.load(local_ids_ptr + slot).to(tl.int64)
        if (expert < 0) | (expert >= NUM_EXPERTS):
            return
        gate_up_tile(
            x, matrix, bias_ptr, slot_weights_ptr, out, sort_order_ptr, expert, slot, 1,
            tl.program_id(0) // num_slots, DIVISOR, SIZES, ROW_STRIDES, GATE_UP, ACTIVATION,
            ROUNDS_OUT, BLOCK_T, BLOCK_N, FORMAT, SWAP_AB, INTERPRET,
        )  # fmt: skip
    else:
        num_tiles = tl.load(num_tiles_ptr)
        if tl.program_id(0) >= num_tiles * num_blocks:
            return
        tile, block = tile_of(tl.program_id(0), num_tiles, num_blocks, GROUP)
        expert, first, num_rows = tile_entry(tiles_ptr, tile)
        if TAIL_T > 0 and num_rows <= TAIL_T:
            gate_up_tile(
                x, matrix, bias_ptr, slot_weights_ptr, out, sort_order_ptr, expert, first,
                num_rows, block, DIVISOR, SIZES, ROW_STRIDES, GATE_UP, ACTIVATION, ROUNDS_OUT,
                TAIL_T, BLOCK_N, FORMAT, SWAP_AB, INTERPRET,
            )  # fmt: skip
        else:
            gate_up_tile(
                x, matrix, bias_ptr, slot_weights_ptr, out, sort_order_ptr, expert, first,
                num_rows, block, DIVISOR, SIZES, ROW_STRIDES, GATE_UP, ACTIVATION, ROUNDS_OUT,
                BLOCK_T, BLOCK_N, FORMAT, SWAP_AB, INTERPRET,
            )  # fmt: skip
