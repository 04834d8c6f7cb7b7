"""Balancing while a model runs: replicas, loads, migrations, and what goes wrong with them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import virtual_ranks
from expert_cases import build_layer, moe_config, random_weights, rows_of
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_kernel import NF4, matrices, super_blocks
from test_cpu_permuted import SCHEMES as PERMUTED
from test_dispatch import OWN, SHARED, by_way
from tolerances import assert_close
from torch import Tensor

import mixtura.eplb.state as state_module
from mixtura.config import (
    DispatcherName,
    EplbConfig,
    ExpertsConfig,
    MoEConfig,
    ParallelConfig,
    TokensHeld,
)
from mixtura.eplb.balancer import Activity, ExpertBalancer
from mixtura.eplb.migration import Migration, Phase
from mixtura.eplb.records import LayerSlots, fingerprint
from mixtura.eplb.state import EplbLayerState, ExpertLoadLedger
from mixtura.eplb.transfers import plan_transfers
from mixtura.errors import ConfigError, InputError, MigrationError, NoKernelFits, RankLost
from mixtura.kernels import get_kernel, kernel_names
from mixtura.layer import FusedMoE
from mixtura.parallel import ExpertParallel, ModelPlacement, Placement, Topology, Transport
from mixtura.parallel.ranks import Spread
from mixtura.parallel.shard import shard_weights
from mixtura.quant.formats import WeightFormat
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import ZeroPoint
from mixtura.types import ExpertBatch, ExpertWeights

NUM_EXPERTS = 6


def ids_of(
    num_tokens: int, top_k: int = 2, num_experts: int = NUM_EXPERTS, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        -1, num_experts, (num_tokens, top_k), generator=generator, dtype=torch.int32
    )


@pytest.fixture(params=["extension", "torch"])
def way(request, monkeypatch) -> str:
    """Both ways of choosing replicas."""
    if request.param == "torch":
        monkeypatch.setattr(state_module, "takes_replicas", lambda ids: False)
    return request.param


# ----------------------------------------------------------------------------------------- replicas


@given(
    num_experts=st.integers(1, 9),
    num_redundant=st.integers(0, 9),
    num_ranks=st.integers(1, 4),
    num_tokens=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_a_choice_is_a_replica_and_a_load_is_a_slot(
    num_experts, num_redundant, num_ranks, num_tokens, seed
):
    num_slots = max(num_experts + num_redundant, num_ranks)
    placement = Placement.linear(num_experts, Topology.even(num_slots, num_ranks))
    ledger = ExpertLoadLedger(2, num_experts)
    state = EplbLayerState.of(ledger, 1, placement)
    ids = ids_of(num_tokens, 3, num_experts, seed)
    found = state.to_physical(ids)
    assert found.dtype == torch.int32
    table = torch.cat([placement.physical_to_logical, torch.tensor([-1], dtype=torch.int32)])
    assert torch.equal(table[found.long()], ids)
    assert ledger.counts[0].sum() == 0
    expected = torch.bincount(ids[ids >= 0].long(), minlength=num_experts)
    assert torch.equal(ledger.loads()[1], expected)
    assert int(ledger.counts[1].sum()) == ids.numel()  # loads + bypassed slots = tokens x top-k


@pytest.mark.parametrize("rank", [None, 2])
def test_the_extension_and_torch_choose_alike(rank, monkeypatch):
    placement = Placement.linear(NUM_EXPERTS, Topology.even(11, 4))
    quota = torch.rand(NUM_EXPERTS, placement.max_replicas) + 0.01
    found = []
    for takes in (True, False):
        if not takes:
            monkeypatch.setattr(state_module, "takes_replicas", lambda ids: False)
        ledger = ExpertLoadLedger(3, NUM_EXPERTS)
        state = EplbLayerState.of(ledger, 2, placement, rank=rank, num_ranks=4)
        equal = state.to_physical(ids_of(500))
        state.set_placement_(placement, quota)
        found.append((equal, state.to_physical(ids_of(500, seed=1)), ledger.counts))
    assert all(map(torch.equal, *found))


def test_replicas_share_as_their_quota_says(way):
    topology = Topology.even(5, 5)
    placement = Placement(torch.tensor([1, 0, 1, 0, 0], dtype=torch.int32), 2, topology)
    state = EplbLayerState.of(ExpertLoadLedger(1, 2), 0, placement)
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]])
    state.set_placement_(placement, shares)
    for expert, slots in enumerate(([1, 3, 4], [0, 2, 0])):
        ids = torch.full((1000, 1), expert, dtype=torch.int32)
        counts = torch.bincount(state.to_physical(ids).flatten().long(), minlength=5)
        parts = counts[slots[: 3 - expert]] / 1000
        assert (parts - shares[expert, : 3 - expert]).abs().max() < 0.005


@pytest.mark.parametrize("tokens_per_rank", [1, 2, 5])
@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_ranks_with_few_tokens_do_not_all_take_one_replica(way, num_replicas, tokens_per_rank):
    """32 ranks with a token each are as even as 32 tokens of one rank."""
    num_ranks = 32
    placement = Placement.linear(1, Topology.even(num_replicas, num_replicas))
    counts = torch.zeros(num_replicas)
    for rank in range(num_ranks):
        state = EplbLayerState.of(
            ExpertLoadLedger(1, 1), 0, placement, rank=rank, num_ranks=num_ranks
        )
        ids = torch.zeros((tokens_per_rank, 1), dtype=torch.int32)
        counts += torch.bincount(state.to_physical(ids).flatten().long(), minlength=num_replicas)
    assert counts.min() / counts.max() > 0.75


def test_layers_do_not_choose_alike(way):
    placement = Placement.linear(1, Topology.even(2, 2))
    ledger = ExpertLoadLedger(64, 1)
    ids = torch.zeros((1, 1), dtype=torch.int32)
    first = [
        int(EplbLayerState.of(ledger, layer, placement).to_physical(ids)) for layer in range(64)
    ]
    assert 24 <= sum(first) <= 40


def test_recording_is_a_switch(way):
    placement = Placement.linear(NUM_EXPERTS, Topology.even(8, 2))
    ledger = ExpertLoadLedger(1, NUM_EXPERTS)
    state = EplbLayerState.of(ledger, 0, placement)
    ledger.record(False)
    state.to_physical(ids_of(9))
    assert ledger.counts.sum() == 0
    ledger.record(True)
    state.to_physical(ids_of(9))
    assert ledger.counts.sum() == 18
    ledger.reset()
    assert ledger.counts.sum() == 0


def test_tables_are_compact_and_stay_where_they_are():
    """DeepSeek-V3: 58 layers, 256 experts, 288 slots; 1,024-wide tables would be 122 MB."""
    placement = Placement.linear(256, Topology.even(288, 32))
    ledger = ExpertLoadLedger(58, 256)
    states = [EplbLayerState.of(ledger, layer, placement) for layer in range(58)]
    assert sum(state.num_bytes for state in states) < 400_000
    addresses = states[0].slots.data_ptr(), states[0].ends.data_ptr()
    states[0].set_placement_(Placement.round_robin(256, Topology.even(288, 32)))
    assert (states[0].slots.data_ptr(), states[0].ends.data_ptr()) == addresses


def test_ids_that_are_no_experts_are_an_error():
    placement = Placement.linear(NUM_EXPERTS, Topology.even(8, 2))
    state = EplbLayerState.of(ExpertLoadLedger(1, NUM_EXPERTS), 0, placement)
    with pytest.raises(InputError, match=r"must be in \[-1, 6\)"):
        state.to_physical(torch.tensor([[6]], dtype=torch.int32))


# ------------------------------------------------------------------------------------------ records

SCHEMES = {
    "q4_k": (super_blocks(4, 16, 32, ZeroPoint.MINIMUM), None),
    "nf4": (NF4, None),
    "permuted int4": PERMUTED["int4, zeros"],
    "permuted int3": PERMUTED["int3, global scales"],
}


def weights_of(name: str, num_experts: int = NUM_EXPERTS, seed: int = 0) -> ExpertWeights:
    sizes = ExpertsConfig(
        num_experts=num_experts, hidden_size=32, intermediate_size=32, has_bias=True
    )
    dense = random_weights(sizes, torch.bfloat16 if name == "bf16" else torch.float32, seed)
    if name in ("fp32", "bf16"):
        return dense
    if name in SCHEMES:
        found = matrices(sizes, *SCHEMES[name], seed=seed)
        return dataclasses.replace(
            found, gate_up_bias=dense.gate_up_bias, down_bias=dense.down_bias
        )
    weights = WeightFormat.parse(name)
    return dataclasses.replace(
        dense,
        gate_up_proj=quantize(dense.gate_up_proj.values, weights),
        down_proj=quantize(dense.down_proj.values, weights),
    )


FORMATS = ["fp32", "bf16", "int8-g32", "int4-g32", "mxfp4", "nvfp4", "fp8", "fp8-block", *SCHEMES]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kernel", kernel_names())
def test_an_expert_can_be_copied_to_another_slot_in_every_kernel_and_format(kernel, name):
    """The slot then computes what the expert did, at the same addresses, and is it unpacked."""
    chosen = get_kernel(kernel)
    config = moe_config(hidden_size=32, experts={"intermediate_size": 32, "has_bias": True})
    layer = FusedMoE(config, weights=weights_of(name))
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    problem = layer.experts.problem(dtype, needs_grad=False)
    if (reason := chosen.unsupported(problem)) is not None:
        pytest.skip(reason)
    here = chosen.pack(weights_of(name))
    there = chosen.pack(weights_of(name, seed=1))
    source, target = (LayerSlots(chosen.slots(packed)) for packed in (here, there))
    assert source.layout == target.layout
    addresses = [tensor.data_ptr() for tensor in target.tensors.values()]
    record = source.record(4, expert=17)
    target.check(record, 17)
    target.restore_(1, record)
    assert addresses == [tensor.data_ptr() for tensor in target.tensors.values()]
    rows = rows_of(3, 32).to(dtype)
    ones = torch.ones(3, 1)

    def run(packed: Any, slot: int) -> Tensor:
        ids = torch.full((3, 1), slot, dtype=torch.int32)
        return chosen.run(packed, ExpertBatch(rows, ids, ones))

    with torch.no_grad():
        assert torch.equal(run(there, 1), run(here, 4))
        other = chosen.pack(weights_of(name, seed=1))
        assert torch.equal(run(there, 0), run(other, 0))
    moved, given, stayed = (
        chosen.unpack(packed, config.experts).slots() for packed in (there, here, other)
    )
    for part, tensor in moved.items():
        assert torch.equal(as_bytes(tensor[1]), as_bytes(given[part][4])), part
        for slot in (0, 2, 3, 4, 5):
            assert torch.equal(as_bytes(tensor[slot]), as_bytes(stayed[part][slot])), part


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@given(st.integers(1, 200), st.data())
def test_a_fingerprint_sees_every_changed_bit_and_every_swap(count, data):
    words = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(count))
    first = data.draw(st.integers(0, count - 1))
    changed = words.clone()
    changed[first] ^= 1 << data.draw(st.integers(0, 62))
    assert fingerprint(changed) != fingerprint(words)
    second = data.draw(st.integers(0, count - 1))
    if words[first] != words[second]:
        swapped = words.clone()
        swapped[first], swapped[second] = words[second], words[first]
        assert fingerprint(swapped) != fingerprint(words)


def test_records_that_are_not_what_was_planned_are_refused():
    slots = LayerSlots(weights_of("int4-g32").slots())
    record = slots.record(2, expert=2)
    with pytest.raises(MigrationError, match="must be 3, as planned; got the weights of expert 2"):
        slots.check(record, 3)
    record[-1] ^= 1
    with pytest.raises(MigrationError, match="must arrive as they were sent"):
        slots.check(record, 2)


# ---------------------------------------------------------------------------------------- transfers


def random_placements(seed: int, num_experts: int = 12, num_slots: int = 16, num_ranks: int = 4):
    generator = torch.Generator().manual_seed(seed)
    topology = Topology.even(num_slots, num_ranks, num_nodes=2)
    found = []
    for _ in range(2):
        extra = torch.randint(0, num_experts, (num_slots - num_experts,), generator=generator)
        ids = torch.cat([torch.arange(num_experts), extra])
        ids = ids[torch.randperm(num_slots, generator=generator)]
        found.append(Placement(ids.int(), num_experts, topology))
    return found


@given(st.integers(0, 10_000))
def test_transfers_make_the_new_placement_of_the_old(seed):
    old, new = random_placements(seed)
    transfers = plan_transfers(old, new)
    ids = old.physical_to_logical.clone()
    for slot, expert, source in transfers:
        assert old.physical_to_logical[source] == expert
        ids[slot] = expert
    assert torch.equal(ids, new.physical_to_logical)
    assert len({slot for slot, _, _ in transfers}) == len(transfers)
    assert plan_transfers(old, old) == ()


def test_the_nearest_source_is_taken():
    topology = Topology.even(8, 4, num_nodes=2)
    old = Placement(torch.tensor([0, 1, 0, 2, 0, 3, 4, 5]).int(), 6, topology)
    new = Placement(torch.tensor([1, 0, 0, 2, 4, 3, 0, 5]).int(), 6, topology)
    sources = {slot: source for slot, _, source in plan_transfers(old, new)}
    assert sources == {0: 1, 1: 0, 4: 6, 6: 4}  # of its own rank, and of its own node


# --------------------------------------------------------------------------------------- migrations

REDUNDANT = 4


def balanced(
    transport: Transport,
    whole: FusedMoE,
    held: TokensHeld,
    dispatcher: DispatcherName,
    *,
    ep_size: int = 2,
    tp_size: int = 1,
    placement: Placement | None = None,
    kernel: str = "reference",
    eplb: EplbConfig | None = None,
) -> FusedMoE:
    """This rank's part of a layer with redundant experts."""
    config = whole.moe_config
    parallel = ParallelConfig(
        ep_size=ep_size,
        tp_size=tp_size,
        tokens=held,
        dispatcher=dispatcher,
        num_redundant_experts=REDUNDANT,
        eplb=eplb or EplbConfig(),
    )
    spread = Spread.of(config, ExpertParallel.over(parallel, transport), placement)
    weights = shard_weights(whole.experts.expert_weights, spread)
    layer = FusedMoE(config, weights=weights, spread=spread, kernel=kernel)
    state = {k: v for k, v in whole.state_dict().items() if not k.startswith("experts.")}
    layer.load_state_dict(state)
    return layer


