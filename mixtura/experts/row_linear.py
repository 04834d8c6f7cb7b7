"""`RowLinear`: a linear layer whose rows round alike in every batch."""

from __future__ import annotations

from torch import Tensor, nn

from mixtura.kernels.row_linear import row_invariant_linear


class RowLinear(nn.Linear):
    """`rows @ weight.T + bias` with every row's sums in one order; `nn.Linear` in all else.

    Rows are bitwise the same in any batch and with any number of threads. Without the C++
    extension and on a GPU it is a loop over rows.

    Attributes:
        is_row_invariant: False makes it `nn.Linear` again.
    """

    is_row_invariant: bool = True

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.is_row_invariant:
            return row_invariant_linear(rows, self.weight, self.bias)
        return super().forward(rows)
