"""From a physical expert to its rank and its place there: tables for tensors of ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.parallel.topology import Topology


@dataclass(frozen=True, slots=True)
class SlotTables:
    """Lookups by physical id; the last entry is that of id -1, no expert.

    Attributes:
        num_ranks: R, groups of ranks with different experts.
        owner: (P + 1,) int64 rank of a slot; R for id -1.
        local: (P + 1,) int32 place of a slot on its rank; -1 for id -1.
        here: (P + 1,) int32 place of a slot on this rank; -1 where it is on another.
    """

    num_ranks: int
    owner: Tensor
    local: Tensor
    here: Tensor

    @classmethod
    def of(cls, topology: Topology, rank: int, device: torch.device | str = "cpu") -> SlotTables:
        """The tables of a rank, on a device."""
        sizes = topology.slots_per_rank
        owner = [r for r, size in enumerate(sizes) for _ in range(size)] + [len(sizes)]
        local = [slot for size in sizes for slot in range(size)] + [-1]
        here = [place if r == rank else -1 for r, place in zip(owner, local, strict=True)]
        return cls(
            len(sizes),
            torch.tensor(owner, dtype=torch.int64, device=device),
            torch.tensor(local, dtype=torch.int32, device=device),
            torch.tensor(here, dtype=torch.int32, device=device),
        )

    def to(self, device: torch.device | str) -> SlotTables:
        """The same tables on another device."""
        tables = (self.owner, self.local, self.here)
        return SlotTables(self.num_ranks, *(table.to(device) for table in tables))

    def local_ids(self, physical_ids: Tensor) -> Tensor:
        """(T,K) physical ids -> places on this rank, int32; -1 where the expert is not here."""
        return self.here[physical_ids.long()]
