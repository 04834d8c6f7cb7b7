"""ggml's blocks as codes, scales and minima: for every type whose weights are `code * scale - m`.

A block's codes lie in *planes*: bit fields of a range of bytes. In a plane of `bits` and `width`,
`width` bytes hold the elements `0 .. width - 1` in their lowest bits, the next `width` elements in
the bits above those, and so on; then come the next `width` bytes. (4, 16) is "low nibbles first,
high nibbles after", (2, 1) is four neighbours in a byte.

In shape comments B is the number of blocks, C their columns, S the groups of a block that share a
scale.

Source: the `block_*` structs and `dequantize_row_*` of ggml.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.ggml_types import GgmlType
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

_SIGN_BIT = 0x80
_IQ4_LEVELS = (
    *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
    *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
)
_TERNARY_LEVELS = (-1.0, 0.0, 1.0, 2.0)
_BINARY_LEVELS = (-1.0, 1.0)

Span = tuple[int, int]
"""First byte of a block, and the one after the last."""


class Values(NamedTuple):
    """What blocks hold: codes (B, C) uint8, scales (B, S), and minima (B, S) if there are any."""

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None


def spread(fields: Tensor, bits: int, width: int) -> Tensor:
    """Bit fields of bytes (B, n) as elements (B, n * 8 / bits), in the order of a plane.

    >>> spread(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), bits=4, width=2).tolist()
    [[1, 3, 2, 4]]
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)[:, None]
    runs = fields.reshape(len(fields), -1, 1, width) >> shifts  # (B, runs, fields, width)
    elements: Tensor = (runs & (2**bits - 1)).flatten(1)
    return elements


