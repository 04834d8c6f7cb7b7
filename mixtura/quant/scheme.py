"""What the bytes of a weight matrix mean: schemes. `quant/matrix.py` has the matrices.

A matrix is `W (N, K)`, N output and K input features, or a stack `W (L, N, K)` of L experts.
Every packed scheme is one formula, with `(n, k)` a position and `(gn, gk)` the group shape:

    stored[n, k] = (level[code[n, k]] - zero[n // gn, k // gk]) * scale[n // gn, k // gk] * global
    W[n, permutation[k]] = stored[n, k]          without a permutation: W = stored

Where groups are parts of super-blocks, their scales and minima are whole numbers:

    scale[n, g] = scales[n, g] * super_scale[n, k // super_columns]

There is one packing, that of `quant/packing.py`. Signed integers are stored as
`q + 2 ** (bits - 1)`. A last group may be shorter than the others: N and K need not be divisible by
the group.

BLOCKS is the exception: the bytes of whole blocks as another program wrote them, for codes that the
formula does not cover (`quant/block_codes.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch

from mixtura.errors import ConfigError
from mixtura.quant.block_codes import BLOCK_CODES

__all__ = [
    "DENSE_DTYPES",
    "SCALE_DTYPES",
    "Code",
    "GlobalScale",
    "QuantScheme",
    "TensorSpec",
    "ZeroPoint",
    "dtype_names",
    "wrong",
]

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DENSE_DTYPES = (*_FLOAT_DTYPES, torch.float64)
SCALE_DTYPES = (*_FLOAT_DTYPES, torch.float8_e4m3fn, torch.float8_e8m0fnu)
_WHOLE_SCALE_DTYPES = (torch.uint8, torch.int8)
# int16 because a GPTQ zero point reaches 256 when there are 8 bits.
_INTEGER_ZERO_DTYPES = (torch.uint8, torch.int16)


class Code(Enum):
    """How a code becomes a level, before zero point and scale."""

    DENSE = "dense"  # no code: the value itself
    INT = "int"  # the unsigned integer
    E2M1 = "e2m1"  # sign, exponent and mantissa bits of a small float
    E2M3 = "e2m3"
    E3M2 = "e3m2"
    E4M3 = "e4m3"  # the "fn" form: no infinities, maximum 448
    E5M2 = "e5m2"
    CODEBOOK = "codebook"  # an entry of the scheme's codebook
    BLOCKS = "blocks"  # no code of its own: a block means its weights together

    @property
    def is_float(self) -> bool:
        """Whether a code is a small float."""
        return self in _FLOAT_FIELDS

    @property
    def exponent_bits(self) -> int:
        """Exponent bits of a float code; the bias is `2 ** (exponent_bits - 1) - 1`."""
        return _FLOAT_FIELDS[self][0]

    @property
    def mantissa_bits(self) -> int:
        """Mantissa bits of a float code."""
        return _FLOAT_FIELDS[self][1]


_FLOAT_FIELDS = {
    Code.E2M1: (2, 1),
    Code.E2M3: (2, 3),
    Code.E3M2: (3, 2),
    Code.E4M3: (4, 3),
    Code.E5M2: (5, 2),
}


class ZeroPoint(Enum):
    """What is subtracted from a level."""

    NONE = "none"  # nothing: floats and codebooks
    MID = "mid"  # 2 ** (bits - 1): symmetric integers
    INTEGER = "integer"  # `zero_points`, one per group: (q - z) * scale
    MINIMUM = "minimum"  # `zero_points` in units of the weight: q * scale - m


class GlobalScale(Enum):
    """Granularity of the second-level scale, always a multiplier."""

    NONE = "none"
    MATRIX = "matrix"
    ROW = "row"  # holds merged projections with unlike scales exactly


class TensorSpec(NamedTuple):
    """Shape and admissible dtypes of one tensor of a `QuantizedMatrix`."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def wrong(what: str, value: object, rule: str, got: object, remedy: str) -> ConfigError:
    """The error that a value of a scheme or a matrix breaks a rule."""
    return ConfigError(f"{what} ({value}) must {rule}; got {got}. {remedy}")


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Dtypes in words, without "torch."."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@dataclass(frozen=True)
class QuantScheme:
    """How a weight matrix is stored, whatever its size; hashable.

    Args:
        code: how a code becomes a level.
        bits: width of a code, 1 to 8 (the width of the dtype where `code` is DENSE; for BLOCKS
            bits per weight, scales included, rounded up).
        group_shape: rows and columns that share a scale; None is the whole axis. `(1, None)` is
            per output channel, `(None, None)` per matrix, `(1, 32)` groups along K. For BLOCKS
            what one block covers.
        scale_dtype: dtype of `scales`; None only for DENSE and BLOCKS.
        zero_point: what is subtracted from a level; not NONE for INT, NONE for all others.
        global_scale: granularity of the second-level scale (fp32).
        has_permutation: whether columns are stored in another order (GPTQ act-order: sorted by
            group); a kernel gathers the activation's columns by `permutation`.
        codebook: the `2 ** bits` levels of CODEBOOK, else None.
        values_dtype: dtype of `values`: uint8, or the dtype of the weight for DENSE.
        blocks: the kind of block for BLOCKS, a name in `BLOCK_CODES`, else None.
        super_columns: columns of a super-block: groups `(1, gk)` in it have uint8 or int8 scales,
            and uint8 zero points for MINIMUM, that multiply an fp16 scale and an fp16 minimum of
            the super-block. None where scales are as they are.

    Raises:
        ConfigError: the fields do not fit together.
    """

    code: Code
    bits: int
    group_shape: tuple[int | None, int | None] = (None, None)
    scale_dtype: torch.dtype | None = None
    zero_point: ZeroPoint = ZeroPoint.NONE
    global_scale: GlobalScale = GlobalScale.NONE
    has_permutation: bool = False
    codebook: tuple[float, ...] | None = None
    values_dtype: torch.dtype = torch.uint8
    blocks: str | None = None
    super_columns: int | None = None

    def __post_init__(self) -> None:
        if any(size is not None and size < 1 for size in self.group_shape):
            remedy = "Use None for a whole axis."
            raise wrong("group_shape", self.group_shape, "be positive", "a size < 1", remedy)
        if self.code is Code.DENSE:
            self._check_dense()
        elif self.code is Code.BLOCKS:
            self._check_blocks()
        else:
            self._check_packed()

    def _check_dense(self) -> None:
        dtype = self.values_dtype
        if dtype not in DENSE_DTYPES:
            rule = f"be one of {dtype_names(DENSE_DTYPES)}"
            raise wrong("dtype of a dense matrix", dtype, rule, dtype, "Convert or quantize it.")
        found = [getattr(self, name) for name in self.__dataclass_fields__]
        none = [(None, None), None, ZeroPoint.NONE, GlobalScale.NONE, False, None]
        if found != [Code.DENSE, 8 * dtype.itemsize, *none, dtype, None, None]:
            rule = f"have {8 * dtype.itemsize} bits and describe no scales, zero points or codes"
            raise wrong("dense scheme", dtype, rule, found, "Use QuantScheme.dense(dtype).")

    def _check_blocks(self) -> None:
        if self.blocks not in BLOCK_CODES:
            rule = f"be one of {', '.join(BLOCK_CODES)} for code blocks"
            raise wrong("blocks", self.blocks, rule, self.blocks, "Dequantize the matrix.")
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if found != _block_fields(self.blocks):
            rule = "have the bits and columns of a block, and describe no scales or zero points"
            remedy = "Use QuantScheme.of_blocks(name)."
            raise wrong("scheme of blocks", self.blocks, rule, list(found.values()), remedy)

    def _check_packed(self) -> None:
        name = f"code {self.code.value}"
        if self.blocks is not None:
            raise wrong("blocks", self.blocks, "be None", name, "Use QuantScheme.of_blocks(name).")
        width = sum(_FLOAT_FIELDS[self.code]) + 1 if self.code.is_float else None
        if not 1 <= self.bits <= 8 or self.bits != (width or self.bits):
            rule = f"be {width or '1 to 8'}"
            raise wrong("bits", self.bits, rule, name, "Use the width of one code.")
        if self.values_dtype is not torch.uint8:
            remedy = "Pack the codes with pack_codes."
            raise wrong("values_dtype", self.values_dtype, "be torch.uint8", name, remedy)
        scale_dtypes = SCALE_DTYPES if self.super_columns is None else _WHOLE_SCALE_DTYPES
        if self.scale_dtype not in scale_dtypes:
            rule = f"be one of {dtype_names(scale_dtypes)}"
            raise wrong("scale_dtype", self.scale_dtype, rule, name, "Convert the scales.")
        if (self.code is Code.INT) == (self.zero_point is ZeroPoint.NONE):
            rule = "say what is subtracted" if self.code is Code.INT else "be none"
            remedy = "Use mid for symmetric integers, none for floats and codebooks."
            raise wrong("zero_point", self.zero_point.value, rule, name, remedy)
        num_levels = None if self.codebook is None else len(self.codebook)
        if num_levels != (2**self.bits if self.code is Code.CODEBOOK else None):
            rule = "hold 2 ** bits levels for code codebook and be None for others"
            got = f"{name}, {self.bits} bits"
            raise wrong("codebook", num_levels, rule, got, "Pass every level of the format.")
        rows, columns = self.group_shape
        if self.super_columns and (rows != 1 or not columns or self.super_columns % columns):
            rule = "be a multiple of the columns of a group of one row"
            remedy = "Multiply the scales out."
            raise wrong("super_columns", self.super_columns, rule, self.group_shape, remedy)

    @classmethod
    def dense(cls, dtype: torch.dtype) -> QuantScheme:
        """The scheme of an unquantized matrix.

        Raises:
            ConfigError: `dtype` is not float64, float32, float16 or bfloat16.
        """
        return cls(Code.DENSE, 8 * dtype.itemsize, values_dtype=dtype)

    @classmethod
    def of_blocks(cls, name: str) -> QuantScheme:
        """The scheme of rows of whole blocks, kept as they are.

        Raises:
            ConfigError: `name` is not one of `BLOCK_CODES`.

        >>> print(QuantScheme.of_blocks("iq2_xxs"))
        iq2_xxs, blocks of 256
        """
        if name not in BLOCK_CODES:
            return cls(Code.BLOCKS, 8, blocks=name)  # which says so
        return cls(**_block_fields(name))

    @property
    def is_quantized(self) -> bool:
        """Whether values are packed codes."""
        return self.code is not Code.DENSE

    @property
    def levels(self) -> tuple[float, ...]:
        """The level of each of the `2 ** bits` codes (NaN and infinities of 8-bit floats included).

        Source: OCP Microscaling Formats (MX) 1.0 for the floats.
        """
        assert self.code not in (Code.DENSE, Code.BLOCKS), f"{self}: no code has a level"
        if self.code is Code.INT:
            return tuple(float(code) for code in range(2**self.bits))
        return _FLOAT_LEVELS[self.code] if self.codebook is None else self.codebook

    @property
    def max_level(self) -> float:
        """The largest finite level."""
        return max(level for level in self.levels if math.isfinite(level))

    def group_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale in a matrix of `shape (..., N, K)`."""
        rows, columns = self.group_shape
        return rows or shape[-2], columns or shape[-1]

    def tensors_for(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors, by field name, of a `QuantizedMatrix` of logical `shape (..., N, K)`.

        Raises:
            ConfigError: K is no whole number of blocks.
        """
        *stack, num_rows, num_columns = shape
        if self.blocks is not None:
            block = BLOCK_CODES[self.blocks]
            if num_columns % block.num_columns:
                rule = f"be divisible by the {block.num_columns} columns of a block"
                raise wrong("K", num_columns, rule, f"'{self}'", "Use another format.")
            row_bytes = num_columns // block.num_columns * block.num_bytes
            return {"values": TensorSpec((*stack, num_rows, row_bytes), (torch.uint8,))}
        if self.scale_dtype is None:
            return {"values": TensorSpec(shape, (self.values_dtype,))}
        group_rows, group_columns = self.group_size(shape)
        grid = (*stack, -(-num_rows // group_rows), -(-num_columns // group_columns))
        row_bytes = -(-num_columns * self.bits // 8)
        specs = {
            "values": TensorSpec((*stack, num_rows, row_bytes), (torch.uint8,)),
            "scales": TensorSpec(grid, (self.scale_dtype,)),
        }
        if self.zero_point is ZeroPoint.INTEGER:
            specs["zero_points"] = TensorSpec(grid, _INTEGER_ZERO_DTYPES)
        if self.zero_point is ZeroPoint.MINIMUM:
            dtypes = _FLOAT_DTYPES if self.super_columns is None else (torch.uint8,)
            specs["zero_points"] = TensorSpec(grid, dtypes)
        if self.global_scale is GlobalScale.MATRIX:
            specs["global_scale"] = TensorSpec(tuple(stack), (torch.float32,))
        if self.global_scale is GlobalScale.ROW:
            specs["global_scale"] = TensorSpec((*stack, num_rows), (torch.float32,))
        if self.has_permutation:
            specs["permutation"] = TensorSpec((*stack, num_columns), (torch.int32,))
        if self.super_columns is not None:
            blocks = (*stack, num_rows, -(-num_columns // self.super_columns))
            specs["super_scales"] = TensorSpec(blocks, (torch.float16,))
            if self.zero_point is ZeroPoint.MINIMUM:
                specs["super_minima"] = TensorSpec(blocks, (torch.float16,))
        return specs

    def __str__(self) -> str:
        if not self.is_quantized:
            return dtype_names((self.values_dtype,))
        if self.blocks is not None:
            return f"{self.blocks}, blocks of {self.group_shape[1]}"
        rows, columns = ("all" if size is None else size for size in self.group_shape)
        parts = [f"int{self.bits}" if self.code is Code.INT else self.code.value]
        parts += [f"group {rows}x{columns}", f"scale {self.scale_dtype}".replace("torch.", "")]
        if self.super_columns is not None:
            parts[-1] += f" of float16 per {self.super_columns}"
        if self.zero_point is not ZeroPoint.NONE:
            parts.append(f"zero point {self.zero_point.value}")
        if self.global_scale is not GlobalScale.NONE:
            parts.append(f"global scale per {self.global_scale.value}")
        if self.has_permutation:
            parts.append("permuted")
        return ", ".join(parts)


def _block_fields(name: str) -> dict[str, Any]:
    """Every field of the scheme of a kind of block."""
    block = BLOCK_CODES[name]
    return {
        "code": Code.BLOCKS,
        "bits": -(-8 * block.num_bytes // block.num_columns),
        "group_shape": (1, block.num_columns),
        "scale_dtype": None,
        "zero_point": ZeroPoint.NONE,
        "global_scale": GlobalScale.NONE,
        "has_permutation": False,
        "codebook": None,
        "values_dtype": torch.uint8,
        "blocks": name,
        "super_columns": None,
    }


def _float_levels(code: Code) -> tuple[float, ...]:
    exponent_bits, mantissa_bits = code.exponent_bits, code.mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    max_field = 2**exponent_bits - 1
    magnitudes = []
    for field in range(max_field + 1):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            if field == 0:
                magnitude = fraction * 2.0 ** (1 - bias)
            elif code is Code.E5M2 and field == max_field:
                magnitude = math.nan if mantissa else math.inf
            elif code is Code.E4M3 and field == max_field and mantissa == 2**mantissa_bits - 1:
                magnitude = math.nan
            else:
                magnitude = (1 + fraction) * 2.0 ** (field - bias)
            magnitudes.append(magnitude)
    return (*magnitudes, *(-magnitude for magnitude in magnitudes))


_FLOAT_LEVELS = {code: _float_levels(code) for code in Code if code.is_float}
