"""How quantized matrices lie in a GPU's memory, and what their products multiply. Pure.

A product multiplies operands: of 16 bits, rows as they come and the weights that codes stand for;
or of 8 bits, both as codes. A word is as wide as an operand and holds codes in `fields`, which are
not neighbours in the matrix: a step of `depth` columns is cut in as many runs as a word has fields,
and word j of a step holds column j of every run. Shifting a tile of words by a field makes the next
run of it: threads exchange nothing, and the columns of rows that it meets are neighbours.

Words lie step after step, `(L, steps, rows, run)`: a block of rows is one piece of memory in every
step. Rows of gate come before those of up. Columns are filled up with zeros to whole steps.

A code's field becomes a level times a power of two, as that is cheap: `level_exponent` undoes it,
along with the scale of a group, but for `left_exponent`, which the finished sums are scaled by, so
that neither the scale nor the product is out of range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mixtura.config import ExpertsConfig, GateUp
from mixtura.quant.activations import ActivationGroup, ActivationScheme
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme, ZeroPoint

MAX_RUNS = {1: 128, 2: 64, 4: 32, 8: 16}
"""Columns of a run at most, by fields of a word: steps of 128."""

MIN_RUNS = {16: 16, 8: 32}
"""Columns that an instruction multiplies, by bits of an operand."""

ROW_GROUP = 128
"""Columns of a row that may share a scale found while running."""

WORD_BITS = 32
"""Of a word of scales or of zero points: the least that is copied ahead of its use."""

_FIELD_DTYPES = {16: torch.bfloat16, 32: torch.float32}

_EXPONENT_BIAS = {torch.bfloat16: 127, torch.float16: 15, torch.float8_e4m3fn: 7}
"""Of the operands that small floats become."""

_BF16_LEFT, _FP16_LEVEL = 64, 7
"""Exponents: what is left to sums beside bf16, and what scales are multiplied by beside fp16. So
scales from 2^-62 on pass in bf16, and are no less exact in fp16 than weights are."""

_E2M1_PLACES = ((15, 8, 6), (12, 5, 3), (9, 2, 0), (14, 13, 10))


@dataclass(frozen=True, slots=True)
class Layout:
    """What a kernel is compiled for, as far as it depends on how a matrix is stored.

    Attributes:
        code: how a code becomes a level. bits: of a code's field, a power of two.
        operand: dtype of what is multiplied.
        run: columns of a run.
        scale_dtype: of groups' scales, as they are stored; None: only finished sums are scaled.
        group_rows: rows that share a group's scale.
        runs_per_scale: runs, next to each other, that share one.
        zero: what is subtracted from codes; None: zero points, of groups or of rows.
        rounding: how rows become operands; None: as they come.
    """

    code: Code
    bits: int
    operand: torch.dtype
    run: int
    scale_dtype: torch.dtype | None = None
    group_rows: int = 1
    runs_per_scale: int = 1
    zero: int | None = 0
    rounding: ActivationScheme | None = None

    @property
    def fields(self) -> int:
        """Codes of a word, and runs of a step."""
        return 8 * self.operand.itemsize // self.bits

    @property
    def depth(self) -> int:
        """Columns of a step."""
        return self.fields * self.run

    @property
    def places(self) -> tuple[tuple[int, int, int], ...]:
        """Bits of e2m1 codes in words of 16 bits, by run: sign, highest and lowest of magnitude.

        Those of bf16, but for a shift that is one for all three, and none for the first run. ()
        for other codes, which lie one behind the other.
        """
        is_spread = self.code is Code.E2M1 and self.operand.itemsize == 2
        return _E2M1_PLACES if is_spread else ()

    @property
    def is_grouped(self) -> bool:
        """Whether groups of columns have scales."""
        return self.scale_dtype is not None

    @property
    def scales_per_step(self) -> int:
        """Scales, and zero points, of a row in a step; 1 where they are of whole rows."""
        return self.fields // self.runs_per_scale

    @property
    def scale_field(self) -> torch.dtype:
        """What scales lie in words as: their dtype, or a wider one that fills a word."""
        assert self.scale_dtype is not None
        width = max(8 * self.scale_dtype.itemsize, WORD_BITS // self.scales_per_step)
        return self.scale_dtype if width == 8 * self.scale_dtype.itemsize else _FIELD_DTYPES[width]

    @property
    def zero_bits(self) -> int:
        """Of a zero point in a word."""
        return max(8 if self.bits <= 4 else 16, WORD_BITS // self.scales_per_step)

    @property
    def is_rounded(self) -> bool:
        """Whether rows are multiplied as codes."""
        return self.rounding is not None

    @property
    def has_row_groups(self) -> bool:
        """Whether a row has a scale for every step, not one."""
        return self.rounding is not None and self.rounding.per is ActivationGroup.GROUP

    @property
    def field_exponent(self) -> int:
        """Of two: what a level is divided by in what its field becomes."""
        if not self.code.is_float:
            return 0
        bias: int = 2 ** (self.code.exponent_bits - 1) - 1
        return _EXPONENT_BIAS[self.operand] - bias

    @property
    def left_exponent(self) -> int:
        """Of two: what sums are multiplied by when they are finished."""
        if self.is_rounded:
            return self.field_exponent
        if not self.is_grouped or not self.code.is_float:
            return 0
        is_bf16 = self.operand is torch.bfloat16
        return _BF16_LEFT if is_bf16 else self.field_exponent - _FP16_LEVEL

    @property
    def level_exponent(self) -> int:
        """Of two: what operands of 16 bits are multiplied by, along with the scale."""
        return self.field_exponent - self.left_exponent

    def for_rows(self, dtype: torch.dtype) -> Layout:
        """The same for rows of another dtype: words of 16 bits are alike."""
        return self if self.is_rounded else replace(self, operand=dtype)

    def __str__(self) -> str:
        code = f"int{self.bits}" if self.code is Code.INT else self.code.value
        operand = str(self.operand).removeprefix("torch.")
        parts = [f"{code}*{operand}"]
        if self.zero is None:
            parts.append("zeros")
        if self.is_grouped:
            parts.append(f"{self.scales_per_step} of {self.scale_field}".replace("torch.", ""))
        if self.group_rows > 1:
            parts.append(f"{self.group_rows} rows")
        if self.has_row_groups:
            parts.append("row groups")
        return "/".join(parts)


def unreadable(scheme: QuantScheme) -> str | None:
    """Why no kernel here reads a scheme, or None."""
    if not scheme.is_quantized:
        return "reads quantized matrices, or dense ones, and not both in one layer"
    if scheme.code in (Code.BLOCKS, Code.CODEBOOK):
        return f"has no decode step for {scheme.blocks or scheme.code.value} codes"
    if scheme.super_columns is not None:
        return "has no decode step for scales of super-blocks"
    if scheme.zero_point is ZeroPoint.MINIMUM:
        return "subtracts zero points from codes, not minima from weights"
    if scheme.has_permutation:
        return "reads columns in the order of the rows', and these are permuted"
    rows, columns = scheme.group_shape
    if columns is not None and columns % MIN_RUNS[16]:
        return f"reads groups of a multiple of {MIN_RUNS[16]} columns, not of {columns}"
    if columns is not None and rows is None:
        return "reads groups of some rows, not of all"
    return None


def unreadable_experts(schemes: Sequence[QuantScheme], has_unlike_gate_up: bool) -> str | None:
    """Why quantized experts are not run, or None; see `ExpertWeights.has_unlike_gate_up`."""
    reasons = map(unreadable, schemes)
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None and has_unlike_gate_up:
        return "reads gate and up of one scheme, and they have two"
    return reason


def not_rounded(scheme: QuantScheme, rounding: ActivationScheme) -> str | None:
    """Why rows rounded so are not multiplied with the codes of a scheme, or None."""
    words, columns = rounding.code_words, scheme.group_shape[1]
    is_int = scheme.code is Code.INT
    # The difference of four bits and any zero point is a number of int8, and of e4m3.
    is_narrow = is_int and scheme.bits <= 4
    if rounding.code is Code.INT:
        has_product = is_narrow or (is_int and scheme.zero_point is ZeroPoint.MID)
    else:
        has_product = is_narrow or scheme.code in (Code.E4M3, Code.E2M1)
    if not has_product or rounding.bits != 8:
        return f"multiplies no {words} activations with '{scheme}'"
    if columns is not None and columns % MIN_RUNS[8]:
        least = MIN_RUNS[8]
        return f"multiplies {words} activations with groups of a multiple of {least}, not {columns}"
    if rounding.per is ActivationGroup.GROUP:
        depth = _run(scheme, 8 // _field_bits(scheme)) * (8 // _field_bits(scheme))
        if rounding.group_columns != ROW_GROUP or depth != ROW_GROUP:
            return (
                f"rounds {ROW_GROUP} columns of a row together, beside weights in steps of as many"
            )
    return None


def layout_for(
    scheme: QuantScheme, rounding: ActivationScheme | None, has_whole_groups: bool = True
) -> Layout:
    """How a matrix is laid out, for rows of bf16 where they are not rounded.

    Args:
        scheme: `unreadable` is None.
        rounding: what rows are rounded to; where `not_rounded` has a reason, they are not.
        has_whole_groups: gate and up have no group in common, so that rows keep sharing scales.
    """
    if rounding is not None and not_rounded(scheme, rounding) is not None:
        rounding = None
    operand = torch.bfloat16
    if rounding is not None:
        operand = torch.int8 if rounding.code is Code.INT else torch.float8_e4m3fn
    bits = _field_bits(scheme)
    fields = 8 * operand.itemsize // bits
    run = _run(scheme, fields)
    rows, columns = scheme.group_shape
    runs_per_scale = fields
    if columns is not None and columns % (fields * run):
        is_whole = (fields * run) % columns == 0
        runs_per_scale = columns // run if is_whole else 1
    zero: int | None = 0
    if scheme.code is Code.INT:
        zero = 2 ** (scheme.bits - 1) if scheme.zero_point is ZeroPoint.MID else None
    return Layout(
        scheme.code,
        bits,
        operand,
        run,
        scale_dtype=None if columns is None else scheme.scale_dtype,
        group_rows=rows if columns is not None and rows and has_whole_groups else 1,
        runs_per_scale=runs_per_scale,
        zero=zero,
        rounding=rounding,
    )


def has_whole_groups(config: ExpertsConfig, scheme: QuantScheme) -> bool:
    """Whether no group of rows has some of gate and some of up."""
    rows = scheme.group_shape[0] or 1
    if config.gate_up is GateUp.UNGATED or rows == 1:
        return True
    return config.gate_up is not GateUp.INTERLEAVED and config.intermediate_size % rows == 0


def has_factors(scheme: QuantScheme) -> bool:
    """Whether finished sums are scaled: by scales of rows or matrices, or global ones."""
    return scheme.group_shape[1] is None or scheme.global_scale is not GlobalScale.NONE


def _field_bits(scheme: QuantScheme) -> int:
    return next(width for width in (2, 4, 8) if width >= scheme.bits)


def _run(scheme: QuantScheme, fields: int) -> int:
    """Columns of a run: as many as divide a group."""
    run, columns = MAX_RUNS[fields], scheme.group_shape[1]
    while columns is not None and columns % run:
        run //= 2
    return run
