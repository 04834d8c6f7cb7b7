"""The machine's limits as the kernels see them: bytes read per second, products per second."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch
from torch import Tensor

from mixtura.errors import ConfigError
from mixtura.kernels.cpu.extension import extension
from mixtura.kernels.cpu.memory import allocate

READ_BYTES = 512 * 2**20
"""The probe reads through this much, many times a last-level cache."""

SLICE_BYTES = 2 * 2**20
"""What a thread reads before it takes the next piece."""

NUM_STREAMS = 4
"""Addresses that a thread reads from at a time; one reaches a tenth less on 4 KiB pages."""

ITERATIONS = 200_000
"""Of the loop of products: about ten milliseconds."""

_ARITHMETIC = {"fp32": 0, "bf16": 1, "int8": 2}


@cache
def _buffer() -> Tensor:
    buffer = allocate((READ_BYTES,), torch.uint8)
    buffer.fill_(1)
    return buffer


def read_bandwidth(seconds: float, num_threads: int) -> float:
    """Bytes per second that `num_threads` read from memory: the median of passes over 512 MiB.

    Huge pages, four streams a thread; at least three passes. The buffer stays for the next call.
    """
    buffer = _buffer()
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        took = extension().time_read(
            buffer.data_ptr(), READ_BYTES, SLICE_BYTES, NUM_STREAMS, num_threads
        )
        rates.append(READ_BYTES / took)
    return statistics.median(rates)


def peak_rate(arithmetic: str, seconds: float, num_threads: int) -> float | None:
    """Operations per second of products in registers, two for each product: the best run.

    Args:
        arithmetic: "int8", "bf16" or "fp32".
        seconds: how long to measure; at least three runs.
        num_threads: threads at once.

    Returns:
        None where the current path has no such products.

    Raises:
        ConfigError: the arithmetic is unknown.
    """
    if arithmetic not in _ARITHMETIC:
        raise ConfigError(
            f"arithmetic ({arithmetic!r}) must be one of {', '.join(_ARITHMETIC)}; got an unknown "
            f"name. Use one of these."
        )
    if arithmetic == "bf16" and not extension().has_bf16():
        return None
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        rates.append(extension().time_spin(_ARITHMETIC[arithmetic], ITERATIONS, num_threads))
    return max(rates)
