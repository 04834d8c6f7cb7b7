"""What every policy of load balancing promises: a valid placement, the same for the same loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from mixtura.conformance.report import Cases, Promises, Refused, require
from mixtura.eplb import POLICIES, Budget, Policy, moved_slots, policy_for
from mixtura.eplb.loads import Loads
from mixtura.errors import ConfigError, InputError
from mixtura.parallel import ModelPlacement, Placement, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Loads and ranks; equal worlds are equal to the bit.

    Attributes:
        loads: a name in `LOADS`. num_layers, num_experts: of the model.
        num_slots: P of a layer. num_ranks, num_nodes: over which they lie in order.
        slots_per_rank: where ranks differ; None: as even as can be.
        seed: of the random numbers.
    """

    loads: str = "skewed"
    num_layers: int = 2
    num_experts: int = 8
    num_slots: int = 12
    num_ranks: int = 4
    num_nodes: int = 1
    slots_per_rank: tuple[int, ...] | None = None
    seed: int = 0

    @property
    def topology(self) -> Topology:
        """Whose slots they are."""
        if self.slots_per_rank is not None:
            return Topology(self.slots_per_rank, (0,) * len(self.slots_per_rank))
        return Topology.even(self.num_slots, self.num_ranks, self.num_nodes)

    def make_loads(self) -> Loads:
        """(layers, E)."""
        generator = np.random.default_rng(self.seed)
        return LOADS[self.loads](generator, (self.num_layers, self.num_experts))

    def old(self) -> ModelPlacement:
        """A placement in force."""
        layer = Placement.round_robin(self.num_experts, self.topology)
        return ModelPlacement.stack([layer] * self.num_layers, version=3)


def _one_hot(generator: np.random.Generator, shape: tuple[int, int]) -> Loads:
    loads = np.zeros(shape)
    loads[:, shape[1] // 2] = 100.0
    return loads


LOADS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Loads]] = {
    "skewed": lambda generator, shape: generator.lognormal(sigma=1.5, size=shape),
    "even": lambda generator, shape: np.ones(shape),
    "zero": lambda generator, shape: np.zeros(shape),
    "one expert": _one_hot,
    "counts": lambda generator, shape: generator.integers(0, 9, shape).astype(float),
}

WORLDS = (
    World(),
    World(num_slots=8),
    World(num_layers=1, num_experts=16, num_slots=16, num_ranks=2),
    World(num_slots=16, num_ranks=4, num_nodes=2),
    World(num_slots=12, num_ranks=1),
    World(num_experts=5, num_slots=7, num_ranks=7),
)

LONELY = (World(num_experts=1, num_slots=4), World(num_experts=1, num_slots=1, num_ranks=1))
FULL = (World(num_slots=8, num_ranks=1), World(num_slots=8, num_ranks=8))


def names() -> tuple[str, ...]:
    """Built-in policies that can be examined."""
    return tuple(POLICIES)


def find(name: str) -> Policy:
    """The policy of a name; see `policy_for` for errors."""
    return policy_for(name)


def promises(policy: Policy, device: str = "cpu") -> Promises:
    """Everything that is tried of a policy; plans are made on the host whatever the device."""
    every = [replace(world, loads=loads) for world, loads in product(WORLDS, LOADS)]
    idle = [replace(world, loads="zero") for world in WORLDS]
    checks: Promises = {
        "it plans something": lambda: [(World(), partial(_plans, policy))],
        "valid placements": lambda: _cases(_valid, policy, every),
        "deterministic": lambda: _cases(_deterministic, policy, every),
        "arguments are left alone": lambda: _cases(_pure, policy, every),
        "no load at all": lambda: _cases(_valid, policy, idle),
        "one expert in every slot": lambda: _cases(_valid, policy, list(LONELY)),
        "one slot for each expert": lambda: _cases(_valid, policy, list(FULL)),
        "ranks of unlike slots": lambda: _cases(
            _valid, policy, [World(slots_per_rank=(5, 3, 4)), World(slots_per_rank=(8, 0, 2))]
        ),
        "many seeds": lambda: _cases(_valid, policy, [World(seed=seed) for seed in range(8)]),
    }
    if policy.is_incremental:
        checks["it keeps to its budget"] = lambda: [
            (f"{world}, {moves} moves", partial(_within, policy, world, moves))
            for world, moves in product(WORLDS, (0, 1, 3))
        ]
    return checks


def _cases(trial: Callable[[Policy, World], None], policy: Policy, worlds: list[World]) -> Cases:
    return [(world, partial(trial, policy, world)) for world in worlds]


def _plan(
    policy: Policy, world: World, old: ModelPlacement | None, budget: Budget | None = None
) -> ModelPlacement:
    try:
        found = policy.plan(world.make_loads(), old, world.topology, budget or Budget())
    except (ConfigError, InputError) as error:
        raise Refused(str(error)) from error
    require(isinstance(found, ModelPlacement), f"a plan must be a ModelPlacement; got {found!r}")
    return found


def _plans(policy: Policy) -> None:
    """A policy that refuses the plainest world has shown nothing, and fails."""
    try:
        _valid(policy, World())
    except Refused as reason:
        require(False, f"it must plan even ranks; got: {reason}")


def _valid(policy: Policy, world: World) -> None:
    for old in (None, world.old()):
        plan = _plan(policy, world, old)
        shape = (world.num_layers, world.topology.num_physical_experts)
        table = plan.physical_to_logical
        same = plan.topology == world.topology and plan.num_experts == world.num_experts
        require(same, f"the plan must be for {world}; got another topology or number of experts")
        got = tuple(table.shape)
        require(got == shape, f"physical_to_logical must be {shape}; got {got}")
        fewest = int(plan.replica_count.min())
        require(fewest >= 1, "every expert must have a slot; got one without")


def _deterministic(policy: Policy, world: World) -> None:
    for old in (None, world.old()):
        first, second = (_plan(policy, world, old) for _ in range(2))
        require(first.digest == second.digest, "equal loads must give equal plans; got two")


def _pure(policy: Policy, world: World) -> None:
    loads, old, topology = world.make_loads(), world.old(), world.topology
    loads.flags.writeable = False
    before = old.physical_to_logical.clone()
    try:
        policy.plan(loads, old, topology, Budget())
    except (ConfigError, InputError) as error:
        raise Refused(str(error)) from error
    same = bool((old.physical_to_logical == before).all())
    require(same, "the placement in force must be left as it is; got another")


def _within(policy: Policy, world: World, max_moves: int) -> None:
    old = world.old()
    plan = _plan(policy, world, old, Budget(max_moves_per_layer=max_moves))
    most = int(moved_slots(old, plan).max())
    require(most <= max_moves, f"a layer must change at most {max_moves} slots; got {most}")
