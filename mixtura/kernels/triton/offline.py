"""Compile launches for a GPU that is not there, and read what they take: registers, shared memory.

Needs Triton with its bundled ptxas and cuobjdump, and no device. Triton's interpreter must be off
(TRITON_INTERPRET unset when Triton is imported): interpreted functions cannot be compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

WARP_SIZE = 32

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spilled_bytes: of a thread's stack; what does not fit in registers goes there.
        shared_bytes: of a program.
        tensor_columns: of a program, in the memory that Blackwell's products have of their own: it
            has 512, and with more Triton compiles a kernel that ends in a trap.
        cubin: machine code.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int
    cubin: bytes

    @property
    def sass(self) -> str:
        """The machine code in words."""
        return _cuobjdump("-sass", self.cubin)


class _StandIn:
    """A driver that names a device, and has none."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, WARP_SIZE)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def stand_in(capability: int) -> Iterator[None]:
    """Let Triton compile for compute capability 80, 90, 100, ... instead of this machine's GPU."""
    found = driver._active
    driver.set_active(_StandIn(capability))
    try:
        yield
    finally:
        driver._active = found


def compile_launch(launch: Any, capability: int) -> Resources:
    """Compile what a `Launch` would, by the same way, and read what it takes."""
    assert isinstance(launch.kernel, triton.JITFunction), "unset TRITON_INTERPRET to compile"
    launch.kernel.device_caches.clear()  # the device has the same number, and is another
    with stand_in(capability):
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)
        cubin: bytes = compiled.asm["cubin"]
        shared: int = compiled.metadata.shared
        columns: int = compiled.metadata.tmem_size
    usage = _cuobjdump("-res-usage", cubin)
    return Resources(_number(usage, "REG"), _number(usage, "STACK"), shared, columns, cubin)


def _number(usage: str, key: str) -> int:
    found = re.findall(rf"\b{key}:(\d+)", usage)
    assert found, f"cuobjdump says nothing of {key}: {usage}"
    return max(int(number) for number in found)


def _cuobjdump(flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_BIN / "cuobjdump"), flag, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
