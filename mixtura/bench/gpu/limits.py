"""The limits of a device: measured with random data in the same run, and those commonly reached."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.bench.gpu.arithmetic import NAMES
from mixtura.bench.gpu.device import Device, first_line

PROBES = 10
"""Samples of a probe; each takes about a millisecond on a data-centre GPU."""

ELEMENT = torch.float32
"""Of what is copied and read."""


@dataclass(frozen=True, slots=True)
class Nominal:
    """Limits that well-tuned programs reach on a part.

    Attributes:
        bandwidth: bytes per second. peak: operations per second in bf16 and fp16. fp8_peak: of
            e4m3 codes.
    """

    bandwidth: float
    peak: float
    fp8_peak: float

    def peak_of(self, dtype: torch.dtype) -> float | None:
        """Operations per second of products of that dtype; None where nobody has published any."""
        peaks = {
            torch.bfloat16: self.peak,
            torch.float16: self.peak,
            torch.float8_e4m3fn: self.fp8_peak,
        }
        return peaks.get(dtype)


NOMINAL = {
    "H200": Nominal(4.3e12, 790e12, 1500e12),
    "H100 80GB HBM3": Nominal(3.0e12, 700e12, 1350e12),
}
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


@dataclass(frozen=True, slots=True)
class Peak:
    """Operations per second of a dense product.

    Attributes:
        note: what must be known of it, where it is another dtype's.
    """

    rate: float
    note: str | None = None


def find_peak(device: Device, dtype: torch.dtype) -> Peak:
    """That of a dtype; of bf16 where the device or torch has no product of fp8 or int8."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return Peak(probe_peak(device, dtype))
    try:
        return Peak(probe_peak(device, dtype))
    except Exception as error:  # torch has no promise about these
        reason = f"no dense product of {NAMES[dtype]} runs here ({first_line(error)})"
    return Peak(probe_peak(device, torch.bfloat16), f"{reason}: the floor has the peak of bf16")


def probe_peak(device: Device, dtype: torch.dtype) -> float:
    """Operations per second of a square product of random data, `matrix_size` on a side.

    Data are N(0,1), rounded to e4m3 codes where those are multiplied; int8 codes are uniform.
    """
    return 2 * device.matrix_size**3 / _median(device, _product(device, dtype))


def _product(device: Device, dtype: torch.dtype) -> Callable[[], object]:
    """The second matrix of 8-bit codes is stored by columns, as their products want it."""
    shape = (device.matrix_size, device.matrix_size)
    if dtype is torch.int8:
        left, right = (_random_int8(device, shape, seed) for seed in range(2))
        return functools.partial(torch._int_mm, left, right.t())
    if dtype is torch.float8_e4m3fn:
        left, right = (_random(device, torch.float32, *shape, seed=s).to(dtype) for s in range(2))
        one = torch.ones((), device=device.type)
        return functools.partial(
            torch._scaled_mm, left, right.t(), one, one,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
    left, right = (_random(device, dtype, *shape, seed=seed) for seed in range(2))
    return functools.partial(torch.mm, left, right, out=torch.empty_like(left))


def _random_int8(device: Device, shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator(device.type).manual_seed(seed)
    return torch.randint(
        -128, 128, shape, generator=generator, device=device.type, dtype=torch.int8
    )


def _random(device: Device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """N(0,1), from a generator of its own: a capture that broke leaves torch's default unusable."""
    generator = torch.Generator(device.type).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device.type, dtype=dtype)


def _median(device: Device, call: Callable[[], object]) -> float:
    call()  # chooses an algorithm, and fills the allocator
    return statistics.median(device.seconds(call) for _ in range(PROBES))
