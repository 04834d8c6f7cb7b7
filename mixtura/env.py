"""The only reader of the process's environment. No variable changes what is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mixtura.errors import ParallelError

RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
LOCAL_RANK, LOCAL_WORLD_SIZE = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
CACHE_HOME = "XDG_CACHE_HOME"


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that torchrun has started.

    Attributes:
        rank, num_ranks: its place in all. local_rank, num_local_ranks: on this machine.
    """

    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int

    @property
    def num_nodes(self) -> int:
        """Machines, each with as many ranks."""
        return max(1, self.num_ranks // self.num_local_ranks)


def read_launch() -> Launch | None:
    """What torchrun says of this process; None where it has not started it.

    Raises:
        ParallelError: a variable is missing beside the others, or is no number.
    """
    if RANK not in os.environ or WORLD_SIZE not in os.environ:
        return None
    found = []
    for name in (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise ParallelError(
                f"{name} ({text!r}) must be a number, as torchrun sets it along with RANK and "
                f"WORLD_SIZE; got another text. Start the ranks with torchrun."
            )
        found.append(int(text))
    return Launch(*found)


def cache_directory() -> Path:
    """Where the user keeps what can be made again: mixtura's part of it, which need not exist.

    Source: XDG Base Directory Specification; a path that is not absolute does not count.
    """
    given = Path(os.environ.get(CACHE_HOME, ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "mixtura"
