"""The balancing of a model: counts loads, plans now and then, moves experts between forwards.

It never ends a run: what goes wrong with a plan or a transfer ends in a line of the log, a state
that can be read, and experts that stay where they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from mixtura.config import EplbConfig, TokensHeld
from mixtura.eplb.metrics import balancedness, predicted_gain
from mixtura.eplb.migration import LOSS, Migration
from mixtura.eplb.policies import Budget, ModelQuota, plan_quota, policy_for
from mixtura.eplb.records import LayerSlots
from mixtura.eplb.state import EplbLayerState, ExpertLoadLedger
from mixtura.errors import ConfigError
from mixtura.parallel import ExpertParallel, ModelPlacement, Placement, Transport

_LOG = logging.getLogger("mixtura.eplb")


class BalancedLayer(Protocol):
    """A layer whose experts can be balanced."""

    def set_layer_state(self, state: EplbLayerState | None) -> None:
        """Bind the layer's view of the model's balancing; None unbinds it."""
        ...

    def slots(self) -> dict[str, Tensor]:
        """The tensors of this rank's experts, (L, ...) each; an error where they cannot move."""
        ...


class Activity(StrEnum):
    """What the balancer is doing."""

    COUNTING = "counting"
    PLANNING = "planning"
    MOVING = "moving"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class BalancerReport:
    """Figures of the balancing so far.

    Attributes:
        activity: what it is doing. reason: why it is off, or what the last plan came to.
        num_steps: forwards since the start. num_plans, num_refused: plans made, and left alone.
        num_moved: slots that got another expert. num_bytes: received by this rank.
        seconds_since_progress: since a plan or a transfer last went on; 0 while counting.
        balancedness_before, balancedness_after: mean over layers, by the loads of the last plan.
    """

    activity: Activity
    reason: str
    num_steps: int
    num_plans: int
    num_refused: int
    num_moved: int
    num_bytes: int
    seconds_since_progress: float
    balancedness_before: float | None
    balancedness_after: float | None


class _Planning:
    """A plan that is being made, in a thread that does not keep the process from ending."""

    def __init__(self, make: Callable[[], _Plan]) -> None:
        self.plan: _Plan | None = None
        self.problem = ""
        self._thread = threading.Thread(
            target=self._run, args=(make,), name="mixtura-eplb", daemon=True
        )
        self._thread.start()

    def _run(self, make: Callable[[], _Plan]) -> None:
        try:
            self.plan = make()
        except Exception as error:  # a policy of anybody's; balancing is not worth the run
            self.problem = f"{type(error).__name__}: {error}"

    @property
    def is_done(self) -> bool:
        """Whether there is a plan, or a problem."""
        return self.plan is not None or bool(self.problem)


@dataclass(frozen=True, eq=False)
class _Plan:
    """A plan that is being weighed."""

    placement: ModelPlacement
    quota: ModelQuota
    gain: float
    before: float
    after: float


