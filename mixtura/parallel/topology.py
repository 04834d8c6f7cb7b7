"""Ranks as expert parallelism sees them: how many slots each has, and on which node it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from mixtura.config.choice import require_positive
from mixtura.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """Physical experts 0 .. P-1 in blocks, rank after rank.

    Attributes:
        slots_per_rank: physical experts of each rank, for one layer. Ranks may differ; a rank
            without slots serves no expert.
        node_of_rank: the node of each rank, any numbers >= 0.
        generation: which membership of the group this is; messages of another one are stale.

    Raises:
        ConfigError: the two tuples differ in length, a number is negative, or there is no slot.

    Example:
        >>> topology = Topology.even(10, num_ranks=4, num_nodes=2)
        >>> topology.slots_per_rank, topology.node_of_rank, topology.first_slot(2)
        ((3, 3, 2, 2), (0, 0, 1, 1), 6)
    """

    slots_per_rank: tuple[int, ...]
    node_of_rank: tuple[int, ...]
    generation: int = 0

    def __post_init__(self) -> None:
        if len(self.slots_per_rank) != len(self.node_of_rank):
            raise ConfigError(
                f"slots_per_rank ({len(self.slots_per_rank)} ranks) must speak of the ranks of "
                f"node_of_rank; got {len(self.node_of_rank)} there. Give both for every rank."
            )
        for name in ("slots_per_rank", "node_of_rank"):
            for value in getattr(self, name):
                require_positive(f"a number of {name}", value, minimum=0)
        require_positive("generation", self.generation, minimum=0)
        if self.num_physical_experts == 0:
            raise ConfigError(
                f"slots_per_rank ({self.slots_per_rank}) must have a slot; got none. Give at "
                f"least one rank a slot."
            )

    @classmethod
    def even(cls, num_physical_experts: int, num_ranks: int, num_nodes: int = 1) -> Self:
        """Slots over ranks and ranks over nodes, in order; what is left over goes to the first.

        Raises:
            ConfigError: a number is below 1, or there are fewer ranks than nodes.
        """
        require_positive("num_physical_experts", num_physical_experts)
        require_positive("num_ranks", num_ranks)
        require_positive("num_nodes", num_nodes)
        if num_nodes > num_ranks:
            raise ConfigError(
                f"num_nodes ({num_nodes}) must be at most num_ranks; got {num_ranks} ranks. Count "
                f"nodes that have a rank."
            )
        ranks_per_node = split_evenly(num_ranks, num_nodes)
        nodes = tuple(node for node, ranks in enumerate(ranks_per_node) for _ in range(ranks))
        return cls(split_evenly(num_physical_experts, num_ranks), nodes)

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.slots_per_rank)

    @property
    def num_physical_experts(self) -> int:
        """P, the slots of all ranks."""
        return sum(self.slots_per_rank)

    @property
    def num_nodes(self) -> int:
        """How many different nodes the ranks are on."""
        return len(set(self.node_of_rank))

    @cached_property
    def first_slots(self) -> tuple[int, ...]:
        """(R+1,) exclusive, with a leading 0: rank r has slots `first_slots[r]` up to the next."""
        return tuple(accumulate(self.slots_per_rank, initial=0))

    def first_slot(self, rank: int) -> int:
        """The physical id of the rank's local expert 0."""
        return self.first_slots[self.check_rank(rank)]

    def slots_of(self, rank: int) -> range:
        """The rank's physical ids."""
        first = self.first_slot(rank)
        return range(first, first + self.slots_per_rank[rank])

    @cached_property
    def rank_of_slot(self) -> Tensor:
        """(P,) int32, the rank of each physical expert."""
        ranks = torch.arange(self.num_ranks, dtype=torch.int32)
        return ranks.repeat_interleave(torch.tensor(self.slots_per_rank))

    def check_rank(self, rank: int) -> int:
        """Return the rank, or raise `ConfigError` where there is no such one."""
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(
                f"rank ({rank}) must be in [0, {self.num_ranks}); got a topology of "
                f"{self.num_ranks} ranks. Count ranks from 0."
            )
        return rank


def split_evenly(total: int, num_parts: int) -> tuple[int, ...]:
    """`total` in parts that differ by at most one, the larger ones first.

    Example:
        >>> split_evenly(10, 4)
        (3, 3, 2, 2)
    """
    base, remainder = divmod(total, num_parts)
    return tuple(base + (part < remainder) for part in range(num_parts))
