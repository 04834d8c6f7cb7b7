"""A linear map whose rows round alike in every batch.

No library call is made that could split the sums by shape or by threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.kernels.contract import sum_dtype


def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """`matrix @ vector` as products and one sum per output. (out, in), (in,) -> (out,)."""
    return (matrix * vector).sum(-1)


def linear_by_row(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias`, each row by itself in fp32. (T, in), (out, in), (out,) -> (T, out).

    Returns:
        Rows in their own dtype, bitwise the same whatever rows are beside them and however many
        threads there are.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(0, weight.shape[0])
    dtype = sum_dtype(rows.dtype)
    matrix = weight.to(dtype)
    out = torch.stack([matrix_vector(matrix, row) for row in rows.to(dtype).unbind(0)])
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(rows.dtype)
