"""Memory for packed weights: in huge pages where the system offers them."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20
"""Bytes; reading through pages of 4 KiB costs a tenth of the bandwidth (docs/benchmarks/cpu.md)."""


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor of zeros, contiguous and at least 64-byte aligned."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    # Private: shared anonymous memory has no transparent huge pages.
    size = num_bytes + HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + num_bytes].view(dtype).view(shape)
