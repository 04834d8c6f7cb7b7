"""Ranks compare what they are about to run: one that differs is an error on all of them.

Without this a rank with other weights, another kernel or another placement would add its share to
everybody's sums, and nothing would look wrong but the text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mixtura.errors import ParallelError, RankLost
from mixtura.parallel.transport import Transport

T = TypeVar("T")

Values = Mapping[str, Any]
"""Name -> what JSON can hold; names are words that an error may show."""


def check_consistent(values: Sequence[Values]) -> None:
    """Compare every rank's values by name; a name that a rank lacks counts as None there.

    What most ranks have is taken for right, and of several that are as frequent the lowest rank's.

    Args:
        values: by rank.

    Raises:
        ParallelError: a value differs; the message names it and the first rank that is odd.

    Example:
        >>> check_consistent([{"dtype": "bfloat16"}, {"dtype": "float32"}])
        Traceback (most recent call last):
        mixtura.errors.ParallelError: dtype of rank 1 (float32) must be that of rank 0; got \
bfloat16 there. Start all ranks alike.
    """
    for name in dict.fromkeys(name for one in values for name in one):
        found = [json.dumps(one.get(name), sort_keys=True) for one in values]
        usual, _ = Counter(found).most_common(1)[0]
        odd = next((rank for rank, value in enumerate(found) if value != usual), None)
        if odd is not None:
            like = found.index(usual)
            raise ParallelError(
                f"{name} of rank {odd} ({values[odd].get(name)}) must be that of rank {like}; got "
                f"{values[like].get(name)} there. Start all ranks alike."
            )


def agree(transport: Transport, work: Callable[[], tuple[Values, T]]) -> T:
    """Do something on every rank, and see that it came out alike.

    Args:
        transport: the ranks, all of which call this.
        work: gives what must be the same everywhere, and a result of this rank's own.

    Returns:
        This rank's result.

    Raises:
        ParallelError: values differ, or the work failed on another rank; with that rank's message.
    """
    if transport.size == 1:
        return work()[1]
    try:
        values, result = work()
    except RankLost:
        raise  # there is nobody to tell
    except Exception as error:
        transport.exchange_values({"error": f"{type(error).__name__}: {error}"})
        raise
    heard = transport.exchange_values({"values": dict(values)})
    for rank, other in enumerate(heard):
        if "error" in other:
            raise ParallelError(
                f"every rank must come to the same point; got an error on rank {rank}: "
                f"{other['error']}"
            )
    check_consistent([other["values"] for other in heard])
    return result
