"""The device that is measured: its clock, its graphs, what it is. All of CUDA's calls are here."""

from __future__ import annotations

import gc
import subprocess
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mixtura.bench.machine import free_bytes
from mixtura.errors import InputError

Step = Callable[[], Tensor]
"""A piece of work for the device; returns its output."""

SMI_FIELDS = {
    "driver": "driver_version",
    "sm_MHz": "clocks.sm",
    "memory_MHz": "clocks.mem",
    "power_W": "power.draw",
    "temperature_C": "temperature.gpu",
}
SMI_SECONDS = 10
"""nvidia-smi is given up after this; nothing depends on it."""


class CannotCapture(Exception):
    """Work cannot become a graph; the message says why."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a device is.

    Attributes:
        capability: "9.0"; empty where there is no such thing.
        cache_bytes: of the last-level cache. memory_bytes: all there is.
    """

    name: str
    capability: str
    driver: str | None
    cache_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Graph:
    """Captured work.

    Attributes:
        replay: runs it again. output: the tensor that it writes each time.
    """

    replay: Callable[[], object]
    output: Tensor


class Device(ABC):
    """What a run needs of a device.

    Attributes:
        type: as torch calls it.
        probe_bytes: of the buffer that is copied and read to find the bandwidth.
        matrix_size: of the square product that shows the peak.
    """

    type: str
    probe_bytes: int = 2 * 2**30
    matrix_size: int = 8192

    @abstractmethod
    def facts(self) -> DeviceFacts:
        """What it is."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes left for tensors."""

    @abstractmethod
    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds from the start of the first piece of work of a call to the end of the last."""

    @abstractmethod
    def capture(self, step: Step) -> Graph:
        """The work of a step as a graph; it has run before.

        Raises:
            CannotCapture: it waits for the host, or cannot be captured for another reason.
        """

    @abstractmethod
    def release(self) -> None:
        """Give memory back that no tensor uses."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all work is done; raises what went wrong with it."""

    @abstractmethod
    def state(self) -> dict[str, float] | None:
        """Clocks, power and temperature now, where they can be had."""


class CudaDevice(Device):
    """The current CUDA device of torch.

    Raises:
        InputError: there is none.
    """

    type = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise InputError(
                f"device (cuda) must be there to be measured; got none that torch "
                f"{torch.__version__} can use. Run this on a machine with a GPU, or measure "
                f"the CPU with --device cpu."
            )
        self._properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._first: torch.cuda.CUDAGraph | None = None

    def facts(self) -> DeviceFacts:
        found = self._properties
        return DeviceFacts(
            name=found.name,
            capability=f"{found.major}.{found.minor}",
            driver=self._driver,
            cache_bytes=found.L2_cache_size,
            memory_bytes=found.total_memory,
        )

    @cached_property
    def _driver(self) -> str | None:
        return self._ask_smi().get("driver")

    def free_bytes(self) -> int:
        return free_bytes("cuda")

    def seconds(self, call: Callable[[], object]) -> float:
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def capture(self, step: Step) -> Graph:
        # A capture that fails leaves a mess, so work that waits for the host is found without one.
        try:
            with _no_waiting():
                step()
        except Exception as error:
            raise CannotCapture(first_line(error)) from None
        reason: str | None = None
        try:
            pool, graph = self._graph_memory(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                try:
                    output = step()
                except Exception as error:
                    reason = first_line(error)  # the end of the capture has another to tell
                    raise
        except Exception as error:
            self._first = None  # what broke may have left the shared memory in a capture
            raise CannotCapture(reason or first_line(error)) from None
        return Graph(graph.replay, output)

    def release(self) -> None:
        self._first = None
        gc.unfreeze()  # what the last call froze may be garbage by now, and hold tensors
        gc.collect()
        gc.freeze()  # every capture collects: it need not look at what is there now
        torch.cuda.empty_cache()

    def finish(self) -> None:
        torch.cuda.synchronize()

    def state(self) -> dict[str, float] | None:
        found = self._ask_smi()
        numbers: dict[str, float] = {}
        for name in SMI_FIELDS:
            try:
                numbers[name] = float(found[name])
            except (KeyError, ValueError):
                continue
        numbers.pop("driver", None)
        return numbers or None

    def _graph_memory(self) -> Any:
        """The memory that graphs share: they run in turn, and keep nothing but an output.

        A small graph holds it until `release`, or until a capture fails.
        """
        if self._first is None:
            first = torch.cuda.CUDAGraph()
            with torch.cuda.graph(first):
                torch.zeros(1, device=self.type)
            self._first = first
        return self._first.pool()

    def _ask_smi(self) -> dict[str, str]:
        """What nvidia-smi says of this device; empty where it says nothing."""
        query = ["nvidia-smi", f"--id=GPU-{self._properties.uuid}", "--format=csv,noheader,nounits"]
        query.append(f"--query-gpu={','.join(SMI_FIELDS.values())}")
        try:
            done = subprocess.run(
                query, capture_output=True, text=True, check=True, timeout=SMI_SECONDS
            )
        except (OSError, subprocess.SubprocessError):
            return {}
        values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
        return dict(zip(SMI_FIELDS, values, strict=False))


@contextmanager
def _no_waiting() -> Iterator[None]:
    """An error from torch where an operator waits for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not every such operator is found
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def first_line(error: BaseException) -> str:
    """An error as one line: its kind, and the start of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
