"""Layers in CUDA graphs: a replay computes what the layer computes, whatever the ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from expert_cases import build_layer, moe_config, rows_of
from graph_kernels import graph_kernels
from test_layer import CASES, SHARED, by_case, layer_of, tokens_for
from tolerances import RTOL, assert_close, relative_error
from torch import Tensor

from mixtura.config import EplbConfig, ParallelConfig, RunnerConfig
from mixtura.eplb import EplbLayerState, ExpertLoadLedger
from mixtura.errors import CaptureUnsupported
from mixtura.layer import FusedMoE
from mixtura.parallel import ExpertParallel
from mixtura.parallel.ranks import Spread
from mixtura.types import TokenInputs

pytestmark = pytest.mark.gpu
BOUND = 4 * RTOL[torch.float32]


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with graph_kernels(), torch.no_grad():
        yield


def capture(
    layer: FusedMoE, rows: Tensor, tokens: TokenInputs | None = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one forward, and where its replays leave the output."""
    side = torch.cuda.Stream(rows.device)
    side.wait_stream(torch.cuda.current_stream(rows.device))
    with torch.cuda.stream(side):
        layer(rows, tokens)  # chooses a kernel, packs, and initializes libraries
    torch.cuda.current_stream(rows.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(rows, tokens)
    return graph, out


def check_replays(layer: FusedMoE, rows: Tensor, tokens: TokenInputs | None = None) -> None:
    """Three replays, each with rows of its own."""
    graph, out = capture(layer, rows, tokens)
    for seed in (2, 3, 4):
        rows.copy_(rows_of(rows.shape[0], seed=seed))
        out.fill_(float("nan"))
        graph.replay()
        assert relative_error(out, layer(rows, tokens)) < BOUND


@by_case
def test_a_layer_does_not_wait_for_the_device(name):
    config, _ = CASES[name]
    layer, rows = layer_of(config, kernel="gathering").cuda(), rows_of(7).cuda()
    ids = tokens_for(config).input_ids
    tokens = TokenInputs(input_ids=None if ids is None else ids.cuda())
    layer(rows, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(rows, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_case
@pytest.mark.parametrize("kernel", ["gathering", "packing"])
def test_a_replay_computes_what_the_layer_does(kernel, name):
    config, _ = CASES[name]
    ids = tokens_for(config).input_ids
    tokens = TokenInputs(input_ids=None if ids is None else ids.cuda())
    check_replays(layer_of(config, kernel=kernel).cuda(), rows_of(7).cuda(), tokens)


@pytest.mark.parametrize("uses_stream", [False, True])
@pytest.mark.parametrize("max_rows_per_pass", [None, 3])
def test_shared_experts_on_their_stream_in_a_graph(max_rows_per_pass, uses_stream):
    """Four layers, so that the memory of the first is used again by the others."""
    shared = replace(SHARED, uses_stream=uses_stream)
    runner = RunnerConfig(max_rows_per_pass=max_rows_per_pass)
    config = moe_config(shared=shared, runner=runner)
    layers = [build_layer(config, seed, kernel="gathering").cuda() for seed in range(4)]
    rows = rows_of(16).cuda()

    def forward() -> Tensor:
        out = rows
        for layer in layers:
            out = out + layer(out)
        return out

    expected = forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert relative_error(out, expected) < BOUND


def test_loads_are_counted_by_replays_while_they_are_to_be():
    config = moe_config()
    parallel = ParallelConfig(num_redundant_experts=2, eplb=EplbConfig())
    spread = Spread.of(config, ExpertParallel.over(parallel))
    ledger = ExpertLoadLedger(1, 6, "cuda")
    graph = torch.cuda.CUDAGraph()
    state = EplbLayerState.of(ledger, 0, spread.placement)
    ids = torch.tensor([[0, 5], [3, 1]], dtype=torch.int32, device="cuda")
    state.to_physical(ids)
    ledger.reset()
    with torch.cuda.graph(graph):
        places = state.to_physical(ids)
    graph.replay()
    assert ledger.loads().tolist() == [[1, 1, 0, 1, 0, 1]]
    ledger.record(False)
    graph.replay()
    assert int(ledger.loads().sum()) == 4
    assert torch.equal(places, state.to_physical(ids))


@pytest.mark.parametrize("options", [{}, {"shared": SHARED}, {"debug": True}])
def test_a_refused_capture_leaves_the_device_usable(options):
    layer, rows = build_layer(moe_config(**options), kernel="torch").cuda(), rows_of(7).cuda()
    expected = layer(rows)
    with pytest.raises(CaptureUnsupported), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(rows)
    assert_close(layer(rows), expected, torch.float32)


def test_the_compilers_graphs_leave_out_what_waits():
    layer, rows = build_layer(moe_config(shared=SHARED), kernel="torch").cuda(), rows_of(7).cuda()
    function = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for seed in (2, 3, 4, 5):
        rows.copy_(rows_of(7, seed=seed))
        assert relative_error(function(rows), layer(rows)) < BOUND


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_a_device_that_is_not_the_current_one():
    config = moe_config(shared=SHARED)
    layer, rows = build_layer(config).to("cuda:1"), rows_of(7).to("cuda:1")
    expected = build_layer(config, kernel="reference")(rows_of(7))
    assert torch.cuda.current_device() == 0
    assert relative_error(layer(rows).cpu(), expected) < BOUND
    assert torch.cuda.current_device() == 0