class ExpertBalancer:
    """Balances the experts of a model's layers over ranks.

    Args:
        config: when and how.
        ranks: that share the experts.
        layers: of the model, all with as many experts.
        placement: where the experts of every layer are now.
        background: a group of the same ranks for weights alone, with `stall_seconds` for its
            timeout; the main one where there is none.

    Attributes:
        quota: how the experts' replicas share; None is equally.
        ledger: the loads since the last plan.

    Raises:
        ConfigError: a kernel cannot move its experts, the policy is unknown, or ranks would choose
            replicas that their dispatcher cannot have.
    """

    def __init__(
        self,
        config: EplbConfig,
        ranks: ExpertParallel,
        layers: Sequence[BalancedLayer],
        placement: ModelPlacement,
        background: Transport | None = None,
    ) -> None:
        if len(layers) != placement.num_layers:
            raise ConfigError(
                f"a placement of {placement.num_layers} layers must be of the model's; got "
                f"{len(layers)} there. Plan it for this model."
            )
        self.config = config
        self.ranks = ranks
        self.layers = layers
        self._placement = placement
        self._is_own_group = background not in (None, ranks.transport)
        self.background = background if background is not None else ranks.transport
        self.policy = policy_for(config.policy)
        slots = [LayerSlots(layer.slots()) for layer in layers]
        self.ledger = ExpertLoadLedger(placement.num_layers, placement.num_experts, slots[0].device)
        is_own = ranks.config.tokens is TokensHeld.OWN
        self.states = [
            EplbLayerState.of(
                self.ledger,
                index,
                placement.layer(index),
                rank=ranks.transport.rank if is_own else None,
                num_ranks=ranks.transport.size,
            )
            for index in range(placement.num_layers)
        ]
        for layer, state in zip(layers, self.states, strict=True):
            layer.set_layer_state(state)
        self.migration: Migration | None = None
        self._planning: _Planning | None = None
        self._plan: _Plan | None = None
        self.quota: ModelQuota | None = None
        self._reason = "no plan was made yet"
        self._is_on = True
        self._steps = self._since_plan = 0
        self._num_plans = self._num_refused = self._num_moved = self._num_bytes = 0
        self._num_done = 0  # layers, over all migrations
        self._progress = time.monotonic()

    def step(self) -> None:
        """After a forward of the model, on every rank: plan, move, or only count.

        Raises:
            RankLost: a rank is gone, which the next forward would have found too; `resolve`.
        """
        self._steps += 1
        if not self._is_on:
            return
        if self.migration is not None:
            self._move(self.migration)
        elif self._planning is not None:
            self._finish_planning(self._planning)
        else:
            self._since_plan += 1
            if self._since_plan >= self.config.interval:
                self._start_planning()

    def plan_now(self) -> None:
        """Do not wait for the interval to end: the next `step` plans. On every rank alike."""
        self._since_plan = self.config.interval

    @property
    def placement(self) -> ModelPlacement:
        """Where the experts are now."""
        return self._placement if self.migration is None else self.migration.placement()

    def resolve(self, transport: Transport) -> ModelPlacement:
        """After a loss, on every survivor: where the experts are, the same on all; balancing ends.

        What layers hold and their tables are of that placement. Its lost ranks are still in it.

        Args:
            transport: the survivors' new group.

        Raises:
            RankLost: a further rank is lost; the next group resolves again.
        """
        migration = self.migration
        # One rank may be over with a migration, or have begun one, where another is not so far.
        num_done = self._num_done + (0 if migration is None else migration.num_done)
        told = transport.exchange((num_done,))
        if migration is not None:
            migration.end(is_behind=num_done < max(done for (done,) in told))
            self._take_over(migration)
        self._turn_off(LOSS)
        return self.placement

    def close(self) -> None:
        """Stop balancing, on every rank; experts stay where they are, and layers find them there.

        A layer whose experts are under way stays as it was.
        """
        self._turn_off("it was closed", logging.INFO)
        if self.migration is not None:
            self.migration.abandon()
            self._take_over(self.migration)
        if self._is_own_group:
            self.background.close()

    def __deepcopy__(self, memo: object) -> ExpertBalancer:
        raise ConfigError(
            "a model whose experts are balanced must not be copied, as the copy would meet the "
            "same ranks; got a copy of one. Load it twice, or without eplb."
        )

    def _start_planning(self) -> None:
        loads = self.ledger.loads()
        self.ledger.reset()
        self._since_plan = 0
        if self.ranks.config.tokens is TokensHeld.OWN:
            on_device = loads.to(self.ranks.transport.device)
            loads = self.ranks.transport.all_reduce(on_device).wait().cpu()
        self._progress = time.monotonic()
        self._planning = _Planning(lambda: self._make_plan(loads))

    def _make_plan(self, loads: Tensor) -> _Plan:
        old, config = self.placement, self.config
        budget = Budget.of_fraction(config.max_moved_fraction, old.topology)
        new = self.policy.plan(loads.double().numpy(), old, old.topology, budget)
        quota = plan_quota(loads, new)
        return _Plan(
            new,
            quota,
            gain=predicted_gain(loads, old, new, quota, self.quota),
            before=float(balancedness(loads, old, self.quota).mean()),
            after=float(balancedness(loads, new, quota).mean()),
        )

    def _finish_planning(self, planning: _Planning) -> None:
        """Go on when every rank has its plan, and all have the same."""
        plan, is_done = planning.plan, planning.is_done
        digest = "" if plan is None else plan.placement.digest
        is_worth = plan is not None and plan.gain >= self.config.min_gain
        is_stalled = time.monotonic() - self._progress > self.config.stall_seconds
        state = [is_done, planning.problem if is_done else "", digest, is_worth, is_stalled]
        told = self.ranks.transport.exchange_values(state)
        if any(wrong for _, wrong, *_ in told):
            self._turn_off(f"planning failed: {next(wrong for _, wrong, *_ in told if wrong)}")
        elif any(stalled for *_, stalled in told):
            self._turn_off(f"planning took more than {self.config.stall_seconds} s")
        elif all(done for done, *_ in told):
            self._planning = None
            self._num_plans += 1
            if any(other != state for other in told):
                self._turn_off("ranks made different plans of the same loads")
            else:
                assert plan is not None
                self._take_up(plan, is_worth)

    def _take_up(self, plan: _Plan, is_worth: bool) -> None:
        found = (
            f"balancedness {plan.before:.3f}, {plan.after:.3f} planned, a gain of {plan.gain:.1%}"
        )
        self._plan = plan
        if not is_worth:
            self._num_refused += 1
            self._reason = f"{found}: less than {self.config.min_gain:.1%}, nothing is moved"
            return
        self._reason = found
        self.quota = plan.quota
        self.migration = Migration(
            self.ranks,
            self.background,
            [LayerSlots(layer.slots()) for layer in self.layers],
            self.placement,
            plan.placement,
            seconds_per_step=self.config.seconds_per_step,
            on_commit=self._commit,
        )
        self._progress = time.monotonic()
        self._share(plan)

    def _share(self, plan: _Plan) -> None:
        """Let replicas that stay where they are share as planned."""
        for index, state in enumerate(self.states):
            if torch.equal(
                self.placement.physical_to_logical[index],
                plan.placement.physical_to_logical[index],
            ):
                state.set_placement_(self.placement.layer(index), plan.quota.fractions[index])

    def _move(self, migration: Migration) -> None:
        before = len(migration.journal), migration.num_moved
        if not migration.is_over:
            # They lie elsewhere where the model was copied or converted in between.
            migration.set_slots(LayerSlots(self.layers[migration.layer].slots()))
        migration.step()
        if (len(migration.journal), migration.num_moved) != before:
            self._progress = time.monotonic()
        if migration.is_over:
            self._take_over(migration)

    def _take_over(self, migration: Migration) -> None:
        """What a migration that is over has come to."""
        self.migration = None
        self._placement = migration.placement()
        self._num_done += migration.num_done
        self._num_moved += migration.num_moved
        self._num_bytes += migration.num_bytes
        self.ledger.reset()
        self._since_plan = 0
        if migration.failure is not None:
            self._turn_off(migration.failure)

    def _commit(self, layer: int, placement: Placement) -> None:
        assert self._plan is not None
        self.states[layer].set_placement_(placement, self._plan.quota.fractions[layer])

    def _turn_off(self, reason: str, level: int = logging.WARNING) -> None:
        """No more plans; what layers hold and their tables agree, and stay as they are."""
        if self._is_on:
            _LOG.log(level, "expert load balancing is off: %s", reason)
        self._is_on = False
        self._reason = reason
        self._planning = None
        self.ledger.record(False)

    @property
    def is_on(self) -> bool:
        """Whether it counts, plans and moves."""
        return self._is_on

    @property
    def activity(self) -> Activity:
        """What it is doing now."""
        if not self._is_on:
            return Activity.OFF
        if self.migration is not None:
            return Activity.MOVING
        return Activity.PLANNING if self._planning is not None else Activity.COUNTING

    def report(self) -> BalancerReport:
        """The figures so far."""
        is_waiting = self.activity in (Activity.PLANNING, Activity.MOVING)
        return BalancerReport(
            activity=self.activity,
            reason=self._reason,
            num_steps=self._steps,
            num_plans=self._num_plans,
            num_refused=self._num_refused,
            num_moved=self._num_moved,
            num_bytes=self._num_bytes,
            seconds_since_progress=time.monotonic() - self._progress if is_waiting else 0.0,
            balancedness_before=None if self._plan is None else self._plan.before,
            balancedness_after=None if self._plan is None else self._plan.after,
        )
