"""Experts on their way when a rank dies or stalls: the others agree on every layer, and go on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import pytest
import torch
import virtual_ranks
from expert_cases import build_layer, moe_config, rows_of
from rank_processes import Deadly, RankProcesses, Seat
from spread_layers import rank_layer
from tolerances import assert_close

from mixtura.config import DispatcherName, EplbConfig, ParallelConfig, TokensHeld
from mixtura.eplb.balancer import Activity, ExpertBalancer
from mixtura.eplb.migration import Migration, Phase
from mixtura.eplb.records import LayerSlots
from mixtura.eplb.state import EplbLayerState, ExpertLoadLedger
from mixtura.errors import RankLost
from mixtura.layer import FusedMoE
from mixtura.parallel import (
    ExpertParallel,
    ModelPlacement,
    Topology,
    Transport,
    regroup,
)
from mixtura.parallel.shard import shard_weights

EXCHANGE_SECONDS = 2.0
"""How long an exchange waits for a rank that says nothing."""

REGISTER_SECONDS = 1.0
"""How long survivors of a rank that died wait for each other: all of them notice at once."""

SLACK_SECONDS = 8.0
"""What noticing, and a loaded machine, may cost on top."""

SIZE, NUM_LAYERS = 3, 2

NUM_POINTS = 28
"""Calls and awaits of a rank while layers move: 6 forwards, 4 transfers, 4 agreements."""

LAST_AGREEMENTS = 2, 3
"""Those by which a layer is new: the first layer moves in three batches, the second in one."""

OLD = [[0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 0, 1], [0, 3, 1, 4, 1, 4, 2, 5, 2, 5, 0, 3]]
NEW = [[0, 2, 1, 3, 1, 3, 4, 5, 4, 5, 0, 2], [1, 3, 0, 4, 0, 4, 2, 5, 2, 5, 1, 3]]
"""Experts of four slots on each of three ranks, by layer: each expert is on two of the ranks."""


def placement_of(table: list[list[int]]) -> ModelPlacement:
    """A table of slots as a placement over the three ranks."""
    return ModelPlacement(torch.tensor(table, dtype=torch.int32), 6, Topology.even(12, SIZE))


def whole_layers() -> list[FusedMoE]:
    """The layers as one process has them."""
    return [build_layer(moe_config(), kernel="reference", seed=n) for n in range(NUM_LAYERS)]


def layers_of(
    whole: list[FusedMoE], transport: Transport, placement: ModelPlacement
) -> list[FusedMoE]:
    """This rank's part of every layer."""
    parallel = ParallelConfig(
        ep_size=transport.size,
        dispatcher=DispatcherName.ALL_REDUCE,
        tokens=TokensHeld.SHARED,
    )
    return [
        rank_layer(layer, parallel, transport, placement=placement.layer(n))
        for n, layer in enumerate(whole)
    ]


def check(whole: list[FusedMoE], layers: list[FusedMoE]) -> None:
    """Run layers, and compare what they give with the whole layers' answers."""
    rows = rows_of(4)
    for expected, layer in zip(whole, layers, strict=True):
        assert_close(layer(rows), expected(rows), torch.float32)


def migration_of(
    layers: list[FusedMoE], transport: Transport, background: Transport | None = None
) -> Migration:
    """The way of this rank's layers from the old to the new placement, with tables bound."""
    old, new = placement_of(OLD), placement_of(NEW)
    ledger = ExpertLoadLedger(NUM_LAYERS, old.num_experts)
    states = [EplbLayerState.of(ledger, n, old.layer(n)) for n in range(NUM_LAYERS)]
    for layer, state in zip(layers, states, strict=True):
        layer.set_layer_state(state)
    parallel = layers[0].plan.spread.ranks.config
    return Migration(
        ExpertParallel.over(parallel, transport),
        background or transport,
        [LayerSlots(layer.slots()) for layer in layers],
        old,
        new,
        seconds_per_step=1000.0,  # as many slots in each step on any machine
        on_commit=lambda n, placement: states[n].set_placement_(placement),
    )


