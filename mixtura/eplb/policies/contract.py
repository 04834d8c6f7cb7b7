"""What a policy is: a pure function from loads to a placement."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from mixtura.config.choice import require_positive
from mixtura.eplb.loads import Loads
from mixtura.errors import ConfigError, InputError
from mixtura.parallel import ModelPlacement, Topology

Ids = NDArray[np.int64]
"""Expert ids of slots, -1 for an empty one."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan may cost, and how it is asked for.

    Attributes:
        max_moves_per_layer: slots of a layer whose expert may change; None is any number. Only
            incremental policies keep to it (`Policy.is_incremental`).
        target_balancedness: an incremental policy stops where a layer has reached this.
        num_expert_groups: G groups of consecutive experts, which hierarchical plans keep together.
        seed: of the random policy.

    Raises:
        ConfigError: a number is out of range.
    """

    max_moves_per_layer: int | None = None
    target_balancedness: float = 1.0
    num_expert_groups: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_moves_per_layer is not None:
            require_positive("max_moves_per_layer", self.max_moves_per_layer, minimum=0)
        require_positive("num_expert_groups", self.num_expert_groups)
        require_positive("seed", self.seed, minimum=0)
        if not 0 < self.target_balancedness <= 1:
            raise ConfigError(
                f"target_balancedness ({self.target_balancedness}) must be in (0, 1], 1 being even "
                f"ranks; got a number outside. Use 0.98, or 1 for the best there is."
            )

    @classmethod
    def of_fraction(cls, fraction: float, topology: Topology) -> Self:
        """A budget of at most this fraction of a layer's slots, rounded down."""
        if not 0 <= fraction <= 1:
            raise ConfigError(
                f"fraction ({fraction}) must be in [0, 1]; got a number outside. Use 0.15 for 15 % "
                f"of the slots."
            )
        return cls(max_moves_per_layer=floor(fraction * topology.num_physical_experts))


class Plan(Protocol):
    """The signature of every policy.

    Args: loads (layers, E) float64; the placement in force, None where there is none yet; whose
    slots to fill; the budget. Returns a placement of every layer: every expert has a slot, equal
    loads are told apart by the lower id, and the same arguments give the same placement.
    """

    def __call__(
        self, loads: Loads, old: ModelPlacement | None, topology: Topology, budget: Budget
    ) -> ModelPlacement: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy under its name.

    Attributes:
        name: as `rebalance(policy=...)` takes it.
        plan: the function.
        is_incremental: it starts at the placement in force and keeps to the budget; the others
            plan from scratch.
    """

    name: str
    plan: Plan
    is_incremental: bool = False


def next_placement(
    ids: NDArray[np.integer], num_experts: int, topology: Topology, old: ModelPlacement | None
) -> ModelPlacement:
    """A plan's (layers, P) as a placement: `old` itself where nothing changed, else one later."""
    table = torch.from_numpy(ids.astype(np.int32))
    if old is not None and old.topology == topology and torch.equal(old.physical_to_logical, table):
        return old
    version = 0 if old is None else old.version + 1
    return ModelPlacement(table, num_experts, topology, version)


def require_slots(num_experts: int, topology: Topology) -> None:
    """Raise `InputError` where experts cannot all have a slot."""
    if topology.num_physical_experts < num_experts:
        raise InputError(
            f"num_physical_experts ({topology.num_physical_experts}) must be at least num_experts; "
            f"got loads of {num_experts}. Give the ranks more slots, or use more ranks."
        )


def require_same(old: ModelPlacement, loads: Loads, topology: Topology) -> None:
    """Raise `InputError` unless the placement in force fits the loads and the topology."""
    found = (old.num_layers, old.num_experts, old.topology.slots_per_rank)
    if found != (*loads.shape, topology.slots_per_rank):
        raise InputError(
            f"the old placement ({found[0]} layers, {found[1]} experts, {found[2]} slots) must be "
            f"of the loads' layers and experts and the topology's slots; got "
            f"{loads.shape[0]}, {loads.shape[1]}, {topology.slots_per_rank}. Plan without an old "
            f"placement, or with a policy that plans from scratch."
        )


def require_even_slots(what: str, topology: Topology) -> int:
    """The slots of every rank, or `ConfigError` where ranks differ."""
    if len(set(topology.slots_per_rank)) > 1:
        raise ConfigError(
            f"num_physical_experts ({topology.num_physical_experts}) must be divisible by "
            f"num_ranks ({topology.num_ranks}) for {what}; got ranks of "
            f"{sorted(set(topology.slots_per_rank))} slots. Use policy 'global' or 'local_search', "
            f"or as many slots on every rank."
        )
    return topology.slots_per_rank[0]
