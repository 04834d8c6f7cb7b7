"""Gives back the memory of checkpoint files that have been read and will not be needed again.

Transformers maps safetensors files into memory, and its tensors are views of the mapping. As long
as one of them is alive the whole file stays mapped, and every page that was ever read counts as
memory of the process until the system needs it for something else.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_SMAPS = Path("/proc/self/smaps")
_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(/.*)$")
_CHANGED = re.compile(r"^Anonymous: +(\d+) kB$")

RELEASE_BYTES = 2**26
"""After so many bytes read, pages are given back: to ask the system for the mappings takes
milliseconds, longer than a small layer."""

Span = tuple[int, int]
"""First address, and the one after the last."""


class MappedFiles:
    """The mappings of some files that this process has made since this object.

    Args:
        paths: the files; links are followed.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self._paths = {str(Path(path).resolve()) for path in paths}
        self._others = set(self._mapped())
        self._num_read = 0

    def count(self, num_bytes: int) -> None:
        """Note that so many more bytes have been read and are not needed again.

        Pages are let go of after every `RELEASE_BYTES`.
        """
        self._num_read += num_bytes
        if self._num_read >= RELEASE_BYTES:
            self.release()

    def release(self) -> None:
        """Let go of the pages that are in memory; reading them again fetches them from the file.

        Mappings of which a page has been written to are left alone. Does nothing where the system
        does not tell which mappings there are.
        """
        self._num_read = 0
        for start, stop in self._unchanged():
            if (start, stop) not in self._others:
                _libc().madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED
                )

    def _mapped(self) -> Iterator[Span]:
        if not sys.platform.startswith("linux") or not _MAPS.exists():
            return
        for line in _MAPS.read_text(errors="surrogateescape").splitlines():
            head = _HEAD.match(line)
            if head is not None and head[3] in self._paths:
                yield int(head[1], 16), int(head[2], 16)

    def _unchanged(self) -> Iterator[Span]:
        if not sys.platform.startswith("linux") or not _SMAPS.exists():
            return
        span: Span | None = None
        for line in _SMAPS.read_text(errors="surrogateescape").splitlines():
            head = _HEAD.match(line)
            if head is not None:
                is_one = head[3] in self._paths
                span = (int(head[1], 16), int(head[2], 16)) if is_one else None
            elif span is not None and (changed := _CHANGED.match(line)):
                if changed[1] == "0":
                    yield span
                span = None


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
