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
_SUPER_COLUMNS = 256

Span = tuple[int, int]
"""First byte of a block, and the one after the last."""


class Grids(NamedTuple):
    """Scales (B, S) of blocks; minima (B, S) and what both multiply (B, 1), if there are any."""

    scales: Tensor
    minima: Tensor | None = None
    super_scales: Tensor | None = None
    super_minima: Tensor | None = None

    def reshaped(self, num_rows: int) -> Grids:
        """The same numbers in so many rows."""
        more = (None if grid is None else grid.reshape(num_rows, -1) for grid in self[1:])
        return Grids(self.scales.reshape(num_rows, -1), *more)


class Values(NamedTuple):
    """What blocks hold: codes (B, C) uint8, and scales."""

    codes: Tensor
    grids: Grids


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


class SixBits:
    """Eight levels of scales and eight of minima in bytes 4 to 15, of Q4_K and Q5_K.

    The first four of both have six bits of a byte; the upper four have a nibble each of the last
    four bytes, and the two bits that are left of the others.
    """

    def read(self, raw: Tensor) -> Tensor:
        """Levels of the scales, then those of the minima, (B, 16)."""
        first, second, third = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
        upper = (third & 15) | (first >> 6 << 4)
        upper_minima = (third >> 4) | (second >> 6 << 4)
        return torch.cat([first & 63, upper, second & 63, upper_minima], 1)

    def write_(self, raw: Tensor, codes: Tensor) -> None:
        """Put the levels into blocks."""
        first, upper, second, upper_minima = codes.chunk(4, 1)
        raw[:, 4:8] = first | (upper >> 4 << 6)
        raw[:, 8:12] = second | (upper_minima >> 4 << 6)
        raw[:, 12:16] = (upper & 15) | (upper_minima & 15) << 4


Fields = Plane | Signed | Trits | SixBits
"""Bits of a block that are whole numbers."""


def _read_planes(planes: tuple[Fields, ...], raw: Tensor) -> Tensor:
    """Codes (B, n) uint8 of all planes together."""
    codes = planes[0].read(raw)
    for plane in planes[1:]:
        codes |= plane.read(raw)
    return codes


def _write_planes_(planes: tuple[Fields, ...], raw: Tensor, codes: Tensor) -> None:
    """Undo `_read_planes`."""
    for plane in planes:
        plane.write_(raw, codes)


# ----------------------------------------------------------------------------------------- scales


class Scales(ABC):
    """Where the scales of a block lie."""

    @abstractmethod
    def read(self, raw: Tensor) -> Grids:
        """The scales.

        Raises:
            CheckpointError: one is not a finite number.
        """

    @abstractmethod
    def write_(self, raw: Tensor, grids: Grids) -> None:
        """Put the scales into blocks, as far as they determine the bytes."""


@dataclass(frozen=True)
class HalfScales(Scales):
    """An fp16 scale, and an fp16 offset that is added, at these bytes."""

    scale: int
    offset: int | None = None

    def read(self, raw: Tensor) -> Grids:
        scales = half(raw, self.scale)
        offsets = None if self.offset is None else half(raw, self.offset)
        check_finite(scales, "scale")
        if offsets is None:
            return Grids(scales)
        check_finite(offsets, "offset")
        return Grids(scales, -offsets)

    def write_(self, raw: Tensor, grids: Grids) -> None:
        raw[:, self.scale : self.scale + 2] = as_bytes(grids.scales)
        if self.offset is not None and grids.minima is not None:
            raw[:, self.offset : self.offset + 2] = as_bytes(-grids.minima)


@dataclass(frozen=True)
class PowerScales(Scales):
    """A power of two, e8m0, in the first byte."""

    def read(self, raw: Tensor) -> Grids:
        scales = raw[:, :1].contiguous().view(torch.float8_e8m0fnu)
        check_finite(scales.float(), "scale")
        return Grids(scales)

    def write_(self, raw: Tensor, grids: Grids) -> None:
        raw[:, :1] = as_bytes(grids.scales)


@dataclass(frozen=True)
class Float8Scales(Scales):
    """Unsigned e4m3 in the first four bytes; the sign bit is ignored, and 0x7F is zero."""

    def read(self, raw: Tensor) -> Grids:
        stored = raw[:, :4]
        if bool((stored == 0xFF).any()):
            raise CheckpointError(
                "the scale of a block (0xFF) must be an unsigned e4m3 number; got none. Fetch the "
                "weights again."
            )
        canonical = torch.where(stored == 0x7F, 0, stored & 0x7F)
        return Grids(canonical.to(torch.uint8).view(torch.float8_e4m3fn))

    def write_(self, raw: Tensor, grids: Grids) -> None:
        raw[:, :4] = as_bytes(grids.scales)


