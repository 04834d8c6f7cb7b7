"""What a measurement of a candidate can give."""

from __future__ import annotations

import math
from dataclasses import dataclass


class MeasuringLost(Exception):
    """Nothing more can be measured: the GPU, or the process that uses it, is lost every time."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a launch, at each number of rows of the case.

    Attributes:
        shipped: with the table's blocks, measured in turns with the candidate. tried: with its.
    """

    shipped: tuple[float, ...]
    tried: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Candidate to table, at each number of rows."""
        return tuple(b / a for a, b in zip(self.shipped, self.tried, strict=True))

    @property
    def ratio(self) -> float:
        """Their geometric mean."""
        return math.exp(sum(map(math.log, self.ratios)) / len(self.ratios))

    @property
    def worst(self) -> float:
        """The largest."""
        return max(self.ratios)


@dataclass(frozen=True, slots=True)
class Failed:
    """A candidate that is passed over.

    Attributes:
        reason: in words.
        ends_case: the table's own blocks cannot run here, so that there is nothing to compare with.
        has_broken_device: the process can use the GPU no more.
    """

    reason: str
    ends_case: bool = False
    has_broken_device: bool = False


Trial = Timed | Failed


def told(error: Exception) -> str:
    """An exception in one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
