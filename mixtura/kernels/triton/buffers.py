"""Memory for what kernels write: running out of it names the buffer and its size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtura.errors import DeviceMemoryError


def empty(like: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor where `like` is.

    Raises:
        DeviceMemoryError: it does not fit.
    """
    try:
        return like.new_empty(tuple(shape), dtype=dtype)
    except torch.OutOfMemoryError as error:
        size = torch.Size(shape).numel() * dtype.itemsize / 2**30
        raise DeviceMemoryError(
            f"the buffer of {name} ({tuple(shape)}, {size:.2f} GiB) must fit in the memory of "
            f"{like.device}; got {error}. Send fewer tokens at a time: "
            f"RunnerConfig(max_rows_per_pass=...)."
        ) from None