class Moved:
    """One layer of a model that migrates between two placements."""

    def __init__(self, layer: FusedMoE, goal: Placement, seconds: float = 1.0) -> None:
        spread = layer.plan.spread
        assert spread is not None
        self.layer = layer
        rank = spread.ranks.transport.rank
        is_own = spread.ranks.config.tokens is OWN
        self.state = EplbLayerState.of(
            ExpertLoadLedger(1, spread.placement.num_experts),
            0,
            spread.placement,
            rank=rank if is_own else None,
            num_ranks=spread.ranks.transport.size,
        )
        layer.set_layer_state(self.state)
        self.migration = Migration(
            spread.ranks,
            spread.ranks.transport,
            [LayerSlots(layer.slots())],
            ModelPlacement.stack([spread.placement]),
            ModelPlacement.stack([goal]),
            seconds_per_step=seconds,
            on_commit=lambda _, placement: self.state.set_placement_(placement),
        )

    def holds(self, whole: FusedMoE, placement: Placement) -> bool:
        """Whether this rank's slots and tables are those of a placement."""
        spread = self.layer.plan.spread
        there = dataclasses.replace(spread, placement=placement)
        expected = shard_weights(whole.experts.expert_weights, there).slots()
        tables = EplbLayerState.of(ExpertLoadLedger(1, placement.num_experts), 0, placement)
        return all(
            torch.equal(tensor, expected[name]) for name, tensor in self.layer.slots().items()
        ) and torch.equal(tables.slots, self.state.slots)