# ------------------------------------------------------------------------------- what is in doubt


def step_deaf(stepper: Migration | ExpertBalancer, transport: Transport) -> None:
    """A step of which this rank does not hear the others' answers."""
    exchange = transport.exchange

    def deaf(values: Any) -> Any:
        exchange(values)
        raise RankLost("exchange must reach every rank; got a test")

    transport.exchange = deaf  # type: ignore[method-assign]
    with pytest.raises(RankLost):
        stepper.step()
    transport.exchange = exchange  # type: ignore[method-assign]


@pytest.mark.parametrize("is_on_its_way", [False, True])
def test_a_rank_that_is_ahead_has_finished_what_another_is_in_doubt_about(is_on_its_way):
    """Two ranks have committed a layer, and are perhaps on their way with the next one."""
    whole = whole_layers()
    migrations: dict[int, Migration] = {}

    def fall_apart(transport: Transport) -> None:
        layers = layers_of(whole, transport, placement_of(OLD))
        migration = migrations[transport.rank] = migration_of(layers, transport)
        migration._slots_per_step = 100  # a layer is one batch: sent, then committed
        migration.step()
        if transport.rank == 2:
            step_deaf(migration, transport)
            return
        migration.step()
        if is_on_its_way:
            migration._send = lambda *_: None  # type: ignore[method-assign]
            migration.step()

    def resolve(transport: Transport) -> list[list[int]]:
        migration = migrations[transport.rank]
        last = migration.journal[-1]
        if transport.rank == 2:
            assert (last.layer, last.phase) == (0, Phase.VERIFIED)
        else:
            phase = Phase.PREPARED if is_on_its_way else Phase.COMMITTED
            assert (last.layer, last.phase) == (int(is_on_its_way), phase)
        migration.resolve(transport)
        assert migration.is_over
        assert migration.failure == "a rank was lost"
        return migration.placement().physical_to_logical.tolist()

    virtual_ranks.run(SIZE, fall_apart)
    assert virtual_ranks.run(SIZE, resolve) == [[NEW[0], OLD[1]]] * SIZE


def test_nothing_is_in_doubt_once_every_layer_is_there():
    """A rank that is over takes part; the last layer is finished, and nothing has failed."""
    whole = whole_layers()
    migrations: dict[int, Migration] = {}

    def fall_apart(transport: Transport) -> None:
        layers = layers_of(whole, transport, placement_of(OLD))
        migration = migrations[transport.rank] = migration_of(layers, transport)
        migration._slots_per_step = 100
        for _ in range(3):
            migration.step()
        if transport.rank == 2:
            step_deaf(migration, transport)
        else:
            migration.step()

    def resolve(transport: Transport) -> list[list[int]]:
        migration = migrations[transport.rank]
        assert migration.is_over == (transport.rank != 2)
        migration.resolve(transport)
        assert migration.is_over
        assert migration.failure is None
        return migration.placement().physical_to_logical.tolist()

    virtual_ranks.run(SIZE, fall_apart)
    assert virtual_ranks.run(SIZE, resolve) == [NEW] * SIZE


