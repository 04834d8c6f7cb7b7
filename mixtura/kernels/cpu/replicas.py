"""The choice of replicas in C++: a few microseconds where torch takes ten operations."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.errors import InputError
from mixtura.kernels.cpu.extension import extension, missing

_HAS_EXTENSION = missing() is None


def takes_replicas(ids: Tensor) -> bool:
    """Whether `place` runs here: on the CPU, outside of a graph that is being traced."""
    return _HAS_EXTENSION and ids.is_cpu and not torch.compiler.is_compiling()


def place(
    ids: Tensor,
    slots: Tensor,
    ends: Tensor,
    counts: Tensor,
    is_recording: Tensor,
    shift: float,
    stride: float,
) -> Tensor:
    """Logical ids (T,K) int32 -> physical ids; the tables as in `EplbLayerState`.

    Raises:
        InputError: an id is outside [-1, E).
    """
    ids = ids.contiguous()
    out = torch.empty_like(ids)
    num_tokens, top_k = ids.shape
    num_experts = counts.shape[0] - 1
    is_done = extension().place(
        ids.data_ptr(),
        out.data_ptr(),
        num_tokens,
        top_k,
        slots.data_ptr(),
        ends.data_ptr(),
        counts.data_ptr(),
        is_recording.data_ptr(),
        num_experts,
        ends.shape[0],
        shift,
        stride,
    )
    if not is_done:
        raise InputError(
            f"expert ids ({int(ids.min())} to {int(ids.max())}) must be in [-1, {num_experts}); "
            f"got another. Check the router or the replayed ids."
        )
    return out
