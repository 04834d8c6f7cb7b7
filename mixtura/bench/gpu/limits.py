"""The limits of a device: measured with random data in the same run, and those commonly reached."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.bench.gpu.device import Device

PROBES = 10
"""Samples of a probe; each takes about a millisecond on a data-centre GPU."""

ELEMENT = torch.float32
"""Of what is copied and read."""


@dataclass(frozen=True, slots=True)
class Nominal:
    """Limits that well-tuned programs reach on a part.

    Attributes:
        bandwidth: bytes per second. peak: operations per second in bf16 and fp16.
    """

    bandwidth: float
    peak: float


NOMINAL = {"H200": Nominal(4.3e12, 790e12), "H100 80GB HBM3": Nominal(3.0e12, 700e12)}
"""By a part of the device's name: what published copies and dense products reach."""


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second that a large copy moves, and that a large sum reads."""

    copy: float
    read: float

    @property
    def best(self) -> float:
        """The faster of the two: a layer mostly reads, and no probe is its whole truth."""
        return max(self.copy, self.read)


def nominal_limits(name: str) -> Nominal | None:
    """Those of a device by its name, where they are known."""
    return next((limits for part, limits in NOMINAL.items() if part in name), None)


def probe_bandwidth(device: Device) -> Bandwidth:
    """Copy and read a buffer of `probe_bytes`, or of a quarter of what is free."""
    num_bytes = min(device.probe_bytes, device.free_bytes() // 4)
    source = _random(device, ELEMENT, max(num_bytes // ELEMENT.itemsize, 1))
    target = torch.empty_like(source)
    size = source.numel() * ELEMENT.itemsize
    copy = _median(device, functools.partial(target.copy_, source))
    read = _median(device, source.sum)
    return Bandwidth(copy=2 * size / copy, read=size / read)


def probe_peak(device: Device, dtype: torch.dtype) -> float:
    """Operations per second of a square product of N(0,1) data, `matrix_size` on a side."""
    size = device.matrix_size
    left, right = (_random(device, dtype, size, size, seed=seed) for seed in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _median(device, functools.partial(torch.mm, left, right, out=out))


def _random(device: Device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """N(0,1), from a generator of its own: a capture that broke leaves torch's default unusable."""
    generator = torch.Generator(device.type).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device.type, dtype=dtype)


def _median(device: Device, call: Callable[[], object]) -> float:
    call()  # chooses an algorithm, and fills the allocator
    return statistics.median(device.seconds(call) for _ in range(PROBES))
