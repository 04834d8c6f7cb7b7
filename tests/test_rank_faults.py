"""Ranks that die or stall, as processes: every survivor gets the one error in time, and goes on."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from expert_cases import build_layer, moe_config, rows_of
from rank_processes import Deadly, RankProcesses, Seat
from spread_layers import WAYS, rank_layer
from tolerances import assert_close

from mixtura.config import DispatcherName, ParallelConfig, RunnerConfig, TokensHeld
from mixtura.errors import ExpertsLost, ParallelError, RankLost
from mixtura.layer import FusedMoE
from mixtura.parallel import (
    LoneTransport,
    ModelPlacement,
    Placement,
    Regrouped,
    Topology,
    TorchTransport,
    Transport,
    join,
    membership,
    regroup,
)

EXCHANGE_SECONDS = 2.0
"""How long an exchange waits for a rank that says nothing."""

SLACK_SECONDS = 8.0
"""What noticing, and a loaded machine, may cost on top."""

POINTS = (0.0, 0.25, 0.5, 0.75, 0.99)
"""Where in the exchanges and awaits of two layers a rank meets its end."""


def work(name: str) -> str:
    """A function of this module, as `RankProcesses` calls it."""
    return f"test_rank_faults:{name}"


def layer_of(
    transport: Transport, way: list[str], placement: Placement | None = None
) -> tuple[FusedMoE, FusedMoE]:
    """A whole layer, and this rank's part of it."""
    runner = RunnerConfig(overlap_min_tokens=2 if way[2] else None)
    whole = build_layer(moe_config(runner=runner), kernel="reference")
    parallel = ParallelConfig(
        ep_size=transport.size, dispatcher=DispatcherName(way[0]), tokens=TokensHeld(way[1])
    )
    return whole, rank_layer(whole, parallel, transport, placement=placement)


def check_layer(whole: FusedMoE, layer: FusedMoE, rank: int, times: int) -> None:
    """Run a layer some times over, and compare every answer with the whole layer's."""
    held = layer.plan.spread.ranks.config.tokens
    for time in range(times):
        rows = rows_of(4, seed=100 * time + (0 if held is TokensHeld.SHARED else rank))
        assert_close(layer(rows), whole(rows), torch.float32)


def run_layers(
    seat: Seat, *, way: list[str], victim: int, kill_at: int | None, number: int, times: int
) -> int:
    """Run a layer; one rank meets its end at a point -> the points that this one has come by."""
    rank = seat.transport.rank
    transport = Deadly(seat.transport, kill_at if rank == victim else None, number)
    whole, layer = layer_of(transport, way)
    seat.meet(f"layers of {victim}")
    check_layer(whole, layer, rank, times)
    return len(transport.points)


def lose_one(way: list[str], number: signal.Signals, part: float, method: str, size: int) -> None:
    """One run: a rank dies or stalls at a point, and what becomes of it and the others."""
    victim = 1
    others = [rank for rank in range(size) if rank != victim]
    layers = {"way": way, "number": int(number)}
    with RankProcesses(size, exchange_seconds=EXCHANGE_SECONDS, method=method) as ranks:
        points = ranks.run(work("run_layers"), victim=-1, kill_at=None, times=2, **layers)
        kill_at = int(part * points[victim])
        ranks.start(work("run_layers"), victim=victim, kill_at=kill_at, times=3, **layers)
        found = ranks.results(EXCHANGE_SECONDS + SLACK_SECONDS, ranks=others)
        if number is signal.SIGSTOP:
            ranks.wait_until_stopped(victim)
            ranks.signal(victim, signal.SIGCONT)
        found += ranks.results(EXCHANGE_SECONDS + SLACK_SECONDS, ranks=[victim])
        *survivors, lost = found
        for outcome in survivors if number is signal.SIGKILL else found:
            assert outcome.error[:1] == ("RankLost",), ranks.report(outcome.text)
        if number is signal.SIGKILL:
            assert lost.exit_code == -signal.SIGKILL
        codes = ranks.close()
        assert [codes[rank] for rank in others] == [0] * len(others)
        assert all(ranks.log(rank).read_text() == "" for rank in others)


