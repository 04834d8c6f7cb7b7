"""Dispatchers on ranks that are threads: every mode gives the layer's one answer."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from typing import Any

import pytest
import torch
import virtual_ranks
from expert_cases import build_layer, moe_config, random_weights, rows_of
from hypothesis import given
from hypothesis import strategies as st
from spread_layers import WAYS, rank_layer
from test_cpu_kernel import matrices, super_blocks
from tolerances import assert_close, frobenius_error
from torch import Tensor

import mixtura.dispatch.choice as choice_module
from mixtura.config import (
    DispatcherName,
    ExpertsConfig,
    GateUp,
    MoEConfig,
    NoComputeExperts,
    NoComputeKind,
    ParallelConfig,
    PlacementStrategy,
    PostNorm,
    RunnerConfig,
    ScaleOn,
    SharedExpertsConfig,
    TokensHeld,
    WireFormat,
)
from mixtura.dispatch import AllToAllDispatcher, choose_dispatcher, expected_ranks
from mixtura.dispatch.all_to_all import Journey, _add
from mixtura.dispatch.deep_ep import DeepEpDispatcher
from mixtura.dispatch.wire import Wire
from mixtura.errors import (
    ConfigError,
    GradientUnsupported,
    MissingDependency,
    ParallelError,
    RankLost,
)
from mixtura.experts import SharedExperts
from mixtura.layer import FusedMoE
from mixtura.parallel import ExpertParallel, SlotTables, Topology, Transport
from mixtura.parallel.ranks import Spread
from mixtura.parallel.shard import cut_weights
from mixtura.quant.cuts import cut_rows, take_experts
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import ZeroPoint
from mixtura.types import ExpertBatch, ExpertWeights

SHARED_EXPERTS = SharedExpertsConfig(intermediate_size=8)
OVERLAP = RunnerConfig(overlap_min_tokens=2)
BOTH = RunnerConfig(max_rows_per_pass=2, overlap_min_tokens=2)
OWN, SHARED = TokensHeld.OWN, TokensHeld.SHARED
by_way = pytest.mark.parametrize("dispatcher, held", WAYS, ids=[f"{d}-{h}" for d, h in WAYS])


def config_of(num_experts: int = 6, **changes: Any) -> MoEConfig:
    return moe_config(num_experts=num_experts, **changes)


def spread_out(config: MoEConfig, parallel: ParallelConfig, counts: list[int]) -> None:
    """Run a layer on ranks with so many tokens each, and compare with one rank."""
    whole = build_layer(config, kernel="reference")
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(n, config.hidden_size, generator=generator) for n in counts]
    if parallel.tokens is SHARED:
        rows = [rows[0]] * len(counts)
    with torch.no_grad():
        expected = [whole(part) for part in rows]

    def work(transport: Transport) -> Tensor:
        layer = rank_layer(whole, parallel, transport)
        out = layer(rows[transport.rank])
        assert isinstance(out, Tensor)
        return out

    results = virtual_ranks.run(parallel.num_ranks, work)
    for actual, truth in zip(results, expected, strict=True):
        if config.deterministic:
            assert torch.equal(actual, truth)
        else:
            assert_close(actual, truth, torch.float32)


@pytest.mark.parametrize("counts", [[5, 0, 3], [1, 1, 1], [0, 0, 0], [0, 0, 17]])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@by_way
def test_ranks_agree_with_one(dispatcher, held, counts, deterministic):
    config = config_of(top_k=4, deterministic=deterministic, shared=SHARED_EXPERTS)
    parallel = ParallelConfig(ep_size=3, tokens=held, dispatcher=dispatcher)
    spread_out(config, parallel, counts)


@pytest.mark.parametrize("kind", list(NoComputeKind))
@by_way
def test_experts_without_arithmetic_stay_at_home(dispatcher, held, kind):
    config = config_of(routing={"no_compute": NoComputeExperts(kind=kind, count=3)}, top_k=3)
    spread_out(config, ParallelConfig(ep_size=2, tokens=held, dispatcher=dispatcher), [7, 2])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"has_sigmoid_gate": True},
        {"has_bias": True},
        {"is_gated": False, "has_bias": True},
        {"intermediate_size": 2},
    ],
)
def test_each_rank_runs_a_part_of_the_shared_experts(changes, monkeypatch):
    """Of all widths, also of those with less than a column for each rank."""
    seen: list[tuple[int, int]] = []
    run_part = SharedExperts.run_part

    def noted(self: SharedExperts, rows: Tensor, gate: Any, part: int, parts: int) -> Tensor:
        seen.append((part, parts))
        return run_part(self, rows, gate, part, parts)

    monkeypatch.setattr(SharedExperts, "run_part", noted)
    shared = dataclasses.replace(SHARED_EXPERTS, **changes)
    spread_out(config_of(shared=shared), ParallelConfig(ep_size=3), [5, 5, 5])
    assert sorted(seen) == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    "changes",
    [
        {"deterministic": True},
        {"routing": {"scale": 2.0, "scale_on": ScaleOn.OUTPUT}},
        {"has_latent": True, "experts": {"hidden_size": 12}},
    ],
)
def test_shared_experts_are_whole_where_a_part_cannot_be_summed(changes, monkeypatch):
    monkeypatch.setattr(SharedExperts, "run_part", None)
    config = config_of(shared=SHARED_EXPERTS, **changes)
    spread_out(config, ParallelConfig(ep_size=2), [5, 5])


@pytest.mark.parametrize("placement", list(PlacementStrategy))
@pytest.mark.parametrize("ep_size, num_experts", [(1, 6), (2, 7), (4, 6), (5, 16)])
@by_way
def test_any_number_of_experts_over_any_number_of_ranks(
    dispatcher, held, ep_size, num_experts, placement
):
    parallel = ParallelConfig(
        ep_size=ep_size, tokens=held, dispatcher=dispatcher, placement=placement
    )
    spread_out(config_of(num_experts), parallel, [3, 0, 4, 1, 2][:ep_size])


@pytest.mark.parametrize("experts", [{}, {"gate_up": GateUp.INTERLEAVED, "has_bias": True}])
@pytest.mark.parametrize("ep_size, tp_size", [(1, 2), (2, 2), (1, 3), (3, 2)])
@by_way
def test_a_grid_of_experts_and_cuts(dispatcher, held, ep_size, tp_size, experts):
    parallel = ParallelConfig(ep_size=ep_size, tp_size=tp_size, tokens=held, dispatcher=dispatcher)
    counts = [3, 0, 4, 1, 2, 5][: ep_size * tp_size]
    spread_out(config_of(experts=experts, shared=SHARED_EXPERTS), parallel, counts)


@pytest.mark.parametrize("runner", [RunnerConfig(max_rows_per_pass=2), OVERLAP, BOTH])
@pytest.mark.parametrize("counts", [[5, 1, 9], [4, 4, 4], [0, 0, 6], [0, 0, 0]])
@by_way
def test_runners_of_ranks_with_different_numbers_of_tokens(dispatcher, held, counts, runner):
    """Ranks meet in every chunk, whether they have tokens for it or not."""
    config = config_of(runner=runner, deterministic=True, shared=SHARED_EXPERTS)
    spread_out(config, ParallelConfig(ep_size=3, tokens=held, dispatcher=dispatcher), counts)


@pytest.mark.parametrize("counts", [[6, 5], [2, 3]])
@by_way
def test_overlap_is_bitwise_the_same_batches_one_after_the_other(dispatcher, held, counts):
    def outputs(runner: RunnerConfig) -> list[Tensor]:
        config = config_of(runner=runner)
        whole = build_layer(config, kernel="reference")
        parallel = ParallelConfig(ep_size=2, tokens=held, dispatcher=dispatcher)
        return virtual_ranks.run(
            2,
            lambda transport: rank_layer(whole, parallel, transport)(
                rows_of(counts[0 if held is SHARED else transport.rank])
            ),
        )

    in_turn = outputs(RunnerConfig(overlap_min_tokens=2))
    one_by_one = outputs(RunnerConfig(max_rows_per_pass=-(-max(counts) // 2)))
    assert all(map(torch.equal, in_turn, one_by_one))


@pytest.mark.parametrize("wire, bound", [(WireFormat.INT8, 2.5e-2), (WireFormat.FP8, 9e-2)])
@pytest.mark.parametrize("hidden_size", [8, 130])
@pytest.mark.parametrize("dispatcher", [DispatcherName.ALL_GATHER, DispatcherName.ALL_TO_ALL])
def test_rows_of_eight_bits_on_the_wire(dispatcher, hidden_size, wire, bound):
    config = config_of(hidden_size=hidden_size)
    whole = build_layer(config, kernel="reference")
    parallel = ParallelConfig(ep_size=2, tokens=OWN, dispatcher=dispatcher, wire=wire)
    rows = [rows_of(9, hidden_size, seed) for seed in range(2)]
    results = virtual_ranks.run(
        2,
        lambda transport: rank_layer(whole, parallel, transport)(rows[transport.rank]),
    )
    for actual, part in zip(results, rows, strict=True):
        with torch.no_grad():
            error = frobenius_error(actual, whole(part))
        assert 0 < error < bound


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    wire=st.sampled_from(list(WireFormat)),
    hidden_size=st.integers(1, 300),
    top_k=st.integers(1, 9),
    num_rows=st.integers(0, 5),
)
def test_a_record_is_read_as_it_was_written(dtype, wire, hidden_size, top_k, num_rows):
    generator = torch.Generator().manual_seed(hidden_size)
    rows = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    ids = torch.randint(-1, 99, (num_rows, top_k), generator=generator, dtype=torch.int32)
    weights = torch.rand(num_rows, top_k, generator=generator)
    layout = Wire(wire, dtype, hidden_size, top_k)
    records = layout.write(rows, ids, weights)
    assert records.shape == (num_rows, layout.row_bytes)
    found = layout.read(records)
    assert torch.equal(found.local_ids, ids)
    assert torch.equal(found.topk_weights, weights)
    assert found.hidden_states.dtype == dtype
    if wire is WireFormat.MODEL:
        assert torch.equal(found.hidden_states, rows)
    elif num_rows:
        largest = rows.float().abs().max()
        step = largest / (127 if wire is WireFormat.INT8 else 2 * 448 / 64)
        assert (found.hidden_states.float() - rows.float()).abs().max() <= step


@by_way
def test_all_tokens_to_one_rank(dispatcher, held):
    """A gate that likes two experts, both of one rank."""
    config = config_of()
    whole = build_layer(config, kernel="reference")
    with torch.no_grad():
        whole.gate.weight.zero_()
        whole.gate.weight[4:6, 0] = 1.0
    rows = rows_of(6).abs()
    parallel = ParallelConfig(ep_size=3, tokens=held, dispatcher=dispatcher)
    results = virtual_ranks.run(3, lambda transport: rank_layer(whole, parallel, transport)(rows))
    with torch.no_grad():
        assert_close(results[1], whole(rows), torch.float32)


def test_sums_that_come_home_are_rounded_to_even():
    """1 + 2^-8 is halfway between 1 and the next bf16."""
    rows = torch.tensor([[1.0], [-1.0], [2.0**-8], [-(2.0**-8)], [3.0]]).to(torch.bfloat16)
    first = torch.tensor([0, 2, 2, 4])  # the second token went nowhere
    journey = Journey((5,), (5,), torch.tensor([0, 2, 1, 3, 4]), first, torch.bfloat16)
    assert _add(rows, journey).flatten().tolist() == [1.0, 0.0, -1.0, 3.0]
    nowhere = Journey((0,), (0,), first[:0], first[:0], torch.bfloat16)
    assert _add(rows[:0], nowhere).shape == (0, 1)


def test_what_is_exchanged():
    """One exchange of counts a layer in all_to_all, one a forward in all_gather, none else."""

    def calls(dispatcher: DispatcherName, held: TokensHeld) -> list[str]:
        config = config_of()
        whole = build_layer(config, kernel="reference")
        parallel = ParallelConfig(ep_size=2, tokens=held, dispatcher=dispatcher)

        def work(transport: virtual_ranks.ThreadTransport) -> list[str]:
            layer = rank_layer(whole, parallel, transport)
            clock = layer.plan.spread.ranks.clock
            with clock.step(4):
                layer(rows_of(4))
                layer(rows_of(4))
            return transport.world.calls[transport.rank]

        return virtual_ranks.run(2, work)[0]

    assert calls(DispatcherName.ALL_REDUCE, SHARED) == ["all_reduce"] * 2
    layer = ["all_gather", "reduce_scatter"]
    assert calls(DispatcherName.ALL_GATHER, OWN) == ["all_gather", *layer, *layer]
    layer = ["all_to_all"] * 3
    own = calls(DispatcherName.ALL_TO_ALL, OWN)
    assert own == ["all_gather", *layer, *layer]  # the first is the step's, which was begun


@by_way
def test_a_rank_knows_what_part_of_the_slots_to_expect(dispatcher, held):
    whole = build_layer(config_of(top_k=2), kernel="reference")
    parallel = ParallelConfig(ep_size=2, tokens=held, dispatcher=dispatcher)
    seen = []

    def work(transport: virtual_ranks.ThreadTransport) -> None:
        layer = rank_layer(whole, parallel, transport)
        run_batch = layer.experts.run_batch

        def seeing(batch: ExpertBatch, *, reduce: bool = True) -> Tensor:
            seen.append(batch.expected_share)
            return run_batch(batch, reduce=reduce)

        layer.experts.run_batch = seeing
        with torch.no_grad(), layer.plan.spread.ranks.clock.step(4):
            layer(rows_of(4))

    virtual_ranks.run(2, work)
    # A row that was sent has one slot here, and the other on either rank: 1/2 of 2 / (1 - 1/4).
    expected = 2 / 3 if dispatcher is DispatcherName.ALL_TO_ALL else 1 / 2
    assert seen == pytest.approx([expected] * 2)


def test_a_rank_in_another_dispatch_is_an_error():
    config = config_of()
    whole = build_layer(config, kernel="reference")
    parallel = ParallelConfig(ep_size=2, tokens=OWN, dispatcher=DispatcherName.ALL_TO_ALL)

    def work(transport: Transport) -> None:
        layer = rank_layer(whole, parallel, transport)
        for _ in range(transport.rank):
            transport.next_number()  # as if another layer had been run
        layer(rows_of(3))

    with pytest.raises(ParallelError, match="must be in the same dispatch"):
        virtual_ranks.run(2, work)


def test_a_layer_with_other_tokens_than_the_forward_is_an_error():
    ranks = ExpertParallel.over(ParallelConfig())
    with (
        ranks.clock.step(4),
        pytest.raises(ParallelError, match=r"the layer's tokens \(5\) must be as many"),
    ):
        ranks.clock.current(5)


def test_ranks_in_different_forwards_are_an_error():
    def work(transport: Transport) -> None:
        ranks = ExpertParallel.over(ParallelConfig(ep_size=2, tokens=OWN), transport)
        ranks.clock._number = transport.rank
        ranks.clock.current(1)

    with pytest.raises(ParallelError, match="every rank must be in forward"):
        virtual_ranks.run(2, work)


def test_gradients_do_not_cross_ranks():
    config = config_of()
    whole = build_layer(config, kernel="reference")

    def work(transport: Transport) -> None:
        layer = rank_layer(whole, ParallelConfig(ep_size=2), transport)
        with torch.enable_grad():
            layer(rows_of(2).requires_grad_())

    with pytest.raises(GradientUnsupported, match="rows that cross ranks"):
        virtual_ranks.run(2, work)


@pytest.mark.parametrize("rank", range(3))
@by_way
def test_a_rank_that_dies_ends_the_others_at_every_point(dispatcher, held, rank):
    """Whichever exchange it dies before, the survivors get the one error, and none hangs."""
    config = config_of()
    whole = build_layer(config, kernel="reference")
    parallel = ParallelConfig(ep_size=3, tokens=held, dispatcher=dispatcher)

    def work(transport: Transport) -> Tensor:
        return rank_layer(whole, parallel, transport)(rows_of(4))

    for point in range(10):
        try:
            results = virtual_ranks.run(3, work, kill_at=(rank, point))
        except RankLost:
            continue
        assert all(result is not None for result in results)
        break
    assert 1 <= point < 9


# ------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    "config, expected",
    [
        (ParallelConfig(), None),
        (ParallelConfig(ep_size=4), DispatcherName.ALL_REDUCE),
        (ParallelConfig(ep_size=2, tokens=OWN), DispatcherName.ALL_GATHER),
        (ParallelConfig(ep_size=32, tokens=OWN), DispatcherName.ALL_TO_ALL),
        (
            ParallelConfig(ep_size=2, tokens=OWN, dispatcher=DispatcherName.ALL_TO_ALL),
            DispatcherName.ALL_TO_ALL,
        ),
    ],
)
def test_the_dispatcher_is_decided_from_sizes(config, expected):
    choice = choose_dispatcher(config, num_experts=64, top_k=8)
    assert choice.name is expected
    assert choice.reason


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 6))
def test_expected_ranks_by_counting(per_rank, top_k, ep_size):
    num_experts = per_rank * ep_size
    if top_k > num_experts or math.comb(num_experts, top_k) > 2000:
        return
    counts = [
        len({expert // per_rank for expert in chosen})
        for chosen in itertools.combinations(range(num_experts), top_k)
    ]
    expected = sum(counts) / len(counts)
    assert expected_ranks(num_experts, top_k, ep_size) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_redundant_experts": 2}, "must come with eplb"),
        ({"dispatcher": DispatcherName.ALL_REDUCE, "tokens": OWN}, "tokens that all ranks share"),
        ({"dispatcher": DispatcherName.ALL_REDUCE, "wire": WireFormat.INT8}, "sends no rows"),
        ({"ep_size": 0}, "ep_size"),
        ({"tp_size": True}, "tp_size"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**change)


@pytest.mark.parametrize(
    "parallel, layer, message",
    [
        ({"ep_size": 7}, {}, r"ep_size \(7\) must be at most the number of experts; got 6"),
        ({"tp_size": 4}, {}, r"intermediate_size \(6\) must be divisible by tp_size; got 4"),
        ({"tp_size": 2}, {"deterministic": True}, "must be 1 with deterministic=True"),
        ({"tp_size": 2}, {"experts": {"post_norm": PostNorm.RMS}}, "norm behind them"),
        ({"ep_size": 2}, {"routing": {"num_fused_shared_experts": 1}}, "must not be fused"),
    ],
)
def test_layers_that_cannot_be_spread_so(parallel, layer, message):
    config = ParallelConfig(**parallel)

    def work(transport: Transport) -> None:
        whole = config_of(**layer)
        FusedMoE(whole, spread=Spread.of(whole, ExpertParallel.over(config, transport)))

    with pytest.raises(ConfigError, match=message):
        virtual_ranks.run(config.num_ranks, work)


def test_a_group_of_another_size_is_an_error():
    with pytest.raises(ParallelError, match=r"ep_size x tp_size \(2 x 1\) must equal the number"):
        ExpertParallel.over(ParallelConfig(ep_size=2))


# --------------------------------------------------------------------------------------------- cuts

FORMATS = [WeightFormat.parse(n) for n in ("int8-g32", "int4-g32", "mxfp4", "fp8-block", "fp8")]


@pytest.mark.parametrize("gate_up", [GateUp.STACKED, GateUp.INTERLEAVED, GateUp.UNGATED])
@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_cuts_of_quantized_weights_are_exact(weights, gate_up):
    sizes = ExpertsConfig(num_experts=2, hidden_size=64, intermediate_size=256, gate_up=gate_up)
    dense_weights = random_weights(sizes)
    whole = dataclasses.replace(
        dense_weights,
        gate_up_proj=quantize(dense_weights.gate_up_proj.values, weights),
        down_proj=quantize(dense_weights.down_proj.values, weights),
    )
    assert_exact_halves(whole)


# As Q4_K and Q6_K of GGUF.
SUPER_BLOCKS = [super_blocks(4, 32, 256, ZeroPoint.MINIMUM), super_blocks(6, 16, 256)]


@pytest.mark.parametrize("gate_up", [GateUp.STACKED, GateUp.INTERLEAVED, GateUp.UNGATED])
@pytest.mark.parametrize("scheme", SUPER_BLOCKS, ids=str)
def test_cuts_of_super_blocks_are_exact(scheme, gate_up):
    sizes = ExpertsConfig(num_experts=3, hidden_size=64, intermediate_size=512, gate_up=gate_up)
    whole = matrices(sizes, scheme)
    assert_exact_halves(whole)
    found = dequantize(take_experts(whole.down_proj, [2, 0]))
    assert torch.equal(found, dequantize(whole.down_proj)[[2, 0]])
    found = dequantize(cut_rows(whole.down_proj.expert(1), [(5, 9), (0, 2)]))
    assert torch.equal(found, dequantize(whole.down_proj)[1, [5, 6, 7, 8, 0, 1]])
    with pytest.raises(ConfigError, match="must be cut at multiples of 256; got a cut at 128"):
        cut_weights(whole, 1, 4)


def assert_exact_halves(whole: ExpertWeights) -> None:
    gate_up = whole.config.gate_up
    parts = [cut_weights(whole, part, 2) for part in range(2)]
    down = torch.cat([dequantize(part.down_proj) for part in parts], 2)
    assert torch.equal(down, dequantize(whole.down_proj))
    halves = [dequantize(part.gate_up_proj) for part in parts]
    up = dequantize(whole.gate_up_proj)
    if gate_up is GateUp.STACKED:
        up = up.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1, 3)
    assert torch.equal(torch.cat(halves, 1), up)


@pytest.mark.parametrize("parts", [4, 8])
def test_a_group_is_never_cut(parts):
    sizes = ExpertsConfig(num_experts=1, hidden_size=64, intermediate_size=96)
    weights = random_weights(sizes)
    weights = dataclasses.replace(
        weights, down_proj=quantize(weights.down_proj.values, WeightFormat.parse("int4-g32"))
    )
    with pytest.raises(ConfigError, match="must be cut at multiples of 32"):
        cut_weights(weights, 1, parts)


# ------------------------------------------------------------------------------------------ DeepEP


class FakeDeepEp:
    """The part of `deep_ep` that is used, over ranks that are threads."""

    class Event:
        def current_stream_wait(self) -> None:
            pass

    class ElasticBuffer:
        def __init__(
            self, group: Transport, *, num_max_tokens_per_rank: int, hidden: int, num_topk: int
        ) -> None:
            self.group, self.most = group, num_max_tokens_per_rank

        def dispatch(self, x: Tensor, **given: Any) -> Any:
            assert x.shape[0] <= self.most == given["num_max_tokens_per_rank"]
            assert given["topk_idx"].dtype == torch.int64
            assert given["async_with_compute_stream"]
            topology = Topology.even(given["num_experts"], self.group.size)
            self.inner = AllToAllDispatcher(self.group, SlotTables.of(topology, self.group.rank))
            arrived = self.inner.dispatch(x, given["topk_idx"], given["topk_weights"]).wait()
            batch = arrived.batch
            event = FakeDeepEp.Event()
            return (
                batch.hidden_states,
                batch.local_ids.long(),
                batch.topk_weights,
                arrived.handle,
                event,
            )

        def combine(self, x: Tensor, *, handle: Any, async_with_compute_stream: bool) -> Any:
            return self.inner.combine(x, handle).wait().tensor, None, FakeDeepEp.Event()


@pytest.mark.parametrize("counts", [[5, 0, 3], [0, 0, 0], [1, 9, 2]])
def test_deep_ep_is_called_as_it_wants(counts, monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", FakeDeepEp)
    monkeypatch.setattr(choice_module, "deep_ep_cannot", lambda *_, **__: None)
    monkeypatch.setattr(choice_module, "TorchTransport", virtual_ranks.ThreadTransport)
    monkeypatch.setattr(
        virtual_ranks.ThreadTransport, "group", property(lambda self: self), raising=False
    )
    parallel = ParallelConfig(ep_size=3, tokens=OWN, dispatcher=DispatcherName.DEEP_EP)
    spread_out(config_of(), parallel, counts)


def test_why_deep_ep_is_not_taken():
    config = config_of()

    def work(transport: Transport) -> None:
        ranks = ExpertParallel.over(
            ParallelConfig(ep_size=2, dispatcher=DispatcherName.DEEP_EP), transport
        )
        FusedMoE(config, spread=Spread.of(config, ranks))

    with pytest.raises(ConfigError, match="got: the package deep_ep is not installed"):
        virtual_ranks.run(2, work)
    with pytest.raises(MissingDependency, match="must be there for this dispatcher"):
        DeepEpDispatcher(None, 6)  # type: ignore[arg-type]