def gather(elements: Tensor, bits: int, width: int) -> Tensor:
    """Undo `spread`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=elements.device)[:, None]
    runs = elements.reshape(len(elements), -1, 8 // bits, width) << shifts
    return runs.sum(2, dtype=torch.uint8).flatten(1)


def half(raw: Tensor, start: int) -> Tensor:
    """The fp16 number at a byte of every block, (B, 1)."""
    return raw[:, start : start + 2].contiguous().view(torch.float16)


def as_bytes(numbers: Tensor) -> Tensor:
    """Numbers (B, n) as their bytes (B, n * itemsize)."""
    return numbers.contiguous().view(torch.uint8)


# ------------------------------------------------------------------------------------------ codes


@dataclass(frozen=True)
class Plane:
    """Some bits of every code of a block: from `shift` up, in a range of bytes."""

    span: Span
    bits: int
    width: int
    shift: int = 0

    def read(self, raw: Tensor) -> Tensor:
        """These bits of the codes, (B, C)."""
        return spread(raw[:, slice(*self.span)], self.bits, self.width) << self.shift

    def write_(self, raw: Tensor, codes: Tensor) -> None:
        """Put these bits of the codes into blocks."""
        fields = (codes >> self.shift) & (2**self.bits - 1)
        raw[:, slice(*self.span)] = gather(fields, self.bits, self.width)


@dataclass(frozen=True)
class Signed:
    """Codes of one signed byte each, read as unsigned with 128 added."""

    span: Span

    def read(self, raw: Tensor) -> Tensor:
        """The codes, (B, C)."""
        return raw[:, slice(*self.span)] ^ _SIGN_BIT

    def write_(self, raw: Tensor, codes: Tensor) -> None:
        """Put the codes into blocks."""
        raw[:, slice(*self.span)] = codes ^ _SIGN_BIT


class Trits:
    """Codes 0..2 as digits of base 3, five to a byte, of TQ1_0.

    A byte is a fraction of 256: digit n is `floor(3 * ((byte * 3 ** n) mod 256) / 256)`. Runs of
    bytes hold their first digits, then their second digits, and so on.
    """

    RUNS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    """First byte, the one after the last, and digits of a byte."""

    def read(self, raw: Tensor) -> Tensor:
        """The codes, (B, 256)."""
        parts = []
        for start, stop, count in self.RUNS:
            powers = raw.new_tensor([3**n for n in range(count)])[:, None]
            fractions = raw[:, None, start:stop] * powers  # uint8: mod 256
            parts.append(((fractions.to(torch.int16) * 3) >> 8).to(torch.uint8).flatten(1))
        return torch.cat(parts, 1)

    def write_(self, raw: Tensor, codes: Tensor) -> None:
        """Put the codes into blocks as ggml does: the smallest byte with these digits."""
        first = 0
        for start, stop, count in self.RUNS:
            digits = codes[:, first : first + count * (stop - start)]
            digits = digits.reshape(len(codes), count, -1).to(torch.int32)
            powers = torch.tensor([3 ** (4 - n) for n in range(count)], device=codes.device)
            number = (digits * powers[:, None]).sum(1)
            raw[:, start:stop] = ((number * 256 + 242) // 243).to(torch.uint8)
            first += count * (stop - start)


# ----------------------------------------------------------------------------------------- scales


class Scales(ABC):
    """Where the scales of a block lie."""

    @abstractmethod
    def read(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and minima, (B, S).

        Raises:
            CheckpointError: one is not a finite number.
        """

    @abstractmethod
    def write_(self, raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
        """Put scales and minima into blocks, as far as they determine the bytes."""


@dataclass(frozen=True)
class HalfScales(Scales):
    """An fp16 scale, and an fp16 offset that is added, at these bytes."""

    scale: int
    offset: int | None = None

    def read(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        scales = half(raw, self.scale)
        offsets = None if self.offset is None else half(raw, self.offset)
        check_finite(scales, "scale")
        if offsets is None:
            return scales, None
        check_finite(offsets, "offset")
        return scales, -offsets

    def write_(self, raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
        raw[:, self.scale : self.scale + 2] = as_bytes(scales)
        if self.offset is not None and minima is not None:
            raw[:, self.offset : self.offset + 2] = as_bytes(-minima)


@dataclass(frozen=True)
class PowerScales(Scales):
    """A power of two, e8m0, in the first byte."""

    def read(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        scales = raw[:, :1].contiguous().view(torch.float8_e8m0fnu)
        check_finite(scales.float(), "scale")
        return scales, None

    def write_(self, raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
        raw[:, :1] = as_bytes(scales)


@dataclass(frozen=True)
class Float8Scales(Scales):
    """Unsigned e4m3 in the first four bytes; the sign bit is ignored, and 0x7F is zero."""

    def read(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        stored = raw[:, :4]
        if bool((stored == 0xFF).any()):
            raise CheckpointError(
                "the scale of a block (0xFF) must be an unsigned e4m3 number; got none. Fetch the "
                "weights again."
            )
        canonical = torch.where(stored == 0x7F, 0, stored & 0x7F)
        return canonical.to(torch.uint8).view(torch.float8_e4m3fn), None

    def write_(self, raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
        raw[:, :4] = as_bytes(scales)


Levels = tuple[Tensor, Tensor | None]
"""Whole numbers (B, S) that multiply a block's scale, and those that multiply its minimum."""


@dataclass(frozen=True)
class TwoLevelScales(Scales):
    """Small whole numbers times an fp16 scale (and an fp16 minimum): exact in fp32.

    A product does not tell its factors.
    """

    levels: Callable[[Tensor], Levels]
    scale: int
    minimum: int | None = None

    def read(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        levels, minimum_levels = self.levels(raw)
        scales = half(raw, self.scale).float()
        check_finite(scales, "scale")
        if minimum_levels is None or self.minimum is None:
            return scales * levels, None
        minima = half(raw, self.minimum).float()
        check_finite(minima, "minimum")
        return scales * levels, minima * minimum_levels

    def write_(self, raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
        """Nothing: all of it is in the header."""


def check_finite(numbers: Tensor, what: str) -> None:
    """Raise `CheckpointError` unless a number per block (B, 1) is finite."""
    is_finite = torch.isfinite(numbers)
    if not bool(is_finite.all()):
        block = int((~is_finite).any(1).nonzero()[0])
        raise CheckpointError(
            f"the {what} of a block must be finite; got {numbers[block, 0].item()} in block "
            f"{block}. Fetch the weights again."
        )


def _levels_q2(raw: Tensor) -> Levels:
    return raw[:, 0:16] & 15, raw[:, 0:16] >> 4


def _levels_q3(raw: Tensor) -> Levels:
    low = spread(raw[:, 96:104], 4, 8)  # (B, 16)
    high = spread(raw[:, 104:108], 2, 4)
    return (low | (high << 4)).float() - 32, None


def _levels_q4(raw: Tensor) -> Levels:
    """Six bits each, the upper four numbers of both kinds split: nibbles here, two bits there."""
    first, second, third = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    levels = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return levels, minima


def _levels_q6(raw: Tensor) -> Levels:
    return raw[:, 192:208].contiguous().view(torch.int8), None


def _levels_iq4(raw: Tensor) -> Levels:
    low = spread(raw[:, 4:8], 4, 1)  # (B, 8)
    high = spread(raw[:, 2:4], 2, 1)
    return (low | (high << 4)).float() - 32, None


# ---------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """A type's blocks.

    Attributes:
        scheme: what its codes and scales mean.
        planes: where the codes are. scales: where the scales are.
        header: bytes that codes and scales do not always determine. needs_header: they never do.
    """

    scheme: QuantScheme
    planes: tuple[Plane | Signed | Trits, ...]
    scales: Scales
    header: tuple[Span, ...] = ()
    needs_header: bool = False

    def read(self, raw: Tensor) -> Values:
        """Blocks (B, bytes) taken apart.

        Raises:
            CheckpointError: a scale is not a finite number.
        """
        codes = self.planes[0].read(raw)
        for plane in self.planes[1:]:
            codes |= plane.read(raw)
        return Values(codes, *self.scales.read(raw))

    def write(self, values: Values, num_bytes: int, header: Tensor | None) -> Tensor:
        """Blocks (B, num_bytes) of these values; `header` is what `header_of` took from others."""
        raw = values.codes.new_zeros((len(values.codes), num_bytes))
        for plane in self.planes:
            plane.write_(raw, values.codes)
        self.scales.write_(raw, values.scales, values.minima)
        if header is not None:
            sizes = [stop - start for start, stop in self.header]
            parts = header.split_with_sizes(sizes, 1)
            for (start, stop), part in zip(self.header, parts, strict=True):
                raw[:, start:stop] = part
        return raw

    def header_of(self, raw: Tensor) -> Tensor | None:
        """The bytes (B, n) of `header`, or None where the values alone give these blocks."""
        if not self.header:
            return None
        if not self.needs_header:
            again = self.write(self.read(raw), raw.shape[1], None)
            if torch.equal(again, raw):
                return None
        return torch.cat([raw[:, start:stop] for start, stop in self.header], 1)


def _integers(bits: int, columns: int, zero_point: ZeroPoint, dtype: torch.dtype) -> QuantScheme:
    return QuantScheme(Code.INT, bits, (1, columns), dtype, zero_point)


def _codebook(levels: tuple[float, ...], columns: int, dtype: torch.dtype) -> QuantScheme:
    bits = (len(levels) - 1).bit_length()
    return QuantScheme(Code.CODEBOOK, bits, (1, columns), dtype, codebook=levels)


_F16, _F32 = torch.float16, torch.float32
_MID, _MINIMUM = ZeroPoint.MID, ZeroPoint.MINIMUM
_Q4_K_SCALES = TwoLevelScales(_levels_q4, scale=0, minimum=2)

LAYOUTS: dict[GgmlType, Layout] = {
    GgmlType.Q4_0: Layout(
        _integers(4, 32, _MID, _F16), (Plane((2, 18), 4, 16),), HalfScales(scale=0)
    ),
    GgmlType.Q4_1: Layout(
        _integers(4, 32, _MINIMUM, _F16), (Plane((4, 20), 4, 16),), HalfScales(scale=0, offset=2)
    ),
    GgmlType.Q5_0: Layout(
        _integers(5, 32, _MID, _F16),
        (Plane((6, 22), 4, 16), Plane((2, 6), 1, 1, shift=4)),
        HalfScales(scale=0),
    ),
    GgmlType.Q5_1: Layout(
        _integers(5, 32, _MINIMUM, _F16),
        (Plane((8, 24), 4, 16), Plane((4, 8), 1, 1, shift=4)),
        HalfScales(scale=0, offset=2),
    ),
    GgmlType.Q8_0: Layout(_integers(8, 32, _MID, _F16), (Signed((2, 34)),), HalfScales(scale=0)),
    GgmlType.Q2_K: Layout(
        _integers(2, 16, _MINIMUM, _F32),
        (Plane((16, 80), 2, 32),),
        TwoLevelScales(_levels_q2, scale=80, minimum=82),
        ((0, 16), (80, 84)),
        needs_header=True,
    ),
    GgmlType.Q3_K: Layout(
        _integers(3, 16, _MID, _F32),
        (Plane((32, 96), 2, 32), Plane((0, 32), 1, 32, shift=2)),
        TwoLevelScales(_levels_q3, scale=108),
        ((96, 110),),
        needs_header=True,
    ),
    GgmlType.Q4_K: Layout(
        _integers(4, 32, _MINIMUM, _F32),
        (Plane((16, 144), 4, 32),),
        _Q4_K_SCALES,
        ((0, 16),),
        needs_header=True,
    ),
    GgmlType.Q5_K: Layout(
        _integers(5, 32, _MINIMUM, _F32),
        (Plane((48, 176), 4, 32), Plane((16, 48), 1, 32, shift=4)),
        _Q4_K_SCALES,
        ((0, 16),),
        needs_header=True,
    ),
    GgmlType.Q6_K: Layout(
        _integers(6, 16, _MID, _F32),
        (Plane((0, 128), 4, 64), Plane((128, 192), 2, 32, shift=4)),
        TwoLevelScales(_levels_q6, scale=208),
        ((192, 210),),
        needs_header=True,
    ),
    GgmlType.IQ4_NL: Layout(
        _codebook(_IQ4_LEVELS, 32, _F16), (Plane((2, 18), 4, 16),), HalfScales(scale=0)
    ),
    GgmlType.IQ4_XS: Layout(
        _codebook(_IQ4_LEVELS, 32, _F32),
        (Plane((8, 136), 4, 16),),
        TwoLevelScales(_levels_iq4, scale=0),
        ((0, 8),),
        needs_header=True,
    ),
    GgmlType.MXFP4: Layout(
        QuantScheme(Code.E2M1, 4, (1, 32), torch.float8_e8m0fnu),
        (Plane((1, 17), 4, 16),),
        PowerScales(),
    ),
    GgmlType.NVFP4: Layout(
        QuantScheme(Code.E2M1, 4, (1, 16), torch.float8_e4m3fn),
        (Plane((4, 36), 4, 8),),
        Float8Scales(),
        ((0, 4),),
    ),
    GgmlType.TQ1_0: Layout(
        _codebook(_TERNARY_LEVELS, 256, _F16), (Trits(),), HalfScales(scale=52), ((0, 52),)
    ),
    GgmlType.TQ2_0: Layout(
        _codebook(_TERNARY_LEVELS, 256, _F16), (Plane((0, 64), 2, 32),), HalfScales(scale=64)
    ),
    GgmlType.Q1_0: Layout(
        _codebook(_BINARY_LEVELS, 128, _F16), (Plane((2, 18), 1, 1),), HalfScales(scale=0)
    ),
    GgmlType.Q2_0: Layout(
        _codebook(_TERNARY_LEVELS, 64, _F16), (Plane((2, 18), 2, 1),), HalfScales(scale=0)
    ),
}
"""The types that are codes and scales."""
