"""A layer's experts as records of bytes that can be sent, checked and put elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.errors import MigrationError

HEAD_WORDS = 2
"""int64 words before the bytes of a record: the logical expert, and the fingerprint."""

WORD_BYTES = 8


@dataclass(frozen=True, eq=False)
class LayerSlots:
    """The slots of one layer on this rank.

    Attributes:
        tensors: by name, (L, ...) each, as a kernel keeps them; they are written in place.
    """

    tensors: Mapping[str, Tensor]

    @property
    def num_slots(self) -> int:
        """L."""
        return next(iter(self.tensors.values())).shape[0]

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return next(iter(self.tensors.values())).device

    @property
    def num_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) // self.num_slots

    @property
    def num_words(self) -> int:
        """int64 words of one record."""
        return HEAD_WORDS + -(-self.num_bytes // WORD_BYTES)

    @property
    def layout(self) -> str:
        """Names, dtypes and sizes of what a record holds; ranks must agree on it."""
        parts = (f"{n} {t.dtype} {tuple(t.shape[1:])}" for n, t in self.tensors.items())
        return "; ".join(parts)

    def record(self, slot: int, expert: int) -> Tensor:
        """The expert in a slot as (num_words,) int64: its id, its fingerprint, its bytes."""
        parts = [_bytes_of(tensor[slot]) for tensor in self.tensors.values()]
        data = torch.cat(parts)
        data = F.pad(data, (0, -data.shape[0] % WORD_BYTES)).view(torch.int64)
        head = data.new_tensor([expert, 0])
        head[1] = fingerprint(data)
        return torch.cat([head, data])

    def check(self, record: Tensor, expert: int) -> None:
        """Raise `MigrationError` unless a record is whole and of this expert."""
        found, told = record[:HEAD_WORDS].tolist()
        if found != expert:
            raise MigrationError(
                f"the slot's expert must be {expert}, as planned; got the weights of expert "
                f"{found}. Nothing was changed."
            )
        actual = int(fingerprint(record[HEAD_WORDS:]))
        if actual != told:
            raise MigrationError(
                f"the weights of expert {expert} must arrive as they were sent (fingerprint "
                f"{told:#x}); got {actual:#x}. Nothing was changed."
            )

    def restore_(self, slot: int, record: Tensor) -> None:
        """Make a slot hold what a record holds; addresses stay."""
        data = record[HEAD_WORDS:].view(torch.uint8)
        start = 0
        with torch.no_grad():
            for tensor in self.tensors.values():
                row = tensor[slot]
                size = row.numel() * row.itemsize
                row.copy_(data[start : start + size].view(row.dtype).view(row.shape))
                start += size


def _bytes_of(row: Tensor) -> Tensor:
    """A copy of a tensor's bytes, (n,) uint8."""
    return row.detach().contiguous().view(-1).view(torch.uint8)


def fingerprint(words: Tensor) -> Tensor:
    """() int64 `sum(words[i] * odd[i])` modulo 2^64: any changed or moved word changes it.

    An odd factor has an inverse, so a single changed word never goes unseen; the factors are
    multiples of the golden ratio, so that words that change places do not cancel.
    """
    return (words * _factors(words.shape[0], words.device)).sum()


@cache
def _factors(count: int, device: torch.device) -> Tensor:
    """(count,) int64 odd factors."""
    step = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number
    return (torch.arange(1, count + 1, device=device) * step) | 1
