"""The weighted sum of a token's slots, in slot order, in fp32; a post norm before it."""

import triton
import triton.language as tl


@triton.jit
def combine_kernel(
    slots_ptr,
    local_ids_ptr,
    topk_weights_ptr,
    norm_ptr,
    out_ptr,
    epsilon,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    REDUCE: tl.constexpr,
    WEIGHS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`out[m] = sum over k of topk_weights[m,k] * slots[m,k]`, slots without an expert left out.

    Pointers: slots (M, TOP_K, HIDDEN_SIZE), local_ids (M, TOP_K), topk_weights (M, TOP_K), norm
    (HIDDEN_SIZE,), out (M, HIDDEN_SIZE); without REDUCE out (M, TOP_K, HIDDEN_SIZE) has the terms.
    A norm sees whole rows, so that BLOCK_H holds one; else programs take BLOCK_H columns each.

    Example: ids [3, -1] and weights [.75, 0] make `.75 * slots[m, 0]`.
    """
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_column = n < HIDDEN_SIZE
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    # A norm holds a whole row at a time; else all the slots' reads go ahead together.
    for k in tl.range(0, TOP_K, loop_unroll_factor=TOP_K if NORM == "none" else 1):
        slot = m * TOP_K + k
        expert = tl.load(local_ids_ptr + slot)
        has_expert = (expert >= 0) & (expert < NUM_EXPERTS)
        mask = tl.where(has_expert, is_column, False)
        row = tl.load(slots_ptr + slot * HIDDEN_SIZE + n, mask=mask, other=0.0)
        value = row.to(tl.float32)
        if NORM != "none":
            weight = tl.load(norm_ptr + n, mask=is_column, other=0.0)
            if NORM == "rms_scale_first":
                scale = weight.to(tl.float32) + 1.0
                if not INTERPRET:  # there a cast cuts off what it should round
                    scale = scale.to(norm_ptr.dtype.element_ty).to(tl.float32)
                value = (value * scale).to(slots_ptr.dtype.element_ty).to(tl.float32)
            mean = tl.sum(value * value, 0) / HIDDEN_SIZE
            value = value * tl.rsqrt(mean + epsilon)
            if NORM == "rms":
                value = value * weight.to(tl.float32)
            value = value.to(slots_ptr.dtype.element_ty).to(tl.float32)
        if WEIGHS:
            value = value * tl.load(topk_weights_ptr + slot)
        term = tl.where(has_expert, value, 0.0)
        if REDUCE:
            total += term
        else:
            tl.store(out_ptr + slot * HIDDEN_SIZE + n, term, mask=is_column)
    if REDUCE:
        tl.store(out_ptr + m * HIDDEN_SIZE + n, total.to(out_ptr.dtype.element_ty), mask=is_column)
