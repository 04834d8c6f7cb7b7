"""A layer on a GPU never waits for it, unless debug asks for what only the device knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from expert_cases import build_layer, moe_config, rows_of
from graph_kernels import GatheringKernel, graph_kernels
from no_data import EchoTransport, Recorded, recorded, without_data
from test_layer import CASES, SHARED, by_case, layer_of, tokens_for
from torch import Tensor

from mixtura.config import (
    EplbConfig,
    GatePrecision,
    MoEConfig,
    NativeGate,
    ParallelConfig,
    Renormalize,
    RunnerConfig,
    ScoreFunction,
    SelectionBias,
    Simulation,
    SimulationConfig,
)
from mixtura.eplb import EplbLayerState, ExpertLoadLedger
from mixtura.errors import InputError
from mixtura.experts import ExpertsOptions, RoutedExperts
from mixtura.hf.experts import experts_forward
from mixtura.layer import FusedMoE
from mixtura.parallel import (
    ExpertParallel,
)
from mixtura.parallel.ranks import Spread
from mixtura.parallel.shard import shard_weights
from mixtura.routing.gate import Choice
from mixtura.types import TokenInputs


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with graph_kernels():
        yield


# -------------------------------------------------------------------------------- waiting for a GPU


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "bincount": lambda x: x.long().bincount(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.ones(3).to(x.device),
    "a list": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
}


@pytest.mark.parametrize("wait", WAITS)
def test_what_waits_for_the_device_is_noticed(wait):
    with recorded() as record:
        try:
            WAITS[wait](torch.empty(3, device="meta"))
        except (RuntimeError, NotImplementedError):
            return
    assert record.crossings != []


def run_without_data(layer: FusedMoE, tokens: TokenInputs | None = None) -> list[str]:
    """Send seven rows through a layer; the operators, of which none may wait."""
    layer.to("meta")
    with recorded() as record:
        out = layer(torch.empty(7, 8, device="meta"), tokens and without_data(tokens))
    assert (out.shape, out.device.type) == ((7, 8), "meta")
    assert record.crossings == []
    return record.operators


@by_case
def test_a_layer_on_a_gpu_does_not_wait_for_it(name):
    config, _ = CASES[name]
    layer = layer_of(config, kernel="gathering")
    assert len(run_without_data(layer, tokens_for(config))) > 10


RULES: dict[str, dict[str, Any]] = {
    "sparsemixer": {"score": ScoreFunction.SPARSEMIXER},
    "square root of softplus": {"score": ScoreFunction.SQRT_SOFTPLUS},
    "logits": {"score": ScoreFunction.LOGIT, "logit_multiplier": 0.5, "logit_softcap": 3.0},
    "bias on logits": {"selection_bias": SelectionBias.ON_LOGIT},
    "clamped sum": {"renormalize": Renormalize.CLAMPED_SUM, "epsilon": 1e-9},
    "p-norm": {"renormalize": Renormalize.P_NORM, "per_expert_scale": True},
    "replay": {"simulation": SimulationConfig(kind=Simulation.REPLAY)},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_on_a_gpu_does_not_wait_for_it(rule):
    run_without_data(build_layer(moe_config(routing=RULES[rule]), kernel="gathering"))


OPTIONS: dict[str, dict[str, Any]] = {
    "chunks": {"runner": RunnerConfig(max_rows_per_pass=3)},
    "two batches": {"runner": RunnerConfig(overlap_min_tokens=2)},
    "native gate": {"gate": GatePrecision.NATIVE, "routing": {"native": NativeGate()}},
    "gate bias": {"has_gate_bias": True},
    "latent": {"experts": {"hidden_size": 12}, "has_latent": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_layer_with_options_on_a_gpu_does_not_wait_for_it(option):
    run_without_data(build_layer(moe_config(shared=SHARED, **OPTIONS[option]), kernel="gathering"))


def test_a_deterministic_layer_on_a_gpu_does_not_wait_for_it(monkeypatch):
    monkeypatch.setattr(GatheringKernel, "is_row_invariant", True)
    config = moe_config(shared=SHARED, deterministic=True)
    run_without_data(build_layer(config, kernel="gathering"))


def test_what_tokens_bring_along_is_not_waited_for():
    tokens = TokenInputs(
        replayed_ids=torch.zeros(7, 2, dtype=torch.int32),
        padding_mask=torch.ones(7, dtype=torch.bool),
    )
    run_without_data(build_layer(moe_config(), kernel="gathering"), tokens)


def spread_layer(
    config: MoEConfig, device: str = "cpu", **options: Any
) -> tuple[FusedMoE, EplbLayerState, EchoTransport]:
    """A rank's part of a layer on two ranks, with redundant experts, and the state of balancing."""
    transport = EchoTransport()
    parallel = ParallelConfig(ep_size=2, num_redundant_experts=2, eplb=EplbConfig())
    spread = Spread.of(config, ExpertParallel.over(parallel, transport))
    weights = shard_weights(build_layer(config).experts.expert_weights, spread)
    weights = weights.mapped(lambda tensor: tensor.to(device))
    state = EplbLayerState.of(ExpertLoadLedger(1, 6), 0, spread.placement)
    kept = {"weights": weights, "spread": spread, "kernel": "gathering", "device": device}
    return FusedMoE(config, **kept, **options), state, transport