def two_placements(num_experts: int, ep_size: int, seed: int) -> list[Placement]:
    return random_placements(seed, num_experts, num_experts + REDUNDANT, ep_size)


@pytest.mark.parametrize("ep_size, tp_size", [(2, 1), (3, 1), (2, 2)])
@by_way
def test_a_layer_gives_one_answer_before_during_and_after_a_migration(
    dispatcher, held, ep_size, tp_size
):
    config = moe_config(num_experts=NUM_EXPERTS)
    whole = build_layer(config, kernel="reference")
    old, new = two_placements(NUM_EXPERTS, ep_size, seed=3)
    rows = rows_of(7)
    with torch.no_grad():
        expected = whole(rows)

    def work(transport: Transport) -> int:
        layer = balanced(
            transport, whole, held, dispatcher, ep_size=ep_size, tp_size=tp_size, placement=old
        )
        moved = Moved(layer, new)
        count = 0
        while not moved.migration.is_over:
            assert_close(layer(rows), expected, torch.float32)
            moved.migration.step()
            count += 1
        assert_close(layer(rows), expected, torch.float32)
        if tp_size == 1:
            assert moved.holds(whole, new)
        assert moved.migration.failure is None
        phases = [entry.phase for entry in moved.migration.journal]
        assert phases == [Phase.PREPARED, Phase.VERIFIED, Phase.COMMITTED]
        return count

    counts = virtual_ranks.run(ep_size * tp_size, work)
    assert min(counts) == max(counts) >= 2


