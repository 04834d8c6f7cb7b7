"""The norm over an expert's output that some families apply before the routing weight."""

from __future__ import annotations

from torch import Tensor

from mixtura.config import PostNorm
from mixtura.kernels.contract import sum_dtype


def post_norm(rows: Tensor, weight: Tensor, kind: PostNorm, epsilon: float) -> Tensor:
    """Normalize rows in fp32 (float64 ones in float64). (.., H), (H,) -> (.., H) in their dtype.

    RMS: `x / rms(x) * w`. RMS_SCALE_FIRST: `y / rms(y)`, `y = x * (1 + w)` rounded to the rows'
    dtype.
    """
    dtype = sum_dtype(rows.dtype)
    x = rows.to(dtype)
    if kind is PostNorm.RMS_SCALE_FIRST:
        x = (x * (1.0 + weight).to(dtype)).to(rows.dtype).to(dtype)
    x = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    if kind is PostNorm.RMS:
        x = x * weight.to(dtype)
    return x.to(rows.dtype)
