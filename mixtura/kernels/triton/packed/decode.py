"""From words to operands: a small function for each kind of code, and `decoded`, which calls it.

A tile of words (N, R) holds several runs of R columns (see layout.py); run I of it becomes an
operand, scaled by its group where operands are of 16 bits. On NVIDIA's GPUs a register of two or
four words is treated at once, in PTX that `assembly_for` writes. Under the interpreter, whose bf16
and fp8 arithmetic is wrong, operands are in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtura.kernels.triton.packed.layout import Layout
from mixtura.quant.scheme import Code

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float8_e4m3fn: 3}

_OFFSETS = {torch.bfloat16: 7, torch.float16: 10}
"""2 to this power is a float whose fraction counts: its bits, or those of q, are it plus q."""

_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "int8",
    torch.float32: "fp32",
    torch.float8_e8m0fnu: "e8m0",
}


_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.int8: tl.int8,
}


_WIDE_BF16 = "wide bf16"
"""fp32 whose last 16 bits are 0."""


class Format(NamedTuple):
    """A layout as kernels are compiled for it; names of dtypes stand for them.

    Attributes:
        fields, run, bits, places, runs_per_scale, group_rows, zero_bits: of `Layout`.
        num_rows: rows of the whole matrix of an expert.
        exponent_bits, mantissa_bits: of small floats; 0 for integers.
        zero: what is subtracted from codes; -1 where zero points are.
        offset: of integers as `assembly` makes them.
        operand, operand_type, scale: dtypes; "" without scales of groups.
        level_exponent: of two: what scales of groups, or levels where there are none, are
            multiplied by for operands of 16 bits. field_factor: of levels.
            left_factor: of finished sums.
        is_rounded, has_row_groups: of `Layout`.
        assembly: see `assembly_for`.
    """

    fields: int
    run: int
    bits: int
    places: tuple[tuple[int, int, int], ...]
    runs_per_scale: int
    group_rows: int
    zero_bits: int
    num_rows: int
    exponent_bits: int
    mantissa_bits: int
    zero: int
    offset: int
    operand: str
    operand_type: tl.dtype
    scale: str
    level_exponent: int
    field_factor: float
    left_factor: float
    is_rounded: bool
    has_row_groups: bool
    assembly: tuple[str, ...]


class Matrix(NamedTuple):
    """The tensors of a packed matrix, as a kernel gets them: see `PackedMatrix`."""

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    factors: Tensor | None


def format_of(layout: Layout, num_rows: int, *, has_assembly: bool) -> Format:
    """What kernels are compiled for, of a matrix with so many rows (gate's and up's together)."""
    is_float = layout.code.is_float
    assembly = assembly_for(layout) if has_assembly else ()
    counts = bool(assembly) and not is_float
    is_offset = counts and (layout.bits <= 4 or layout.operand is torch.float16)
    return Format(
        fields=layout.fields,
        run=layout.run,
        bits=layout.bits,
        places=layout.places,
        runs_per_scale=layout.runs_per_scale,
        group_rows=layout.group_rows,
        zero_bits=layout.zero_bits,
        num_rows=num_rows,
        exponent_bits=layout.code.exponent_bits if is_float else 0,
        mantissa_bits=layout.code.mantissa_bits if is_float else 0,
        zero=-1 if layout.zero is None else layout.zero,
        offset=2 ** _OFFSETS[layout.operand] if is_offset else 0,
        operand=_NAMES[layout.operand],
        operand_type=_TYPES[layout.operand],
        scale=_scale_name(layout),
        level_exponent=layout.level_exponent,
        field_factor=2.0**-layout.field_exponent,
        left_factor=2.0**layout.left_exponent,
        is_rounded=layout.is_rounded,
        has_row_groups=layout.has_row_groups,
        assembly=assembly,
    )


def _scale_name(layout: Layout) -> str:
    if not layout.is_grouped:
        return ""
    is_wide = layout.scale_field is torch.float32 and layout.scale_dtype is torch.bfloat16
    return _WIDE_BF16 if is_wide else _NAMES[layout.scale_field]


def assembly_for(layout: Layout) -> tuple[str, ...]:
    """PTX for every run: a register of words -> one of operands. () where plain Triton does.

    Integers come out with an offset (`_OFFSETS`), but 8-bit ones for bf16, whose fraction is too
    short for that.
    """
    runs = range(layout.fields)
    if layout.code.is_float and (layout.fields > 1):
        return tuple(_small_float(layout, run) for run in runs)
    if layout.code is not Code.INT or layout.is_rounded:
        return ()
    if layout.bits == 8 and layout.operand is torch.bfloat16:
        return tuple(_int8_for_bf16(run) for run in runs)
    return tuple(_counted(layout, run) for run in runs)


def _mask(bits: int, width: int) -> str:
    """`bits` in every part of `width` bits of a register."""
    return f"0x{sum(bits << at for at in range(0, 32, width)):08X}"


def _counted(layout: Layout, run: int) -> str:
    """Integers: the last bits of a float that counts."""
    one = {torch.bfloat16: 0x4300, torch.float16: 0x6400}[layout.operand]
    mask, offset = _mask(2**layout.bits - 1, 16), _mask(one, 16)
    shift = f"shr.b32 t, $1, {layout.bits * run}; "
    return f"{{ .reg .b32 t; {shift}lop3.b32 $0, t, {mask}, {offset}, 0xEA; }}"


def _int8_for_bf16(run: int) -> str:
    """Bytes: the last ones of 2^23 in fp32, which is taken away again."""
    moves = "".join(
        f"prmt.b32 {to}, $1, 0x4B000000, 0x744{2 * part + run}; add.f32 {to}, {to}, 0fCB000000; "
        for part, to in enumerate("tu")
    )
    return f"{{ .reg .f32 t, u; {moves}cvt.rn.bf16x2.f32 $0, u, t; }}"


def _small_float(layout: Layout, run: int) -> str:
    """Sign and magnitude of floats, brought to where those of the operand are."""
    code, width = layout.code, 8 * layout.operand.itemsize
    magnitude_bits = code.exponent_bits + code.mantissa_bits
    low = _MANTISSA_BITS[layout.operand] - code.mantissa_bits
    start = layout.bits * run
    # (first bit of a part, its bits, where its first bit goes)
    parts = [(start + magnitude_bits, 1, width - 1), (start, magnitude_bits, low)]
    if layout.places:
        sign, high, lowest = layout.places[run]
        parts = [(sign, 1, width - 1), (high, 1, low + 2), (lowest, 2, low)]
    masks: dict[int, int] = {}  # by shift to the left
    for first, bits, to in parts:
        masks[to - first] = masks.get(to - first, 0) | (2**bits - 1) << to
    moves, gathered = "", ""
    for shift, bits_there in masks.items():
        source = "$1"
        if shift:
            name, by = ("shl", shift) if shift > 0 else ("shr", -shift)
            moves += f"{name}.b32 t, $1, {by}; "
            source = "t"
        mask = _mask(bits_there, width)
        if gathered:
            moves += f"lop3.b32 u, {source}, {mask}, {gathered}, 0xEA; "
        else:
            moves += f"and.b32 u, {source}, {mask}; "
        gathered = "u"
    return f"{{ .reg .b32 t, u; {moves}mov.b32 $0, u; }}"


@triton.jit
def bits_as_float32(bits, DTYPE: tl.constexpr):
    """The float called DTYPE whose bits are those of an int32, in fp32."""
    if DTYPE == "fp32" or DTYPE == "wide bf16":
        result = bits.to(tl.float32, bitcast=True)
    elif DTYPE == "bf16":
        result = (bits << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "fp16":
        result = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif DTYPE == "e4m3":
        result = small_float(bits, 4, 3)
    else:
        tl.static_assert(DTYPE == "e8m0")
        power = tl.where(bits == 0, 0x400000, bits << 23)  # 2^-127 has no exponent of its own
        result = power.to(tl.float32, bitcast=True)
    return result


@triton.jit
def small_float(code, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """The float that a code (int32) of a sign, EXPONENT_BITS and MANTISSA_BITS is, in fp32.

    Behind the wider exponent the same bits are smaller by the difference of the biases.
    """
    MAGNITUDE_BITS: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS
    sign = ((code >> MAGNITUDE_BITS) & 1) << 31
    magnitude = (code & ((1 << MAGNITUDE_BITS) - 1)) << (23 - MANTISSA_BITS)
    return (sign | magnitude).to(tl.float32, bitcast=True) * 2.0 ** (128 - 2 ** (EXPONENT_BITS - 1))


@triton.jit
def read_words(codes_ptr, expert, step, num_steps, n, is_row, FORMAT: tl.constexpr):
    """A step's words of rows n of an expert: (N, R)."""
    RUN: tl.constexpr = FORMAT.run
    row = (expert * num_steps + step) * FORMAT.num_rows + n
    words = codes_ptr + row[:, None] * RUN + tl.arange(0, RUN)[None, :]
    if FORMAT.fields == 1 and FORMAT.operand == "e4m3":
        found = tl.load(words, mask=is_row[:, None], other=0.0)
    else:
        found = tl.load(words, mask=is_row[:, None], other=0)
    return found


