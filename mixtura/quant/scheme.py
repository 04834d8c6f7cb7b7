"""What the bytes of a weight matrix mean: schemes, matrices, and `dequantize`.

A matrix is `W (N, K)`, N output and K input features, or a stack `W (L, N, K)` of L experts.
Every packed scheme is one formula, with `(n, k)` a position and `(gn, gk)` the group shape:

    stored[n, k] = (level[code[n, k]] - zero[n // gn, k // gk]) * scale[n // gn, k // gk] * global
    W[n, permutation[k]] = stored[n, k]          without a permutation: W = stored

There is one packing, that of `quant/packing.py`. Signed integers are stored as
`q + 2 ** (bits - 1)`. A last group may be shorter than the others: N and K need not be divisible by
the group.

BLOCKS is the exception: the bytes of whole blocks as another program wrote them, for codes that the
formula does not cover (`quant/block_codes.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixtura.errors import ConfigError, InputError
from mixtura.quant.block_codes import BLOCK_CODES, decode_rows
from mixtura.quant.packing import expand_groups, unpack_codes

__all__ = [
    "DENSE_DTYPES",
    "SCALE_DTYPES",
    "Code",
    "GlobalScale",
    "QuantScheme",
    "QuantizedMatrix",
    "TensorSpec",
    "ZeroPoint",
    "dense",
    "dequantize",
    "stack_experts",
]

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DENSE_DTYPES = (*_FLOAT_DTYPES, torch.float64)
SCALE_DTYPES = (*_FLOAT_DTYPES, torch.float8_e4m3fn, torch.float8_e8m0fnu)
# int16 because a GPTQ zero point reaches 256 when there are 8 bits.
_INTEGER_ZERO_DTYPES = (torch.uint8, torch.int16)
_TENSOR_NAMES = ("values", "scales", "zero_points", "global_scale", "permutation")


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


def _error(what: str, value: object, rule: str, got: object, remedy: str) -> ConfigError:
    return ConfigError(f"{what} ({value}) must {rule}; got {got}. {remedy}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
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

    def __post_init__(self) -> None:
        if any(size is not None and size < 1 for size in self.group_shape):
            remedy = "Use None for a whole axis."
            raise _error("group_shape", self.group_shape, "be positive", "a size < 1", remedy)
        if self.code is Code.DENSE:
            self._check_dense()
        elif self.code is Code.BLOCKS:
            self._check_blocks()
        else:
            self._check_packed()

    def _check_dense(self) -> None:
        dtype = self.values_dtype
        if dtype not in DENSE_DTYPES:
            rule = f"be one of {_names(DENSE_DTYPES)}"
            raise _error("dtype of a dense matrix", dtype, rule, dtype, "Convert or quantize it.")
        found = [getattr(self, name) for name in self.__dataclass_fields__]
        none = [(None, None), None, ZeroPoint.NONE, GlobalScale.NONE, False, None]
        if found != [Code.DENSE, 8 * dtype.itemsize, *none, dtype, None]:
            rule = f"have {8 * dtype.itemsize} bits and describe no scales, zero points or codes"
            raise _error("dense scheme", dtype, rule, found, "Use QuantScheme.dense(dtype).")

    def _check_blocks(self) -> None:
        if self.blocks not in BLOCK_CODES:
            rule = f"be one of {', '.join(BLOCK_CODES)} for code blocks"
            raise _error("blocks", self.blocks, rule, self.blocks, "Dequantize the matrix.")
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if found != _block_fields(self.blocks):
            rule = "have the bits and columns of a block, and describe no scales or zero points"
            remedy = "Use QuantScheme.of_blocks(name)."
            raise _error("scheme of blocks", self.blocks, rule, list(found.values()), remedy)

    def _check_packed(self) -> None:
        name = f"code {self.code.value}"
        if self.blocks is not None:
            raise _error("blocks", self.blocks, "be None", name, "Use QuantScheme.of_blocks(name).")
        width = sum(_FLOAT_FIELDS[self.code]) + 1 if self.code.is_float else None
        if not 1 <= self.bits <= 8 or self.bits != (width or self.bits):
            rule = f"be {width or '1 to 8'}"
            raise _error("bits", self.bits, rule, name, "Use the width of one code.")
        if self.values_dtype is not torch.uint8:
            remedy = "Pack the codes with pack_codes."
            raise _error("values_dtype", self.values_dtype, "be torch.uint8", name, remedy)
        if self.scale_dtype not in SCALE_DTYPES:
            rule = f"be one of {_names(SCALE_DTYPES)}"
            raise _error("scale_dtype", self.scale_dtype, rule, name, "Convert the scales.")
        if (self.code is Code.INT) == (self.zero_point is ZeroPoint.NONE):
            rule = "say what is subtracted" if self.code is Code.INT else "be none"
            remedy = "Use mid for symmetric integers, none for floats and codebooks."
            raise _error("zero_point", self.zero_point.value, rule, name, remedy)
        num_levels = None if self.codebook is None else len(self.codebook)
        if num_levels != (2**self.bits if self.code is Code.CODEBOOK else None):
            rule = "hold 2 ** bits levels for code codebook and be None for others"
            got = f"{name}, {self.bits} bits"
            raise _error("codebook", num_levels, rule, got, "Pass every level of the format.")

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
                raise _error("K", num_columns, rule, f"'{self}'", "Use another format.")
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
            specs["zero_points"] = TensorSpec(grid, _FLOAT_DTYPES)
        if self.global_scale is GlobalScale.MATRIX:
            specs["global_scale"] = TensorSpec(tuple(stack), (torch.float32,))
        if self.global_scale is GlobalScale.ROW:
            specs["global_scale"] = TensorSpec((*stack, num_rows), (torch.float32,))
        if self.has_permutation:
            specs["permutation"] = TensorSpec((*stack, num_columns), (torch.int32,))
        return specs

    def __str__(self) -> str:
        if not self.is_quantized:
            return _names((self.values_dtype,))
        if self.blocks is not None:
            return f"{self.blocks}, blocks of {self.group_shape[1]}"
        rows, columns = ("all" if size is None else size for size in self.group_shape)
        parts = [f"int{self.bits}" if self.code is Code.INT else self.code.value]
        parts += [f"group {rows}x{columns}", f"scale {self.scale_dtype}".replace("torch.", "")]
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


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """One weight matrix, or a stack of one per expert, with the scheme that gives it meaning.

    The tensors are never written after construction. Shapes below are for a stack; one matrix
    has them without L. `GN = ceil(N / gn)`, `GK = ceil(K / gk)`.

    Args:
        scheme: what the tensors mean.
        shape: logical, unpadded `(N, K)` or `(L, N, K)`.
        values: `(L, N, ceil(K * bits / 8))` uint8 codes; for DENSE the `(L, N, K)` weight itself,
            a Parameter too; for BLOCKS the bytes of a row's blocks, `(L, N, bytes)`.
        scales: `(L, GN, GK)` of `scheme.scale_dtype`; negative scales are legal.
        zero_points: `(L, GN, GK)`, uint8 or int16 for INTEGER, float for MINIMUM.
        global_scale: fp32, `(L,)` per MATRIX (`()` for one matrix), `(L, N)` per ROW.
        permutation: `(L, K)` int32; column j of `values` is logical column `permutation[j]`.

    Raises:
        ConfigError: a tensor is missing, superfluous, of another shape or dtype than the scheme
            and `shape` ask for, or on another device. Contents are not looked at.
    """

    scheme: QuantScheme
    shape: tuple[int, ...]
    values: Tensor
    scales: Tensor | None = None
    zero_points: Tensor | None = None
    global_scale: Tensor | None = None
    permutation: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            rule = "be (N, K) or (L, N, K) with positive sizes"
            remedy = "Put the expert axis first; leave an empty matrix out."
            raise _error("shape", self.shape, rule, f"{len(self.shape)} dims", remedy)
        specs = self.scheme.tensors_for(self.shape)
        for name in _TENSOR_NAMES:
            tensor: Tensor | None = getattr(self, name)
            if name in specs:
                self._check_tensor(name, tensor, specs[name])
            elif tensor is not None:
                rule = f"be None in a matrix of scheme '{self.scheme}'"
                remedy = "Leave it out, or say in the scheme what it means."
                raise _error(name, tuple(tensor.shape), rule, "a tensor", remedy)

    def _check_tensor(self, name: str, tensor: Tensor | None, spec: TensorSpec) -> None:
        if tensor is None:
            got = "None"
        elif tuple(tensor.shape) != spec.shape:
            got = f"shape {tuple(tensor.shape)}"
        elif tensor.dtype not in spec.dtypes:
            got = f"dtype {tensor.dtype}"
        elif tensor.device != self.device:
            got = f"device {tensor.device} beside values on {self.device}"
        else:
            return
        rule = f"be a tensor {spec.shape} of {_names(spec.dtypes)} on the device of values"
        remedy = "Change the tensor, or the scheme that describes it."
        raise _error(name, f"matrix {self.shape}, {self.scheme}", rule, got, remedy)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        return {name: getattr(self, name) for name in self.scheme.tensors_for(self.shape)}

    @property
    def is_quantized(self) -> bool:
        """Whether `values` are packed codes."""
        return self.scheme.is_quantized

    @property
    def is_stack(self) -> bool:
        """Whether there is an expert axis."""
        return len(self.shape) == 3

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `values`: uint8 where packed, else the weight's."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.values.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def expert(self, index: int) -> QuantizedMatrix:
        """The matrix of one expert, a view that shares memory with the stack.

        Raises:
            InputError: this is not a stack, or it has no expert `index`.
        """
        if not self.is_stack:
            raise InputError(
                f"expert ({index}) must index a stack (L, N, K); got a matrix {self.shape}. "
                "Use the matrix itself."
            )
        if not 0 <= index < self.shape[0]:
            raise InputError(
                f"expert ({index}) must be in 0..{self.shape[0] - 1}; got {index}. "
                "Use the local index of an expert that this stack holds."
            )
        parts = {name: tensor[index] for name, tensor in self.tensors.items()}
        return QuantizedMatrix(self.scheme, self.shape[1:], **parts)


def dense(tensor: Tensor) -> QuantizedMatrix:
    """Wrap an unquantized weight `(N, K)` or `(L, N, K)` without copying; gradients flow to it.

    Raises:
        ConfigError: its dtype is no dense dtype, or its shape is no matrix or stack.
    """
    return QuantizedMatrix(QuantScheme.dense(tensor.dtype), tuple(tensor.shape), tensor)


def stack_experts(matrices: Iterable[QuantizedMatrix], num_experts: int) -> QuantizedMatrix:
    """Copy `num_experts` matrices `(N, K)` of one scheme and shape into a stack `(L, N, K)`.

    The iterable is consumed one matrix at a time, so a generator keeps only one alive.

    Raises:
        ConfigError: a matrix differs from the first in scheme, shape or tensor dtypes, is a stack
            itself, or their number is not `num_experts`.
    """
    first: QuantizedMatrix | None = None
    stacked: dict[str, Tensor] = {}
    count = 0
    for matrix in matrices:
        if first is None:
            first = matrix
            for name, tensor in matrix.tensors.items():
                stacked[name] = tensor.new_empty((num_experts, *tensor.shape))
        kind = (matrix.scheme, matrix.shape, [t.dtype for t in matrix.tensors.values()])
        wanted = (first.scheme, first.shape, [t.dtype for t in stacked.values()])
        if matrix.is_stack or kind != wanted:
            found = f"'{matrix.scheme}', shape {matrix.shape}"
            rule = f"be of one shape (N, K), scheme and dtypes: '{first.scheme}', {first.shape}"
            raise _error("matrix", count, rule, found, "Convert the odd one out first.")
        if count < num_experts:
            for name, tensor in matrix.tensors.items():
                stacked[name][count].copy_(tensor)
        count += 1
    if first is None or count != num_experts:
        remedy = "Pass one matrix per expert, at least one."
        raise _error("num_experts", num_experts, "count the matrices", count, remedy)
    return QuantizedMatrix(first.scheme, (num_experts, *first.shape), **stacked)


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight `(N, K)` or `(L, N, K)` that a matrix stands for: the meaning of its scheme.

    Packed values are computed in fp32, in the order of the formula at the head of this file
    (`((level - zero) * scale) * global`, for MINIMUM `(level * scale - minimum) * global`), and
    rounded to `dtype` once at the end. An expert at a time is in fp32. A dense matrix gives
    `values.to(dtype)`: differentiable, and the same tensor when the dtype is its own.

    Raises:
        InputError: `dtype` is not float64, float32, float16 or bfloat16.

    >>> from mixtura.quant.packing import pack_codes
    >>> scheme = QuantScheme(Code.INT, 4, (1, None), torch.float32, ZeroPoint.MID)
    >>> codes = torch.tensor([[8, 9, 0]], dtype=torch.uint8)
    >>> matrix = QuantizedMatrix(scheme, (1, 3), pack_codes(codes, 4), torch.tensor([[0.5]]))
    >>> dequantize(matrix).tolist()
    [[0.0, 0.5, -4.0]]
    """
    if dtype not in DENSE_DTYPES:
        choices = _names(DENSE_DTYPES)
        raise InputError(f"dtype ({dtype}) must be one of {choices}; got {dtype}. Use one of them.")
    if not matrix.is_quantized:
        return matrix.values.to(dtype)
    if not matrix.is_stack:
        return _dequantize_packed(matrix).to(dtype)
    weight = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for index in range(matrix.shape[0]):
        weight[index] = _dequantize_packed(matrix.expert(index))
    return weight