ALL_WAYS = [
    [dispatcher.value, held.value, order]
    for order in ("", "overlapped")
    for dispatcher, held in WAYS
]
SIGNALS = [signal.SIGKILL, signal.SIGSTOP]
TEN = [
    (way, number, POINTS[(2 * nth + shift) % len(POINTS)])
    for shift, number in enumerate(SIGNALS)
    for nth, way in enumerate(ALL_WAYS[shift * 5 : shift * 5 + 5])
]


def name_of(value: Any) -> str:
    return (
        "-".join(filter(None, value))
        if isinstance(value, list)
        else str(getattr(value, "name", value))
    )


@pytest.mark.parametrize("way, number, part", TEN, ids=name_of)
def test_a_rank_that_dies_or_stalls_ends_the_others(way, number, part):
    lose_one(way, number, part, "forkserver", 3)


@pytest.mark.slow
@pytest.mark.parametrize("part", POINTS)
@pytest.mark.parametrize("number", SIGNALS, ids=name_of)
@pytest.mark.parametrize("way", ALL_WAYS, ids=name_of)
def test_a_rank_that_dies_or_stalls_at_any_point(way, number, part):
    lose_one(way, number, part, "forkserver", 3 + ALL_WAYS.index(way) % 2)


def test_processes_end_as_programs_do_after_a_loss():
    """With an interpreter that shuts down, and nothing on its output."""
    lose_one(["all_to_all", "own", "overlapped"], signal.SIGKILL, 0.5, "spawn", 2)


def call_after_a_loss(seat: Seat) -> None:
    """A group that was left stays left."""
    if seat.transport.rank == 1:
        seat.transport.close()
        return
    rows = torch.ones(1)
    with pytest.raises(RankLost, match=r"all_reduce \(rank 0 of 2\) must reach every rank"):
        seat.transport.all_reduce(rows).wait()
    with pytest.raises(RankLost, match=r"must have its group; got one that was left"):
        seat.transport.all_reduce(rows)


def test_a_group_that_was_left_stays_left():
    with RankProcesses(2) as ranks:
        ranks.run(work("call_after_a_loss"))


def join_alone(seat: Seat) -> None:
    """The other rank never comes."""
    if seat.transport.rank == 0:
        with pytest.raises(RankLost, match=r"rank 0 \(of 2\) must meet every rank of generation 5"):
            join(seat.store, 0, 2, generation=5, timeout_seconds=1.0)


def test_a_rank_that_never_comes_is_an_error():
    with RankProcesses(2) as ranks:
        ranks.run(work("join_alone"))


# ------------------------------------------------------------------------------------- collectives


