"""Policy `static`: the placement in force stays; the first one is linear."""

from __future__ import annotations

from mixtura.eplb.loads import Loads
from mixtura.eplb.policies.contract import Budget, Policy, next_placement, require_same
from mixtura.parallel import ModelPlacement, Placement, Topology


def plan_static(
    loads: Loads, old: ModelPlacement | None, topology: Topology, budget: Budget
) -> ModelPlacement:
    """The old placement, or `Placement.linear` for every layer.

    Raises:
        InputError: the old placement is of other slots, or there are fewer slots than experts.
    """
    num_layers, num_experts = loads.shape
    if old is None:
        return ModelPlacement.stack([Placement.linear(num_experts, topology)] * num_layers)
    require_same(old, loads, topology)
    return next_placement(old.physical_to_logical.numpy(), num_experts, topology, old)


STATIC = Policy("static", plan_static, is_incremental=True)
