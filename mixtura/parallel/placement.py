"""Which rank holds which expert: logical experts -> physical slots -> ranks.

Three kinds of id, never mixed: **logical** (0 .. E-1, what the router chose), **physical** (0 ..
P-1, a slot of the group), **local** (0 .. L-1, a slot of one rank). -1 is none of them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mixtura.errors import InputError, MixturaError, PlacementError
from mixtura.parallel.slots import (
    EMPTY,
    IntArray,
    check_experts,
    check_table,
    deal,
    digest_of,
    replica_table,
)
from mixtura.parallel.topology import Topology

FORMAT, FORMAT_VERSION = "mixtura placement", 1


class Move(NamedTuple):
    """What a slot must get: a copy of a logical expert, from this rank or another."""

    slot: int
    expert: int


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """One rank's lookup.

    Attributes:
        rank: whose it is.
        first_slot: physical id of local expert 0: `local = physical - first_slot`.
        logical_to_local: (E,) int32, where the rank has the expert (the lowest local id where it
            has it twice), -1 elsewhere.
        local_to_logical: (L,) int32, -1 for an empty slot.
    """

    rank: int
    first_slot: int
    logical_to_local: Tensor
    local_to_logical: Tensor

    @property
    def num_local_experts(self) -> int:
        """L, empty slots included."""
        return self.local_to_logical.shape[0]


@dataclass(frozen=True, eq=False)
class Placement:
    """The experts of one layer over the ranks. Never changed: a new one has another version.

    Attributes:
        physical_to_logical: (P,) int32 on the CPU, the expert of each slot, -1 for an empty one;
            a copy of what was given.
        num_experts: E, logical.
        topology: whose slots they are.
        version: counts the changes of a layer's placement; not part of the digest.

    Raises:
        InputError: another shape, dtype or device; an id outside [-1, E); an expert without a
            slot.

    Example:
        >>> placement = Placement.linear(4, Topology.even(6, num_ranks=2))
        >>> placement.physical_to_logical.tolist()
        [0, 1, 2, 2, 3, 0]
        >>> placement.logical_to_physical.tolist()
        [[0, 5], [1, -1], [2, 3], [4, -1]]
    """

    physical_to_logical: Tensor
    num_experts: int
    topology: Topology
    version: int = 0

    def __post_init__(self) -> None:
        table = self.physical_to_logical
        check_table(table, (self.topology.num_physical_experts,))
        check_experts(table.numpy()[None], self.num_experts)
        copy = table.clone(memory_format=torch.contiguous_format)
        object.__setattr__(self, "physical_to_logical", copy)

    @classmethod
    def linear(cls, num_experts: int, topology: Topology) -> Self:
        """Blocks of consecutive experts, rank after rank; the first ranks get the remainder.

        Redundant slots go on where the rank's block ends: they repeat the first experts of the
        next rank's block, round the ring. Where every rank has as many, each gives away as large
        a share of its experts as it takes in: equal loads stay as even as without redundancy, and
        a rank's load varies less, being a sum over more experts. A rank with more slots than there
        are experts leaves the rest empty, so that none holds an expert twice.

        Raises:
            InputError: fewer slots than experts.
        """
        owners = np.sort(deal(num_experts, topology))
        return cls._on_ring(owners, num_experts, topology)

    @classmethod
    def round_robin(cls, num_experts: int, topology: Topology) -> Self:
        """Experts dealt to the ranks in turn, so that neighbours in id lie apart.

        Redundant slots repeat the first experts of the next rank, as with `linear`.

        Raises:
            InputError: fewer slots than experts.
        """
        return cls._on_ring(deal(num_experts, topology), num_experts, topology)

    @classmethod
    def _on_ring(cls, owners: IntArray, num_experts: int, topology: Topology) -> Self:
        """Each rank's own experts, then those of the ranks after it."""
        ring = np.argsort(owners, kind="stable")
        starts = np.searchsorted(owners[ring], np.arange(topology.num_ranks))
        slots = []
        for start, num_slots in zip(starts, topology.slots_per_rank, strict=True):
            window = np.full(num_slots, EMPTY)
            held = min(num_slots, num_experts)
            window[:held] = ring[(start + np.arange(held)) % num_experts]
            slots.append(window)
        table = torch.from_numpy(np.concatenate(slots).astype(np.int32))
        return cls(table, num_experts, topology)

    @cached_property
    def _replicas(self) -> tuple[Tensor, Tensor]:
        table, count = replica_table(self.physical_to_logical.numpy()[None], self.num_experts)
        return torch.from_numpy(table[0]), torch.from_numpy(count[0])

    @property
    def logical_to_physical(self) -> Tensor:
        """(E, max_replicas) int32, the slots of each expert in ascending order, padded with -1."""
        return self._replicas[0]

    @property
    def replica_count(self) -> Tensor:
        """(E,) int32, slots of each expert, at least 1."""
        return self._replicas[1]

    @property
    def max_replicas(self) -> int:
        """Slots of the expert that has most."""
        return self.logical_to_physical.shape[1]

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that name the experts of all slots and the ranks of the slots.

        The same on every machine; version and generation are not in it.
        """
        return digest_of(self.physical_to_logical, self.num_experts, self.topology)

    def moves(self, new: Placement) -> tuple[Move, ...]:
        """What the slots must get to make this placement the new one, by ascending slot.

        A slot that becomes empty needs nothing.

        Raises:
            InputError: the new placement is of other slots or experts.
        """
        check_alike(self, new)
        old_ids, new_ids = self.physical_to_logical, new.physical_to_logical
        slots = ((old_ids != new_ids) & (new_ids != EMPTY)).nonzero().flatten()
        pairs = zip(slots.tolist(), new_ids[slots].tolist(), strict=True)
        return tuple(Move(slot, expert) for slot, expert in pairs)

    def missing_experts(self, lost_ranks: Collection[int] = ()) -> tuple[int, ...]:
        """The experts, ascending, of which no rank has a copy once `lost_ranks` are gone."""
        lost = torch.tensor([self.topology.check_rank(rank) for rank in lost_ranks])
        is_live = ~torch.isin(self.topology.rank_of_slot, lost)
        held = set(self.physical_to_logical[is_live].tolist())
        return tuple(expert for expert in range(self.num_experts) if expert not in held)

    def expert_map(self, rank: int) -> ExpertMap:
        """The lookup of one rank."""
        slots = self.topology.slots_of(rank)
        local_to_logical = self.physical_to_logical[slots.start : slots.stop].clone()
        logical_to_local = torch.full((self.num_experts,), EMPTY, dtype=torch.int32)
        for local in reversed(range(len(slots))):
            if (expert := int(local_to_logical[local])) != EMPTY:
                logical_to_local[expert] = local
        return ExpertMap(rank, slots.start, logical_to_local, local_to_logical)


@dataclass(frozen=True, eq=False)
class ModelPlacement:
    """The experts of every MoE layer of a model over the same slots and ranks.

    Attributes:
        physical_to_logical: (layers, P) int32 on the CPU, -1 for an empty slot; a copy of what
            was given.
        num_experts: E of every layer, logical.
        topology: whose slots they are.
        version: counts the changes of the model's placement; not part of the digest.

    Raises:
        InputError: as `Placement`, and where there is no layer.
    """

    physical_to_logical: Tensor
    num_experts: int
    topology: Topology
    version: int = 0

    def __post_init__(self) -> None:
        table = self.physical_to_logical
        num_layers = table.shape[0] if table.ndim else 0
        check_table(table, (max(num_layers, 1), self.topology.num_physical_experts))
        check_experts(table.numpy(), self.num_experts)
        copy = table.clone(memory_format=torch.contiguous_format)
        object.__setattr__(self, "physical_to_logical", copy)

    @classmethod
    def stack(cls, layers: Sequence[Placement], version: int = 0) -> Self:
        """One placement for each layer, all of the same topology and number of experts.

        Raises:
            InputError: there is no layer, or layers differ.
        """
        if not layers:
            raise InputError(
                "layers (0) must be at least 1; got none. Give each layer's placement."
            )
        for layer in layers:
            check_alike(layers[0], layer)
        table = torch.stack([layer.physical_to_logical for layer in layers])
        return cls(table, layers[0].num_experts, layers[0].topology, version)

    def layer(self, index: int) -> Placement:
        """One layer's placement, with the model's version."""
        table = self.physical_to_logical[index]
        return Placement(table, self.num_experts, self.topology, self.version)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.physical_to_logical.shape[0]

    @cached_property
    def _replicas(self) -> tuple[Tensor, Tensor]:
        table, count = replica_table(self.physical_to_logical.numpy(), self.num_experts)
        return torch.from_numpy(table), torch.from_numpy(count)

    @property
    def logical_to_physical(self) -> Tensor:
        """(layers, E, max_replicas) int32, slots in ascending order, padded with -1.

        As wide as the expert with most replicas in any layer needs.
        """
        return self._replicas[0]

    @property
    def replica_count(self) -> Tensor:
        """(layers, E) int32, slots of each expert, at least 1."""
        return self._replicas[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the three tables: what a rank keeps."""
        tables = (self.physical_to_logical, self.logical_to_physical, self.replica_count)
        return sum(table.nbytes for table in tables)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that name the experts of all slots and the ranks of the slots."""
        return digest_of(self.physical_to_logical, self.num_experts, self.topology)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the table of slots, and the topology as metadata.

        Raises:
            PlacementError: the file cannot be written.
        """
        from safetensors import SafetensorError  # noqa: PLC0415 - layers need only torch
        from safetensors.torch import save_file  # noqa: PLC0415

        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "num_experts": json.dumps(self.num_experts),
            "slots_per_rank": json.dumps(self.topology.slots_per_rank),
            "node_of_rank": json.dumps(self.topology.node_of_rank),
            "generation": json.dumps(self.topology.generation),
            "version": json.dumps(self.version),
            "digest": self.digest,
        }
        try:
            save_file({"physical_to_logical": self.physical_to_logical}, path, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise PlacementError(
                f"the placement ({path}) must be writable; got {error}. Choose another path."
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written; everything in it is checked.

        Raises:
            PlacementError: the file is missing, truncated, no placement, of another version, or
                says what no placement can.
        """
        metadata, table = _read(path)
        try:
            number = {name: json.loads(metadata[name]) for name in NUMBERS}
            topology = Topology(
                tuple(json.loads(metadata["slots_per_rank"])),
                tuple(json.loads(metadata["node_of_rank"])),
                number["generation"],
            )
            placement = cls(table, number["num_experts"], topology, number["version"])
            is_whole = placement.digest == metadata["digest"]
        except (KeyError, TypeError, ValueError, RecursionError, MixturaError) as error:
            raise PlacementError(
                f"the placement ({path}) must be whole; got {error}. Save it again."
            ) from None
        if not is_whole:
            raise PlacementError(
                f"the placement ({path}) must have the digest that it names, "
                f"{metadata['digest']}; got {placement.digest}. Save it again."
            )
        return placement


NUMBERS = ("num_experts", "generation", "version")
"""What a placement's file has as single numbers."""


def _read(path: str | Path) -> tuple[dict[str, str], Tensor]:
    """The metadata of a placement's file, of the version that is read, and its table."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - layers need only torch

    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PlacementError(
            f"the placement ({path}) must exist; got no such file. Check the path."
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise PlacementError(
            f"the placement ({path}) must be a whole safetensors file; got {error}. Save it again."
        ) from None
    if metadata.get("format") != FORMAT or list(tensors) != ["physical_to_logical"]:
        raise PlacementError(
            f"{path} must be a placement; got a safetensors file of something else. Check the path."
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise PlacementError(
            f"the placement ({path}) must be of version {FORMAT_VERSION}; got "
            f"{metadata.get('format_version')!r}. Save it again with this mixtura."
        )
    return metadata, tensors["physical_to_logical"]


def check_alike(old: Placement | ModelPlacement, new: Placement | ModelPlacement) -> None:
    """Raise `InputError` unless layers, experts and slots are as many in both."""
    for name, was, now in (
        ("slots_per_rank", old.topology.slots_per_rank, new.topology.slots_per_rank),
        ("num_experts", old.num_experts, new.num_experts),
        ("layers and slots", (*old.physical_to_logical.shape,), (*new.physical_to_logical.shape,)),
    ):
        if was != now:
            raise InputError(
                f"{name} ({now}) must be the same in two placements that are compared; got {was} "
                f"in the other. Plan anew where ranks or experts have changed."
            )
