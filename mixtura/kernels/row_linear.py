"""A linear map whose rows round alike in every batch: on a CPU in C++, else by plain products."""

from __future__ import annotations

from torch import Tensor

from mixtura.kernels.cpu.row_linear import row_linear, takes_row_linear
from mixtura.kernels.reference.linear import linear_by_row


def row_invariant_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` in fp32, rounded once. (..., in), (out, in), (out,) -> (..., out).

    Returns:
        Rows in their own dtype, bitwise the same whatever rows are beside them and however many
        threads there are.
    """
    if takes_row_linear(rows, weight, bias):
        return row_linear(rows, weight, bias)
    flat = linear_by_row(rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]), weight, bias)
    return flat.view(*rows.shape[:-1], weight.shape[0])
