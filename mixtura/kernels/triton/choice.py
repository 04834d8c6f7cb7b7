"""Routing kernels: fp32 logits (T, num_logits) -> weights, ids and bypass, on the device.

T tokens, E choices in groups of equal size, K slots of a token, L experts that slots are sorted by.
The steps are those of mixtura/routing/pipeline.py and of `Router.finish`, in fp32; quotients, roots
and exp are the device's, within a few units in the last place, and the same for equal logits.

Choices are ordered by int32 keys that rise as the scores do: K times the largest is taken, of equal
ones the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from mixtura.kernels.triton.align import count_block, place_all
from mixtura.kernels.triton.steps import tanh

SOFTMAX, SIGMOID, SQRT_SOFTPLUS, LOGIT = (tl.constexpr(number) for number in range(4))
NORM_SUM, NORM_CLAMPED, NORM_P = (tl.constexpr(number) for number in range(1, 4))
TO_NOTHING, TO_SELF, TO_CONSTANT = (tl.constexpr(number) for number in range(1, 4))
TAKEN = tl.constexpr(-(2**31))
"""The key of what cannot be chosen: below -inf."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A routing rule as kernels are compiled for it; see `RoutingConfig`.

    Attributes:
        selects_score: the largest scores are chosen, else the largest logits.
        num_groups: 1 where there is no limit.
        softcap: 0 for none. bypass: 0 where every choice computes.
    """

    num_experts: int
    num_choices: int
    top_k: int
    num_shared: int
    has_shared_gate: bool
    score: int
    scores_chosen: bool
    selects_score: bool
    num_groups: int
    topk_groups: int
    adds_two_best: bool
    drops_to_zero: bool
    norm: int
    epsilon: float
    p_norm: float
    multiplier: float
    softcap: float
    scale: float
    output_scale: float
    bypass: int

    @property
    def num_slots(self) -> int:
        """Slots of a token, those of fused shared experts included."""
        return self.top_k + self.num_shared

    @property
    def num_placed(self) -> int:
        """Experts that slots are sorted by."""
        return self.num_experts + self.num_shared

    @property
    def num_logits(self) -> int:
        """Columns of the logits."""
        return self.num_choices + (self.num_shared if self.has_shared_gate else 0)


# ------------------------------------------------------------------------------- parts of kernels


@triton.jit
def _row_sums(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Sums along the rows of (ROWS, SIZE), of neighbours, then of neighbouring sums. -> (ROWS,)"""
    BITS: tl.constexpr = SIZE.bit_length() - 1
    for bit in tl.static_range(BITS):
        x = tl.sum(tl.reshape(x, [ROWS, SIZE >> (bit + 1), 2]), 2)
    return tl.reshape(x, [ROWS])


@triton.jit
def _transformed(x, RULE: tl.constexpr):
    """`cap * tanh(m * x / cap)`."""
    if RULE.multiplier != 1.0:
        x = x * RULE.multiplier
    if RULE.softcap > 0.0:
        x = tanh(x / RULE.softcap) * RULE.softcap
    return x


@triton.jit
def _scored(x, SCORE: tl.constexpr):
    """Scores of logits by themselves."""
    if SCORE == SIGMOID:
        small = tl.exp(-tl.abs(x))
        x = tl.where(x >= 0, 1.0, small) / (1.0 + small)
    elif SCORE == SQRT_SOFTPLUS:
        small = tl.exp(-tl.abs(x))
        whole = 1.0 + small
        # log(1 + s), exact where 1 + s rounds: the rounding is in log and in whole - 1 alike.
        rest = tl.where(whole == 1.0, 1.0, whole - 1.0)
        log = tl.where(whole == 1.0, small, small * (tl.log(whole) / rest))
        x = tl.sqrt(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log)
    return x


@triton.jit
def _key(x):
    """int32 that orders as x does; zeros are equal, and NaN is above all, all alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, key, 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The inverse of `_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best(keys, index, SIZE: tl.constexpr):
    """Index of the largest key of every row, the first of equal ones. (R,SIZE), (1,SIZE) -> (R,)"""
    is_best = keys == tl.max(keys, 1)[:, None]
    return tl.min(tl.where(is_best, index, SIZE), 1)


@triton.jit
def _limited(
    keys, RULE: tl.constexpr, ROWS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Give the keys (ROWS, BLOCK_G * BLOCK_S) outside the best groups the dropped value's."""
    grouped = tl.reshape(keys, [ROWS, BLOCK_G, BLOCK_S])
    best = tl.max(grouped, 2)
    if RULE.adds_two_best:
        member = tl.arange(0, BLOCK_S)[None, None, :]
        first = tl.min(tl.where(grouped == best[:, :, None], member, BLOCK_S), 2)
        others = tl.where(member == first[:, :, None], TAKEN, grouped)
        best = _key(_value(best) + _value(tl.max(others, 2)))
    group = tl.arange(0, BLOCK_G)[None, :]
    best = tl.where(group < RULE.num_groups, best, TAKEN)
    kept = tl.zeros([ROWS, BLOCK_G], tl.int32)
    for _ in range(RULE.topk_groups):
        taken = group == _best(best, group, BLOCK_G)[:, None]
        kept = tl.where(taken, 1, kept)
        best = tl.where(taken, TAKEN, best)
    dropped = 0 if RULE.drops_to_zero else -2139095041  # the keys of 0.0 and of -inf
    return tl.reshape(tl.where(kept[:, :, None] > 0, grouped, dropped), [ROWS, BLOCK_G * BLOCK_S])


