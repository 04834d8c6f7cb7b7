"""Weight matrices and stacks of them, and `dequantize`: the meaning of a `QuantScheme`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.errors import InputError
from mixtura.quant.block_codes import BLOCK_CODES, decode_rows
from mixtura.quant.packing import expand_groups, unpack_codes
from mixtura.quant.scheme import (
    DENSE_DTYPES,
    Code,
    QuantScheme,
    TensorSpec,
    ZeroPoint,
    dtype_names,
    wrong,
)

__all__ = [
    "SUPER_BLOCKS",
    "QuantizedMatrix",
    "dense",
    "dequantize",
    "group_scales",
    "stack_experts",
]

SUPER_BLOCKS = ("super_scales", "super_minima")
"""Fields of a matrix that have a number for each super-block of a row."""

_TENSOR_NAMES = (
    "values",
    "scales",
    "zero_points",
    "global_scale",
    "permutation",
    *SUPER_BLOCKS,
)


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
        zero_points: `(L, GN, GK)`, uint8 or int16 for INTEGER, float for MINIMUM (uint8 with
            `super_minima`).
        global_scale: fp32, `(L,)` per MATRIX (`()` for one matrix), `(L, N)` per ROW.
        permutation: `(L, K)` int32; column j of `values` is logical column `permutation[j]`.
        super_scales, super_minima: `(L, N, ceil(K / super_columns))` fp16, what `scales` and
            `zero_points` multiply.

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
    super_scales: Tensor | None = None
    super_minima: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            rule = "be (N, K) or (L, N, K) with positive sizes"
            remedy = "Put the expert axis first; leave an empty matrix out."
            raise wrong("shape", self.shape, rule, f"{len(self.shape)} dims", remedy)
        specs = self.scheme.tensors_for(self.shape)
        for name in _TENSOR_NAMES:
            tensor: Tensor | None = getattr(self, name)
            if name in specs:
                self._check_tensor(name, tensor, specs[name])
            elif tensor is not None:
                rule = f"be None in a matrix of scheme '{self.scheme}'"
                remedy = "Leave it out, or say in the scheme what it means."
                raise wrong(name, tuple(tensor.shape), rule, "a tensor", remedy)

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
        rule = f"be a tensor {spec.shape} of {dtype_names(spec.dtypes)} on the device of values"
        remedy = "Change the tensor, or the scheme that describes it."
        raise wrong(name, f"matrix {self.shape}, {self.scheme}", rule, got, remedy)

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
            raise wrong("matrix", count, rule, found, "Convert the odd one out first.")
        if count < num_experts:
            for name, tensor in matrix.tensors.items():
                stacked[name][count].copy_(tensor)
        count += 1
    if first is None or count != num_experts:
        remedy = "Pass one matrix per expert, at least one."
        raise wrong("num_experts", num_experts, "count the matrices", count, remedy)
    return QuantizedMatrix(first.scheme, (num_experts, *first.shape), **stacked)


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight `(N, K)` or `(L, N, K)` that a matrix stands for: the meaning of its scheme.

    Packed values are computed in fp32, in the order of the formula of `quant/scheme.py`
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
        choices = dtype_names(DENSE_DTYPES)
        raise InputError(f"dtype ({dtype}) must be one of {choices}; got {dtype}. Use one of them.")
    if not matrix.is_quantized:
        return matrix.values.to(dtype)
    if not matrix.is_stack:
        return _dequantize_packed(matrix).to(dtype)
    weight = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for index in range(matrix.shape[0]):
        weight[index] = _dequantize_packed(matrix.expert(index))
    return weight


def group_scales(matrix: QuantizedMatrix) -> Tensor:
    """The scale of every group in fp32, exact: `scales`, times `super_scales` if there are any."""
    assert matrix.scales is not None
    return _of_super_blocks(matrix.scales, matrix.super_scales, matrix.scheme)


def _of_super_blocks(grid: Tensor, factors: Tensor | None, scheme: QuantScheme) -> Tensor:
    """A grid (..., GN, GK) in fp32, times a factor per super-block if there are any."""
    columns = scheme.group_shape[1]
    if factors is None or scheme.super_columns is None or columns is None:
        return grid.float()
    size = (1, scheme.super_columns // columns)
    return grid.float() * expand_groups(factors.float(), size, grid.shape)


def _dequantize_packed(matrix: QuantizedMatrix) -> Tensor:
    scheme, shape = matrix.scheme, matrix.shape
    if scheme.blocks is not None:
        return decode_rows(BLOCK_CODES[scheme.blocks], matrix.values)
    group_size = scheme.group_size(shape)

    def expanded(grid: Tensor, factors: Tensor | None = None) -> Tensor:
        return expand_groups(_of_super_blocks(grid, factors, scheme), group_size, shape)

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
    weight *= expanded(matrix.scales, matrix.super_scales)
    if scheme.zero_point is ZeroPoint.MINIMUM and matrix.zero_points is not None:
        weight -= expanded(matrix.zero_points, matrix.super_minima)
    if matrix.global_scale is not None:
        weight *= matrix.global_scale.reshape(-1, 1)
    if matrix.permutation is not None:
        weight = weight[:, matrix.permutation.argsort()]
    return weight
