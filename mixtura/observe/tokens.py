"""Which token of which sequence a row of a routing trace is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mixtura.errors import InputError


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The token behind each row of a trace.

    Attributes:
        sequence: (N,) int32 numbers of sequences, in the order in which they began.
        position: (N,) int32, 0 for the first token of a sequence; -1 - c for padding in column c of
            a batch. Rows are in rising order of (sequence, position), each pair once.
        requests: for every sequence, the id of the request in a continuous batch; None for the row
            of a batch.

    Raises:
        InputError: shapes, dtypes or order are others, or a sequence has no entry in `requests`.

    Example:
        >>> sequence = torch.tensor([0, 0, 1], dtype=torch.int32)
        >>> position = torch.tensor([0, 1, 0], dtype=torch.int32)
        >>> table = TokenTable(sequence, position, (None, None))
        >>> table.find(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 1])).tolist()
        [2, -1, 1]
    """

    sequence: Tensor
    position: Tensor
    requests: tuple[str | None, ...]

    def __post_init__(self) -> None:
        for name, part in (("sequence", self.sequence), ("position", self.position)):
            if part.ndim != 1 or part.dtype != torch.int32 or len(part) != len(self.sequence):
                raise InputError(
                    f"the {name} of tokens must be int32, one number a row; got "
                    f"{tuple(part.shape)} of {part.dtype} for {len(self.sequence)} rows. Record "
                    f"the routing again."
                )
        if len(self) and not 0 <= int(self.sequence.min()) <= int(self.sequence.max()) < len(
            self.requests
        ):
            raise InputError(
                f"sequences of tokens must be in [0, {len(self.requests)}), the sequences of the "
                f"trace; got {int(self.sequence.min())} to {int(self.sequence.max())}. Record the "
                f"routing again."
            )
        if not bool((self._keys[1:] > self._keys[:-1]).all()):
            raise InputError(
                "tokens must be in rising order of sequence and position, each once; got another "
                "order. Record the routing again."
            )

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def is_padding(self) -> Tensor:
        """(N,) bool, True where the row is no token of the sequence."""
        return self.position < 0

    def find(self, sequence: Tensor, position: Tensor) -> Tensor:
        """Rows (M,) int64 of tokens (M,), (M,); -1 where there is none."""
        if not len(self):
            return torch.full(sequence.shape, -1)
        wanted = order_keys(sequence, position)
        rows = torch.searchsorted(self._keys, wanted).clamp(max=len(self) - 1)
        return torch.where(self._keys[rows] == wanted, rows, -1)

    @cached_property
    def _keys(self) -> Tensor:
        return order_keys(self.sequence, self.position)


def order_keys(sequence: Tensor, position: Tensor) -> Tensor:
    """Numbers (N,) int64 that are in the order of (sequence, position)."""
    return sequence.long() * 2**32 + position.long()
