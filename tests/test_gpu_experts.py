"""The experts on a GPU at the sizes of models: errors, graphs, races, devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtura import ExpertsConfig, FusedMoE, MoEConfig, RoutingConfig, SharedExpertsConfig
from mixtura.config import SWIGLU_OAI, GateUp, NoComputeExperts, NoComputeKind, Renormalize
from mixtura.kernels.reference.activation import activate, split_gate_up
from mixtura.kernels.registry import gpu_routing
from mixtura.kernels.triton import TritonKernel
from mixtura.quant.matrix import dense
from mixtura.types import ExpertBatch, ExpertOrder, ExpertWeights, Routing

pytestmark = pytest.mark.gpu

KERNEL = TritonKernel()

MAX_ERROR = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Of a result, relative (Frobenius), against fp32 with the same weights."""

NUM_LAUNCHES = 10_000

NUM_SAMPLED = 64
"""Rows that are compared; fp32 experts on all would take longer than everything else."""

SHAPES: dict[str, tuple[ExpertsConfig, int]] = {
    "qwen3-30b-a3b": (
        ExpertsConfig(num_experts=128, hidden_size=2048, intermediate_size=768),
        8,
    ),
    "gpt-oss-20b": (
        ExpertsConfig(
            num_experts=32,
            hidden_size=2880,
            intermediate_size=2880,
            activation=SWIGLU_OAI,
            gate_up=GateUp.INTERLEAVED,
            is_transposed=True,
            has_bias=True,
        ),
        4,
    ),
    "mixtral-half": (ExpertsConfig(num_experts=8, hidden_size=4096, intermediate_size=7168), 2),
    "uneven": (ExpertsConfig(num_experts=60, hidden_size=2056, intermediate_size=1000), 6),
}
ROWS = (1, 2, 7, 8, 16, 33, 128, 512, 2048, 5000)

HUGE_ROWS = 80_000
HUGE_BYTES = 24e9
"""Free memory with which so many rows are tried: a matrix of all slots in fp32 takes 10.5."""

NUM_POISONED = 32
"""Buffers of each small size that are filled at a time."""


