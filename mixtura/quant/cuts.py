"""Parts of packed matrices, cut where their groups end: some experts, some rows, some columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixtura.errors import ConfigError
from mixtura.quant.matrix import SUPER_BLOCKS, QuantizedMatrix
from mixtura.quant.scheme import Code, GlobalScale

Range = tuple[int, int]
"""Start and stop."""

_GRIDS = ("scales", "zero_points")


def take_experts(stack: QuantizedMatrix, experts: Sequence[int]) -> QuantizedMatrix:
    """The matrices of some experts of a stack, in the order given; a copy."""
    index = torch.tensor(list(experts), device=stack.device)
    parts: dict[str, Any] = {name: take(part, 0, index) for name, part in stack.tensors.items()}
    return replace(stack, shape=(len(experts), *stack.shape[1:]), **parts)


def cut_rows(matrix: QuantizedMatrix, ranges: Sequence[Range]) -> QuantizedMatrix:
    """Ranges of rows (outputs) below each other, of a matrix (N,K) or a stack; a copy.

    Raises:
        ConfigError: a range ends within rows that share scales.
    """
    scheme, num_rows = matrix.scheme, matrix.shape[-2]
    parts: dict[str, Any] = dict(matrix.tensors)
    index = _index(ranges, matrix.values)
    parts["values"] = take(matrix.values, -2, index)
    grids = [name for name in (*_GRIDS, *SUPER_BLOCKS) if name in parts]
    if grids and scheme.group_shape[0] is not None:
        size = scheme.group_shape[0]
        _check_ends("rows", matrix, ranges, size, num_rows)
        groups = [(start // size, -(-stop // size)) for start, stop in ranges]
        for name in grids:
            parts[name] = take(parts[name], -2, _index(groups, matrix.values))
    if scheme.global_scale is GlobalScale.ROW:
        parts["global_scale"] = take(parts["global_scale"], -1, index)
    return replace(matrix, shape=(*matrix.shape[:-2], len(index), matrix.shape[-1]), **parts)


def cut_columns(matrix: QuantizedMatrix, start: int, stop: int) -> QuantizedMatrix:
    """Columns (inputs) `start .. stop - 1` of a matrix (N,K) or a stack; a copy.

    Raises:
        ConfigError: a group, a block, a super-block or a byte of codes would be cut, or columns are
            permuted.
    """
    scheme, num_columns = matrix.scheme, matrix.shape[-1]
    if scheme.has_permutation:
        raise ConfigError(
            f"columns of a matrix ({scheme}) must be in order to be cut; got a permutation. Use "
            f"tp_size 1, or a checkpoint without activation order."
        )
    parts: dict[str, Any] = dict(matrix.tensors)
    ranges = [(start, stop)]
    size = scheme.group_shape[1] if scheme.is_quantized else None
    if size is not None:
        _check_ends("columns", matrix, ranges, scheme.super_columns or size, num_columns)
    if scheme.code is Code.BLOCKS:
        row_bytes = matrix.values.shape[-1]
        parts["values"] = matrix.values[
            ..., start * row_bytes // num_columns : stop * row_bytes // num_columns
        ].contiguous()
    elif scheme.is_quantized:
        codes_in_bytes = 8 // scheme.bits if 8 % scheme.bits == 0 else 8
        _check_ends("columns", matrix, ranges, codes_in_bytes, num_columns)
        parts["values"] = matrix.values[
            ..., start * scheme.bits // 8 : -(-stop * scheme.bits // 8)
        ].contiguous()
    else:
        parts["values"] = matrix.values[..., start:stop].contiguous()
    for names, shared in ((_GRIDS, size), (SUPER_BLOCKS, scheme.super_columns)):
        for name in names:
            if shared is not None and name in parts:
                groups = (start // shared, -(-stop // shared))
                parts[name] = take(parts[name], -1, _index([groups], matrix.values))
    return replace(matrix, shape=(*matrix.shape[:-1], stop - start), **parts)


def _check_ends(
    what: str, matrix: QuantizedMatrix, ranges: Sequence[Range], size: int, count: int
) -> None:
    wrong = [end for both in ranges for end in both if end % size and end != count]
    if wrong:
        raise ConfigError(
            f"{what} of a matrix {matrix.shape} ({matrix.scheme}) must be cut at multiples of "
            f"{size}; got a cut at {wrong[0]}. Use another tp_size, which divides the "
            f"intermediate size into such parts."
        )


def _index(ranges: Sequence[Range], like: Tensor) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=like.device) for start, stop in ranges])


def take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """`index_select` for any dtype, also those that torch has none for; a copy."""
    is_small = tensor.dtype.is_floating_point and tensor.itemsize == 1
    plain = tensor.view(torch.uint8) if is_small else tensor
    return plain.index_select(dim, index).view(tensor.dtype)