@pytest.mark.parametrize("name", ["int4-g32", "bf16"])
@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_packed_experts_move(kernel, name):
    """What the kernel packed is what moves."""
    weights = weights_of(name)
    config = moe_config(hidden_size=32, experts={"intermediate_size": 32, "has_bias": True})
    try:
        whole = FusedMoE(config, weights=weights, kernel=kernel)
        dtype = torch.bfloat16
        whole.experts.decide(whole.experts.problem(dtype, needs_grad=False))
    except NoKernelFits as error:
        pytest.skip(str(error))
    with torch.no_grad():
        whole.gate.weight.copy_(rows_of(NUM_EXPERTS, 32, seed=4))
        rows = rows_of(5, 32).to(dtype)
        expected = whole(rows)
    old, new = two_placements(NUM_EXPERTS, 2, seed=5)

    def work(transport: Transport) -> None:
        layer = balanced(
            transport, whole, SHARED, DispatcherName.ALL_REDUCE, placement=old, kernel=kernel
        )
        moved = Moved(layer, new)
        while not moved.migration.is_over:
            moved.migration.step()
        assert moved.migration.num_moved > 0
        assert_close(layer(rows), expected, dtype)

    virtual_ranks.run(2, work)


def test_weights_that_arrive_changed_leave_every_rank_as_it_was(monkeypatch):
    whole = build_layer(moe_config(num_experts=NUM_EXPERTS), kernel="reference")
    old, new = two_placements(NUM_EXPERTS, 3, seed=3)

    def work(transport: Transport) -> str:
        if transport.rank == 1:
            swap = transport.swap

            def spoiled(sends: Any, receives: Any) -> Any:
                for _, tensor in sends:
                    tensor[-1] ^= 4
                return swap(sends, receives)

            monkeypatch.setattr(transport, "swap", spoiled)
        layer = balanced(
            transport, whole, SHARED, DispatcherName.ALL_REDUCE, ep_size=3, placement=old
        )
        moved = Moved(layer, new)
        while not moved.migration.is_over:
            moved.migration.step()
        assert moved.holds(whole, old)
        assert moved.migration.journal[-1].phase is Phase.ABORTED
        return moved.migration.failure or ""

    reasons = virtual_ranks.run(3, work)
    assert all(reasons)
    assert any("must arrive as they were sent" in reason for reason in reasons)


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_that_dies_in_a_migration_leaves_the_others_of_one_mind(rank):
    """At every exchange: all survivors hold the old layer, or all hold the new one."""
    whole = build_layer(moe_config(num_experts=NUM_EXPERTS), kernel="reference")
    old, new = two_placements(NUM_EXPERTS, 3, seed=3)
    outcomes = set()
    for point in itertools.count():
        lost: dict[int, Moved] = {}

        def work(transport: Transport, lost: dict[int, Moved] = lost) -> None:
            layer = balanced(
                transport, whole, SHARED, DispatcherName.ALL_REDUCE, ep_size=3, placement=old
            )
            moved = lost[transport.rank] = Moved(layer, new)
            while not moved.migration.is_over:
                moved.migration.step()

        try:
            virtual_ranks.run(3, work, kill_at=(rank, point))
        except RankLost:
            pass
        else:
            if len(lost) == 3 and all(moved.migration.failure is None for moved in lost.values()):
                break  # it lived to the end
        survivors = [lost[other] for other in range(3) if other != rank]

        def resolve(transport: Transport, survivors: list[Moved] = survivors) -> bool:
            moved = survivors[transport.rank]
            if not moved.migration.is_over:
                moved.migration.resolve(transport)
            is_old, is_new = moved.holds(whole, old), moved.holds(whole, new)
            assert is_old != is_new
            return is_new

        decided = virtual_ranks.run(2, resolve)
        assert len(set(decided)) == 1, f"at exchange {point}: {decided}"
        outcomes.add(decided[0])
    assert point >= 3
    assert False in outcomes


