"""Loads replayed through policies: what balancing would have done, step by step.

Every `interval` steps a policy plans from the loads since the last plan; quotas go with the plan,
as in `ExpertBalancer`. A plan that lowers the busiest ranks' load by `min_gain` is in force from
the next step on, whose time has the move in it:

    step seconds = even_seconds * sum_l max_r n[l, r] / mean over steps of sum_l n[l] / R
                   + moved_bytes / bytes_per_second

with n the rank loads of that step under the placement and the quotas in force. A step of the mean
load takes `even_seconds / balancedness_of_sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtura.config import EplbConfig
from mixtura.config.choice import require_finite, require_positive
from mixtura.eplb.decision import QUOTA
from mixtura.eplb.loads import Loads
from mixtura.eplb.metrics import mean_and_max, moved_bytes, moved_slots
from mixtura.eplb.policies import POLICIES, Budget, ModelQuota, plan_quota, policy_for, policy_names
from mixtura.errors import ConfigError, InputError
from mixtura.parallel import ModelPlacement, Placement, Topology

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

OFF = "off"
"""The replay without balancing and without redundant slots."""
STATIC = "static"
"""The replay that never plans: the first placement, whose replicas share equally."""
YARDSTICKS = (OFF, STATIC, "random")
"""What is never recommended."""
EVERY_POLICY = (STATIC, QUOTA, *(name for name in POLICIES if name != STATIC))
CLOSE = 0.005
"""Of the time without balancing: replays this near the best count as equals, so that the one that
moves least is recommended."""
EVEN = 0.97
"""Balancedness from which ranks are called even."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What a step and a move cost.

    Attributes:
        even_seconds: of the routed experts of all layers, in a step of mean load whose ranks are
            even.
        bytes_per_slot: of one expert's weights in one layer.
        bytes_per_second: at which the ranks together receive weights.

    Raises:
        ConfigError: a number is not above 0.
    """

    even_seconds: float
    bytes_per_slot: int
    bytes_per_second: float

    def __post_init__(self) -> None:
        require_positive("bytes_per_slot", self.bytes_per_slot)
        for name in ("even_seconds", "bytes_per_second"):
            require_finite(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name} ({getattr(self, name)}) must be above 0; got less. Measure it."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """What is simulated.

    Attributes:
        num_ranks: R. num_nodes: on which they lie in order.
        num_redundant: slots of a layer beyond one for each expert.
        num_expert_groups: G, for hierarchical plans.
        policies: to replay: names of `policy_names`, and `quota`, which moves nothing; by default
            all that are built in.
        costs: of steps and moves.
        eplb: its interval, min_gain and max_moved_fraction; not its policy.

    Raises:
        ConfigError: a number is out of range, or a policy unknown.
    """

    num_ranks: int
    costs: StepCosts
    num_nodes: int = 1
    num_redundant: int = 0
    num_expert_groups: int = 1
    policies: tuple[str, ...] = EVERY_POLICY
    eplb: EplbConfig = field(default_factory=EplbConfig)

    def __post_init__(self) -> None:
        Topology.even(self.num_ranks, self.num_ranks, self.num_nodes)
        require_positive("num_redundant", self.num_redundant, minimum=0)
        require_positive("num_expert_groups", self.num_expert_groups)
        known = dict.fromkeys((*EVERY_POLICY, *policy_names()))
        unknown = [name for name in self.policies if name not in known]
        if unknown or not self.policies:
            raise ConfigError(
                f"policies ({', '.join(unknown) or 'none'}) must be of {', '.join(known)}; "
                f"got another name. Use some of these."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """What became of the loads under one policy.

    Attributes:
        policy: its name, `quota`, `static`, or `off`.
        balancedness: (steps,) the layers' mean.
        seconds: (steps,) predicted, moves included. move_seconds: (steps,) of them.
        moved_slots, moved_bytes: (steps,) in front of each step, all layers and ranks.
        num_plans: made. num_carried_out: of them, those with enough gain.
    """

    policy: str
    balancedness: Floats
    seconds: Floats
    move_seconds: Floats
    moved_slots: Counts
    moved_bytes: Counts
    num_plans: int
    num_carried_out: int


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """The replays of one trace.

    Attributes:
        config: what was simulated.
        num_steps, num_layers, num_experts: of the loads.
        off: without balancing and without redundant slots.
        replays: one for each policy that can plan for these ranks, in the order asked for.
        refusals: why the others cannot, by name.
    """

    config: SimulationConfig
    num_steps: int
    num_layers: int
    num_experts: int
    off: Replay
    replays: tuple[Replay, ...]
    refusals: Mapping[str, str]

    def saving(self, replay: Replay) -> float:
        """The part of the time without balancing that a replay saves, moves included."""
        return float(1 - replay.seconds.sum() / self.off.seconds.sum())

    @property
    def redundant_bytes(self) -> int:
        """Of the redundant slots in all layers, all ranks together."""
        return self.config.num_redundant * self.num_layers * self.config.costs.bytes_per_slot

    @property
    def redundant_bytes_of_a_rank(self) -> int:
        """Of the redundant slots in all layers, on the rank that gets most of them."""
        plain = Topology.even(self.num_experts, self.config.num_ranks)
        more = Topology.even(self.num_experts + self.config.num_redundant, self.config.num_ranks)
        pairs = zip(plain.slots_per_rank, more.slots_per_rank, strict=True)
        most = max(after - before for before, after in pairs)
        return most * self.num_layers * self.config.costs.bytes_per_slot


def loads_of_choices(choices: Sequence[Tensor], num_experts: int, tokens_per_step: int) -> Loads:
    """Cut a trace into steps and count.

    Args:
        choices: for each layer (N, K) ids of experts; ids from `num_experts` on compute nothing.
        tokens_per_step: consecutive tokens of a step; what is left over at the end is not used.

    Returns:
        (steps, layers, E) slots routed to each expert.

    Raises:
        InputError: there is no layer, layers saw different tokens, or there is no whole step.
    """
    require_positive("tokens_per_step", tokens_per_step)
    sizes = sorted({ids.shape[0] for ids in choices})
    if len(sizes) != 1:
        raise InputError(
            f"a trace must have layers that saw as many tokens; got layers of {sizes} tokens. Take "
            f"those of one kind."
        )
    num_steps = sizes[0] // tokens_per_step
    if not num_steps:
        raise InputError(
            f"tokens_per_step ({tokens_per_step}) must be at most the trace's tokens; got "
            f"{sizes[0]} of them. Use smaller steps, or a longer trace."
        )
    loads = np.zeros((num_steps, len(choices), num_experts))
    for layer, ids in enumerate(choices):
        flat = ids[: num_steps * tokens_per_step].reshape(num_steps, -1).long()
        keys = flat + num_experts * torch.arange(num_steps)[:, None]
        counted = torch.bincount(keys[flat < num_experts], minlength=num_steps * num_experts)
        loads[:, layer] = counted.reshape(num_steps, num_experts).numpy()
    return loads


def simulate(loads: Loads, config: SimulationConfig) -> Simulation:
    """Replay loads without balancing, and through each policy from a linear placement on.

    Args:
        loads: (steps, layers, E), slots routed to each expert.

    Raises:
        InputError: loads are not such, there are more ranks than slots, or the steps end before
            the first plan is in force.
    """
    num_experts = _check(loads, config)
    plain = Topology.even(num_experts, config.num_ranks, config.num_nodes)
    slots = num_experts + config.num_redundant
    topology = Topology.even(slots, config.num_ranks, config.num_nodes)
    replays, refusals = [], {}
    for name in dict.fromkeys(config.policies):
        try:
            replays.append(_Replayer(name, loads, topology, config).run())
        except ConfigError as error:
            refusals[name] = str(error)
    return Simulation(
        config=config,
        num_steps=loads.shape[0],
        num_layers=loads.shape[1],
        num_experts=num_experts,
        off=_Replayer(OFF, loads, plain, config).run(),
        replays=tuple(replays),
        refusals=refusals,
    )


def _check(loads: Loads, config: SimulationConfig) -> int:
    """E, where the loads can be simulated."""
    if loads.ndim != 3 or 0 in loads.shape or not (np.isfinite(loads) & (loads >= 0)).all():
        raise InputError(
            f"loads {loads.shape} must be (steps, layers, experts), finite and at least 0; got "
            f"others. Count the slots that were routed to each expert in each step."
        )
    if loads.sum() == 0:
        raise InputError(
            "loads must have something to do; got none in any step. Record the routing again."
        )
    num_experts: int = loads.shape[2]
    slots = num_experts + config.num_redundant
    if config.num_ranks > slots:
        raise InputError(
            f"num_ranks ({config.num_ranks}) must be at most the slots of a layer; got "
            f"{num_experts} experts and {config.num_redundant} redundant slots. Use fewer ranks or "
            f"more slots."
        )
    if len(loads) <= config.eplb.interval:
        raise InputError(
            f"interval ({config.eplb.interval}) must be below the number of steps, for a plan to "
            f"show; got {len(loads)} steps. Use a shorter interval, smaller steps or a longer "
            f"trace."
        )
    return num_experts


Plan = Callable[[Loads, ModelPlacement], tuple[ModelPlacement, ModelQuota]]


class _Replayer:
    """One policy, and what is in force while its replay goes on."""

    def __init__(
        self, name: str, loads: Loads, topology: Topology, config: SimulationConfig
    ) -> None:
        self.name, self.loads, self.config = name, loads, config
        num_steps, num_layers, num_experts = loads.shape
        layer = Placement.linear(num_experts, topology)
        self.placement = ModelPlacement.stack([layer] * num_layers)
        self.quota: ModelQuota | None = None
        self.plan = _planner(name, topology, config)
        self.mean_load = loads.sum((1, 2)).mean() / config.num_ranks
        self.balancedness, self.seconds = np.ones(num_steps), np.zeros(num_steps)
        self.moved_slots = np.zeros(num_steps, np.int64)
        self.moved_bytes = np.zeros(num_steps, np.int64)
        self.num_plans = self.num_carried_out = 0

    def run(self) -> Replay:
        num_steps, interval = len(self.loads), self.config.eplb.interval
        for step in range(num_steps):
            if self.plan is not None and step and step % interval == 0:
                self._change(step, self.plan, self.loads[step - interval : step].sum(0))
            mean, largest = mean_and_max(self.loads[step], self.placement, self.quota)
            even = np.ones_like(mean)
            by_layer = np.divide(mean, largest, where=largest > 0, out=even)
            self.balancedness[step] = by_layer.mean()
            self.seconds[step] = largest.sum() / self.mean_load * self.config.costs.even_seconds
        move_seconds = self.moved_bytes / self.config.costs.bytes_per_second
        return Replay(
            policy=self.name,
            balancedness=self.balancedness,
            seconds=self.seconds + move_seconds,
            move_seconds=move_seconds,
            moved_slots=self.moved_slots,
            moved_bytes=self.moved_bytes,
            num_plans=self.num_plans,
            num_carried_out=self.num_carried_out,
        )

    def _change(self, step: int, plan: Plan, loads: Loads) -> None:
        """Plan in front of a step, and carry the plan out where it gains enough."""
        self.num_plans += 1
        new, quota = plan(loads, self.placement)
        before = mean_and_max(loads, self.placement, self.quota)[1].sum()
        after = mean_and_max(loads, new, quota)[1].sum()
        if before == 0 or 1 - after / before < self.config.eplb.min_gain:
            return
        self.num_carried_out += 1
        self.moved_slots[step] = moved_slots(self.placement, new).sum()
        bytes_per_slot = self.config.costs.bytes_per_slot
        self.moved_bytes[step] = moved_bytes(self.placement, new, bytes_per_slot)
        self.placement, self.quota = new, quota


def _planner(name: str, topology: Topology, config: SimulationConfig) -> Plan | None:
    """How a policy plans as the balancer has it; None for what never does."""
    if name in (OFF, STATIC):
        return None
    if name == QUOTA:
        return lambda loads, old: (old, plan_quota(loads, old))
    policy = policy_for(name)
    limited = Budget.of_fraction(config.eplb.max_moved_fraction, topology)
    budget = replace(limited, num_expert_groups=config.num_expert_groups)

    def plan(loads: Loads, old: ModelPlacement) -> tuple[ModelPlacement, ModelQuota]:
        new = policy.plan(loads, old, topology, budget)
        return new, plan_quota(loads, new)

    return plan


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do about balancing.

    Attributes:
        text: one or two sentences, with the reason.
        policy: to enable; None where none is worth it. `quota` is what the running balancer does
            under policy `static`.
    """

    text: str
    policy: str | None


