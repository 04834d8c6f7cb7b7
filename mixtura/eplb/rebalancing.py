"""The public call: loads in, placement out."""

from __future__ import annotations

from mixtura.eplb.loads import AnyLoads, as_loads
from mixtura.eplb.policies import Budget, policy_for
from mixtura.errors import ConfigError
from mixtura.parallel import ModelPlacement, Topology


def rebalance(
    loads: AnyLoads,
    *,
    num_physical_experts: int,
    num_ranks: int,
    num_nodes: int = 1,
    num_expert_groups: int = 1,
    policy: str = "deepseek",
    old: ModelPlacement | None = None,
    max_moves_per_layer: int | None = None,
) -> ModelPlacement:
    """Plan which expert each slot of each layer holds.

    Args:
        loads: (layers, E) what each logical expert has to do, in any unit.
        num_physical_experts: P, slots of a layer over all ranks; the first ranks get the remainder.
        num_ranks: R. num_nodes: on which they lie in order.
        num_expert_groups: G groups of consecutive experts, for hierarchical plans.
        policy: one of `policy_names`.
        old: the placement in force, where there is one.
        max_moves_per_layer: slots of a layer whose expert may change; for incremental policies.

    Returns:
        `.physical_to_logical` (layers, P), `.logical_to_physical` (layers, E, max_replicas) and
        `.replica_count` (layers, E), int32 on the CPU.

    Raises:
        ConfigError: a number is out of range, or the policy cannot plan for it.
        InputError: loads or the old placement do not fit.

    Example:
        >>> plan = rebalance([[8, 4, 2, 2]], num_physical_experts=6, num_ranks=2)
        >>> plan.physical_to_logical.tolist()
        [[1, 0, 3, 0, 0, 2]]
    """
    chosen = policy_for(policy)
    if max_moves_per_layer is not None and not chosen.is_incremental:
        raise ConfigError(
            f"max_moves_per_layer ({max_moves_per_layer}) must be None for policy {policy!r}, "
            f"which plans from scratch; got a limit. Use policy 'local_search'."
        )
    topology = Topology.even(num_physical_experts, num_ranks, num_nodes)
    budget = Budget(max_moves_per_layer, num_expert_groups=num_expert_groups)
    return chosen.plan(as_loads(loads), old, topology, budget)
