"""Policy `deepseek`: the published algorithm, slot by slot.

Three levels where the nodes divide the expert groups: groups to nodes, replicas within a node,
replicas to the ranks of the node. Otherwise one level over all ranks, as if there were one group
and one node. Two replicas of an expert can come to lie on one rank, as they do in the published
algorithm; the policies `global` and `hierarchical` avoid it.

Source: github.com/deepseek-ai/EPLB.
"""

from __future__ import annotations

import numpy as np

from mixtura.eplb.loads import Loads
from mixtura.eplb.policies.contract import (
    Budget,
    Ids,
    Policy,
    next_placement,
    require_even_slots,
    require_slots,
)
from mixtura.eplb.policies.greedy import pack, replicate
from mixtura.errors import ConfigError
from mixtura.parallel import ModelPlacement, Topology


def plan_deepseek(
    loads: Loads, old: ModelPlacement | None, topology: Topology, budget: Budget
) -> ModelPlacement:
    """The published plan from scratch.

    Raises:
        ConfigError: ranks differ in slots, nodes in ranks, or the groups do not divide the
            experts.
    """
    num_experts = loads.shape[1]
    require_slots(num_experts, topology)
    require_even_slots("policy 'deepseek'", topology)
    num_groups = require_groups(budget, num_experts)
    num_nodes = topology.num_nodes
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    elif topology.num_ranks % num_nodes:
        raise ConfigError(
            f"num_ranks ({topology.num_ranks}) must be divisible by num_nodes ({num_nodes}) for a "
            f"hierarchical plan; got nodes of different size. Use policy 'global'."
        )
    experts = group_to_nodes(loads, num_groups, num_nodes)  # (layers, N, E/N)
    num_layers, _, per_node = experts.shape
    slots_per_node = topology.num_physical_experts // num_nodes
    rows = experts.reshape(-1, per_node)
    node_loads = np.take_along_axis(loads, experts.reshape(num_layers, -1), 1).reshape(rows.shape)
    replicas, count = replicate(node_loads, slots_per_node)
    shares = np.take_along_axis(node_loads / count, replicas, 1)
    rank, place = pack(shares, topology.num_ranks // num_nodes)
    ids = np.empty_like(replicas)
    slots = rank * (topology.num_physical_experts // topology.num_ranks) + place
    np.put_along_axis(ids, slots, np.take_along_axis(rows, replicas, 1), 1)
    return next_placement(ids.reshape(num_layers, -1), num_experts, topology, old)


def group_to_nodes(loads: Loads, num_groups: int, num_nodes: int) -> Ids:
    """(layers, N, E/N) experts of each node: groups stay whole, each node gets as many."""
    num_layers, num_experts = loads.shape
    group_loads = loads.reshape(num_layers, num_groups, -1).sum(2)
    node, place = pack(group_loads, num_nodes)
    groups = np.empty_like(node)
    positions = node * (num_groups // num_nodes) + place
    np.put_along_axis(groups, positions, np.broadcast_to(np.arange(num_groups), node.shape), 1)
    size = num_experts // num_groups
    experts: Ids = groups[:, :, None] * size + np.arange(size)
    return experts.reshape(num_layers, num_nodes, -1)


def require_groups(budget: Budget, num_experts: int) -> int:
    """G, or `ConfigError` where it does not divide the experts."""
    if num_experts % budget.num_expert_groups:
        raise ConfigError(
            f"num_expert_groups ({budget.num_expert_groups}) must divide num_experts; got "
            f"{num_experts} experts. Use the model's number of groups, or 1."
        )
    return budget.num_expert_groups


DEEPSEEK = Policy("deepseek", plan_deepseek)
