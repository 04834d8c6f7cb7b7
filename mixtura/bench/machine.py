"""The machine and its limits, measured: how fast it reads memory and multiplies matrices."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from mixtura.bench.measure import interleave
from mixtura.plugin import transformers_version

READ_BYTES = 512 * 2**20
"""The probe reads through this much, many times a last-level cache."""

SLICE_BYTES = 32 * 2**20
"""In pieces of about a millisecond, so that other processes do not disturb most of them."""

MATRIX_SIZE = 2048
"""Of the square product that shows the peak: large enough for full speed, done in milliseconds."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that results belong to.

    Attributes:
        bandwidth, bandwidth_one_thread: bytes per second read from memory.
        peak_flops: floating-point operations per second of a large matrix product, by dtype's name.
    """

    cpu: str
    num_cores: int
    num_threads: int
    python: str
    torch: str
    transformers: str
    bandwidth: float
    bandwidth_one_thread: float
    peak_flops: dict[str, float]


def probe_machine(dtypes: tuple[torch.dtype, ...], *, seconds: float = 1.0) -> Machine:
    """Measure the limits; each probe takes about `seconds`."""
    bandwidth = read_bandwidth(seconds)
    with threads(1):
        bandwidth_one_thread = read_bandwidth(seconds)
    return Machine(
        cpu=cpu_name(),
        num_cores=os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers_version() or "none",
        bandwidth=bandwidth,
        bandwidth_one_thread=bandwidth_one_thread,
        peak_flops={dtype_name(dtype): peak_flops(dtype, seconds) for dtype in dtypes},
    )


def read_bandwidth(seconds: float) -> float:
    """Bytes per second that torch's threads read: the median over slices of a large buffer."""
    buffer = torch.ones(READ_BYTES // SLICE_BYTES, SLICE_BYTES // 4)

    def read(number: int) -> None:
        buffer[number % buffer.shape[0]].sum()

    return SLICE_BYTES / interleave({"read": read}, seconds=seconds)["read"].median


def peak_flops(dtype: torch.dtype, seconds: float) -> float:
    """Operations per second of the best large square product, with the weights in either role."""
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype) for _ in range(2))
    calls = {
        "linear": lambda _: F.linear(left, right),
        "mm": lambda _: torch.mm(left, right),
    }
    timings = interleave(calls, seconds=seconds)
    return float(2 * MATRIX_SIZE**3 / min(timing.minimum for timing in timings.values()))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with `count` threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def cpu_name() -> str:
    """The processor as the system calls it, with family and model number where known."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in path.read_text().splitlines())
    facts: dict[str, str] = {}
    for key, _, value in lines:
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts.get('model')})"
    return name
