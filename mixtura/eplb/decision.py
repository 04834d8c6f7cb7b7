"""Whether to rebalance, and how: what a plan saves against what it costs to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixtura.config.choice import require_finite, require_positive
from mixtura.eplb.loads import AnyLoads, Loads, as_loads
from mixtura.eplb.metrics import (
    balancedness,
    moved_bytes,
    moved_slots,
    predicted_gain,
)
from mixtura.eplb.policies import Budget, ModelQuota, plan_quota, policy_for
from mixtura.errors import ConfigError
from mixtura.parallel import ModelPlacement

QUOTA = "quota"
"""The candidate that moves nothing and splits loads over the replicas there are."""


@dataclass(frozen=True, slots=True)
class Economy:
    """What a step and a move cost.

    Attributes:
        routed_seconds: of the routed experts in one step, all layers, as measured now.
        steps_until_stale: steps for which loads are expected to stay as they are.
        bytes_per_slot: of one expert's weights in one layer.
        bytes_per_second: at which the ranks together receive weights beside their work.
        fixed_seconds: what any move costs besides.

    Raises:
        ConfigError: a number is out of range.
    """

    routed_seconds: float
    steps_until_stale: int
    bytes_per_slot: int
    bytes_per_second: float
    fixed_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("routed_seconds", "bytes_per_second", "fixed_seconds"):
            require_finite(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name} ({getattr(self, name)}) must be at least 0; got a negative number. "
                    f"Measure it."
                )
        if self.bytes_per_second == 0:
            raise ConfigError(
                "bytes_per_second (0) must be above 0; got 0. Give the bandwidth of the move."
            )
        require_positive("steps_until_stale", self.steps_until_stale, minimum=0)
        require_positive("bytes_per_slot", self.bytes_per_slot)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """What one policy offers.

    Attributes:
        policy: its name, or `quota`.
        placement: what it plans; the old one where nothing is to move.
        quota: how replicas share; None is equally.
        balancedness: the layers' mean, as predicted from the loads.
        num_moves: slots of all layers that must get another expert.
        gain_seconds: saved until the loads are stale. cost_seconds: of the move.
        refusal: why it may not be taken; empty where it may.
    """

    policy: str
    placement: ModelPlacement
    quota: ModelQuota | None
    balancedness: float
    num_moves: int
    gain_seconds: float
    cost_seconds: float
    refusal: str = ""

    @property
    def net_seconds(self) -> float:
        """Gain less cost."""
        return self.gain_seconds - self.cost_seconds


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What to do about the loads, with the reason.

    Attributes:
        chosen: None where rebalancing does not pay.
        reason: one sentence.
        candidates: everything that was weighed, in the order asked for.
    """

    chosen: Candidate | None
    reason: str
    candidates: tuple[Candidate, ...]


def decide(
    loads: AnyLoads,
    old: ModelPlacement,
    budget: Budget,
    economy: Economy,
    policies: Sequence[str] = (QUOTA, "local_search", "global"),
) -> Decision:
    """The candidate that saves most time net of its move; none where none saves any.

    `gain = routed_seconds * predicted_gain * steps_until_stale`, `cost = moved_bytes /
    bytes_per_second + fixed_seconds` (0 for what moves nothing). Where two save as much, the first
    in `policies` is taken. A plan that needs more moves than the budget allows is refused.

    Args:
        loads: (layers, E), measured under the placement in force.
        old: the placement in force; replicas share equally in it.
        policies: names, and `quota`.

    Raises:
        ConfigError: a name is not known, or a policy cannot plan for this topology.
        InputError: loads and placement differ.
    """
    array = as_loads(loads)
    candidates = []
    for name in policies:
        if name == QUOTA:
            placement, quota = old, plan_quota(array, old)
        else:
            policy = policy_for(name)
            moves = budget.max_moves_per_layer if policy.is_incremental else None
            asked = replace(budget, max_moves_per_layer=moves)
            placement, quota = policy.plan(array, old, old.topology, asked), None
        candidates.append(_weigh(name, array, old, (placement, quota), budget, economy))
    allowed = [found for found in candidates if not found.refusal]
    best = max(allowed, key=lambda found: found.net_seconds, default=None)
    now = float(balancedness(array, old).mean())
    if best is None or best.net_seconds <= 0:
        return Decision(None, _why_not(best, candidates, now), tuple(candidates))
    reason = (
        f"{best.policy} takes balancedness from {now:.3f} to {best.balancedness:.3f} and saves "
        f"{best.gain_seconds:.3g} s; moving {best.num_moves} slots costs {best.cost_seconds:.3g} s."
    )
    return Decision(best, reason, tuple(candidates))


def _weigh(
    name: str,
    loads: Loads,
    old: ModelPlacement,
    plan: tuple[ModelPlacement, ModelQuota | None],
    budget: Budget,
    economy: Economy,
) -> Candidate:
    placement, quota = plan
    moves = moved_slots(old, placement)
    gain = predicted_gain(loads, old, placement, quota)
    cost = 0.0
    if moves.any():
        num_bytes = moved_bytes(old, placement, economy.bytes_per_slot)
        cost = num_bytes / economy.bytes_per_second + economy.fixed_seconds
    limit = budget.max_moves_per_layer
    refusal = ""
    if limit is not None and moves.max() > limit:
        refusal = f"moves {moves.max()} slots of a layer, {limit} are allowed"
    return Candidate(
        policy=name,
        placement=placement,
        quota=quota,
        balancedness=float(balancedness(loads, placement, quota).mean()),
        num_moves=int(moves.sum()),
        gain_seconds=economy.routed_seconds * gain * economy.steps_until_stale,
        cost_seconds=cost,
        refusal=refusal,
    )


def _why_not(best: Candidate | None, candidates: Sequence[Candidate], now: float) -> str:
    if best is None:
        refusals = "; ".join(f"{found.policy} {found.refusal}" for found in candidates)
        return f"Keep the placement, at balancedness {now:.3f}: {refusals or 'nothing was asked'}."
    return (
        f"Keep the placement, at balancedness {now:.3f}: the best, {best.policy}, saves "
        f"{best.gain_seconds:.3g} s and costs {best.cost_seconds:.3g} s."
    )
