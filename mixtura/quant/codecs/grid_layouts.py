"""How scales, zero points and scalars of a matrix lie in a file.

A grid is `(..., GN, GK)`, one value per group. Like a `CodeLayout`, a layout knows one part in both
directions, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.codecs.code_layouts import (
    NibbleWords,
    Shape,
    read_words,
    word_counts,
    write_words,
)


class Arrangement(Enum):
    """The shape in which a file stores a grid `(..., GN, GK)`."""

    GRID = "grid"  # (..., GN, GK)
    TRANSPOSED = "transposed"  # (..., GK, GN)
    ROWS = "rows"  # (..., GN), with one group along K
    ONE = "one"  # (..., 1), with a single group
    SCALAR = "scalar"  # (...), with a single group
    SPACED = "spaced"  # (..., GN, 1, GK, 1)

    def stored_shape(self, grid: Shape) -> Shape:
        """The stored shape of a grid of that shape."""
        *stack, rows, columns = grid
        tails = {
            Arrangement.GRID: (rows, columns),
            Arrangement.TRANSPOSED: (columns, rows),
            Arrangement.ROWS: (rows,),
            Arrangement.ONE: (1,),
            Arrangement.SCALAR: (),
            Arrangement.SPACED: (rows, 1, columns, 1),
        }
        return (*stack, *tails[self])

    def read(self, stored: Tensor, grid: Shape) -> Tensor:
        """A stored grid in the shape `grid`."""
        if self is Arrangement.TRANSPOSED:
            return stored.mT.contiguous()
        return stored.reshape(grid)

    def write(self, values: Tensor) -> Tensor:
        """Undo `read`."""
        if self is Arrangement.TRANSPOSED:
            return values.mT.contiguous()
        return values.reshape(self.stored_shape(tuple(values.shape)))

    @classmethod
    def of_tensor(cls, num_dims: int) -> Arrangement:
        """How a single value per matrix is stored in a tensor of that many dims."""
        return {0: cls.SCALAR, 1: cls.ONE}.get(num_dims, cls.GRID)

    @classmethod
    def of_channels(cls, num_dims: int) -> Arrangement:
        """How a value per row is stored in a tensor of that many dims."""
        return cls.ROWS if num_dims == 1 else cls.GRID


@dataclass(frozen=True)
class GridLayout:
    """Scales. Attributes: part, the dtype of the file (uint8 for e8m0 too), and the arrangement."""

    part: str
    dtype: torch.dtype
    arrangement: Arrangement = Arrangement.GRID

    def read(self, stored: Tensor, grid: Shape, dtype: torch.dtype) -> Tensor:
        """The scales `grid` in the scheme's dtype: the same bits."""
        return self.arrangement.read(stored.view(dtype), grid)

    def write(self, scales: Tensor) -> Tensor:
        """Undo `read`."""
        return self.arrangement.write(scales).view(self.dtype)


@dataclass(frozen=True)
class ScalarLayout:
    """One value per matrix, such as a global scale.

    Attributes:
        part: the part. dtype: what the file calls it. tail: dims behind those of the stack.
        is_reciprocal: what the file stores is divided by, not multiplied.
        is_meant: whether it is read; else it is kept as it is.
    """

    part: str
    dtype: torch.dtype = torch.float32
    tail: Shape = ()
    is_reciprocal: bool = False
    is_meant: bool = True

    def read(self, stored: Tensor, stack: Shape) -> Tensor:
        """The multiplier, fp32 of shape `stack`."""
        value = stored.reshape(stack).float()
        return value.reciprocal() if self.is_reciprocal else value

    def write(self, multiplier: Tensor) -> Tensor:
        """Undo `read`, up to the rounding of a reciprocal."""
        value = multiplier.reciprocal() if self.is_reciprocal else multiplier
        return value.to(self.dtype).reshape((*multiplier.shape, *self.tail))


class ZeroLayout(ABC):
    """The zero points of integer codes as one part; `Attributes`: part, dtype."""

    part: str
    dtype: torch.dtype

    @abstractmethod
    def stored_shapes(self, grid: Shape) -> tuple[Shape, ...]:
        """The shapes that the part may have, today's first."""

    @abstractmethod
    def read(self, stored: Tensor, grid: Shape) -> Tensor:
        """The zero points of unsigned codes, uint8 of shape `grid`."""

    @abstractmethod
    def write(self, zeros: Tensor, stored_shape: Shape) -> Tensor:
        """The part, in one of its shapes; unused bits are 0."""


@dataclass(frozen=True)
class PlainZeros(ZeroLayout):
    """A number per group. Attributes: `middle` is added: 2 ** (bits - 1) for signed integers."""

    part: str
    dtype: torch.dtype
    middle: int
    arrangement: Arrangement = Arrangement.GRID

    def stored_shapes(self, grid: Shape) -> tuple[Shape, ...]:
        return (self.arrangement.stored_shape(grid),)

    def read(self, stored: Tensor, grid: Shape) -> Tensor:
        zeros = self.arrangement.read(stored, grid).float() + self.middle
        top = max(2 * self.middle - 1, 0)
        is_beside = (zeros < 0) | (zeros > top)
        if is_beside.any():
            where = tuple(is_beside.nonzero()[0].tolist())
            raise CheckpointError(
                f"{self.part} {where} must be in {-self.middle}..{top - self.middle}; got "
                f"{zeros[where].item() - self.middle:g}. Fetch config.json and the weights again, "
                "both of one model."
            )
        return zeros.to(torch.uint8)

    def write(self, zeros: Tensor, stored_shape: Shape) -> Tensor:
        numbers = zeros.to(torch.int16) - self.middle
        return self.arrangement.write(numbers).to(self.dtype)


@dataclass(frozen=True)
class WordZeros(ZeroLayout):
    """int32 words along N, `(..., ceil(GN * bits / 32), GK)`, of compressed-tensors.

    Dense or not like the words of `RowWords`.
    """

    part: str
    bits: int
    dtype: torch.dtype = torch.int32

    def stored_shapes(self, grid: Shape) -> tuple[Shape, ...]:
        dense, loose = word_counts(grid[-2], self.bits)
        shapes = (*grid[:-2], dense, grid[-1]), (*grid[:-2], loose, grid[-1])
        return shapes[:1] if dense == loose else shapes

    def read(self, stored: Tensor, grid: Shape) -> Tensor:
        return read_words(stored.mT, grid[-2], self.bits).mT.contiguous()

    def write(self, zeros: Tensor, stored_shape: Shape) -> Tensor:
        return write_words(zeros.mT, self.bits, stored_shape[-2]).mT.contiguous()


@dataclass(frozen=True)
class NibbleZeros(ZeroLayout):
    """Words of eight along N, `(..., GK, ceil(N / 8))`, of Quark.

    Attributes:
        words: how codes lie in a word. is_flat: without the axis of groups, `(..., ceil(N / 8))`.
    """

    words: NibbleWords
    is_flat: bool

    @property
    def part(self) -> str:  # type: ignore[override]
        return self.words.part

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.words.dtype

    def stored_shapes(self, grid: Shape) -> tuple[Shape, ...]:
        shape = self.words.stored_shapes(grid)[0]
        return ((*shape[:-2], shape[-1]),) if self.is_flat else (shape,)

    def read(self, stored: Tensor, grid: Shape) -> Tensor:
        words = stored.unsqueeze(-2) if self.is_flat else stored
        return self.words.codes(words, grid[-2]).mT.contiguous()

    def write(self, zeros: Tensor, stored_shape: Shape) -> Tensor:
        return self.words.words(zeros.mT).reshape(stored_shape)
