"""A few cases out of a product of axes that together hold every combination of two (or more)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Combination = tuple[tuple[str, Any], ...]

CANDIDATES = 30
"""Cases that are tried for each place; more make the list little shorter."""


def combinations_of(case: Case, strength: int) -> set[Combination]:
    """The values of every `strength` axes of a case."""
    return set(itertools.combinations(case.items(), strength))


def every_combination(axes: Mapping[str, Sequence[Any]], strength: int) -> set[Combination]:
    """All values of every `strength` axes."""
    return {
        tuple(zip(names, values, strict=True))
        for names in itertools.combinations(axes, strength)
        for values in itertools.product(*(axes[name] for name in names))
    }


def covering_cases(axes: Mapping[str, Sequence[Any]], strength: int = 2) -> list[Case]:
    """Cases that hold every combination of `strength` values, found greedily; always the same.

    >>> len(covering_cases({"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2]}))
    9
    """
    generator = random.Random(0)
    missing = every_combination(axes, strength)
    cases: list[Case] = []
    while missing:
        first = dict(min(missing, key=repr))
        tried = [
            {name: first.get(name, generator.choice(values)) for name, values in axes.items()}
            for _ in range(CANDIDATES)
        ]
        best = max(tried, key=lambda case: len(missing & combinations_of(case, strength)))
        cases.append(best)
        missing -= combinations_of(best, strength)
    return cases
