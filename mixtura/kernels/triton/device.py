"""What a GPU can do, as far as the choice of blocks depends on it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata

import torch

from mixtura.errors import InputError

MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
"""The first with bf16 products and asynchronous copies."""

MIN_E4M3_CAPABILITY = (8, 9)
"""The first with products of fp8."""


@dataclass(frozen=True, slots=True)
class Device:
    """Limits of a GPU.

    Attributes:
        name: what the driver calls it.
        capability: of CUDA; None for another maker's.
        num_processors: streaming multiprocessors.
        shared_bytes: shared memory that one program may take.
        is_interpreter: no GPU, but Triton's interpreter.
    """

    name: str
    capability: tuple[int, int] | None
    num_processors: int
    shared_bytes: int
    is_interpreter: bool = False

    @property
    def has_wide_products(self) -> bool:
        """Products of whole warp groups that read shared memory: Hopper, data-centre Blackwell."""
        return self.capability is not None and 9 <= self.capability[0] < 12

    @property
    def is_blackwell(self) -> bool:
        """A data-centre Blackwell."""
        return self.has_wide_products and self.capability is not None and self.capability[0] > 9

    @property
    def has_descriptors(self) -> bool:
        """A unit that copies whole tiles by descriptor (TMA)."""
        return self.capability is not None and self.capability[0] >= 9


HOPPER = Device("H100, H200", (9, 0), 132, 232448)
"""Source: NVIDIA's tuning guide."""

INTERPRETER = replace(HOPPER, name="Triton's interpreter", num_processors=3, is_interpreter=True)
"""Hopper's limits, and so few processors that programs walk over several tiles each."""


@lru_cache
def device_of(device: torch.device) -> Device:
    """The limits of a device; tensors on a CPU are the interpreter's."""
    if device.type == "cpu":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    capability = None if torch.version.hip else (found.major, found.minor)
    if capability is not None and capability < MIN_CAPABILITY:
        raise InputError(
            f"the GPU ({device}, {found.name}) must have compute capability "
            f"{_dotted(MIN_CAPABILITY)} or more for Triton kernels; got {_dotted(capability)}. Use "
            f"another GPU, or kernel='torch'."
        )
    return Device(found.name, capability, found.multi_processor_count, shared)


@lru_cache
def triton_version() -> str | None:
    """As it is installed; None for a build of another maker, under another name."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


@lru_cache
def missing() -> str | None:
    """Why there can be no Triton kernels in this process, or None. Does not import Triton."""
    wanted = ".".join(map(str, MIN_TRITON))
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; install triton >= {wanted}"
    version = triton_version() or wanted
    parts = version.split(".")
    if tuple(int(part) for part in parts[:2]) < MIN_TRITON:
        return f"needs triton >= {wanted}, and {version} is installed"
    if torch.cuda.is_available() and not torch.version.hip:
        capability = torch.cuda.get_device_capability()
        if capability < MIN_CAPABILITY:
            return (
                f"needs a GPU of compute capability {_dotted(MIN_CAPABILITY)} or more, and this "
                f"one has {_dotted(capability)}"
            )
    return None


@lru_cache
def has_e4m3_products() -> bool:
    """Whether the GPU multiplies e4m3 codes; one that is not here is taken for a recent one."""
    if not torch.cuda.is_available():
        return True
    return not torch.version.hip and torch.cuda.get_device_capability() >= MIN_E4M3_CAPABILITY


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