def test_a_layer_in_doubt_is_finished_where_one_rank_has_finished_it():
    """A rank that heard everybody and one that did not: the second has what it takes."""
    whole = build_layer(moe_config(num_experts=NUM_EXPERTS), kernel="reference")
    old, new = two_placements(NUM_EXPERTS, 2, seed=3)

    def work(transport: Transport) -> None:
        layer = balanced(transport, whole, SHARED, DispatcherName.ALL_REDUCE, placement=old)
        moved = Moved(layer, new)
        moved.migration._slots_per_step = 100  # all at once
        moved.migration.step()
        if transport.rank == 1:
            exchange = transport.exchange

            def deaf(values: Sequence[int]) -> Any:
                exchange(values)
                raise RankLost("exchange must reach every rank; got a test")

            transport.exchange = deaf  # type: ignore[method-assign]
            with pytest.raises(RankLost):
                moved.migration.step()
            transport.exchange = exchange  # type: ignore[method-assign]
            assert moved.holds(whole, old)
        else:
            moved.migration.step()
            assert moved.holds(whole, new)
        moved.migration.resolve(transport)
        assert moved.holds(whole, new)

    virtual_ranks.run(2, work)


# ----------------------------------------------------------------------------------------- balancer


def skewed(config: MoEConfig, hot: int) -> FusedMoE:
    """A layer whose gate likes one expert."""
    whole = build_layer(config, kernel="reference")
    with torch.no_grad():
        whole.gate.weight[hot, 0] = 9.0
    return whole


