"""A few rows: every slot by itself, with no sort before it and no combine behind it.

Reading the weights is all the work, so that a program asks for many of them at once and adds
products in place, (N, K) of them, until the one sum at its end.
"""

import triton
import triton.language as tl

from mixtura.kernels.triton.steps import activate


@triton.jit(do_not_specialize=["num_slots"])
def direct_gate_up_kernel(
    x_ptr,
    weight_ptr,
    up_weight_ptr,
    bias_ptr,
    slot_weights_ptr,
    local_ids_ptr,
    out_ptr,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZES: tl.constexpr,
    STRIDES: tl.constexpr,
    UP_STRIDES: tl.constexpr,
    GATE_UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`out[s] = f(x[t] @ Wg[e].T + b_gate[e]) * (x[t] @ Wu[e].T + b_up[e])`.

    s is a flat slot of token t = s // TOP_K. Pointers as in `gate_up_kernel`; local_ids (M, TOP_K),
    out (slots, I). Programs of one block of columns are neighbours: where slots
    share an expert, the L2 cache has it.

    Example: slot 9 of 16 with expert 3 and BLOCK_N 16 makes, in program 9 + 2 * 16,
    out[9, 32:48].
    """
    HIDDEN_SIZE: tl.constexpr = SIZES[0]
    INTERMEDIATE_SIZE: tl.constexpr = SIZES[1]
    UP_SIZE: tl.constexpr = SIZES[2]
    slot = tl.program_id(0) % num_slots
    expert = tl.load(local_ids_ptr + slot).to(tl.int64)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    block = tl.program_id(0) // num_slots
    IS_ONE_SUM: tl.constexpr = GATE_UP == "interleaved" or GATE_UP == "ungated"
    IS_INTERLEAVED: tl.constexpr = GATE_UP == "interleaved"
    IS_GATED: tl.constexpr = GATE_UP != "ungated"
    WIDTH: tl.constexpr = 2 * BLOCK_N if IS_INTERLEAVED else BLOCK_N
    END: tl.constexpr = UP_SIZE if IS_ONE_SUM else INTERMEDIATE_SIZE
    up_start = INTERMEDIATE_SIZE if GATE_UP == "stacked" else 0
    row = block * WIDTH + tl.arange(0, WIDTH)
    is_row = row[:, None] < END
    gates = weight_ptr + expert * STRIDES[0] + row.to(tl.int64)[:, None] * STRIDES[1]
    if not IS_ONE_SUM:
        up_row = (up_start + row).to(tl.int64)[:, None]
        ups = up_weight_ptr + expert * UP_STRIDES[0] + up_row * UP_STRIDES[1]
    x_row = x_ptr + (slot // TOP_K).to(tl.int64) * HIDDEN_SIZE
    gate_sums = tl.zeros((WIDTH, BLOCK_K), dtype=tl.float32)
    up_sums = tl.zeros((WIDTH, BLOCK_K), dtype=tl.float32)
    for start in tl.range(0, HIDDEN_SIZE, BLOCK_K, num_stages=NUM_STAGES):
        k = start + tl.arange(0, BLOCK_K)
        is_column = k < HIDDEN_SIZE
        mask = is_row
        if HIDDEN_SIZE % BLOCK_K != 0:
            mask = mask & is_column[None, :]
        column = k[None, :].to(tl.int64)
        x = tl.load(x_row + k, mask=is_column, other=0.0).to(tl.float32)[None, :]
        gate_sums += tl.load(gates + column * STRIDES[2], mask=mask, other=0.0).to(tl.float32) * x
        if not IS_ONE_SUM:
            weights = tl.load(ups + column * UP_STRIDES[2], mask=mask, other=0.0)
            up_sums += weights.to(tl.float32) * x
    gate = tl.sum(gate_sums, 1)
    up = tl.sum(up_sums, 1)
    if IS_INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_N, 2)))
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = n < INTERMEDIATE_SIZE
    if slot_weights_ptr is not None:
        scale = tl.load(slot_weights_ptr + slot)
        gate *= scale
        up *= scale
    if bias_ptr is not None:
        bias = bias_ptr + expert * UP_SIZE
        n_gate = 2 * n if IS_INTERLEAVED else n
        gate += tl.load(bias + n_gate, mask=is_column, other=0.0).to(tl.float32)
        if IS_GATED:
            n_up = 2 * n + 1 if IS_INTERLEAVED else up_start + n
            up += tl.load(bias + n_up, mask=is_column, other=0.0).to(tl.float32)
    hidden = activate(gate, up, IS_GATED, ACTIVATION)
    out = out_ptr + slot.to(tl.int64) * INTERMEDIATE_SIZE + n
    tl.store(out, hidden.to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize=["num_rows"])
def direct_down_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    slot_weights_ptr,
    local_ids_ptr,
    out_ptr,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZES: tl.constexpr,
    STRIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`out[m] = sum over k of w[m,k] * (hidden[m,k] @ W[e].T + b[e])`, e = local_ids[m,k].

    SIZES are hidden size H and intermediate size I. Pointers: hidden (M, TOP_K, I), weight (L, H,
    I) with STRIDES, bias (L, H), slot_weights (M, TOP_K) or None for 1, local_ids (M, TOP_K), out
    (M, H).

    Example: of 2 rows, program 1 + 2 * 2 makes out[1, 2 * BLOCK_N : 3 * BLOCK_N].
    """
    HIDDEN_SIZE: tl.constexpr = SIZES[0]
    INTERMEDIATE_SIZE: tl.constexpr = SIZES[1]
    m = tl.program_id(0) % num_rows
    n = (tl.program_id(0) // num_rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < HIDDEN_SIZE
    rows = n.to(tl.int64)[:, None] * STRIDES[1]
    sums = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    num_steps = tl.cdiv(INTERMEDIATE_SIZE, BLOCK_K)
    for step in tl.range(0, TOP_K * num_steps, num_stages=NUM_STAGES):
        slot = m * TOP_K + step // num_steps
        expert = tl.load(local_ids_ptr + slot).to(tl.int64)
        has_expert = (expert >= 0) & (expert < NUM_EXPERTS)
        scale = 1.0
        if slot_weights_ptr is not None:
            scale = tl.load(slot_weights_ptr + slot, mask=has_expert, other=0.0)
        k = (step % num_steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        is_column = tl.where(has_expert, k < INTERMEDIATE_SIZE, False)
        hidden = hidden_ptr + slot.to(tl.int64) * INTERMEDIATE_SIZE + k
        x = tl.load(hidden, mask=is_column, other=0.0).to(tl.float32) * scale
        weights = weight_ptr + expert * STRIDES[0] + rows
        weights += k[None, :].to(tl.int64) * STRIDES[2]
        mask = tl.where(has_expert, is_row, False)[:, None]
        if INTERMEDIATE_SIZE % BLOCK_K != 0:
            mask = mask & is_column[None, :]
        sums += tl.load(weights, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        if bias_ptr is not None:
            is_first = tl.where(has_expert & (step % num_steps == 0), is_row, False)
            bias = tl.load(bias_ptr + expert * HIDDEN_SIZE + n, mask=is_first, other=0.0)
            total += bias.to(tl.float32) * scale
    total += tl.sum(sums, 1)
    out = out_ptr + m.to(tl.int64) * HIDDEN_SIZE + n
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_row)