@triton.jit
def _normalized(w, is_top, RULE: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Renormalize and scale weights (ROWS, BLOCK_K) along the slots of the choice."""
    if RULE.norm == NORM_P:
        size = tl.where(is_top, tl.abs(w), 0.0)
        if RULE.p_norm == 1.0:
            norm = _row_sums(size, ROWS, BLOCK_K)
        elif RULE.p_norm == 2.0:
            norm = tl.sqrt(_row_sums(size * size, ROWS, BLOCK_K))
        else:
            powers = tl.where(size > 0.0, tl.exp2(tl.log2(size) * RULE.p_norm), size)
            norm = tl.exp2(tl.log2(_row_sums(powers, ROWS, BLOCK_K)) * (1.0 / RULE.p_norm))
        w = w / norm[:, None]
    elif RULE.norm != 0:
        total = _row_sums(tl.where(is_top, w, 0.0), ROWS, BLOCK_K)
        if RULE.norm == NORM_SUM:
            total = total + RULE.epsilon
        else:
            total = tl.where(total < RULE.epsilon, RULE.epsilon, total)
        w = w / total[:, None]
    if RULE.scale != 1.0:
        w = w * RULE.scale
    return w


@triton.jit
def _route_rows(
    logits,
    selection_bias,
    expert_scale,
    given_ids,
    padding_mask,
    weights,
    ids,
    raw_weights,
    raw_ids,
    bypass_weights,
    bypass_ids,
    first,
    T,
    stride,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Route tokens first .. first + ROWS - 1.

    Logits 0 3 1 3 of a token with top_k 2 and a softmax over the chosen: ids 1 3, weights .5 .5.
    """
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_S
    GROUP: tl.constexpr = RULE.num_choices // RULE.num_groups
    row = first + tl.arange(0, ROWS)
    is_row = (row < T)[:, None]
    at = logits + row.to(tl.int64)[:, None] * stride
    column = tl.arange(0, BLOCK_E)[None, :]
    # A group begins at a multiple of BLOCK_S, so that it is a row of a reshaped tile.
    expert = column // BLOCK_S * GROUP + column % BLOCK_S
    is_choice = (column % BLOCK_S < GROUP) & (column // BLOCK_S < RULE.num_groups)
    x = tl.load(at + expert, mask=is_row & is_choice, other=0.0)
    has_nan = tl.max((x != x).to(tl.int32), 1) > 0
    x = tl.where(is_choice, _transformed(x, RULE), float("-inf"))
    if (RULE.score == SOFTMAX) & (not RULE.scores_chosen):
        highest = tl.max(x, 1)[:, None]
        terms = tl.exp(x - highest)
        total = _row_sums(terms, ROWS, BLOCK_E)[:, None]

    slot = tl.arange(0, BLOCK_K)[None, :]
    is_top = slot < RULE.top_k
    if given_ids is not None:
        chosen = tl.load(
            given_ids + row.to(tl.int64)[:, None] * RULE.top_k + slot,
            mask=is_row & is_top,
            other=-1,
        ).to(tl.int32)
        chosen = tl.where((chosen >= 0) & (chosen < RULE.num_choices), chosen, -1)
    else:
        selection = x
        if RULE.selects_score:
            selection = terms / total if RULE.score == SOFTMAX else _scored(x, RULE.score)
        if selection_bias is not None:
            bias = tl.load(selection_bias + expert, mask=is_choice, other=0.0)
            selection = selection + bias.to(tl.float32)
        keys = tl.where(is_choice, _key(selection), TAKEN)
        if RULE.num_groups > 1:
            keys = tl.where(is_choice, _limited(keys, RULE, ROWS, BLOCK_G, BLOCK_S), TAKEN)
        chosen = tl.full([ROWS, BLOCK_K], -1, tl.int32)
        for k in range(RULE.top_k):
            best = _best(keys, column, BLOCK_E)[:, None]
            keys = tl.where(column == best, TAKEN, keys)
            chosen = tl.where(slot == k, best // BLOCK_S * GROUP + best % BLOCK_S, chosen)

    is_real = is_row & is_top & (chosen >= 0)
    x = _transformed(tl.load(at + tl.maximum(chosen, 0), mask=is_real, other=0.0), RULE)
    if RULE.score == SOFTMAX:
        if RULE.scores_chosen:
            x = tl.where(is_top, x, float("-inf"))
            terms = tl.exp(x - tl.max(x, 1)[:, None])
            total = _row_sums(terms, ROWS, BLOCK_K)[:, None]
        else:
            terms = tl.exp(x - highest)
        w = terms / total
    else:
        w = _scored(x, RULE.score)
    w = _normalized(w, is_top, RULE, ROWS, BLOCK_K)
    if expert_scale is not None:
        w = w * tl.load(expert_scale + chosen, mask=is_real, other=0.0).to(tl.float32)
    w = tl.where(has_nan[:, None], float("nan"), w)
    w = tl.where(chosen >= 0, w, 0.0)
    if RULE.num_shared > 0:
        if RULE.has_shared_gate:
            gates = at + RULE.num_choices + slot - RULE.top_k
            is_gate = is_row & (slot >= RULE.top_k) & (slot < RULE.num_slots)
            shared = _scored(tl.load(gates, mask=is_gate, other=0.0), SIGMOID)
        else:
            shared = tl.full([ROWS, BLOCK_K], 1.0, tl.float32)
        shared = shared / RULE.output_scale
        w = tl.where(is_top, w, shared)
        chosen = tl.where(is_top, chosen, RULE.num_experts + slot - RULE.top_k)

    # What `Router.finish` does: slots of no expert become -1, and what they add is said apart.
    out = row.to(tl.int64)[:, None] * RULE.num_slots + slot
    is_slot = is_row & (slot < RULE.num_slots)
    if raw_ids is not None:
        tl.store(raw_weights + out, w, mask=is_slot)
        tl.store(raw_ids + out, chosen, mask=is_slot)
    if padding_mask is not None:
        is_token = (tl.load(padding_mask + row, mask=row < T, other=0) != 0)[:, None]
        w = tl.where(is_token, w, 0.0)
        chosen = tl.where(is_token, chosen, -1)
    if RULE.bypass != 0:
        needs_none = (chosen >= RULE.num_experts) & is_top
        left = tl.where(needs_none, w, 0.0)
        if RULE.bypass == TO_CONSTANT:
            constant = tl.where(needs_none, chosen - RULE.num_experts, 0)
            tl.store(bypass_weights + out, left, mask=is_slot)
            tl.store(bypass_ids + out, constant.to(tl.int64), mask=is_slot)
        else:
            identity = _row_sums(left, ROWS, BLOCK_K)
            if RULE.bypass == TO_NOTHING:
                identity = identity * 0.0  # NaN where the token's weights are
            tl.store(bypass_weights + row, identity, mask=row < T)
        w = tl.where(needs_none, 0.0, w)
        chosen = tl.where(needs_none, -1, chosen)
    tl.store(weights + out, w, mask=is_slot)
    tl.store(ids + out, chosen, mask=is_slot)


# ------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["T", "stride"])
def route_and_place(
    logits,
    selection_bias,
    expert_scale,
    given_ids,
    padding_mask,
    weights,
    ids,
    raw_weights,
    raw_ids,
    bypass_weights,
    bypass_ids,
    sort_order,
    expert_offsets,
    tiles,
    num_tiles,
    T,
    stride,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """All tokens, ROWS at a time, then all their slots, by one program."""
    for first in range(0, T, ROWS):
        _route_rows(
            logits,
            selection_bias,
            expert_scale,
            given_ids,
            padding_mask,
            weights,
            ids,
            raw_weights,
            raw_ids,
            bypass_weights,
            bypass_ids,
            first,
            T,
            stride,
            RULE,
            ROWS,
            BLOCK_G,
            BLOCK_S,
            BLOCK_K,
        )
    tl.debug_barrier()  # the ids are read back by other threads of the program
    place_all(
        ids,
        sort_order,
        expert_offsets,
        tiles,
        num_tiles,
        T * RULE.num_slots,
        RULE.num_placed,
        BLOCK_L,
        SIZE,
        TILE_ROWS,
    )


@triton.jit(do_not_specialize=["T", "stride"])
def route_blocks(
    logits,
    selection_bias,
    expert_scale,
    given_ids,
    padding_mask,
    weights,
    ids,
    raw_weights,
    raw_ids,
    bypass_weights,
    bypass_ids,
    counts,
    T,
    stride,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SIZE: tl.constexpr,
):
    """BLOCK_T tokens, ROWS at a time, and how many of their slots each expert has."""
    start = tl.program_id(0) * BLOCK_T
    for first in range(start, tl.minimum(start + BLOCK_T, T), ROWS):
        _route_rows(
            logits,
            selection_bias,
            expert_scale,
            given_ids,
            padding_mask,
            weights,
            ids,
            raw_weights,
            raw_ids,
            bypass_weights,
            bypass_ids,
            first,
            T,
            stride,
            RULE,
            ROWS,
            BLOCK_G,
            BLOCK_S,
            BLOCK_K,
        )
    if counts is not None:
        tl.debug_barrier()  # as above
        count_block(
            ids,
            counts,
            T * RULE.num_slots,
            RULE.num_placed,
            BLOCK_L,
            SIZE,
            BLOCK_T * RULE.num_slots,
        )