@pytest.mark.parametrize("is_balanced", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_experts_over_ranks_that_share_a_batch_are_not_waited_for(
    deterministic, is_balanced, monkeypatch
):
    monkeypatch.setattr(GatheringKernel, "is_row_invariant", True)
    layer, state, transport = spread_layer(moe_config(deterministic=deterministic), "meta")
    if is_balanced:
        layer.set_layer_state(without_data(state))
    operators = run_without_data(layer)
    assert transport.calls == 1
    assert ("searchsorted" in operators) is is_balanced


@pytest.mark.parametrize(
    "name, kernel",
    [
        ("sigmoid, bias, groups, scale", "gathering"),
        ("sigmoid, bias, groups, scale", "torch"),
        ("constant experts", "torch"),
    ],
)
def test_the_graph_of_a_compiled_layer_does_not_wait(name, kernel):
    """But for one operator of the torch kernel, which CUDA graphs are told to leave out."""
    records: list[Recorded] = []

    def backend(graph: Callable[..., Any], _: object) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            with recorded() as record:
                records.append(record)
                return graph(*inputs)

        return run

    layer = layer_of(CASES[name][0], kernel=kernel).to("meta")
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(layer, backend=backend, fullgraph=True)(
            torch.empty(7, 8, device="meta")
        )
    (record,) = records
    assert (out.shape, record.crossings) == ((7, 8), [])
    of_torch = {"grouped_linear"} if kernel == "torch" else set()
    assert {name for name in record.operators if name.startswith("grouped")} == of_torch


@pytest.mark.parametrize("name", ["grouped_linear", "grouped_outer", "experts"])
def test_operators_that_wait_are_left_out_of_the_compilers_graphs(name):
    operator = getattr(torch.ops.mixtura, name).default
    assert torch.Tag.cudagraph_unsafe in operator.tags


# ------------------------------------------------------------------------------------ ids, in debug


@pytest.mark.parametrize(
    "routing, tokens",
    [
        ({}, TokenInputs(replayed_ids=torch.zeros(7, 2, dtype=torch.int32))),
        ({"hash_routing": True}, TokenInputs(input_ids=torch.zeros(7, dtype=torch.int64))),
    ],
    ids=["replay", "hash routing"],
)
def test_debug_reads_ids_of_tokens_before_anything_is_indexed(routing, tokens):
    layer = build_layer(moe_config(routing=routing, debug=True), kernel="gathering").to("meta")
    rows, tokens = torch.empty(7, 8, device="meta"), without_data(tokens)
    with recorded() as record, pytest.raises(RuntimeError, match="meta"):
        layer(rows, tokens)
    assert record.operators == ["view", "min", "_local_scalar_dense"]


def test_debug_reads_chosen_ids_before_anything_is_indexed():
    """Whoever chose them: a router, a function of the caller's, a simulation."""
    layer = build_layer(moe_config(debug=True), kernel="gathering").to("meta")
    choice = Choice(*(torch.empty(7, 2, device="meta") for _ in range(2)), torch.empty(7, 2).long())
    for spoilt in (-2, 6):
        bad = choice._replace(ids=torch.full((7, 2), spoilt))
        with recorded() as record, pytest.raises(ValueError, match=f"got {spoilt} to {spoilt}"):
            layer.finish_routing(bad, TokenInputs(), layer.gate.tensors())
        assert set(record.operators) <= {"min", "max", "_local_scalar_dense"}


@pytest.mark.parametrize("is_balanced", [False, True])
def test_debug_finds_bad_ids_before_they_are_placed_or_sent(is_balanced):
    def custom(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return logits[:, :top_k], torch.full((logits.shape[0], top_k), 6)

    layer, state, transport = spread_layer(moe_config(debug=True), custom_routing=custom)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)  # memory that was NaN would be found first
    if is_balanced:
        layer.set_layer_state(state)
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"expert ids must be in \[-1, 6\); got 6"),
    ):
        layer(rows_of(3))
    assert transport.calls == 0
    assert state.counts.tolist() == [0] * 7


@pytest.mark.parametrize("debug", [False, True])
def test_debug_reads_ids_of_a_router_that_is_not_ours(debug):
    config = moe_config().experts
    options = ExpertsOptions(kernel="gathering", debug=debug)
    module = RoutedExperts(config, options=options, device="meta")
    rows = torch.empty(7, 8, device="meta")
    ids = torch.empty(7, 2, dtype=torch.int64, device="meta")
    refused = pytest.raises(RuntimeError, match="meta") if debug else nullcontext()
    with recorded() as record, refused:
        experts_forward(module, rows, ids, torch.empty(7, 2, device="meta"))
    assert (record.operators[-1] == "_local_scalar_dense") is debug
