"""Policy `random`: what balancing is measured against; loads are not asked."""

from __future__ import annotations

import numpy as np

from mixtura.eplb.loads import Loads
from mixtura.eplb.policies.contract import Budget, Policy, next_placement, require_slots
from mixtura.parallel import ModelPlacement, Topology


def plan_random(
    loads: Loads, old: ModelPlacement | None, topology: Topology, budget: Budget
) -> ModelPlacement:
    """Each expert in a random slot; slots left over take random experts that their rank lacks.

    Drawn from `budget.seed`. A rank with more slots than there are experts leaves the rest empty.

    Raises:
        InputError: fewer slots than experts.
    """
    num_layers, num_experts = loads.shape
    require_slots(num_experts, topology)
    generator = np.random.default_rng(budget.seed)
    usable = [
        slot for rank in range(topology.num_ranks) for slot in topology.slots_of(rank)[:num_experts]
    ]
    slots = generator.permuted(np.tile(usable, (num_layers, 1)), axis=1)
    rank_of_slot = topology.rank_of_slot.numpy()
    ids = np.full((num_layers, topology.num_physical_experts), -1, np.int64)
    holds = np.zeros((num_layers, topology.num_ranks, num_experts), bool)
    rows = np.arange(num_layers)
    for index, slot in enumerate(slots.T):
        rank = rank_of_slot[slot]
        expert = np.full(num_layers, index)
        if index >= num_experts:
            keys = generator.random((num_layers, num_experts))
            expert = np.where(holds[rows, rank], -1.0, keys).argmax(1)
        ids[rows, slot] = expert
        holds[rows, rank, expert] = True
    return next_placement(ids, num_experts, topology, old)


RANDOM = Policy("random", plan_random)
