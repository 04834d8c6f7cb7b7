"""Rows of packed matrices: some of them, and matrices below each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixtura.errors import ConfigError
from mixtura.quant.matrix import SUPER_BLOCKS, QuantizedMatrix
from mixtura.quant.scheme import GlobalScale, QuantScheme

_BY_ROW = ("values", "scales", "zero_points", *SUPER_BLOCKS)
"""Tensors with a row for each output, where no rows share scales."""


def has_own_rows(scheme: QuantScheme) -> bool:
    """Whether each output has scales of its own, so that rows can be moved."""
    return not scheme.is_quantized or scheme.group_shape[0] == 1


def take_rows(matrix: QuantizedMatrix, rows: Tensor) -> QuantizedMatrix:
    """`W[rows]` of a matrix (N, K), or of every matrix of a stack; a copy.

    Raises:
        ConfigError: rows share scales.
    """
    _check_own_rows(matrix.scheme)
    parts: dict[str, Any] = dict(matrix.tensors)
    for name in _BY_ROW:
        if name in parts:
            parts[name] = _bytes(parts[name])[..., rows, :].view(parts[name].dtype)
    if matrix.scheme.global_scale is GlobalScale.ROW:
        parts["global_scale"] = parts["global_scale"][..., rows]
    shape = (*matrix.shape[:-2], len(rows), matrix.shape[-1])
    return replace(matrix, shape=shape, **parts)


def concat_rows(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices (N, K) of one scheme below each other; unlike second scales become one for a row.

    Raises:
        ConfigError: the schemes, widths or orders of columns differ, or rows share scales.
    """
    first = matrices[0]
    scheme = first.scheme
    if any((m.scheme, m.shape[-1]) != (scheme, first.shape[-1]) for m in matrices):
        raise ConfigError(
            f"matrices ({len(matrices)}) must be of one scheme and width to be one; got "
            f"{', '.join(f'{m.shape} {m.scheme}' for m in matrices)}. Keep them apart."
        )
    _check_own_rows(scheme)
    if not have_one_order(matrices):
        raise ConfigError(
            f"matrices ({scheme}) must have their columns in one order to be one; got permutations "
            f"that differ. Keep the matrices apart."
        )
    parts: dict[str, Any] = {
        name: torch.cat([_bytes(m.tensors[name]) for m in matrices], -2).view(tensor.dtype)
        for name, tensor in first.tensors.items()
        if name in _BY_ROW
    }
    if first.permutation is not None:
        parts["permutation"] = first.permutation
    if scheme.global_scale is not GlobalScale.NONE:
        parts["global_scale"] = torch.cat([_by_row(m) for m in matrices], -1)
        scheme = replace(scheme, global_scale=GlobalScale.ROW)
    shape = (*first.shape[:-2], sum(m.shape[-2] for m in matrices), first.shape[-1])
    return QuantizedMatrix(scheme, shape, **parts)


def have_one_order(matrices: Sequence[QuantizedMatrix]) -> bool:
    """Whether columns of matrices are stored in one order; those without memory count as such."""
    first = matrices[0].permutation
    if first is None:
        return all(matrix.permutation is None for matrix in matrices)
    others = (matrix.permutation for matrix in matrices)
    return all(
        other is not None and (other.is_meta or torch.equal(other, first)) for other in others
    )


def _by_row(matrix: QuantizedMatrix) -> Tensor:
    assert matrix.global_scale is not None
    if matrix.scheme.global_scale is GlobalScale.ROW:
        return matrix.global_scale
    return matrix.global_scale.unsqueeze(-1).expand(*matrix.shape[:-1])


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that torch can index, whatever the tensor's."""
    is_small = tensor.dtype.is_floating_point and tensor.itemsize == 1
    return tensor.view(torch.uint8) if is_small else tensor


def _check_own_rows(scheme: QuantScheme) -> None:
    if not has_own_rows(scheme):
        raise ConfigError(
            f"rows of a matrix ({scheme}) must have scales of their own to be moved; got shared "
            f"ones. Keep the matrix whole."
        )
