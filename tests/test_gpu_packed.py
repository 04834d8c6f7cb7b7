"""Quantized experts on a GPU at the sizes of models: errors, graphs, races, offsets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_device import DEVICE
from packed_experts import (
    E4M3_GROUPS,
    E4M3_TOKENS,
    INT8_TOKENS,
    KERNEL,
    SCHEMES,
    same_rounding,
)
from torch import Tensor

from mixtura.config import SWIGLU_OAI, ExpertsConfig, GateUp
from mixtura.kernels.reference.activation import activate, split_gate_up
from mixtura.quant.activations import ActivationScheme, round_activations
from mixtura.quant.matrix import QuantizedMatrix, dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import QuantScheme
from mixtura.types import ExpertBatch, ExpertWeights

pytestmark = pytest.mark.gpu

MAX_ERROR = 5e-3
"""Of rows of bf16, relative (Frobenius), against fp32 with rows that are rounded alike."""

MAX_ROUNDED_ERROR = 4e-2
"""The same against rows as they come."""

NUM_LAUNCHES = 3_000

NUM_SAMPLED = 64
"""Rows that are compared; fp32 experts on all would take longer than everything else."""

CONFIGS: dict[str, tuple[ExpertsConfig, int]] = {
    "qwen3-30b-a3b": (ExpertsConfig(num_experts=128, hidden_size=2048, intermediate_size=768), 8),
    "gpt-oss-20b": (
        ExpertsConfig(
            num_experts=32,
            hidden_size=2880,
            intermediate_size=2880,
            activation=SWIGLU_OAI,
            gate_up=GateUp.INTERLEAVED,
            has_bias=True,
        ),
        4,
    ),
    "uneven": (ExpertsConfig(num_experts=60, hidden_size=2056, intermediate_size=1000), 6),
}
SHAPES: list[tuple[str, str, ActivationScheme | None]] = [
    ("qwen3-30b-a3b", "fp8-block", E4M3_GROUPS),
    ("qwen3-30b-a3b", "int4-g128", None),
    ("qwen3-30b-a3b", "int4-g128", INT8_TOKENS),
    ("qwen3-30b-a3b", "nvfp4", None),
    ("gpt-oss-20b", "mxfp4", None),
    ("gpt-oss-20b", "mxfp4", E4M3_TOKENS),
    ("uneven", "int4-g32-fp16-zeros", None),
    ("uneven", "int8-channel", INT8_TOKENS),
    ("uneven", "fp8", E4M3_TOKENS),
    ("uneven", "fp8-block", None),
]
ROWS = (1, 2, 8, 33, 128, 512, 2048, 5000)

HUGE_ROWS = 80_000
HUGE_BYTES = 28e9
"""Free memory with which so many rows are tried: outputs of all slots take 10.5 in fp32."""

NUM_POISONED = 32
"""Buffers of each small size that are filled at a time."""


def random_experts(
    config: ExpertsConfig, scheme: QuantScheme, activations: ActivationScheme | None
) -> ExpertWeights:
    """N(0, 1 / inputs), made and rounded on the GPU."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.empty(shape, device=DEVICE).normal_(0.0, scale, generator=generator)

    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    return ExpertWeights(
        config,
        gate_up_proj=quantize(normal(count, config.up_size, hidden, scale=hidden**-0.5), scheme),
        down_proj=quantize(normal(count, hidden, inner, scale=inner**-0.5), scheme),
        gate_up_bias=normal(count, config.up_size, scale=0.1) if config.has_bias else None,
        down_bias=normal(count, hidden, scale=0.1) if config.has_bias else None,
        activations=activations,
    )


