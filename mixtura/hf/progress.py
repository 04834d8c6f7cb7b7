"""A bar on stderr for a long read, with bytes per second; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from transformers.utils import logging


class OnBytes(Protocol):
    """Told how many more bytes have been read."""

    def __call__(self, num_bytes: int, /) -> object: ...


@contextmanager
def read_progress(what: str, num_bytes: int) -> Iterator[OnBytes]:
    """A bar of Transformers' kind: it is off where Transformers' bars are.

    Args:
        what: is read. num_bytes: of it.
    """
    with logging.tqdm(
        total=num_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not sys.stderr.isatty(),
    ) as bar:
        yield bar.update
