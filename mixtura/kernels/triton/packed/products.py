"""Products of packed weights and rows: how sums begin, what a step adds to them, how they end.

N rows of weights, T rows, R columns of a run. With SWAP_AB weights are on the wide side of the
product, (N, T), and where codes are smaller than operands they come from registers; else sums are
(T, N).
"""

import triton
import triton.language as tl

from mixtura.kernels.triton.packed.decode import (
    bits_as_float32,
    decoded,
    read_scale,
    read_words,
    read_zero,
    scaled,
)
from mixtura.kernels.triton.steps import read_rows


@triton.jit
def zero_sums(
    NUM_WEIGHTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FORMAT: tl.constexpr,
    SWAP_AB: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Sums that nothing has been added to: whole numbers where all that is added is."""
    IS_INT: tl.constexpr = FORMAT.operand == "int8" and FORMAT.scale == "" and not INTERPRET
    ROWS: tl.constexpr = NUM_WEIGHTS if SWAP_AB else BLOCK_T
    COLUMNS: tl.constexpr = BLOCK_T if SWAP_AB else NUM_WEIGHTS
    if IS_INT and not FORMAT.has_row_groups:
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    else:
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    return sums


@triton.jit
def num_steps(NUM_COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """Steps of a row: a number that the compiler does not know, so that it leaves the loop one.

    There is one row of programs, number 0.
    """
    DEPTH: tl.constexpr = FORMAT.fields * FORMAT.run
    return (NUM_COLUMNS + DEPTH - 1) // DEPTH + tl.program_id(1)


@triton.jit
def is_within(n, END: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns n of blocks of BLOCK are before END: known to be all where BLOCK divides it."""
    return tl.full(n.shape, True, tl.int1) if END % BLOCK == 0 else n < END


@triton.jit
def of_weights(values, SWAP_AB: tl.constexpr):
    """Values of rows of weights (N,), to be multiplied with sums."""
    return values[:, None] if SWAP_AB else values[None, :]


@triton.jit
def of_rows(values, SWAP_AB: tl.constexpr):
    """Values of rows (T,), to be multiplied with sums."""
    return values[None, :] if SWAP_AB else values[:, None]


@triton.jit
def multiply(weights, rows, total, SWAP_AB: tl.constexpr, CHUNK: tl.constexpr):
    """`total` and the products of weights (N, R) and rows (T, R); CHUNK terms of fp8 at a time."""
    if SWAP_AB:
        first, second = weights, tl.trans(rows)
    else:
        first, second = rows, tl.trans(weights)
    total = tl.dot(
        first, second, total, max_num_imprecise_acc=CHUNK, out_dtype=total.dtype
    )  # fmt: skip
    return total


@triton.jit
def add_step(
    total,
    x,
    x_rows,
    x_row,
    is_row,
    matrix,
    expert,
    step,
    n,
    is_weight,
    NUM_COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    SWAP_AB: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`total` and the products of a step's columns.

    W are rows n of an expert, x rows x_row (T,), which the pointers x_rows (T, 1) begin. Operands
    of 8 bits are multiplied by themselves, and what they make is scaled: by the scale of the
    weights' group (N,) and, where rows have groups, by theirs (T,).
    """
    FIELDS: tl.constexpr = FORMAT.fields
    DEPTH: tl.constexpr = FIELDS * FORMAT.run
    NUM_STEPS: tl.constexpr = (NUM_COLUMNS + DEPTH - 1) // DEPTH
    words = read_words(matrix.codes, expert, step, NUM_STEPS, n, is_weight, FORMAT)
    if FORMAT.has_row_groups:
        row_scale = tl.load(x.scales + x_row * NUM_STEPS + step, mask=is_row, other=0.0)
    for run in tl.static_range(FIELDS):
        k = step * DEPTH + run * FORMAT.run
        rows = read_rows(x_rows, is_row, k, NUM_COLUMNS, FORMAT.run, DEPTH, INTERPRET)
        zero = read_zero(matrix, expert, step, NUM_STEPS, n, is_weight, run, FORMAT)
        scale = read_scale(matrix, expert, step, NUM_STEPS, n, is_weight, run, FORMAT)
        weights = decoded(words, zero, run, FORMAT, INTERPRET)
        if not FORMAT.is_rounded:
            weights = scaled(weights, scale, FORMAT, INTERPRET)
            total = multiply(weights, rows, total, SWAP_AB, FORMAT.run)
        elif FORMAT.scale == "" and not FORMAT.has_row_groups:
            total = multiply(weights, rows, total, SWAP_AB, FORMAT.run)
        else:
            nothing = tl.zeros(total.shape, tl.float32)
            if FORMAT.operand == "int8" and not INTERPRET:
                nothing = tl.zeros(total.shape, tl.int32)
            product = multiply(weights, rows, nothing, SWAP_AB, FORMAT.run).to(tl.float32)
            if FORMAT.has_row_groups:
                product *= of_rows(row_scale, SWAP_AB)
            if FORMAT.scale != "":
                product *= of_weights(bits_as_float32(scale, FORMAT.scale), SWAP_AB)
            total += product
    return total


@triton.jit
def finished(
    total,
    x,
    x_row,
    is_row,
    matrix,
    expert,
    n,
    is_weight,
    FORMAT: tl.constexpr,
    SWAP_AB: tl.constexpr,
):
    """A sum with what has been left out of its terms: factors of weights and of rows."""
    total = total.to(tl.float32)
    if FORMAT.is_rounded and not FORMAT.has_row_groups:
        row_scale = tl.load(x.scales + x_row, mask=is_row, other=0.0)
        total *= of_rows(row_scale, SWAP_AB)
    if matrix.factors is not None:
        factors = matrix.factors + expert * FORMAT.num_rows + n
        total *= of_weights(tl.load(factors, mask=is_weight, other=0.0), SWAP_AB)
    if FORMAT.left_factor != 1.0:
        total *= FORMAT.left_factor
    return total


@triton.jit
def slots_of(sort_order_ptr, first, is_row):
    """The slots (T,) of a tile: sorted ones from `first` on, or, without an order, slot `first`."""
    if sort_order_ptr is None:
        slot = tl.where(is_row, first, first)
    else:
        t = tl.arange(0, is_row.shape[0])
        slot = tl.load(sort_order_ptr + first + t, mask=is_row, other=0)
    return slot