def random_batch(config: ExpertsConfig, top_k: int, num_rows: int, seed: int = 0) -> ExpertBatch:
    """Skewed choices, of which every second expert gets none; one slot in ten is empty."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    skew = -0.8 * torch.arange(1, config.num_experts + 1, device=DEVICE).log()
    noise = torch.rand(num_rows, config.num_experts, generator=generator, device=DEVICE)
    scores = skew - torch.log(-torch.log(noise))
    if config.num_experts // 2 >= top_k:
        scores[:, 1::2] = float("-inf")
    ids = scores.topk(top_k).indices.int()
    is_absent = torch.rand(num_rows, top_k, generator=generator, device=DEVICE) < 0.1
    weights = torch.rand(num_rows, top_k, generator=generator, device=DEVICE)
    rows = torch.randn(num_rows, config.hidden_size, generator=generator, device=DEVICE)
    return ExpertBatch(
        rows.bfloat16(), ids.masked_fill(is_absent, -1), weights.masked_fill(is_absent, 0.0)
    )


def truth(weights: ExpertWeights, batch: ExpertBatch) -> Tensor:
    """(M, H) fp32, expert by expert, with rows rounded to `weights.activations`."""
    config, activations = weights.config, weights.activations
    rows = batch.hidden_states.float()
    out = torch.zeros_like(rows)

    def project(stack: QuantizedMatrix, bias: Tensor | None, x: Tensor, expert: int) -> Tensor:
        if activations is not None:
            x = round_activations(x, activations)
        y = x @ dequantize(stack.expert(expert), torch.float32).T
        return y if bias is None else y + bias[expert]

    for expert in batch.local_ids.unique().tolist():
        if expert < 0:
            continue
        tokens, slots = (batch.local_ids == expert).nonzero(as_tuple=True)
        first = project(weights.gate_up_proj, weights.gate_up_bias, rows[tokens], expert)
        gate, up = split_gate_up(first, config.gate_up)
        hidden = activate(gate, up, config.activation)
        y = project(weights.down_proj, weights.down_bias, hidden, expert)
        out.index_add_(0, tokens, y * batch.topk_weights[tokens, slots, None])
    return out


def poison() -> None:
    """Leave NaN, which is no code of e4m3 either, in the memory of the next buffers.

    Of many sizes, all held at a time and the largest first, so that holes are filled with what is
    smaller: up to 1 MB torch takes buffers from another pool than above it.
    """
    sizes = [2**29, 2**25, 2**21]  # bytes
    sizes += [size for power in range(20, 8, -1) for size in [2**power] * NUM_POISONED]
    held = [torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE) for size in sizes]
    del held


def error_at(weights: ExpertWeights, batch: ExpertBatch, found: Tensor, sample: Tensor) -> float:
    """Relative error of some rows."""
    part = ExpertBatch(
        batch.hidden_states[sample], batch.local_ids[sample], batch.topk_weights[sample]
    )
    expected = truth(weights, part)
    return float((found[sample].float() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """The truth is in fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[ExpertWeights, Any, int]]:
    name, scheme, activations = request.param
    config, top_k = CONFIGS[name]
    weights = random_experts(config, SCHEMES[scheme], activations)
    yield weights, KERNEL.pack(weights), top_k
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("num_rows", ROWS)
def test_results_at_the_sizes_of_models(
    shape: tuple[ExpertWeights, Any, int], num_rows: int
) -> None:
    weights, packed, top_k = shape
    batch = random_batch(weights.config, top_k, num_rows)
    poison()
    found = KERNEL.run(packed, batch)
    assert found.isfinite().all()
    sample = torch.randperm(num_rows)[:NUM_SAMPLED].to(DEVICE)
    assert error_at(same_rounding(weights), batch, found, sample) <= MAX_ERROR
    plain = dataclasses.replace(weights, activations=None)
    assert error_at(plain, batch, found, sample) <= MAX_ROUNDED_ERROR


