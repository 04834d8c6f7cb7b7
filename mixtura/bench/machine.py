"""The machine and its limits, measured: how fast it reads memory and multiplies.

The C++ extension has probes that reach the limits (huge pages, several streams for each thread,
dot products in registers). Where it is missing, torch's own reading and products stand in: lower
figures, so that fractions of them come out higher.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mixtura.bench.measure import interleave
from mixtura.plugin import transformers_version

LIMITS_MODULE = "mixtura.kernels.cpu.limits"
"""Probes of the extension: `read_bandwidth(seconds, num_threads)`, `peak_rate(arithmetic, ...)`."""

READ_BYTES = 512 * 2**20
"""torch's probe reads through this much, many times a last-level cache."""

SLICE_BYTES = 32 * 2**20
"""In pieces of about a millisecond, so that other processes do not disturb most of them."""

MATRIX_SIZE = 2048
"""Of the square product that shows the peak: large enough for full speed, done in milliseconds."""


class Arithmetic(Enum):
    """What multiplies: the dot products whose peak is the limit of a case with many tokens."""

    INT8 = "int8"
    BF16 = "bf16"
    FP32 = "fp32"


_OPERANDS = {
    Arithmetic.INT8: torch.int8,
    Arithmetic.BF16: torch.bfloat16,
    Arithmetic.FP32: torch.float32,
}


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that results belong to.

    Attributes:
        bandwidth, bandwidth_one_thread: bytes per second read from memory.
        peak: operations per second by the arithmetic's name.
        probes: "extension" or "torch", whichever measured the limits.
    """

    cpu: str
    num_cores: int
    num_threads: int
    python: str
    torch: str
    transformers: str
    mixtura: str
    bandwidth: float
    bandwidth_one_thread: float
    peak: dict[str, float]
    probes: str


def probe_machine(wanted: tuple[Arithmetic, ...], *, seconds: float = 1.0) -> Machine:
    """Measure the bandwidth and the peaks that are wanted; each probe takes about `seconds`."""
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
        mixtura=metadata.version("mixtura"),
        bandwidth=bandwidth,
        bandwidth_one_thread=bandwidth_one_thread,
        peak={arithmetic.value: peak_rate(arithmetic, seconds) for arithmetic in wanted},
        probes="torch" if _ask_extension("read_bandwidth", 0.0) is None else "extension",
    )


def read_bandwidth(seconds: float) -> float:
    """Bytes per second that torch's number of threads reads from memory."""
    found = _ask_extension("read_bandwidth", seconds)
    return read_bandwidth_with_torch(seconds) if found is None else found


def read_bandwidth_with_torch(seconds: float) -> float:
    """Bytes per second that torch's threads read: the median over slices of a large buffer."""
    buffer = torch.ones(READ_BYTES // SLICE_BYTES, SLICE_BYTES // 4)

    def read(number: int) -> None:
        buffer[number % buffer.shape[0]].sum()

    return SLICE_BYTES / interleave({"read": read}, seconds=seconds)["read"].median


def peak_rate(arithmetic: Arithmetic, seconds: float) -> float:
    """Operations per second of dot products; of torch's best where the extension cannot say."""
    found = _ask_extension("peak_rate", seconds, arithmetic.value)
    return peak_rate_with_torch(arithmetic, seconds) if found is None else found


def peak_rate_with_torch(arithmetic: Arithmetic, seconds: float) -> float:
    """Operations per second of the best large square product, with the weights in either role."""
    dtype = _OPERANDS[arithmetic]
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE).mul_(32).to(dtype) for _ in range(2))
    calls = {
        "linear": lambda _: F.linear(left, right),
        "mm": lambda _: torch.mm(left, right),
    }
    if dtype is torch.int8:
        calls = {"mm": lambda _: torch._int_mm(left, right)}
    timings = interleave(calls, seconds=seconds)
    return float(2 * MATRIX_SIZE**3 / min(timing.minimum for timing in timings.values()))


def _ask_extension(probe: str, seconds: float, *first: str) -> float | None:
    """What a probe of the extension finds; None without extension, or where the CPU cannot."""
    try:
        limits: Any = importlib.import_module(LIMITS_MODULE)
        found: float | None = getattr(limits, probe)(*first, seconds, torch.get_num_threads())
    except ImportError:
        return None
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with `count` threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def free_bytes(device: str) -> int:
    """Bytes that a type of device has left for tensors."""
    if device == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return available_memory()


def available_memory() -> int:
    """Bytes that this process may still take, caches that the system can give back included."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
