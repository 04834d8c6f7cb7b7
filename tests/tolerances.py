"""How far results may be from the truth: the table of `mixtura.conformance.closeness`, and what
arithmetic of fewer bits costs."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.conformance.closeness import NOISE_FACTOR, RTOL, relative_error

__all__ = [
    "NOISE_FACTOR",
    "PRODUCTS",
    "RTOL",
    "assert_close",
    "frobenius_error",
    "products_bound",
    "relative_error",
]

PRODUCTS: dict[tuple[torch.dtype, int | None], float] = {
    (torch.bfloat16, None): 4e-3,
    (torch.int8, 32): 1.3e-2,
    (torch.int8, 128): 1.8e-2,
    (torch.int8, 256): 2.2e-2,
}
"""(arithmetic of the products, columns that share a scale of the activations) -> error.

Of the experts as a whole, with packed weights, on N(0,1) data; the measure is `frobenius_error`
against fp32 with dequantized weights. Activations rounded to int8 cost more than the dtype of the
rows does. Groups in between have the bound of the next larger ones.
"""


def frobenius_error(actual: Tensor, expected: Tensor) -> float:
    """`|actual - expected| / |expected|` in float64; 0 for empty tensors, NaN spreads."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    return difference if size == 0.0 else difference / size


def products_bound(arithmetic: torch.dtype, group_columns: int | None, rows: torch.dtype) -> float:
    """How large `frobenius_error` may be where results are rounded to the dtype of the rows.

    `group_columns` is None where the arithmetic needs no scales.
    """
    if arithmetic is torch.float32:
        return RTOL[torch.float32] + RTOL[rows]
    sizes = [size for dtype, size in PRODUCTS if dtype is arithmetic]
    if group_columns is not None:
        sizes = [min(size for size in sizes if size is not None and size >= group_columns)]
    return PRODUCTS[arithmetic, sizes[0]] + RTOL[rows] / 4  # half a unit in the last place


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, *, noise: Tensor | None = None
) -> None:
    """Fail unless `actual`, computed in `dtype`, is as near to `expected` as that dtype allows.

    `noise` is what plain torch in `dtype` makes of the same problem.
    """
    bound = RTOL[dtype]
    if noise is not None:
        bound = max(bound, NOISE_FACTOR * relative_error(noise, expected))
    error = relative_error(actual, expected)
    assert error <= bound, f"relative error {error:.2e} is above {bound:.2e} for {dtype}"