@pytest.mark.parametrize("is_over", [False, True])
def test_balancers_agree_where_experts_are(is_over):
    """Some are done with their migration, which the last has in doubt; or nobody is."""
    whole = whole_layers()
    balancers: dict[int, ExpertBalancer] = {}
    config = EplbConfig(interval=1, max_moved_fraction=1.0, min_gain=0.0, seconds_per_step=1000.0)

    def fall_apart(transport: Transport) -> None:
        layers = layers_of(whole, transport, placement_of(OLD))
        ranks = layers[0].plan.spread.ranks
        balancer = ExpertBalancer(config, ranks, layers, placement_of(OLD))
        balancers[transport.rank] = balancer
        balancer.ledger.counts[:, 1] = 100
        balancer.step()
        balancer._planning._thread.join()
        balancer.step()
        migration = balancer.migration
        migration._slots_per_step = 100
        num_steps = 2 * len(migration._queue) if is_over else 2
        for _ in range(num_steps - 1):
            balancer.step()
        if transport.rank == 2:
            step_deaf(balancer, transport)
        else:
            balancer.step()
            assert (balancer.migration is None) == is_over

    def resolve(transport: Transport) -> list[list[int]]:
        balancer = balancers[transport.rank]
        placement = balancer.resolve(transport)
        assert balancer.activity is Activity.OFF
        assert balancer.report().reason == "a rank was lost"
        for n, layer in enumerate(balancer.layers):
            spread = replace(layer.plan.spread, placement=placement.layer(n))
            expected = shard_weights(whole[n].experts.expert_weights, spread).slots()
            assert all(torch.equal(t, expected[name]) for name, t in layer.slots().items())
            tables = EplbLayerState.of(balancer.ledger, n, placement.layer(n))
            assert torch.equal(tables.slots, balancer.states[n].slots)
        balancer.close()
        return placement.physical_to_logical.tolist()

    virtual_ranks.run(SIZE, fall_apart)
    found = virtual_ranks.run(SIZE, resolve)
    assert found == [found[0]] * SIZE
    assert [row == old for row, old in zip(found[0], OLD, strict=True)] == [False, not is_over]


# ------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Moving:
    """Layers that run while their experts move.

    Attributes:
        points: that this rank has come by, over the group and the one for weights.
    """

    whole: list[FusedMoE]
    layers: list[FusedMoE]
    migration: Migration
    points: list[str]

    @classmethod
    def of(cls, seat: Seat, name: str, kill_at: int | None, number: int) -> Self:
        """Ready on every rank; this one may meet its end at a point."""
        whole = whole_layers()
        points: list[str] = []
        transport = Deadly(seat.transport, kill_at, number, points)
        background = Deadly(seat.transport.another(EXCHANGE_SECONDS), kill_at, number, points)
        layers = layers_of(whole, transport, placement_of(OLD))
        migration = migration_of(layers, transport, background)
        seat.meet(name)
        return cls(whole, layers, migration, points)

    def run(self) -> None:
        """Before every step, a forward of the layer that is under way."""
        while not self.migration.is_over:
            layer = slice(self.migration.layer, self.migration.layer + 1)
            check(self.whole[layer], self.layers[layer])
            self.migration.step()


def count(seat: Seat) -> list[str]:
    """Move all experts without a loss -> the points that this rank has come by."""
    moving = Moving.of(seat, "count", None, 0)
    moving.run()
    points = list(moving.points)
    assert moving.migration.failure is None
    check(moving.whole, moving.layers)
    return points


def lose(
    seat: Seat, *, victim: int, kill_at: int, number: int, seconds: float
) -> list[list[list[int]]]:
    """Lose a rank, regroup, resolve, and go on with the weights that are here.

    Returns what all ranks held before it was dropped, and the slots that are left.
    """
    moving = Moving.of(seat, "lose", kill_at if seat.transport.rank == victim else None, number)
    whole, layers, migration = moving.whole, moving.layers, moving.migration
    with pytest.raises(RankLost):
        moving.run()
        for _ in range(3):
            check(whole, layers)
    found = regroup(seat.store, seat.transport, timeout_seconds=seconds)
    seat.transport = found.transport
    migration.resolve(found.transport)
    placement = migration.placement()
    left = found.placement_of(placement)
    again = []
    for n, layer in enumerate(layers):
        spread = layers_of(whole, found.transport, left)[n].plan.spread
        weights = layer.experts.expert_weights
        rebuilt = FusedMoE(layer.moe_config, weights=weights, spread=spread, kernel="reference")
        rebuilt.load_state_dict(layer.state_dict())
        expected = shard_weights(whole[n].experts.expert_weights, spread).slots()
        assert all(torch.equal(t, expected[name]) for name, t in rebuilt.slots().items())
        again.append(rebuilt)
    check(whole, again)
    return [placement.physical_to_logical.tolist(), left.physical_to_logical.tolist()]


