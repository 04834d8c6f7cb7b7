"""Elementwise functions whose results do not depend on where in a batch an element lies.

torch computes some functions differently in its vector loops and in what these leave over, and
cuts long tensors by the number of threads. A row at a time, an element's place is always the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def by_row(run: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """An elementwise function of (T, n) tensors, a row at a time. -> (T, n)."""
    if parts[0].shape[0] < 2:
        return run(*parts)
    return torch.cat([run(*rows) for rows in zip(*(torch.split(x, 1) for x in parts), strict=True)])


class RowActivation(nn.Module):
    """A family's activation module, adopted: its own function, a row at a time.

    Attributes:
        is_row_invariant: False makes it the family's again.
    """

    is_row_invariant: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        if not self.is_row_invariant:
            return super().forward(x)  # type: ignore[no-any-return]
        return by_row(super().forward, x.reshape(x.shape[:-1].numel(), x.shape[-1])).view(x.shape)
