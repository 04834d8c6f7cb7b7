"""How far a result may be from the truth in fp32 or better.

The measure is `max|a - b| / max|b|`. A bound is the table's, or twice the error that plain torch of
the same dtype makes on the same problem, whichever is larger: no kernel is asked to round better
than torch does.
"""

from __future__ import annotations

import torch
from torch import Tensor

RTOL: dict[torch.dtype, float] = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
"""About two units in the last place of the dtype, more in fp32 and fp64, where sums dominate."""

NOISE_FACTOR = 2.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`max|actual - expected| / max|expected|` in float64; 0 for empty tensors, NaN spreads."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    return difference if largest == 0.0 else difference / largest
