"""Schemes that the C++ kernels read in codes of another: the same levels, bit for bit.

    stored                                   read as
    integers of 1, 2, 3 bits                 int4
    integers of 5, 6, 7 bits                 int8
    a codebook of unlike whole numbers       int4 where all are in -8..7, int8 in -128..127
    e2m3, e3m2                               e4m3

A code becomes the one that stands for the same level; scales and zero points stay as they are. No
two codes become one, so that the way back is exact: a codebook with two zeros is not converted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from mixtura.quant.packing import pack_codes, unpack_codes
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint


@dataclass(frozen=True)
class Conversion:
    """Codes of one scheme as those of another.

    Attributes:
        stored: what the matrix has. read: what the kernels get.
        codes: of `read`, by code of `stored`; all unlike.
    """

    stored: QuantScheme
    read: QuantScheme
    codes: tuple[int, ...]

    def apply(self, values: Tensor, num_columns: int) -> Tensor:
        """Packed rows (..., bytes) uint8 of `stored` as packed rows of `read`."""
        return _translated(values, num_columns, self.stored.bits, self.read.bits, self.codes)

    def undo(self, values: Tensor, num_columns: int) -> Tensor:
        """Packed rows of `read` as packed rows of `stored`."""
        codes = [0] * 2**self.read.bits
        for stored, read in enumerate(self.codes):
            codes[read] = stored
        return _translated(values, num_columns, self.read.bits, self.stored.bits, codes)

    def __str__(self) -> str:
        return f"{code_name(self.stored)} as {code_name(self.read)}"


def _translated(
    values: Tensor, num_columns: int, bits: int, new_bits: int, codes: list[int] | tuple[int, ...]
) -> Tensor:
    table = torch.tensor(codes, dtype=torch.uint8)
    old = unpack_codes(values, num_columns, bits)
    return pack_codes(table.index_select(0, old.flatten().int()).view(old.shape), new_bits)


def code_name(scheme: QuantScheme) -> str:
    """What people call a scheme's codes."""
    match scheme.code:
        case Code.DENSE:
            return str(scheme.values_dtype).removeprefix("torch.")
        case Code.INT:
            return f"int{scheme.bits}"
        case Code.CODEBOOK:
            return f"codebook of {2**scheme.bits}"
        case _:
            return str(scheme.code.value)


@cache
def conversion_of(scheme: QuantScheme) -> Conversion | None:
    """How the codes of a scheme become others, or None where they stay.

    >>> str(conversion_of(QuantScheme(Code.INT, 3, (1, 32), torch.float16, ZeroPoint.MID)))
    'int3 as int4'
    """
    match scheme.code:
        case Code.INT if scheme.bits not in (4, 8):
            bits = 4 if scheme.bits < 4 else 8
            # Without a middle, codes are the levels themselves.
            is_centred = scheme.zero_point is ZeroPoint.MID
            first = (2**bits - 2**scheme.bits) // 2 if is_centred else 0
            codes = tuple(range(first, first + 2**scheme.bits))
            return Conversion(scheme, replace(scheme, bits=bits), codes)
        case Code.CODEBOOK:
            return _whole_numbers(scheme)
        case Code.E2M3 | Code.E3M2:
            read = replace(scheme, code=Code.E4M3, bits=8)
            code_of = _by_level(read.levels)
            codes = tuple(code_of[_signed(level)] for level in scheme.levels)
            return Conversion(scheme, read, codes)
        case _:
            return None


def as_read(scheme: QuantScheme) -> QuantScheme:
    """The scheme in whose codes the kernels get a matrix."""
    conversion = conversion_of(scheme)
    return scheme if conversion is None else conversion.read


def _whole_numbers(scheme: QuantScheme) -> Conversion | None:
    levels = scheme.levels
    if len(set(levels)) < len(levels) or not all(level.is_integer() for level in levels):
        return None
    for bits in (4, 8):
        middle = 2 ** (bits - 1)
        if -middle <= min(levels) and max(levels) < middle:
            read = replace(
                scheme, code=Code.INT, bits=bits, zero_point=ZeroPoint.MID, codebook=None
            )
            return Conversion(scheme, read, tuple(int(level) + middle for level in levels))
    return None


def _signed(level: float) -> tuple[float, float]:
    """A level that tells a zero from a negative one."""
    return level, math.copysign(1.0, level)


def _by_level(levels: tuple[float, ...]) -> Mapping[tuple[float, float], int]:
    return {_signed(level): code for code, level in enumerate(levels)}