def call_everything(seat: Seat) -> None:
    """Every exchange of the contract, even and uneven, on real ranks, with warnings as errors."""
    group, rank = seat.transport, seat.transport.rank
    counts = [2, 0, 3]
    mine = torch.full((counts[rank], 2), float(rank))
    everyone = torch.cat([torch.full((count, 2), float(r)) for r, count in enumerate(counts)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(group.all_reduce(torch.ones(2) * rank).wait(), torch.full((2,), 3.0))
        assert torch.equal(group.all_gather(mine, counts).wait(), everyone)
        assert group.all_gather(torch.ones(1, 2), [1] * 3).wait().shape == (3, 2)
        assert group.all_gather(mine[:0], [0] * 3).wait().shape == (0, 2)
        assert torch.equal(group.reduce_scatter(everyone, counts).wait(), 3 * mine)
        assert torch.equal(
            group.reduce_scatter(torch.ones(3), [1] * 3).wait(), torch.full((1,), 3.0)
        )
        send = [0, rank, 1]  # rank r sends r rows to rank 1, one to rank 2
        receive = [[0, 0, 0], [0, 1, 2], [1, 1, 1]][rank]
        rows = torch.full((sum(send), 1), rank, dtype=torch.uint8)
        arrived = group.all_to_all(rows, send, receive).wait()
        assert arrived.flatten().tolist() == [r for r, n in enumerate(receive) for _ in range(n)]
        found = torch.zeros(2)
        others = [(rank + 1) % 3, (rank + 2) % 3]
        group.swap([(others[0], torch.full((2,), float(rank)))], [(others[1], found)]).wait()
        assert found.tolist() == [others[1]] * 2
        group.swap([], []).wait()
        assert group.exchange((rank, 7)) == [(0, 7), (1, 7), (2, 7)]
        assert group.exchange_values({"rank": [rank] * rank}) == [
            {"rank": [r] * r} for r in range(3)
        ]


def test_every_exchange_on_real_ranks_without_a_warning():
    """torch renames its collectives; whichever version is here must not say so."""
    with RankProcesses(3) as ranks:
        ranks.run(work("call_everything"))


# -------------------------------------------------------------------------------------- membership

COVERED = Placement.linear(6, Topology.even(12, 3))
"""Six experts, each on two of three ranks."""


def troubled_join(trouble: str) -> Callable[..., TorchTransport]:
    """What rank 3 does instead of joining, the first time."""

    def instead(*arguments: Any, **named: Any) -> TorchTransport:
        membership.join = join
        if trouble == "dies before it joins":
            os.kill(os.getpid(), signal.SIGKILL)
        transport = join(*arguments, **named)
        if trouble == "dies when it has joined":
            os.kill(os.getpid(), signal.SIGKILL)
        raise transport.lost("join", RuntimeError("this rank alone had no success"))

    return instead


def go_on(
    seat: Seat, *, way: list[str], number: int, seconds: float, trouble: str = ""
) -> dict[str, Any]:
    """Lose a rank in a layer, regroup, and run the layer again with the weights that are here."""
    victim = 1
    rank, size = seat.transport.rank, seat.transport.size
    placement = COVERED if size == 3 else Placement.linear(6, Topology.even(6 * size, size))
    transport = Deadly(seat.transport, 3 if rank == victim else None, number)
    whole, layer = layer_of(transport, way, placement)
    seat.meet("the layer")
    with pytest.raises(RankLost):
        check_layer(whole, layer, rank, 3)
    if trouble and rank == 3:
        membership.join = troubled_join(trouble)
    found = regroup(seat.store, seat.transport, timeout_seconds=seconds)
    seat.transport = found.transport
    left = found.placement_of(placement)
    whole, again = layer_of(found.transport, way, left)
    held = layer.experts.expert_weights
    again = FusedMoE(layer.moe_config, weights=held, spread=again.plan.spread, kernel="reference")
    again.load_state_dict(layer.state_dict())
    check_layer(whole, again, found.transport.rank, 3)
    return {
        "survivors": list(found.survivors),
        "rank": found.transport.rank,
        "generation": [found.transport.generation, left.topology.generation],
        "slots": left.physical_to_logical.tolist(),
    }


@pytest.mark.parametrize(
    "way, number",
    [(ALL_WAYS[0], signal.SIGKILL), (ALL_WAYS[4], signal.SIGSTOP)],
    ids=name_of,
)
def test_survivors_go_on_with_the_weights_that_they_have(way, number):
    with RankProcesses(3, exchange_seconds=EXCHANGE_SECONDS) as ranks:
        ranks.start(
            work("go_on"),
            way=way,
            number=int(number),
            seconds=EXCHANGE_SECONDS,
        )
        found = ranks.results(3 * EXCHANGE_SECONDS + SLACK_SECONDS, ranks=[0, 2])
        assert all(outcome.is_value for outcome in found), ranks.report(str(found))
        slots = [
            *COVERED.physical_to_logical[:4].tolist(),
            *COVERED.physical_to_logical[8:].tolist(),
        ]
        for rank, outcome in enumerate(found):
            assert outcome.value == {
                "survivors": [0, 2],
                "rank": rank,
                "generation": [1, 1],
                "slots": slots,
            }
        if number is signal.SIGSTOP:  # it wakes up, and finds that the others have gone on
            ranks.signal(1, signal.SIGCONT)
            (late,) = ranks.results(2 * EXCHANGE_SECONDS + SLACK_SECONDS, ranks=[1])
            assert late.error[:1] == ("RankLost",)
            assert "rank 1 (of 3) must register within 2.0 s" in late.text


@pytest.mark.parametrize(
    "trouble, left",
    [
        ("dies before it joins", [0, 2]),
        ("dies when it has joined", [0, 2]),
        ("has no success", [0, 2, 3]),
    ],
)
def test_trouble_while_the_others_regroup(trouble, left):
    """All agree on that too, and try again under the next number."""
    with RankProcesses(4, exchange_seconds=EXCHANGE_SECONDS) as ranks:
        ranks.start(
            work("go_on"),
            way=["all_to_all", "own", ""],
            number=int(signal.SIGKILL),
            seconds=EXCHANGE_SECONDS,
            trouble=trouble,
        )
        found = ranks.results(6 * EXCHANGE_SECONDS + SLACK_SECONDS, ranks=left)
        assert all(outcome.is_value for outcome in found), ranks.report(str(found))
        assert [outcome.value["survivors"] for outcome in found] == [left] * len(left)
        assert [outcome.value["generation"] for outcome in found] == [[2, 2]] * len(left)


def regroup_without_cover(seat: Seat) -> None:
    """Ranks 0 and 2 of 3, where rank 1 had experts that nobody else has."""
    if seat.transport.rank == 1:
        return
    placement = Placement.linear(6, Topology.even(6, 3))
    found = regroup(seat.store, seat.transport, timeout_seconds=1.0)
    seat.transport = found.transport
    with pytest.raises(ExpertsLost, match=r"got none for expert 2, 3 without the ranks \[1\]"):
        found.placement_of(placement)


def test_experts_that_nobody_holds_are_named():
    with RankProcesses(3) as ranks:
        ranks.run(work("regroup_without_cover"))


def regroup_without_a_loss(seat: Seat) -> list[int]:
    """All come, so that nobody waits for the time to be over."""
    found = regroup(seat.store, seat.transport, timeout_seconds=30.0)
    seat.transport = found.transport
    return list(found.survivors)


def test_a_false_alarm_costs_no_time():
    with RankProcesses(3) as ranks:
        assert ranks.run(work("regroup_without_a_loss"), seconds=15.0) == [[0, 1, 2]] * 3
        ranks.run(work("call_everything"))


def test_a_store_that_is_gone_is_an_error():
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = torch.distributed.TCPStore(
        "127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=1)
    )
    del server
    with pytest.raises(ParallelError, match=r"the store \(for rank 0 of 1\) must answer"):
        regroup(client, LoneTransport(), timeout_seconds=1.0)


@pytest.mark.parametrize("layers", [0, 2])
def test_what_is_left_of_a_placement(layers):
    topology = Topology((3, 0, 2, 2), (0, 0, 1, 2))
    placement = Placement(torch.tensor([0, 1, 2, 2, 3, 3, 0], dtype=torch.int32), 4, topology, 7)
    whole = ModelPlacement.stack([placement] * layers, 7) if layers else placement
    left = membership.without_lost(whole, [0, 1, 3], generation=5)
    assert left.physical_to_logical.tolist() == (
        [[0, 1, 2, 3, 0]] * layers if layers else [0, 1, 2, 3, 0]
    )
    assert left.topology == Topology((3, 0, 2), (0, 0, 2), 5)
    assert (left.num_experts, left.version) == (4, 8)


def test_a_rank_of_a_placement_is_left_with_all_cuts_of_its_experts():
    placement = Placement.linear(6, Topology.even(12, 3))
    found = Regrouped(LoneTransport(), survivors=(0, 1, 4, 5), tp_size=2)
    left = found.placement_of(placement)
    assert left.physical_to_logical.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert left.topology.num_ranks == 2


def test_missing_experts_are_named_by_layer():
    topology = Topology.even(4, 2)
    first = Placement(torch.tensor([0, 1, 0, 1], dtype=torch.int32), 2, topology)
    second = Placement(torch.tensor([0, 0, 1, 1], dtype=torch.int32), 2, topology)
    whole = ModelPlacement.stack([first, second, second])
    with pytest.raises(ExpertsLost, match=r"expert 1 of layer 1; 1 of layer 2 without the ranks"):
        membership.without_lost(whole, [0], generation=1)
