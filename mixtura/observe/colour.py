"""One colour scale for the picture and the page: load relative to the layer's mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAKO = (
    "#0b0405",
    "#28192f",
    "#3b2f5e",
    "#40498e",
    "#366a9f",
    "#348aa6",
    "#38aaac",
    "#54c9ad",
    "#a0dfb9",
    "#def5e5",
)
"""Seaborn's mako at ten equal steps: lightness rises evenly, so it reads without colour vision."""

ON_LIGHT, ON_DARK = (0.93, 0.08), (0.2, 1.0)
"""The part of it, from no load to the highest, that stands out from light and from dark paper."""

LEAST_TOP = 2.0
"""The scale reaches twice the mean at least, so that balanced layers do not look uneven."""

MEAN_AT = 0.4
"""Where the mean stands on the scale: one colour in all pictures, with room below and above."""

APART = 0.11
"""Part of the scale between two marks."""

TIMES = "\u00d7"
"""Follows a relative load: 2 times the mean."""

MARKS = (1, 0.5, 0.25, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Relative loads worth a mark, the most important first."""


@dataclass(frozen=True, slots=True)
class ColourScale:
    """Relative load 0 .. `top` to a place in [0, 1], by a power that puts the mean at `MEAN_AT`.

    Attributes:
        top: the relative load that takes the strongest colour.
    """

    top: float

    @classmethod
    def over(cls, highest: float) -> ColourScale:
        """The scale for loads up to `highest` times the mean."""
        return cls(max(highest, LEAST_TOP))

    def position(self, relative_load: float) -> float:
        """0 for none, `MEAN_AT` for the mean, 1 for `top` and above."""
        exponent = -math.log(MEAN_AT) / math.log(self.top)
        return float(min((max(relative_load, 0.0) / self.top) ** exponent, 1.0))

    @property
    def marks(self) -> tuple[float, ...]:
        """Relative loads to write beside the scale, ascending, from 0 to `top`."""
        found = [0.0, self.top]
        for mark in MARKS:
            if all(abs(self.position(mark) - self.position(other)) >= APART for other in found):
                found.append(mark)
        return tuple(sorted(found))


def colour_at(position: float, *, on: tuple[float, float] = ON_LIGHT) -> str:
    """The colour at a position in [0, 1] of the scale, on light paper unless `on` says otherwise.

    Example:
        >>> colour_at(1.0, on=ON_DARK)
        '#def5e5'
    """
    none, full = on
    place = (none + (full - none) * position) * (len(MAKO) - 1)
    low = min(int(place), len(MAKO) - 2)
    part = place - low
    mixed = [
        round(int(MAKO[low][i : i + 2], 16) * (1 - part) + int(MAKO[low + 1][i : i + 2], 16) * part)
        for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
