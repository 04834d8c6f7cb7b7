"""Loads: how much each logical expert of each layer has to do, in any unit (slots routed to it)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mixtura.errors import InputError

Loads = NDArray[np.float64]
"""(layers, E), finite and not negative."""

AnyLoads = Tensor | NDArray[np.generic] | Sequence[Sequence[float]]
"""(layers, E), what a caller may give."""


def as_loads(loads: AnyLoads) -> Loads:
    """Loads as (layers, E) float64, checked.

    Raises:
        InputError: another shape, or a load that is negative or not finite.
    """
    array = np.asarray(loads.cpu().double() if isinstance(loads, Tensor) else loads, np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            f"loads {array.shape} must be (layers, experts); got {array.ndim} dimensions. Give "
            f"one row a layer, and a layer and an expert at least."
        )
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise InputError(
            f"loads must be finite and at least 0; got {array.min()} to {array.max()}. Give the "
            f"slots that were routed to each expert."
        )
    return array
