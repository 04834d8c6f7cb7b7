"""What the contents of a stored matrix tell of damage: no weights that were learned look so."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.matrix import QuantizedMatrix, group_scales
from mixtura.quant.scheme import ZeroPoint

LOWEST_ZERO = 1
"""What a stored 0 stands for in GPTQ's first version; it is 0 elsewhere."""


def check_contents(name: str, matrix: QuantizedMatrix) -> None:
    """Refuse a matrix, or one of a stack, that holds no weights.

    Codes that are all alike, scales that are all zero and zero points that are all at the lower end
    are what a damaged or half-written file looks like; so is a dense matrix of zeros. The scales'
    being finite is the codecs' to check. A matrix without memory is not looked at.

    Args:
        name: what messages call it. matrix: (N, K) or (E, N, K).

    Raises:
        CheckpointError: as above.
    """
    if matrix.device.type == "meta":
        return
    for place, one in _experts(name, matrix):
        fault = _fault(one)
        if fault is not None:
            raise CheckpointError(f"{place} ({one.scheme}) must {fault}. Fetch the weights again.")


def zero_scales(matrix: QuantizedMatrix) -> int:
    """How many groups of a matrix or stack have scale 0, and so mean nothing but zeros."""
    if matrix.scales is None:
        return 0
    return matrix.scales.numel() - int(_as_numbers(matrix, matrix.scales).count_nonzero())


def _as_numbers(matrix: QuantizedMatrix, scales: Tensor) -> Tensor:
    """Scales as torch can compare them; e8m0 has no 0, and its code 0, 2 ** -127, counts as one."""
    is_e8m0 = scales.dtype is torch.float8_e8m0fnu
    return scales.view(torch.uint8) if is_e8m0 else group_scales(matrix)


def _experts(name: str, matrix: QuantizedMatrix) -> Iterator[tuple[str, QuantizedMatrix]]:
    if not matrix.is_stack:
        yield name, matrix
        return
    for number in range(matrix.shape[0]):
        yield f"expert {number} of {name}", matrix.expert(number)


def _fault(one: QuantizedMatrix) -> str | None:
    """What a matrix (N, K) lacks, and what was found; None where it is sound."""
    if not one.is_quantized:
        if not torch.isfinite(one.values).all():
            return "hold finite numbers; got one that is not"
        return None if one.values.any() else "hold weights; got zeros alone"
    if one.values.numel() > 1 and one.values.min() == one.values.max():
        return "hold weights; got the same code everywhere"
    if one.scales is not None and not _as_numbers(one, one.scales).any():
        return "have scales that are not zero; got none"
    zeros = one.zero_points if one.scheme.zero_point is ZeroPoint.INTEGER else None
    if zeros is not None and zeros.numel() > 1 and zeros.max() <= LOWEST_ZERO:
        return "have zero points between its codes; got the lowest for every group"
    return None