def recommend(simulation: Simulation, min_gain: float) -> Recommendation:
    """The policy with the least predicted time, or none where it saves less than `min_gain`.

    Of those within half a percent of the best, the one that moves fewest bytes; then the first.
    """
    candidates = [found for found in simulation.replays if found.policy not in YARDSTICKS]
    if not candidates:
        return Recommendation("Do not enable: no policy that balances was simulated.", None)
    most = max(simulation.saving(found) for found in candidates)
    close = [found for found in candidates if simulation.saving(found) >= most - CLOSE]
    best = min(close, key=lambda found: int(found.moved_bytes.sum()))
    saving = simulation.saving(best)
    if saving < min_gain:
        return Recommendation(_why_not(simulation, candidates, best, min_gain), None)
    name = best.policy if best.policy != QUOTA else "quota (policy 'static' of the balancer)"
    text = (
        f"Enable {name}: it {_told(saving)} of the routed experts' time, moves included, and takes "
        f"balancedness from {simulation.off.balancedness.mean():.3f} to "
        f"{best.balancedness.mean():.3f}."
    )
    still = [found for found in simulation.replays if found.policy == STATIC]
    if simulation.config.num_redundant and still:
        alone = _told(simulation.saving(still[0])).replace("s ", " ", 1)
        text += f" Redundant slots that never change {alone}."
    return Recommendation(text, best.policy)


def _told(saving: float) -> str:
    """ "saves 3.1%" or "loses 3.1%"."""
    return f"saves {saving:.1%}" if saving >= 0 else f"loses {-saving:.1%}"


def _why_not(
    simulation: Simulation, candidates: Sequence[Replay], best: Replay, min_gain: float
) -> str:
    """Why the best replay is not worth it."""
    off = simulation.off
    free = min((found.seconds - found.move_seconds).sum() for found in candidates)
    if off.balancedness.mean() >= EVEN:
        why = f"ranks are even as they are (balancedness {off.balancedness.mean():.3f})"
    elif 1 - free / off.seconds.sum() >= min_gain:
        why = "moves take about as long as they save, or longer"
    elif any(found.num_carried_out for found in candidates):
        why = "what plans gain on the loads that they are made of, the steps after do not show"
    else:
        why = "no plan lowers the load of the busiest ranks enough"
    return (
        f"Do not enable: {why}. The best, {best.policy}, {_told(simulation.saving(best))} of the "
        f"routed experts' time; {min_gain:.1%} are asked for."
    )