def run_balanced(
    transport: Transport,
    whole: FusedMoE,
    held: TokensHeld,
    dispatcher: DispatcherName,
    eplb: EplbConfig,
    num_steps: int,
    after: Callable[[ExpertBalancer], Any],
) -> Any:
    layer = balanced(transport, whole, held, dispatcher, ep_size=3, eplb=eplb)
    spread = layer.plan.spread
    balancer = ExpertBalancer(eplb, spread.ranks, [layer], ModelPlacement.stack([spread.placement]))
    rows = rows_of(24, seed=2 + (transport.rank if held is OWN else 0)).abs()
    with torch.no_grad():
        expected = whole(rows)
    for _ in range(num_steps):
        assert_close(layer(rows), expected, torch.float32)
        balancer.step()
        while balancer.activity is Activity.PLANNING:  # forwards take longer than here
            balancer.step()
    found = after(balancer)
    balancer.close()
    assert_close(layer(rows), expected, torch.float32)
    return found


@by_way
def test_a_skewed_layer_is_balanced_while_it_runs(dispatcher, held):
    eplb = EplbConfig(interval=4, max_moved_fraction=0.5)
    whole = skewed(moe_config(num_experts=NUM_EXPERTS), hot=1)
    reports = virtual_ranks.run(
        3,
        lambda transport: run_balanced(
            transport, whole, held, dispatcher, eplb, 24, lambda b: b.report()
        ),
    )
    for report in reports:
        assert report.num_plans >= 2
        assert report.num_refused >= 1  # the last plan found nothing left to gain
        assert report.balancedness_before > 0.9  # half of all slots are one expert's
        assert report.num_moved == reports[0].num_moved > 0
        assert report.num_steps >= 24


def test_a_plan_that_gains_too_little_is_left_alone():
    eplb = EplbConfig(interval=2, min_gain=0.9)
    whole = build_layer(moe_config(num_experts=NUM_EXPERTS), kernel="reference")
    reports = virtual_ranks.run(
        3,
        lambda transport: run_balanced(
            transport, whole, SHARED, DispatcherName.ALL_REDUCE, eplb, 9, lambda b: b.report()
        ),
    )
    for report in reports:
        assert report.num_refused == report.num_plans >= 1
        assert report.num_moved == 0
        assert "nothing is moved" in report.reason


