"""The file of results: a line for each, so that a run goes on where the one before it stopped."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mixtura.bench.gpu.results import Key, LayerResult, Place
from mixtura.errors import InputError


class Journal:
    """Results of earlier runs that still hold, and those of this one.

    What was measured elsewhere, or with other versions, sources or tuned blocks, stays in the file
    and does not count. A line that is torn, or that another version wrote, is passed over.

    Args:
        path: of the file; None keeps nothing.
        place: where this run measures.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, place: Place) -> None:
        self.path = path
        self.place = place
        self._results: dict[Key, LayerResult] = {}
        self.num_passed_over = 0
        if path is None:
            return
        try:
            with path.open("a+", encoding="utf-8") as file:
                file.seek(0)
                lines = file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the file of results ({path}) must be readable and writable; got {error}. Choose "
                f"another."
            ) from None
        for line in lines:
            self._take(LayerResult.from_json(line))

    def _take(self, result: LayerResult | None) -> None:
        if result is None:
            self.num_passed_over += 1
        elif result.place.is_like(self.place):
            self._results[result.key] = result

    @property
    def results(self) -> list[LayerResult]:
        """Those that hold, the newest of each kind, in the order in which kinds came up."""
        return list(self._results.values())

    def has(self, keys: Iterable[Key]) -> bool:
        """Whether all of these are there."""
        return all(key in self._results for key in keys)

    def add(self, results: Iterable[LayerResult]) -> None:
        """Append results in one piece, behind a torn line on a line of their own."""
        added = list(results)
        for result in added:
            self._results[result.key] = result
        if self.path is None or not added:
            return
        with self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write("".join(f"{result.to_json()}\n" for result in added).encode())