@triton.jit
def read_grid(grid_ptr, expert, step, num_steps, n, is_row, INDEX: tl.constexpr,
              BITS: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    """Number INDEX of those that a grid has for each row in a step, BITS wide: (N,) int32."""
    PER_WORD: tl.constexpr = 32 // BITS
    NUM_WORDS: tl.constexpr = (FORMAT.fields // FORMAT.runs_per_scale + PER_WORD - 1) // PER_WORD
    NUM_GROUPS: tl.constexpr = (FORMAT.num_rows + FORMAT.group_rows - 1) // FORMAT.group_rows
    row = ((expert * num_steps + step) * NUM_WORDS + INDEX // PER_WORD) * NUM_GROUPS
    words = tl.load(grid_ptr + row + n // FORMAT.group_rows, mask=is_row, other=0)
    if BITS < 32:
        words = (words >> (INDEX % PER_WORD * BITS)) & ((1 << BITS) - 1)
    return words


@triton.jit
def read_scale(matrix, expert, step, num_steps, n, is_row, RUN: tl.constexpr, FORMAT: tl.constexpr):
    """The scale of run RUN in a step for rows n of an expert: (N,) int32 bits; 0 without groups."""
    if FORMAT.scale == "":
        bits = tl.zeros_like(n)
    else:
        IS_HALF: tl.constexpr = FORMAT.scale == "bf16" or FORMAT.scale == "fp16"
        BITS: tl.constexpr = 16 if IS_HALF else 8 if FORMAT.scale[0] == "e" else 32
        INDEX: tl.constexpr = RUN // FORMAT.runs_per_scale
        bits = read_grid(
            matrix.scales, expert, step, num_steps, n, is_row, INDEX, BITS, FORMAT
        )  # fmt: skip
    return bits


@triton.jit
def read_zero(matrix, expert, step, num_steps, n, is_row, RUN: tl.constexpr, FORMAT: tl.constexpr):
    """The zero point of run RUN in a step for rows n of an expert: (N,) int32."""
    if FORMAT.zero >= 0:
        zero = tl.full(n.shape, FORMAT.zero, tl.int32)
    elif FORMAT.scale == "":
        zero = tl.load(matrix.zeros + expert * FORMAT.num_rows + n, mask=is_row, other=0)
    else:
        INDEX: tl.constexpr = RUN // FORMAT.runs_per_scale
        zero = read_grid(
            matrix.zeros, expert, step, num_steps, n, is_row, INDEX, FORMAT.zero_bits, FORMAT
        )  # fmt: skip
    return zero


@triton.jit
def scaled(operands, scale, FORMAT: tl.constexpr, INTERPRET: tl.constexpr):
    """Operands of 16 bits (N, R) with the scale of their group (N,), or the level's factor."""
    LEVEL: tl.constexpr = 2.0**FORMAT.level_exponent
    if FORMAT.scale == "":
        if LEVEL != 1.0:
            operands *= LEVEL
    else:
        if INTERPRET:
            factor = bits_as_float32(scale, FORMAT.scale) * LEVEL
        elif FORMAT.scale == FORMAT.operand:
            factor = scale.to(tl.int16).to(FORMAT.operand_type, bitcast=True)
            if LEVEL != 1.0:
                factor *= LEVEL
        elif FORMAT.scale == "wide bf16" and FORMAT.operand == "bf16":
            factor = (scale >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
            if LEVEL != 1.0:
                factor *= LEVEL
        elif FORMAT.scale == "e8m0" and FORMAT.operand == "bf16":
            exponent = (scale + FORMAT.level_exponent) << 7
            factor = exponent.to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            wide = bits_as_float32(scale, FORMAT.scale) * LEVEL
            factor = wide.to(FORMAT.operand_type)
        operands *= factor[:, None]
    return operands


@triton.jit
def decoded(words, zero, RUN: tl.constexpr, FORMAT: tl.constexpr, INTERPRET: tl.constexpr):
    """Run RUN of a tile of words (N, R) as operands; zero (N,) is what integers are less."""
    IS_INT: tl.constexpr = FORMAT.exponent_bits == 0
    if FORMAT.fields == 1:
        operands = words
        if INTERPRET:
            operands = operands.to(tl.float32)
    elif len(FORMAT.assembly) > 0:
        operands = tl.inline_asm_elementwise(
            FORMAT.assembly[RUN], "=r,r", [words], dtype=FORMAT.operand_type, is_pure=True,
            pack=32 // (FORMAT.bits * FORMAT.fields),
        )  # fmt: skip
        if IS_INT:
            operands -= (zero + FORMAT.offset).to(FORMAT.operand_type)[:, None]
    else:
        wide = words.to(tl.int32)
        if len(FORMAT.places) > 0:
            SIGN: tl.constexpr = FORMAT.places[RUN][0]
            HIGH: tl.constexpr = FORMAT.places[RUN][1]
            LOW: tl.constexpr = FORMAT.places[RUN][2]
            code = ((wide >> SIGN) & 1) << 3 | ((wide >> HIGH) & 1) << 2 | (wide >> LOW) & 3
        else:
            code = (wide >> (RUN * FORMAT.bits)) & ((1 << FORMAT.bits) - 1)
        if IS_INT:
            level = (code - zero[:, None]).to(tl.float32)
        else:
            level = small_float(code, FORMAT.exponent_bits, FORMAT.mantissa_bits)
            level *= FORMAT.field_factor
        if INTERPRET:
            operands = level
        elif FORMAT.operand == "int8":
            operands = level.to(tl.int32).to(tl.int8)
        else:
            operands = level.to(FORMAT.operand_type)
    return operands
