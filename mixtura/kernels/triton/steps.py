"""What the kernels of the experts have in common: finding a tile, reading weights, activations.

Under the interpreter bf16 arithmetic is wrong, so that everything is widened to fp32 as soon as it
is read (`INTERPRET`).
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(item, num_tiles, num_blocks, GROUP: tl.constexpr):
    """(tile, block of columns) of a work item.

    Items go through the blocks of GROUP tiles before the next ones', tiles fastest: what is being
    read by all programs together, weights and rows, stays small enough for the L2 cache.
    With GROUP 2, 4 tiles and 3 blocks: (0,0) (1,0) (0,1) (1,1) (0,2) (1,2) (2,0) ...
    """
    group = item // (GROUP * num_blocks)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    within = item % (GROUP * num_blocks)
    return group * GROUP + within % size, within // size


@triton.jit
def tile_entry(tiles_ptr, tile):
    """(expert as int64, first sorted row, number of rows) of a tile of `ExpertOrder`."""
    entry = tiles_ptr + tile * 4
    return tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def read_rows(
    rows,
    is_row,
    k,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Columns k .. of the rows that pointers (T, 1) begin: (T, BLOCK_K), 0 behind the last.

    They are part of a step of DEPTH columns.
    """
    columns = k + tl.arange(0, BLOCK_K)
    mask = is_row[:, None]
    if NUM_COLUMNS % DEPTH != 0:
        mask = mask & (columns[None, :] < NUM_COLUMNS)
    tile = tl.load(rows + columns[None, :], mask=mask, other=0.0)
    if INTERPRET:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def read_tile(
    weight,
    expert,
    row,
    column,
    end_row,
    NUM_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    STRIDES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    READ: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Rows row .. and columns column .. of one expert's matrix: (BLOCK_ROWS, BLOCK_COLUMNS).

    Columns behind NUM_COLUMNS are 0; rows from end_row on are anything, and are never stored. READ
    says what `weight` is: "pointer" to (L, NUM_ROWS, NUM_COLUMNS) with STRIDES; "rows", a
    descriptor of all experts' rows (L * NUM_ROWS, NUM_COLUMNS); "columns", one of their columns
    (L * NUM_COLUMNS, NUM_ROWS), as transposed weights are stored. Descriptors ask for columns that
    the block divides.
    """
    if READ == "rows":
        tile = weight.load([expert.to(tl.int32) * NUM_ROWS + row, column])
    elif READ == "columns":
        tile = tl.trans(weight.load([expert.to(tl.int32) * NUM_COLUMNS + column, row]))
    else:
        rows = row + tl.arange(0, BLOCK_ROWS)
        columns = column + tl.arange(0, BLOCK_COLUMNS)
        pointers = (
            weight
            + expert * STRIDES[0]
            + rows[:, None].to(tl.int64) * STRIDES[1]
            + columns[None, :].to(tl.int64) * STRIDES[2]
        )
        mask = rows[:, None] < end_row
        if NUM_COLUMNS % BLOCK_COLUMNS != 0:
            mask = mask & (columns[None, :] < NUM_COLUMNS)
        tile = tl.load(pointers, mask=mask, other=0.0)
    if INTERPRET:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def multiply_add(rows, weights, total, SWAP_AB: tl.constexpr):
    """`rows @ weights.T + total`; with SWAP_AB its transpose, the weights on the wide side.

    (T,K), (N,K), (T,N) -> (T,N); with SWAP_AB (N,T) -> (N,T).
    """
    if SWAP_AB:
        total = tl.dot(weights, tl.trans(rows), total)
    else:
        total = tl.dot(rows, tl.trans(weights), total)
    return total


@triton.jit
def tanh(x):
    """Within two units in the last place; the polynomial is that of Cephes' tanhf."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, p * z * x + x, tl.where(x < 0, -far, far))


@triton.jit
def apply_function(x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, GATE_SOFTCAP: tl.constexpr):
    """The scalar function of `Activation`, in fp32."""
    if FUNCTION == "silu":
        linear = x
        if GATE_SOFTCAP > 0.0:
            linear = GATE_SOFTCAP * tanh(x / GATE_SOFTCAP)
        result = linear * tl.sigmoid(ALPHA * x)
    elif FUNCTION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        result = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif FUNCTION == "relu":
        result = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif FUNCTION == "relu2":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        result = positive * positive
    elif FUNCTION == "sigmoid":
        result = tl.sigmoid(x)
    elif FUNCTION == "tanh":
        result = tanh(x)
    else:
        tl.static_assert(FUNCTION == "identity")
        result = x
    return result


@triton.jit
def activate(gate, up, IS_GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """`f(gate) * (up + offset)` with limits and soft-caps, as kernels/reference/activation.py.

    ACTIVATION: function, alpha, limit, whether it limits the gate, offset of up, soft-cap of the
    gate, soft-cap of up; a limit or soft-cap of 0 is none.
    """
    FUNCTION: tl.constexpr = ACTIVATION[0]
    ALPHA: tl.constexpr = ACTIVATION[1]
    LIMIT: tl.constexpr = ACTIVATION[2]
    LIMITS_GATE: tl.constexpr = ACTIVATION[3]
    UP_OFFSET: tl.constexpr = ACTIVATION[4]
    GATE_SOFTCAP: tl.constexpr = ACTIVATION[5]
    UP_SOFTCAP: tl.constexpr = ACTIVATION[6]
    if LIMIT > 0.0 and LIMITS_GATE:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    hidden = apply_function(gate, FUNCTION, ALPHA, GATE_SOFTCAP)
    if LIMIT > 0.0 and not LIMITS_GATE:
        hidden = tl.minimum(hidden, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if IS_GATED:
        if LIMIT > 0.0:
            up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        if UP_SOFTCAP > 0.0:
            up = UP_SOFTCAP * tanh(up / UP_SOFTCAP)
        hidden = hidden * (up + UP_OFFSET)
    return hidden


@triton.jit
def finish_hidden(
    gate,
    up,
    n,
    slot,
    is_row,
    is_column,
    slot_weights_ptr,
    bias_ptr,
    expert,
    SIZES: tl.constexpr,
    GATE_UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Hidden rows (T, N) in fp32 from the sums of gate and of up: columns n of slots (T,).

    Weights (slots,), which scale the input, and biases (L, U), which lie as GATE_UP says, may be
    None; SIZES are hidden size, intermediate size and U.
    """
    IS_GATED: tl.constexpr = GATE_UP != "ungated"
    if slot_weights_ptr is not None:
        scale = tl.load(slot_weights_ptr + slot, mask=is_row, other=0.0)[:, None]
        gate *= scale
        up *= scale
    if bias_ptr is not None:
        IS_INTERLEAVED: tl.constexpr = GATE_UP == "interleaved"
        bias = bias_ptr + expert * SIZES[2]
        n_gate = 2 * n if IS_INTERLEAVED else n
        gate += tl.load(bias + n_gate, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            n_up = 2 * n + 1 if IS_INTERLEAVED else SIZES[1] + n
            up += tl.load(bias + n_up, mask=is_column, other=0.0).to(tl.float32)[None, :]
    return activate(gate, up, IS_GATED, ACTIVATION)
