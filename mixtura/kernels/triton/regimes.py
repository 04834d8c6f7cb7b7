"""Which kernels a number of rows calls for: a pure function of sizes.

The router cuts its sorted slots by the same function, so that one launch chooses experts and makes
the tiles that the experts' kernels walk over.
"""

from __future__ import annotations

from enum import StrEnum

from mixtura.types import Tiling

DIRECT_MAX_ROWS = 8
"""Rows up to which ids may index the experts with no sort before them."""

DIRECT_MAX_SHARE = 0.5
"""Of slots to experts: with more, slots share experts, and each would read its expert anew."""

SMALL_MAX_MEAN = 96
"""Rows of an expert, on average, up to which its weights are on the wide side of the product.

At twice as many, reading a bf16 expert takes as long as its products (H200: 184 rows)."""

SMALL_TILES = (16, 32, 64)
"""Rows of a tile on the narrow side of Hopper's product."""

LARGE_TILING = Tiling(rows=128)


class Regime(StrEnum):
    """How rows meet experts.

    DIRECT: every slot by itself, unsorted. SMALL: tiles of few rows, the weights on the wide side
    of the product. LARGE: tiles of many rows.
    """

    DIRECT = "direct"
    SMALL = "small"
    LARGE = "large"


def regime_for(num_rows: int, top_k: int, num_experts: int, expected_share: float = 1.0) -> Regime:
    """Rows M, slots of each K, experts L, `ExpertBatch.expected_share` -> the kernels to run."""
    num_slots = num_rows * top_k * expected_share
    is_few = num_rows == 1 or num_slots <= DIRECT_MAX_SHARE * num_experts
    if num_rows <= DIRECT_MAX_ROWS and is_few:
        return Regime.DIRECT
    return Regime.SMALL if num_slots <= SMALL_MAX_MEAN * num_experts else Regime.LARGE


def tiling_for(
    num_rows: int, top_k: int, num_experts: int, expected_share: float = 1.0
) -> Tiling | None:
    """How the slots of so many rows are cut; None where they are not sorted.

    A small tile holds the rows of most experts when choices are even: their mean and two standard
    deviations, so that an expert's weights are mostly read once.

    >>> tiling_for(64, 8, 128)
    Tiling(rows=16)
    """
    match regime_for(num_rows, top_k, num_experts, expected_share):
        case Regime.DIRECT:
            return None
        case Regime.LARGE:
            return LARGE_TILING
    mean = num_rows * top_k * expected_share / num_experts
    wanted = mean + 2 * mean**0.5
    return Tiling(next((rows for rows in SMALL_TILES if rows >= wanted), SMALL_TILES[-1]))