def test_what_is_packed_comes_back_on_the_gpu(shape: tuple[ExpertWeights, Any, int]) -> None:
    weights, packed, _ = shape
    back = KERNEL.unpack(packed, weights.config)
    for mine, theirs in zip(back.projections(), weights.projections(), strict=True):
        for name, tensor in theirs.tensors.items():
            found = mine.tensors[name].contiguous().view(torch.uint8)
            assert torch.equal(found, tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("num_rows", ROWS)
def test_a_graph_holds_for_any_choice_of_experts(
    shape: tuple[ExpertWeights, Any, int], num_rows: int
) -> None:
    weights, packed, top_k = shape
    batches = [random_batch(weights.config, top_k, num_rows, seed) for seed in range(3)]
    first = batches[0]
    static = ExpertBatch(
        first.hidden_states.clone(), first.local_ids.clone(), first.topk_weights.clone()
    )
    KERNEL.run(packed, static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = KERNEL.run(packed, static)
    for batch in batches:
        static.hidden_states.copy_(batch.hidden_states)
        static.local_ids.copy_(batch.local_ids)
        static.topk_weights.copy_(batch.topk_weights)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, KERNEL.run(packed, batch))


STRESSED: list[tuple[str, ActivationScheme | None]] = [
    ("int4-g32", None),
    ("mxfp4", E4M3_TOKENS),
    ("fp8-block", E4M3_GROUPS),
    ("int8-channel", INT8_TOKENS),
]


@pytest.mark.parametrize("num_rows", [4, 48, 1000])
@pytest.mark.parametrize("scheme, activations", STRESSED)
def test_the_same_answer_thousands_of_times(
    scheme: str, activations: ActivationScheme | None, num_rows: int
) -> None:
    """A race would show as another one, or as NaN of what nobody wrote; choices take turns."""
    config = ExpertsConfig(num_experts=32, hidden_size=256, intermediate_size=192)
    packed = KERNEL.pack(random_experts(config, SCHEMES[scheme], activations))
    batches = [random_batch(config, 4, num_rows, seed) for seed in range(8)]
    expected = [KERNEL.run(packed, batch) for batch in batches]
    is_same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for number in range(NUM_LAUNCHES):
        if number % 100 == 0:
            poison()
        turn = number % len(batches)
        is_same &= (KERNEL.run(packed, batches[turn]) == expected[turn]).all()
    assert bool(is_same)


@pytest.mark.parametrize("scheme, activations", STRESSED)
def test_rows_of_any_layout_of_tiles_agree(
    scheme: str, activations: ActivationScheme | None
) -> None:
    """By themselves, in small tiles and in large ones, a row's experts give the same."""
    config = ExpertsConfig(num_experts=32, hidden_size=520, intermediate_size=264)
    weights = random_experts(config, SCHEMES[scheme], activations)
    packed, batch = KERNEL.pack(weights), random_batch(config, 4, 1000)
    whole = KERNEL.run(packed, batch)
    for count in (1, 5, 60, 300):
        part = ExpertBatch(
            batch.hidden_states[:count], batch.local_ids[:count], batch.topk_weights[:count]
        )
        found = KERNEL.run(packed, part).float()
        difference = (found - whole[:count].float()).norm() / whole[:count].float().norm()
        assert float(difference) <= MAX_ERROR


def random_bytes(scheme: QuantScheme, shape: tuple[int, int, int]) -> QuantizedMatrix:
    """Codes of e4m3 that are numbers below 2, of so many experts that nothing else is made."""
    values = torch.empty(shape, dtype=torch.uint8, device=DEVICE)
    for expert in values:
        expert.random_(0, 256).bitwise_and_(0xBF)
    specs = scheme.tensors_for(shape)
    scales = torch.full(specs["scales"].shape, shape[2] ** -0.5, device=DEVICE)
    return QuantizedMatrix(scheme, shape, values, scales)


@pytest.mark.parametrize("activations, num_experts", [(None, 34), (E4M3_TOKENS, 17)])
def test_more_words_than_32_bits_count(
    activations: ActivationScheme | None, num_experts: int
) -> None:
    """Of gate and up and of down, whose words are of two codes or of one."""
    config = ExpertsConfig(num_experts=num_experts, hidden_size=8192, intermediate_size=16384)
    needed = 3.5 * config.hidden_size * config.intermediate_size * num_experts * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    scheme, up = SCHEMES["fp8"], (num_experts, config.up_size, config.hidden_size)
    weights = ExpertWeights(
        config,
        gate_up_proj=random_bytes(scheme, up),
        down_proj=random_bytes(scheme, (num_experts, 8192, 16384)),
        activations=activations,
    )
    packed = KERNEL.pack(weights)
    assert packed.gate_up.codes.numel() > 2**32 and packed.down.codes.numel() > 2**31
    for num_rows in (1, 40, 2000):
        batch = random_batch(config, 2, num_rows)
        ids = torch.arange(2 * num_rows, device=DEVICE).view(-1, 2) % num_experts
        batch = dataclasses.replace(batch, local_ids=(num_experts - 1 - ids).int())
        found = KERNEL.run(packed, batch)
        sample = torch.arange(min(num_rows, num_experts), device=DEVICE)
        assert error_at(same_rounding(weights), batch, found, sample) <= MAX_ERROR


@pytest.mark.parametrize("scheme, activations", [("int4-g128", None), ("fp8", E4M3_TOKENS)])
def test_more_elements_than_32_bits_count(
    scheme: str, activations: ActivationScheme | None
) -> None:
    """(M, K, H) has 2.6e9, and the sorted rows of the slots that are not empty 2.35e9."""
    num_rows, top_k = HUGE_ROWS, 8
    config = ExpertsConfig(num_experts=8, hidden_size=4096, intermediate_size=128)
    if torch.cuda.mem_get_info()[0] < HUGE_BYTES:
        pytest.skip(f"needs {HUGE_BYTES / 1e9:.0f} GB of free memory")
    assert 0.9 * num_rows * top_k * config.hidden_size > 2**31
    weights = random_experts(config, SCHEMES[scheme], activations)
    batch = random_batch(config, top_k, num_rows)
    found = KERNEL.run(KERNEL.pack(weights), batch)
    # Every row visits nearly every expert; the last rows' slots are the last of each.
    sample = torch.cat([torch.arange(NUM_SAMPLED), torch.arange(NUM_SAMPLED) - NUM_SAMPLED])
    sample = torch.cat([sample, torch.randperm(num_rows)[:NUM_SAMPLED]]).to(DEVICE)
    assert error_at(same_rounding(weights), batch, found, sample) <= MAX_ERROR
    assert found.isfinite().all()


def test_nothing_waits_for_the_device() -> None:
    config = ExpertsConfig(num_experts=32, hidden_size=256, intermediate_size=192)
    for scheme, activations in STRESSED:
        packed = KERNEL.pack(random_experts(config, SCHEMES[scheme], activations))
        for num_rows in (1, 40, 2000):
            batch = random_batch(config, 4, num_rows)
            KERNEL.run(packed, batch)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                KERNEL.run(packed, batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
