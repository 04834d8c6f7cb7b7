"""What the host must know of CUDA: whether a graph is being captured, and where launches go.

A captured launch runs again with every replay, and what the host does between launches does not:
a call that waits for the device to decide something cannot be captured.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from mixtura.errors import CaptureUnsupported

_HAS_GRAPHS: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
"""On ROCm too, which torch presents as CUDA."""


def is_capturing(device: torch.device) -> bool:
    """Whether work for a device is being recorded in a CUDA graph instead of being run.

    False while `torch.compile` traces, which comes before any capture.
    """
    return not torch.compiler.is_compiling() and _captures(device)


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and _HAS_GRAPHS and torch.cuda.is_current_stream_capturing()


def cannot_capture(what: str, fact: str, instead: str) -> CaptureUnsupported:
    """The error for a part that would wait for the host inside a graph."""
    return CaptureUnsupported(
        f"{what} must not wait for the host inside a CUDA graph; got {fact}. {instead}, or run the "
        f"layer outside of the graph."
    )


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context for launches on a device: Triton's go to the current one, whatever the tensors'."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    if device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