def _dequantize_packed(matrix: QuantizedMatrix) -> Tensor:
    scheme, shape = matrix.scheme, matrix.shape
    if scheme.blocks is not None:
        return decode_rows(BLOCK_CODES[scheme.blocks], matrix.values)
    group_size = scheme.group_size(shape)

    def expanded(grid: Tensor) -> Tensor:
        return expand_groups(grid.float(), group_size, shape)

    assert matrix.scales is not None
    codes = unpack_codes(matrix.values, shape[1], scheme.bits)
    if scheme.code is Code.INT:
        weight = codes.float()
    else:
        weight = torch.tensor(scheme.levels, device=codes.device).take(codes.long())
    if scheme.zero_point is ZeroPoint.MID:
        weight -= 2 ** (scheme.bits - 1)
    if scheme.zero_point is ZeroPoint.INTEGER and matrix.zero_points is not None:
        weight -= expanded(matrix.zero_points)
    weight *= expanded(matrix.scales)
    if scheme.zero_point is ZeroPoint.MINIMUM and matrix.zero_points is not None:
        weight -= expanded(matrix.zero_points)
    if matrix.global_scale is not None:
        weight *= matrix.global_scale.reshape(-1, 1)
    if matrix.permutation is not None:
        weight = weight[:, matrix.permutation.argsort()]
    return weight
