"""What the C++ kernels take for granted of a matrix: looked at once, when it is packed."""

from __future__ import annotations

import torch

from mixtura.errors import InputError
from mixtura.quant.matrix import QuantizedMatrix


def check_permutation(matrix: QuantizedMatrix) -> None:
    """Raise `InputError` unless every column is there once: the kernels do not look."""
    if matrix.permutation is None:
        return
    wanted = torch.arange(matrix.shape[-1], dtype=torch.int32)
    for expert, order in enumerate(matrix.permutation):
        if not torch.equal(order.sort().values, wanted):
            raise InputError(
                f"permutation (expert {expert}) must have each of {len(wanted)} columns once; got "
                f"{order.min().item()}..{order.max().item()}. Fetch or make the weights again."
            )