@dataclass(frozen=True)
class TwoLevelScales(Scales):
    """Small whole numbers that multiply an fp16 scale (and an fp16 minimum) of the block.

    Attributes:
        planes: where the numbers are; those of minima follow those of scales.
        scale, minimum: bytes of the fp16 numbers.
        middle: what is subtracted from numbers that have a sign.
    """

    planes: tuple[Fields, ...]
    scale: int
    minimum: int | None = None
    middle: int | None = None

    def read(self, raw: Tensor) -> Grids:
        levels = _read_planes(self.planes, raw)
        scales = half(raw, self.scale)
        check_finite(scales, "scale")
        if self.middle is not None:
            levels = (levels - self.middle).view(torch.int8)  # modulo 256
        if self.minimum is None:
            return Grids(levels, None, scales)
        minima = half(raw, self.minimum)
        check_finite(minima, "minimum")
        scale_levels, minimum_levels = levels.chunk(2, 1)
        return Grids(scale_levels, minimum_levels, scales, minima)

    def write_(self, raw: Tensor, grids: Grids) -> None:
        assert grids.super_scales is not None
        raw[:, self.scale : self.scale + 2] = as_bytes(grids.super_scales)
        levels = grids.scales
        if self.middle is not None:
            levels = levels.view(torch.uint8) + self.middle  # modulo 256
        if self.minimum is not None and grids.minima is not None:
            assert grids.super_minima is not None
            raw[:, self.minimum : self.minimum + 2] = as_bytes(grids.super_minima)
            levels = torch.cat([levels, grids.minima], 1)
        _write_planes_(self.planes, raw, levels)


def check_finite(numbers: Tensor, what: str) -> None:
    """Raise `CheckpointError` unless a number per block (B, 1) is finite."""
    is_finite = torch.isfinite(numbers)
    if not bool(is_finite.all()):
        block = int((~is_finite).any(1).nonzero()[0])
        raise CheckpointError(
            f"the {what} of a block must be finite; got {numbers[block, 0].item()} in block "
            f"{block}. Fetch the weights again."
        )


# ---------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """A type's blocks.

    Attributes:
        scheme: what its codes and scales mean.
        planes: where the codes are. scales: where the scales are.
        header: bytes that codes and scales do not always determine.
    """

    scheme: QuantScheme
    planes: tuple[Fields, ...]
    scales: Scales
    header: tuple[Span, ...] = ()

    def read(self, raw: Tensor) -> Values:
        """Blocks (B, bytes) taken apart.

        Raises:
            CheckpointError: a scale is not a finite number.
        """
        return Values(_read_planes(self.planes, raw), self.scales.read(raw))

    def write(self, values: Values, num_bytes: int, header: Tensor | None) -> Tensor:
        """Blocks (B, num_bytes) of these values; `header` is what `header_of` took from others."""
        raw = values.codes.new_zeros((len(values.codes), num_bytes))
        _write_planes_(self.planes, raw, values.codes)
        self.scales.write_(raw, values.grids)
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
        if torch.equal(self.write(self.read(raw), raw.shape[1], None), raw):
            return None
        return torch.cat([raw[:, start:stop] for start, stop in self.header], 1)


def _integers(bits: int, columns: int, zero_point: ZeroPoint, dtype: torch.dtype) -> QuantScheme:
    super_columns = None if dtype.is_floating_point else _SUPER_COLUMNS
    return QuantScheme(Code.INT, bits, (1, columns), dtype, zero_point, super_columns=super_columns)


def _codebook(levels: tuple[float, ...], columns: int, dtype: torch.dtype) -> QuantScheme:
    bits = (len(levels) - 1).bit_length()
    super_columns = None if dtype.is_floating_point else _SUPER_COLUMNS
    return QuantScheme(
        Code.CODEBOOK, bits, (1, columns), dtype, codebook=levels, super_columns=super_columns
    )


_F16, _U8, _I8 = torch.float16, torch.uint8, torch.int8
_MID, _MINIMUM = ZeroPoint.MID, ZeroPoint.MINIMUM

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
        _integers(2, 16, _MINIMUM, _U8),
        (Plane((16, 80), 2, 32),),
        TwoLevelScales((Plane((0, 16), 4, 16),), scale=80, minimum=82),
    ),
    GgmlType.Q3_K: Layout(
        _integers(3, 16, _MID, _I8),
        (Plane((32, 96), 2, 32), Plane((0, 32), 1, 32, shift=2)),
        TwoLevelScales(
            (Plane((96, 104), 4, 8), Plane((104, 108), 2, 4, shift=4)), scale=108, middle=32
        ),
    ),
    GgmlType.Q4_K: Layout(
        _integers(4, 32, _MINIMUM, _U8),
        (Plane((16, 144), 4, 32),),
        TwoLevelScales((SixBits(),), scale=0, minimum=2),
    ),
    GgmlType.Q5_K: Layout(
        _integers(5, 32, _MINIMUM, _U8),
        (Plane((48, 176), 4, 32), Plane((16, 48), 1, 32, shift=4)),
        TwoLevelScales((SixBits(),), scale=0, minimum=2),
    ),
    GgmlType.Q6_K: Layout(
        _integers(6, 16, _MID, _I8),
        (Plane((0, 128), 4, 64), Plane((128, 192), 2, 32, shift=4)),
        TwoLevelScales((Signed((192, 208)),), scale=208, middle=128),
    ),
    GgmlType.IQ4_NL: Layout(
        _codebook(_IQ4_LEVELS, 32, _F16), (Plane((2, 18), 4, 16),), HalfScales(scale=0)
    ),
    GgmlType.IQ4_XS: Layout(
        _codebook(_IQ4_LEVELS, 32, _I8),
        (Plane((8, 136), 4, 16),),
        TwoLevelScales((Plane((4, 8), 4, 1), Plane((2, 4), 2, 1, shift=4)), scale=0, middle=32),
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
