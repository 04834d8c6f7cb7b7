"""Policies `global` and `hierarchical`: the greedy steps, with no expert twice on a rank.

Ranks may have any number of slots; `hierarchical` needs nodes that divide the expert groups. A
rank with more slots than there are experts leaves the rest empty. A slot stays where it is if its
rank keeps the expert, so that fewer weights are copied.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mixtura.eplb.loads import Loads
from mixtura.eplb.policies.contract import Budget, Ids, Policy, next_placement, require_slots
from mixtura.eplb.policies.deepseek import group_to_nodes, require_groups
from mixtura.eplb.policies.greedy import pack_distinct, replicate
from mixtura.errors import ConfigError, InputError
from mixtura.parallel import ModelPlacement, Topology


def plan_global(
    loads: Loads, old: ModelPlacement | None, topology: Topology, budget: Budget
) -> ModelPlacement:
    """Replicas by load, then the heaviest replica to the lightest rank, over all ranks.

    Raises:
        InputError: fewer slots than experts.
    """
    num_experts = loads.shape[1]
    require_slots(num_experts, topology)
    ids = place_distinct(loads, np.array(topology.slots_per_rank))
    return next_placement(keep_slots(ids, old, topology), num_experts, topology, old)


def plan_hierarchical(
    loads: Loads, old: ModelPlacement | None, topology: Topology, budget: Budget
) -> ModelPlacement:
    """Expert groups to nodes, each node as many; then `global` within each node.

    Raises:
        ConfigError: the nodes do not divide the groups, or the groups the experts.
        InputError: a node has fewer slots than experts.
    """
    num_layers, num_experts = loads.shape
    require_slots(num_experts, topology)
    num_groups, num_nodes = require_groups(budget, num_experts), topology.num_nodes
    if num_groups % num_nodes:
        raise ConfigError(
            f"num_expert_groups ({num_groups}) must be divisible by num_nodes ({num_nodes}) for "
            f"policy 'hierarchical'; got a remainder of {num_groups % num_nodes}. Use policy "
            f"'global'."
        )
    nodes = np.array(topology.node_of_rank)
    slots_per_rank = np.array(topology.slots_per_rank)
    experts_of_node = group_to_nodes(loads, num_groups, num_nodes)
    ids = np.empty((num_layers, topology.num_physical_experts), np.int64)
    for index, node in enumerate(np.unique(nodes)):
        experts = np.sort(experts_of_node[:, index], 1)
        num_slots = slots_per_rank[nodes == node]
        if num_slots.sum() < experts.shape[1]:
            raise InputError(
                f"slots of node {node} ({num_slots.sum()}) must be at least its share of the "
                f"experts; got {experts.shape[1]}. Use policy 'global'."
            )
        local = place_distinct(np.take_along_axis(loads, experts, 1), num_slots)
        placed = np.take_along_axis(experts, np.maximum(local, 0), 1)
        ids[:, np.repeat(nodes == node, slots_per_rank)] = np.where(local < 0, -1, placed)
    return next_placement(keep_slots(ids, old, topology), num_experts, topology, old)


def place_distinct(loads: Loads, slots_per_rank: Ids) -> Ids:
    """(layers, P) experts of the ranks' slots, -1 where a rank has more slots than experts.

    A layer without load is planned as if its experts had equal ones.
    """
    num_layers, num_experts = loads.shape
    loads = np.where(loads.any(1, keepdims=True), loads, 1.0)
    filled = np.minimum(slots_per_rank, num_experts)
    experts, count = replicate(loads, int(filled.sum()), int((filled > 0).sum()))
    experts = np.sort(experts, 1)
    shares = np.take_along_axis(loads / count, experts, 1)
    placed = pack_distinct(shares, experts, filled)
    replace_duplicates(placed, loads, count, filled)
    is_filled = np.concatenate(
        [np.arange(size) < used for size, used in zip(slots_per_rank, filled, strict=True)]
    )
    ids = np.full((num_layers, len(is_filled)), -1, np.int64)
    ids[:, is_filled] = placed
    return ids


def replace_duplicates(ids: Ids, loads: Loads, count: Ids, slots_per_rank: Ids) -> None:
    """Give a slot whose expert the rank has already to the busiest expert that it lacks.

    Packing leaves such slots only where the last ranks with room all have the last experts.
    Changes `ids` and `count`.
    """
    first = 0
    for num_slots in slots_per_rank:
        held = ids[:, first : first + num_slots]  # a view
        ordered = np.sort(held, 1)
        for layer in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1)):
            for slot in range(1, num_slots):
                if (expert := held[layer, slot]) in held[layer, :slot]:
                    share = loads[layer] / count[layer]
                    share[held[layer]] = -1.0
                    count[layer, expert] -= 1
                    held[layer, slot] = share.argmax()
                    count[layer, held[layer, slot]] += 1
        first += num_slots


def keep_slots(ids: Ids, old: ModelPlacement | None, topology: Topology) -> Ids:
    """The same experts on each rank, in the slots that they have in the old placement.

    What is new on a rank fills the slots that are left, in order.
    """
    if old is None or old.topology.slots_per_rank != topology.slots_per_rank:
        return ids
    before = old.physical_to_logical.numpy()
    kept = np.full_like(ids, -1)
    for first, stop in pairwise(topology.first_slots):
        if first == stop:
            continue
        new, was = ids[:, first:stop], before[:, first:stop]
        is_same = (new[:, :, None] == was[:, None, :]) & (new >= 0)[:, :, None]
        is_kept = is_same.any(2)
        layers, slots = np.nonzero(is_kept)
        places = is_same.argmax(2)[layers, slots]
        rows = kept[:, first:stop]
        is_free = np.ones_like(is_kept)
        is_free[layers, places] = False
        rows[layers, places] = new[layers, slots]
        rows[is_free] = new[~is_kept]
    return kept


GLOBAL = Policy("global", plan_global)
HIERARCHICAL = Policy("hierarchical", plan_hierarchical)
