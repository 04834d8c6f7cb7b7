"""How the codes of a matrix lie in a file, and the way to and from `quant/packing.py`.

A layout is a small frozen value of a `StoredMatrix`. It knows one part: its name, dtype, shape for
a logical shape `(..., N, K)`, and both directions, bit for bit. "Fields" are positions of a word,
from bit 0 up. Hosts are little-endian, as safetensors files are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.packing import pack_codes, unpack_codes

Shape = tuple[int, ...]

_WORD_BITS = 32
_WORD_BYTES = 4
_NIBBLES = 8
# Field i of an interleaved word holds element _ELEMENT_OF_FIELD[i] of its eight.
_ELEMENT_OF_FIELD = [0, 2, 4, 6, 1, 3, 5, 7]
_FIELD_OF_ELEMENT = [0, 4, 1, 5, 2, 6, 3, 7]
_SIGN_OF_NIBBLE = 8
_MXFP4_BLOCK_BYTES = 16


class CodeLayout(ABC):
    """The codes of a matrix as one part of a file.

    Attributes:
        part: the part. bits: width of a code. dtype: what the file calls its elements.
    """

    part: str
    bits: int
    dtype: torch.dtype

    @abstractmethod
    def stored_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes that the part may have for a logical `(..., N, K)`, today's first."""

    @abstractmethod
    def logical_shape(self, stored: Shape) -> Shape:
        """The logical shape of a part whose last unit of storage is full."""

    @abstractmethod
    def read(self, stored: Tensor, shape: Shape) -> Tensor:
        """The part as packed rows `(..., N, ceil(K * bits / 8))`."""

    @abstractmethod
    def write(self, values: Tensor, shape: Shape, stored_shape: Shape) -> Tensor:
        """Packed rows as the part, in one of its shapes; unused bits are 0."""

    def has_unused_bits(self, shape: Shape, stored_shape: Shape) -> bool:
        """Whether the part has bits that belong to no code."""
        num_bits = torch.Size(stored_shape).numel() * self.dtype.itemsize * 8
        return num_bits != torch.Size(shape).numel() * self.bits


