"""The compiled extension, where there is one, and which of its kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mixtura.errors import ConfigError

try:
    from mixtura.kernels.cpu import _cpu  # type: ignore[attr-defined, unused-ignore]
except ImportError as error:
    _cpu = None
    _failure = str(error)


_EMULATED = "_emulated"


def extension() -> Any:
    """The module of C++ functions; only where `missing()` is None."""
    assert _cpu is not None, _failure
    return _cpu


def missing() -> str | None:
    """Why there is no extension, or None where there is."""
    if _cpu is not None:
        return None
    return "its C++ extension is not built: install a C++17 compiler, then mixtura again"


def runnable_paths() -> tuple[str, ...]:
    """Instruction sets that this processor can run, best first."""
    return tuple(name for name in extension().runnable() if not name.endswith(_EMULATED))


def emulated_paths() -> tuple[str, ...]:
    """Paths that emulate instructions which this processor may lack; they run where forced only.

    `amx_emulated` is the source of `amx` with its tile instructions in scalar code, for processors
    with AVX-512-BF16. It is slow and shows that the kernels are right, not that they are fast.
    """
    return tuple(name for name in extension().runnable() if name.endswith(_EMULATED))


def current_path() -> str:
    """The instruction set whose kernels run."""
    name: str = extension().current()
    return name


def cpu_flags() -> tuple[str, ...]:
    """What the processor and the operating system offer, of what matters here."""
    return tuple(extension().flags())


@contextmanager
def forced_path(name: str) -> Iterator[None]:
    """Run a block on another instruction set, for tests and measurements; pack within it.

    Raises:
        ConfigError: this processor cannot run it.
    """
    choices = runnable_paths() + emulated_paths()
    if name not in choices:
        raise ConfigError(
            f"path ({name!r}) must be one that this processor runs; got none of "
            f"{', '.join(choices)}. Use one of these."
        )
    before = current_path()
    extension().choose(name)
    try:
        yield
    finally:
        extension().choose(before)