def test_a_policy_that_fails_turns_balancing_off_everywhere(caplog, monkeypatch):
    whole = build_layer(moe_config(num_experts=NUM_EXPERTS), kernel="reference")
    make = ExpertBalancer._make_plan

    def failing(self: ExpertBalancer, loads: Tensor) -> Any:
        if self.ranks.transport.rank == 2:
            raise ValueError("no such plan")
        return make(self, loads)

    monkeypatch.setattr(ExpertBalancer, "_make_plan", failing)
    with caplog.at_level(logging.WARNING, "mixtura.eplb"):
        reports = virtual_ranks.run(
            3,
            lambda transport: run_balanced(
                transport,
                whole,
                SHARED,
                DispatcherName.ALL_REDUCE,
                EplbConfig(interval=2),
                8,
                lambda b: b.report(),
            ),
        )
    for report in reports:
        assert report.activity is Activity.OFF
        assert report.reason == "planning failed: ValueError: no such plan"
    assert "expert load balancing is off" in caplog.text


def test_ranks_with_different_plans_move_nothing(monkeypatch):
    whole = skewed(moe_config(num_experts=NUM_EXPERTS), hot=1)
    make = ExpertBalancer._make_plan
    monkeypatch.setattr(
        ExpertBalancer,
        "_make_plan",
        lambda self, loads: make(self, loads.roll(self.ranks.transport.rank, 1)),
    )
    eplb = EplbConfig(interval=2, max_moved_fraction=0.5, min_gain=0.0)
    reports = virtual_ranks.run(
        3,
        lambda transport: run_balanced(
            transport, whole, SHARED, DispatcherName.ALL_REDUCE, eplb, 8, lambda b: b.report()
        ),
    )
    for report in reports:
        assert (report.activity, report.num_moved) == (Activity.OFF, 0)
        assert "different plans" in report.reason


def test_a_planner_that_stalls_is_given_up(monkeypatch):
    whole = build_layer(moe_config(num_experts=NUM_EXPERTS), kernel="reference")
    never = threading.Event()
    make = ExpertBalancer._make_plan

    def waiting(self: ExpertBalancer, loads: Tensor) -> Any:
        if self.ranks.transport.rank == 1:
            never.wait(20)
        return make(self, loads)

    monkeypatch.setattr(ExpertBalancer, "_make_plan", waiting)
    eplb = EplbConfig(interval=1, stall_seconds=0.2)
    reports = virtual_ranks.run(
        3,
        lambda transport: run_balanced(
            transport, whole, SHARED, DispatcherName.ALL_REDUCE, eplb, 3, lambda b: b.report()
        ),
    )
    never.set()
    for report in reports:
        assert report.activity is Activity.OFF
        assert "planning took more than 0.2 s" in report.reason


def test_a_kernel_that_cannot_move_experts_refuses_balancing(monkeypatch):
    whole = build_layer(moe_config(num_experts=NUM_EXPERTS), kernel="reference")
    monkeypatch.setattr(type(get_kernel("reference")), "slots", lambda self, packed: None)

    def work(transport: Transport) -> None:
        layer = balanced(transport, whole, SHARED, DispatcherName.ALL_REDUCE)
        spread = layer.plan.spread
        ExpertBalancer(
            EplbConfig(), spread.ranks, [layer], ModelPlacement.stack([spread.placement])
        )

    with pytest.raises(ConfigError, match=r"the kernel \(reference\) must be able to move experts"):
        virtual_ranks.run(2, work)


def test_replicas_chosen_by_rank_are_refused_where_results_are_summed():
    """Else an expert's output would be added twice, or not at all, and nobody would know."""
    whole = build_layer(moe_config(num_experts=NUM_EXPERTS), kernel="reference")

    def work(transport: Transport) -> None:
        layer = balanced(transport, whole, SHARED, DispatcherName.ALL_REDUCE)
        placement = layer.plan.spread.placement
        ledger = ExpertLoadLedger(1, NUM_EXPERTS)
        layer.set_layer_state(
            EplbLayerState.of(ledger, 0, placement, rank=transport.rank, num_ranks=2)
        )

    with pytest.raises(ConfigError, match="added twice"):
        virtual_ranks.run(2, work)
