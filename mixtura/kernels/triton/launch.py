"""A kernel and what it is launched with, as a value: to be run, timed, or compiled and read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with all that it is launched with.

    Attributes:
        kernel: the function under `@triton.jit`.
        grid: programs.
        arguments: in the order of its first parameters; None is left out of the compiled kernel.
        constants: the other parameters by name, and num_warps and num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](*self.arguments, **self.constants)


def cdiv(size: int, part: int) -> int:
    """Parts that hold `size`. Triton's own is a kernel's function, and takes 10 us on the host."""
    return -(-size // part)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`, which is positive."""
    return 1 << (number - 1).bit_length()
