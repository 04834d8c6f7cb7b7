"""Whether the contents of a matrix are numbers: what kernels take for granted."""

from __future__ import annotations

import torch

from mixtura.errors import InputError
from mixtura.quant.matrix import SUPER_BLOCKS, QuantizedMatrix
from mixtura.quant.scheme import Code

_FIRST_ODD = {Code.E4M3: 0x7F, Code.E5M2: 0x7C}
"""The smallest magnitude of a code that is no finite number."""


def check_finite(matrix: QuantizedMatrix) -> None:
    """Raise `InputError` unless scales, zero points and codes of 8-bit floats are numbers."""
    if not matrix.is_quantized:
        return
    named = {"scales": matrix.scales, "zero_points": matrix.zero_points}
    named["global_scale"] = matrix.global_scale
    named |= {name: getattr(matrix, name) for name in SUPER_BLOCKS}
    for name, tensor in named.items():
        if tensor is None or not tensor.dtype.is_floating_point:
            continue
        bad = (~torch.isfinite(tensor.float())).nonzero()
        if len(bad):
            raise InputError(
                f"{name} ({tuple(bad[0].tolist())}) must be finite; got "
                f"{tensor.float()[tuple(bad[0])].item()}. Fetch or make the weights again."
            )
    first = _FIRST_ODD.get(matrix.scheme.code)
    if first is None:
        return
    for expert, codes in enumerate(matrix.values):
        if bool(((codes & 127) >= first).any()):
            raise InputError(
                f"values (expert {expert}) must be numbers; got NaN codes of "
                f"{matrix.scheme.code.value}. Fetch or make the weights again."
            )