@dataclass(frozen=True)
class RowBytes(CodeLayout):
    """Bytes `(..., N, ceil(K * bits / 8))`, packed as here, apart from inverted sign bits.

    Attributes:
        flip: what each byte is XORed with: 0x80 turns int8 into its offset form, 0x88 two int4.
    """

    part: str
    bits: int
    dtype: torch.dtype
    flip: int = 0

    def stored_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return ((*shape[:-1], -(-shape[-1] * self.bits // 8)),)

    def logical_shape(self, stored: Shape) -> Shape:
        num_codes, rest = divmod(stored[-1] * 8, self.bits)
        if rest:
            raise CheckpointError(
                f"{self.part} ({stored[-1]} bytes a row) must hold whole codes of {self.bits} "
                f"bits; got {stored[-1] * 8} bits. Fetch config.json and the weights again, both "
                "of one model."
            )
        return (*stored[:-1], num_codes)

    def read(self, stored: Tensor, shape: Shape) -> Tensor:
        return self._flipped(stored.view(torch.uint8), shape)

    def write(self, values: Tensor, shape: Shape, stored_shape: Shape) -> Tensor:
        return self._flipped(values, shape).view(self.dtype)

    def _flipped(self, rows: Tensor, shape: Shape) -> Tensor:
        flipped = rows ^ self.flip if self.flip else rows
        return _without_unused_bits(flipped, shape[-1], self.bits)


@dataclass(frozen=True)
class RowWords(CodeLayout):
    """int32 words along K, of compressed-tensors.

    Dense, `(..., N, ceil(K * bits / 32))`: a little-endian stream in which codes may cross words.
    Files older than that have `32 // bits` codes in each word, and unused bits above them where 32
    is no multiple of `bits`. The width says which one it is; it differs wherever K is a multiple of
    32, and means dense words where it does not.
    """

    part: str
    bits: int
    dtype: torch.dtype = torch.int32

    def stored_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        dense, loose = word_counts(shape[-1], self.bits)
        shapes = (*shape[:-1], dense), (*shape[:-1], loose)
        return shapes[:1] if dense == loose else shapes

    def logical_shape(self, stored: Shape) -> Shape:
        return (*stored[:-1], stored[-1] * _WORD_BITS // self.bits)

    def read(self, stored: Tensor, shape: Shape) -> Tensor:
        if stored.shape[-1] != word_counts(shape[-1], self.bits)[0]:
            return pack_codes(read_words(stored, shape[-1], self.bits), self.bits)
        row_bytes = -(-shape[-1] * self.bits // 8)
        rows = _as_bytes(stored)[..., :row_bytes].contiguous()
        return _without_unused_bits(rows, shape[-1], self.bits)

    def write(self, values: Tensor, shape: Shape, stored_shape: Shape) -> Tensor:
        if stored_shape[-1] != word_counts(shape[-1], self.bits)[0]:
            codes = unpack_codes(values, shape[-1], self.bits)
            return write_words(codes, self.bits, stored_shape[-1])
        missing = stored_shape[-1] * _WORD_BYTES - values.shape[-1]
        return _as_words(F.pad(values, (0, missing)))


@dataclass(frozen=True)
class SignedBytes(CodeLayout):
    """One signed code of fewer than 8 bits in each int8, `(..., N, K)`."""

    part: str
    bits: int
    dtype: torch.dtype = torch.int8

    def stored_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return (shape,)

    def logical_shape(self, stored: Shape) -> Shape:
        return stored

    def has_unused_bits(self, shape: Shape, stored_shape: Shape) -> bool:
        return False  # the bits above a code repeat its sign: `read` checks them

    def read(self, stored: Tensor, shape: Shape) -> Tensor:
        middle = 2 ** (self.bits - 1)
        codes = stored.view(torch.uint8).add(middle)  # modulo 256
        is_wide = codes >= 2 * middle
        if is_wide.any():
            where = tuple(is_wide.nonzero()[0].tolist())
            raise CheckpointError(
                f"{self.part} {where} must be in {-middle}..{middle - 1}, integers of {self.bits} "
                f"bits; got {stored[where].item()}. Fetch config.json and the weights again, both "
                "of one model."
            )
        return pack_codes(codes, self.bits)

    def write(self, values: Tensor, shape: Shape, stored_shape: Shape) -> Tensor:
        codes = unpack_codes(values, shape[-1], self.bits)
        return codes.sub(2 ** (self.bits - 1)).view(torch.int8)  # modulo 256


@dataclass(frozen=True)
class NibbleWords(CodeLayout):
    """Eight 4-bit codes in each int32, along N of a transposed matrix or along K, of Quark.

    Attributes:
        is_transposed: `(K, ceil(N / 8))`, else `(N, ceil(K / 8))`.
        is_interleaved: elements of a word are in the order 0, 2, 4, 6, 1, 3, 5, 7, from bit 0 up.
        is_signed: codes are in two's complement.
    """

    part: str
    is_transposed: bool
    is_interleaved: bool
    is_signed: bool
    bits: int = 4
    dtype: torch.dtype = torch.int32

    def stored_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        *stack, num_rows, num_columns = shape
        if self.is_transposed:
            num_rows, num_columns = num_columns, num_rows
        return ((*stack, num_rows, -(-num_columns // _NIBBLES)),)

    def logical_shape(self, stored: Shape) -> Shape:
        *stack, num_rows, num_columns = (*stored[:-1], stored[-1] * _NIBBLES)
        if self.is_transposed:
            num_rows, num_columns = num_columns, num_rows
        return (*stack, num_rows, num_columns)

    def read(self, stored: Tensor, shape: Shape) -> Tensor:
        num_codes = shape[-2] if self.is_transposed else shape[-1]
        codes = self.codes(stored, num_codes)
        return pack_codes(codes.mT.contiguous() if self.is_transposed else codes, self.bits)

    def write(self, values: Tensor, shape: Shape, stored_shape: Shape) -> Tensor:
        codes = unpack_codes(values, shape[-1], self.bits)
        return self.words(codes.mT if self.is_transposed else codes)

    def codes(self, words: Tensor, num_codes: int) -> Tensor:
        """Words `(..., ceil(num_codes / 8))` as unsigned codes, signed ones in offset form."""
        fields = unpack_codes(_as_bytes(words), words.shape[-1] * _NIBBLES, 4)
        codes = fields[..., :num_codes]
        if self.is_interleaved:
            in_order = _split(fields, _NIBBLES)[..., _FIELD_OF_ELEMENT]
            codes = in_order.flatten(-2)[..., :num_codes]
        return codes ^ _SIGN_OF_NIBBLE if self.is_signed else codes

    def words(self, codes: Tensor) -> Tensor:
        """Undo `codes`."""
        codes = codes ^ _SIGN_OF_NIBBLE if self.is_signed else codes
        fields = F.pad(codes, (0, -codes.shape[-1] % _NIBBLES))
        if self.is_interleaved:
            fields = _split(fields, _NIBBLES)[..., _ELEMENT_OF_FIELD].flatten(-2)
        return _as_words(pack_codes(fields, 4))


@dataclass(frozen=True)
class ByteBlocks(CodeLayout):
    """4-bit codes in blocks of 32, `(..., N, K / 32, 16)` uint8, of gpt-oss."""

    part: str
    bits: int = 4
    dtype: torch.dtype = torch.uint8

    def stored_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return ((*shape[:-1], -(-shape[-1] // 2 // _MXFP4_BLOCK_BYTES), _MXFP4_BLOCK_BYTES),)

    def logical_shape(self, stored: Shape) -> Shape:
        return (*stored[:-2], stored[-2] * _MXFP4_BLOCK_BYTES * 2)

    def read(self, stored: Tensor, shape: Shape) -> Tensor:
        rows = stored.flatten(-2)[..., : -(-shape[-1] // 2)]
        return _without_unused_bits(rows, shape[-1], self.bits)

    def write(self, values: Tensor, shape: Shape, stored_shape: Shape) -> Tensor:
        padded = F.pad(values, (0, -values.shape[-1] % _MXFP4_BLOCK_BYTES))
        return padded.reshape(stored_shape)


def word_counts(num_codes: int, bits: int) -> tuple[int, int]:
    """int32 words for so many codes: dense, and with `32 // bits` in each.

    >>> word_counts(128, bits=3)
    (12, 13)
    """
    return -(-num_codes * bits // _WORD_BITS), -(-num_codes // (_WORD_BITS // bits))


def read_words(words: Tensor, num_codes: int, bits: int) -> Tensor:
    """int32 words `(..., W)`, dense or not by their number, as unsigned codes `(..., num_codes)`.

    >>> read_words(torch.tensor([0x3210], dtype=torch.int32), num_codes=4, bits=4).tolist()
    [0, 1, 2, 3]
    """
    stream = _as_bytes(words)
    if words.shape[-1] == word_counts(num_codes, bits)[0]:
        return unpack_codes(stream, num_codes, bits)
    each = unpack_codes(_split(stream, _WORD_BYTES), _WORD_BITS // bits, bits)
    return each.flatten(-2)[..., :num_codes]


def write_words(codes: Tensor, bits: int, num_words: int) -> Tensor:
    """Undo `read_words`."""
    num_codes, per_word = codes.shape[-1], _WORD_BITS // bits
    if num_words == word_counts(num_codes, bits)[0]:
        stream = pack_codes(codes, bits)
        stream = F.pad(stream, (0, num_words * _WORD_BYTES - stream.shape[-1]))
    else:
        fields = F.pad(codes, (0, num_words * per_word - num_codes))
        each = pack_codes(_split(fields, per_word), bits)
        stream = F.pad(each, (0, _WORD_BYTES - each.shape[-1])).flatten(-2)
    return _as_words(stream)


def _as_bytes(words: Tensor) -> Tensor:
    words = words.contiguous()
    if words.stride(-1) != 1:  # as an axis of one element may have any stride
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)


def _as_words(stream: Tensor) -> Tensor:
    # A copy, as words must begin at multiples of four bytes.
    return stream.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _split(rows: Tensor, size: int) -> Tensor:
    return rows.reshape(*rows.shape[:-1], -1, size)


def _without_unused_bits(rows: Tensor, num_codes: int, bits: int) -> Tensor:
    num_unused = -num_codes * bits % 8
    if num_unused:
        rows = rows.clone()
        rows[..., -1] &= 0xFF >> num_unused
    return rows
