"""What no-compute experts add to a layer's routed result, by the fastest way there is."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.kernels.triton.device import missing
from mixtura.types import Bypass

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What is added up in fp32."""


def add_bypass(bypass: Bypass, routed: Tensor, rows: Tensor) -> Tensor:
    """`bypass.apply(routed, rows)`, in one launch on a GPU where no graph is recorded. (T,H)."""
    weight = bypass.identity_weight
    if weight is None or bypass.constants is not None or not _can_launch(routed, rows, weight):
        return bypass.apply(routed, rows)
    from mixtura.kernels.triton.bypass import add_identity

    return add_identity(routed, rows, weight)


def _can_launch(*tensors: Tensor) -> bool:
    """Whether plain tensors of a GPU meet outside of graphs of torch.compile and of autograd."""
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    are_plain = all(
        tensor.is_cuda and type(tensor) is Tensor and tensor.dtype in DTYPES for tensor in tensors
    )
    return are_plain and not needs_grad and not torch.compiler.is_compiling() and missing() is None