def work(function: Callable[..., Any]) -> str:
    """A function of this module, as `RankProcesses` calls it."""
    return f"test_migration_faults:{function.__name__}"


def lose_one(points: list[str], victim: int, kill_at: int, number: signal.Signals) -> None:
    """One run: a rank dies or stalls at a point, and what becomes of it and the others."""
    others = [rank for rank in range(SIZE) if rank != victim]
    is_killed = number is signal.SIGKILL
    seconds = REGISTER_SECONDS if is_killed else EXCHANGE_SECONDS
    limit = EXCHANGE_SECONDS + seconds + SLACK_SECONDS
    with RankProcesses(SIZE, exchange_seconds=EXCHANGE_SECONDS) as ranks:
        arguments = {"victim": victim, "kill_at": kill_at, "number": int(number)}
        ranks.start(work(lose), seconds=seconds, **arguments)
        found = ranks.results(limit, ranks=others)
        assert all(outcome.is_value for outcome in found), ranks.report(str(found))
        assert found[0].value == found[1].value, f"at point {kill_at}"
        if not is_killed:  # it wakes up, and finds that the others have gone on
            ranks.wait_until_stopped(victim)
            ranks.signal(victim, signal.SIGCONT)
        (lost,) = ranks.results(limit, ranks=[victim])
        if is_killed:
            assert lost.exit_code == -signal.SIGKILL
        else:
            assert lost.error[:1] == ("RankLost",), ranks.report(lost.text)
            assert f"rank {victim} (of 3) must register within" in lost.text
    held, left = found[0].value
    assert left == [row[: 4 * victim] + row[4 * victim + 4 :] for row in held]
    for layer, row in enumerate(held):
        asked, heard = doubt(points, layer)
        may_be = ([OLD[layer]] if kill_at <= heard else []) + (
            [NEW[layer]] if kill_at > asked else []
        )
        assert row in may_be, f"layer {layer} at point {kill_at}"


def doubt(points: list[str], layer: int) -> tuple[int, int]:
    """From which point on a layer may be new, and until which it may be old.

    The victim says that its experts of the layer are there; and it has the others' part in a
    forward after that.
    """
    agreements = [n for n, point in enumerate(points) if point == "all_gather"]
    asked = agreements[LAST_AGREEMENTS[layer]]
    after = [n for n in range(asked, len(points)) if points[n] == "await all_reduce"]
    return asked, min(after, default=len(points))


@pytest.fixture(scope="module")
def points() -> list[list[str]]:
    """By rank, every call and await of a run without a loss."""
    with RankProcesses(SIZE) as ranks:
        found = ranks.run(work(count))
    assert [len(row) for row in found] == [NUM_POINTS] * SIZE
    return found


@pytest.mark.parametrize(
    "victim, what, nth",
    [
        (1, "await swap", 0),  # the first experts are on their way
        (2, "all_reduce", 2),  # a forward, with more on their way
        (0, "all_gather", 2),  # it has all experts of the first layer, and says so to nobody
        (1, "await all_gather", 2),  # it has said so to all, to some or to none
        (2, "swap", 3),  # the first layer is done
    ],
)
def test_a_rank_that_dies_while_experts_move(points, victim, what, nth):
    """The others go on, with layers wholly old or wholly new."""
    kill_at = [n for n, point in enumerate(points[victim]) if point == what][nth]
    lose_one(points[victim], victim, kill_at, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", range(NUM_POINTS))
@pytest.mark.parametrize("victim", range(SIZE))
def test_a_rank_that_dies_at_any_point_while_experts_move(points, victim, kill_at):
    """Every call and every await."""
    lose_one(points[victim], victim, kill_at, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", range(0, NUM_POINTS, 5))
@pytest.mark.parametrize("victim", range(SIZE))
def test_a_rank_that_stalls_while_experts_move(points, victim, kill_at):
    """As if it had died; and when it wakes up, it ends."""
    lose_one(points[victim], victim, kill_at, signal.SIGSTOP)
