"""What the C++ kernels take for granted of a matrix: looked at once, when it is packed."""

from __future__ import annotations

import torch

from mixtura.errors import InputError
from mixtura.quant.matrix import SUPER_BLOCKS, QuantizedMatrix
from mixtura.quant.scheme import Code


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


def check_finite(matrix: QuantizedMatrix) -> None:
    """Raise `InputError` unless scales, zero points and e4m3 codes are numbers."""
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
    if matrix.scheme.code is Code.E4M3:
        for expert, codes in enumerate(matrix.values):
            if bool(((codes & 127) == 127).any()):
                raise InputError(
                    f"values (expert {expert}) must be numbers; got NaN codes of e4m3. Fetch or "
                    f"make the weights again."
                )