def random_weights(config: ExpertsConfig, dtype: torch.dtype) -> ExpertWeights:
    """N(0, 1 / inputs), made on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device="cuda")
        return out.normal_(0.0, scale, generator=generator)

    def stack(rows: int, columns: int) -> Tensor:
        scale = columns**-0.5
        if config.is_transposed:
            return normal(config.num_experts, columns, rows, scale=scale).transpose(1, 2)
        return normal(config.num_experts, rows, columns, scale=scale)

    count, hidden = config.num_experts, config.hidden_size
    return ExpertWeights(
        config,
        gate_up_proj=dense(stack(config.up_size, hidden)),
        down_proj=dense(stack(hidden, config.intermediate_size)),
        gate_up_bias=normal(count, config.up_size, scale=0.1) if config.has_bias else None,
        down_bias=normal(count, hidden, scale=0.1) if config.has_bias else None,
    )


def random_batch(
    config: ExpertsConfig, top_k: int, num_rows: int, dtype: torch.dtype, seed: int = 0
) -> ExpertBatch:
    """Skewed choices, of which every second expert gets none; one slot in ten is empty."""
    generator = torch.Generator("cuda").manual_seed(seed)
    skew = -0.8 * torch.arange(1, config.num_experts + 1, device="cuda").log()
    noise = torch.rand(num_rows, config.num_experts, generator=generator, device="cuda")
    scores = skew - torch.log(-torch.log(noise))
    if config.num_experts // 2 >= top_k:
        scores[:, 1::2] = float("-inf")
    ids = scores.topk(top_k).indices.int()
    is_absent = torch.rand(num_rows, top_k, generator=generator, device="cuda") < 0.1
    weights = torch.rand(num_rows, top_k, generator=generator, device="cuda")
    rows = torch.randn(num_rows, config.hidden_size, generator=generator, device="cuda")
    return ExpertBatch(
        rows.to(dtype), ids.masked_fill(is_absent, -1), weights.masked_fill(is_absent, 0.0)
    )


def truth(weights: ExpertWeights, batch: ExpertBatch) -> Tensor:
    """(M, H) fp32, expert by expert."""
    config = weights.config
    rows = batch.hidden_states.float()
    out = torch.zeros_like(rows)
    for expert in range(config.num_experts):
        tokens, slots = (batch.local_ids == expert).nonzero(as_tuple=True)
        if tokens.numel() == 0:
            continue

        def project(matrix: Tensor, bias: Tensor | None, x: Tensor, expert: int = expert) -> Tensor:
            y = x @ matrix[expert].float().T
            return y if bias is None else y + bias[expert].float()

        first = project(weights.gate_up_proj.values, weights.gate_up_bias, rows[tokens])
        gate, up = split_gate_up(first, config.gate_up)
        hidden = activate(gate, up, config.activation)
        y = project(weights.down_proj.values, weights.down_bias, hidden)
        out.index_add_(0, tokens, y * batch.topk_weights[tokens, slots, None])
    return out


def poison() -> None:
    """Leave NaN in the memory that the next buffers are made of.

    Of many sizes, all held at a time and the largest first, so that holes are filled with what is
    smaller: up to 1 MB torch takes buffers from another pool than above it.
    """
    sizes = [2**29, 2**25, 2**21]  # bytes
    sizes += [size for power in range(20, 8, -1) for size in [2**power] * NUM_POISONED]
    held = [
        torch.full((size // 2,), float("nan"), dtype=torch.bfloat16, device="cuda")
        for size in sizes
    ]
    del held


def error_at(weights: ExpertWeights, batch: ExpertBatch, found: Tensor, sample: Tensor) -> float:
    """Relative error of some rows against fp32."""
    part = ExpertBatch(
        batch.hidden_states[sample], batch.local_ids[sample], batch.topk_weights[sample]
    )
    expected = truth(weights, part)
    return float((found[sample].float() - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[ExpertWeights, int]]:
    config, top_k = SHAPES[request.param]
    yield random_weights(config, torch.bfloat16), top_k
    torch.cuda.empty_cache()


@pytest.mark.parametrize("num_rows", ROWS)
def test_results_at_the_sizes_of_models(shape: tuple[ExpertWeights, int], num_rows: int) -> None:
    weights, top_k = shape
    batch = random_batch(weights.config, top_k, num_rows, torch.bfloat16)
    poison()
    found = KERNEL.run(weights, batch)
    sample = torch.randperm(num_rows)[:NUM_SAMPLED].cuda()
    assert error_at(weights, batch, found, sample) <= MAX_ERROR[torch.bfloat16]
    assert found.isfinite().all()


def test_more_elements_than_32_bits_count() -> None:
    """(M, K, H) has 2.6e9, and the sorted rows of the slots that are not empty 2.35e9."""
    num_rows, top_k = HUGE_ROWS, 8
    config = ExpertsConfig(num_experts=8, hidden_size=4096, intermediate_size=128)
    if torch.cuda.mem_get_info()[0] < HUGE_BYTES:
        pytest.skip(f"needs {HUGE_BYTES / 1e9:.0f} GB of free memory")
    assert 0.9 * num_rows * top_k * config.hidden_size > 2**31
    weights = random_weights(config, torch.bfloat16)
    batch = random_batch(config, top_k, num_rows, torch.bfloat16)
    found = KERNEL.run(weights, batch)
    # Every row visits nearly every expert; the last rows' slots are the last of each.
    sample = torch.cat([torch.arange(NUM_SAMPLED), torch.arange(NUM_SAMPLED) - NUM_SAMPLED])
    sample = torch.cat([sample, torch.randperm(num_rows)[:NUM_SAMPLED]]).cuda()
    assert error_at(weights, batch, found, sample) <= MAX_ERROR[torch.bfloat16]
    assert found.isfinite().all()


@pytest.mark.parametrize("num_rows", ROWS)
def test_a_graph_holds_for_any_choice_of_experts(
    shape: tuple[ExpertWeights, int], num_rows: int
) -> None:
    weights, top_k = shape
    batches = [
        random_batch(weights.config, top_k, num_rows, torch.bfloat16, seed) for seed in range(3)
    ]
    static = ExpertBatch(
        *(t.clone() for t in (batches[0].hidden_states, batches[0].local_ids,
                              batches[0].topk_weights))
    )  # fmt: skip
    KERNEL.run(weights, static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = KERNEL.run(weights, static)
    for batch in batches:
        static.hidden_states.copy_(batch.hidden_states)
        static.local_ids.copy_(batch.local_ids)
        static.topk_weights.copy_(batch.topk_weights)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, KERNEL.run(weights, batch))


@pytest.mark.parametrize("num_rows", [4, 48, 700])
def test_the_same_answer_ten_thousand_times(num_rows: int) -> None:
    """A race would show as another one, or as NaN of what nobody wrote."""
    config = ExpertsConfig(num_experts=32, hidden_size=256, intermediate_size=128)
    weights = random_weights(config, torch.bfloat16)
    batch = random_batch(config, 4, num_rows, torch.bfloat16)
    expected = KERNEL.run(weights, batch)
    is_same = torch.ones((), dtype=torch.bool, device="cuda")
    for number in range(NUM_LAUNCHES):
        if number % 100 == 0:
            poison()
        is_same &= (KERNEL.run(weights, batch) == expected).all()
    assert bool(is_same)


def parts_that_hold(order: ExpertOrder | None, num_rows: int, num_tiles: int) -> list[Tensor]:
    """What of an order is said: nothing behind the last row and the last tile."""
    if order is None:
        return []
    return [
        order.sort_order[:num_rows], order.expert_offsets, order.tiles[:num_tiles], order.num_tiles,
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("num_tokens, is_sorted", [(4, False), (48, True), (700, True)])
def test_the_same_routing_ten_thousand_times(num_tokens: int, is_sorted: bool) -> None:
    """One program for each token; one for all; and blocks, a scan, and their scattering."""
    routing = gpu_routing(RoutingConfig(num_experts=32, top_k=4, renormalize=Renormalize.SUM))
    assert routing is not None
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(num_tokens, 32, generator=generator, device="cuda")
    is_real = torch.arange(num_tokens, device="cuda") % 7 != 3
    _, _, expected = routing.route(logits, padding_mask=is_real)
    order = expected.order
    assert (order is not None) == is_sorted
    num_rows = 0 if order is None else int(order.expert_offsets[-1])
    num_tiles = 0 if order is None else int(order.num_tiles)
    assert num_rows == (4 * int(is_real.sum()) if is_sorted else 0)

    def parts(made: Routing) -> list[Tensor]:
        return [
            made.topk_ids, made.topk_weights, *parts_that_hold(made.order, num_rows, num_tiles),
        ]  # fmt: skip

    wanted = parts(expected)
    is_same = torch.ones((), dtype=torch.bool, device="cuda")
    for number in range(NUM_LAUNCHES):
        if number % 100 == 0:
            poison()
        _, _, found = routing.route(logits, padding_mask=is_real)
        for part, right in zip(parts(found), wanted, strict=True):
            is_same &= (part == right).all()
    assert bool(is_same)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [4, 48, 700])
def test_a_whole_layer_answers_the_same_ten_thousand_times(num_tokens: int) -> None:
    moe = layer()
    rows = torch.randn(num_tokens, 512, device="cuda", dtype=torch.bfloat16)
    expected = moe(rows)
    is_same = torch.ones((), dtype=torch.bool, device="cuda")
    for number in range(NUM_LAUNCHES):
        if number % 100 == 0:
            poison()
        is_same &= (moe(rows) == expected).all()
    assert bool(is_same)


def layer(**changes: Any) -> FusedMoE:
    """A layer with shared experts on a stream of their own, and experts without arithmetic."""
    config = MoEConfig(
        hidden_size=512,
        routing=RoutingConfig(
            num_experts=32,
            top_k=4,
            renormalize=Renormalize.SUM,
            no_compute=NoComputeExperts(kind=NoComputeKind.IDENTITY, count=8),
        ),
        experts=ExpertsConfig(num_experts=32, hidden_size=512, intermediate_size=256),
        shared=SharedExpertsConfig(intermediate_size=256),
    )
    found = FusedMoE(replace(config, **changes), device="cuda", dtype=torch.bfloat16)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return found


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 8, 64, 500, 2000])
def test_a_whole_layer_in_a_graph(num_rows: int) -> None:
    moe = layer()
    rows = torch.randn(num_rows, 512, device="cuda", dtype=torch.bfloat16)
    moe(rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe(rows)
    for _ in range(3):
        rows.normal_()
        graph.replay()
        assert torch.equal(out, moe(rows))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_whole_layer_compiled(mode: str) -> None:
    moe = layer()
    compiled = torch.compile(moe, fullgraph=True, mode=mode)
    for num_rows in (1, 16, 500):
        rows = torch.randn(num_rows, 512, device="cuda", dtype=torch.bfloat16)
        expected = moe(rows).float()
        for _ in range(3):
            error = (compiled(rows).float() - expected).norm() / expected.norm()
            assert error < 1e-2


@torch.no_grad()
def test_another_device_than_the_first() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    moe = layer()
    rows = torch.randn(40, 512, device="cuda", dtype=torch.bfloat16)
    expected = moe(rows)
    assert torch.equal(moe.to("cuda:1")(rows.to("cuda:1")).to("cuda:0"), expected)


@torch.no_grad()
def test_nothing_waits_for_the_device() -> None:
    moe = layer()
    for num_rows in (1, 40, 2000):
        rows = torch.randn(num_rows, 512, device="cuda", dtype=torch.bfloat16)
        moe(rows)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            moe(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
