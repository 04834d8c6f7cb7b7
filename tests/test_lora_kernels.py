"""LoRA adapters on experts: every kernel against dense experts that have them merged in."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import virtual_ranks
from expert_cases import (
    ACTIVATIONS,
    CONFIGS,
    build_layer,
    converted,
    cpu_products_bound,
    dequantized,
    moe_config,
    plain_experts,
    quantized,
    random_batch,
    random_weights,
    rows_of,
    sizes,
)
from lora_cases import (
    PARTS,
    merged,
    merged_truth,
    mixed_adapters,
    mixed_ids,
    random_adapter,
    some_rows,
    with_adapters,
)
from spread_layers import WAYS, rank_layer
from test_cpu_kernel import PATHS, matrices
from test_cpu_permuted import SCHEMES as PERMUTED
from test_eplb_runtime import NUM_EXPERTS, SHARED, Moved, balanced, two_placements
from test_hf_block import converted as converted_model
from test_hf_block import one_line, output
from tolerances import assert_close, frobenius_error
from torch import Tensor

from mixtura.config import (
    ActivationDtype,
    DispatcherName,
    EplbConfig,
    ExpertsConfig,
    GateUp,
    ParallelConfig,
    RunnerConfig,
    TokensHeld,
    WeightOn,
    WireFormat,
)
from mixtura.dispatch.deep_ep import DeepEpDispatcher
from mixtura.dispatch.wire import Wire
from mixtura.eplb.migration import Phase
from mixtura.eplb.records import LayerSlots
from mixtura.errors import ConfigError, InputError, NoKernelFits
from mixtura.experts import ExpertsOptions, PackedExperts, RoutedExperts
from mixtura.hf.experts import plan_experts
from mixtura.kernels import get_kernel, kernel_names, select_kernel
from mixtura.kernels.cpu.extension import forced_path, missing
from mixtura.layer import FusedMoE
from mixtura.lora import Adapters, LoraWeights, LowRank
from mixtura.parallel import ExpertParallel, Spread, Transport
from mixtura.parallel.shard import shard_lora
from mixtura.quant.formats import WeightFormat
from mixtura.types import ExpertBatch, ExpertWeights, TokenInputs

WITH_LORA = ("reference", "torch", "cpu")
NUM_ROWS = 13

needs_cpu = pytest.mark.skipif(missing() is not None, reason=missing() or "")
kernels = pytest.mark.parametrize(
    "kernel", ["reference", "torch", pytest.param("cpu", marks=needs_cpu)]
)
by_layout = pytest.mark.parametrize("layout", CONFIGS)


def experts_of(
    weights: ExpertWeights,
    kernel: str,
    adapters: Adapters = (),
    weight_on: WeightOn = WeightOn.OUTPUT,
    activation_dtype: ActivationDtype | None = None,
) -> RoutedExperts:
    options = ExpertsOptions(kernel=kernel, weight_on=weight_on, activation_dtype=activation_dtype)
    experts = RoutedExperts(weights.config, weights=weights, options=options)
    if adapters:
        experts.set_lora(adapters)
    return experts


def batch_with_holes(
    config: ExpertsConfig,
    num_rows: int = NUM_ROWS,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    num_adapters: int = 5,
) -> ExpertBatch:
    """Rows of every adapter and of none, with and without experts."""
    batch = random_batch(config, num_rows, top_k, dtype)
    ids = batch.local_ids.clone()
    ids[1::4, 0] = -1
    ids[3:4] = -1
    adapter_ids = mixed_ids(num_rows, num_adapters)
    return dataclasses.replace(batch, local_ids=ids, adapter_ids=adapter_ids)


# ------------------------------------------------------------------------------------- the meaning


@by_layout
@pytest.mark.parametrize("weight_on", WeightOn)
def test_the_reference_is_the_merged_experts_on_small_integers(layout, weight_on):
    """Exactly: sums of small integers have one answer."""
    config = dataclasses.replace(CONFIGS[layout], post_norm=None)
    if config.activation.function.value not in ("relu", "relu_squared"):
        config = dataclasses.replace(config, activation=ACTIVATIONS["identity"])
    generator = torch.Generator().manual_seed(3)

    def integers(like: Tensor) -> Tensor:
        drawn = torch.randint(-2, 3, like.shape, generator=generator, dtype=torch.float64)
        return drawn.to(like.dtype)

    weights = random_weights(config, torch.float64).mapped(integers)
    adapters = tuple(one and one.mapped(integers) for one in mixed_adapters(config))
    batch = batch_with_holes(config, dtype=torch.float64)
    batch = dataclasses.replace(
        batch,
        hidden_states=integers(batch.hidden_states),
        topk_weights=integers(batch.topk_weights),
    )
    found = experts_of(weights, "reference", adapters, weight_on)(batch)
    assert torch.equal(found, merged_truth(weights, adapters, batch, weight_on))


@kernels
@by_layout
@pytest.mark.parametrize("weight_on", WeightOn)
def test_merged_experts_are_the_truth(kernel, layout, weight_on):
    config = CONFIGS[layout]
    weights, adapters = random_weights(config), mixed_adapters(config)
    batch = batch_with_holes(config)
    experts = experts_of(weights, kernel, adapters, weight_on)
    truth = merged_truth(weights, adapters, batch, weight_on)
    assert_close(experts(batch), truth, torch.float32)
    terms = experts(batch, reduce=False)
    assert_close(terms.sum(1), truth, torch.float32)
    assert not terms[batch.local_ids < 0].any()


@kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_delta_comes_before_every_activation(kernel, activation):
    config = dataclasses.replace(sizes(), activation=ACTIVATIONS[activation])
    weights, adapters = random_weights(config), mixed_adapters(config)
    batch = batch_with_holes(config)
    found = experts_of(weights, kernel, adapters)(batch)
    assert_close(found, merged_truth(weights, adapters, batch), torch.float32)


@kernels
@pytest.mark.parametrize("parts", [parts[:n] for parts in (PARTS, PARTS[::-1]) for n in (1, 2)])
@pytest.mark.parametrize("top_k, num_experts", [(1, 1), (3, 3)])
def test_adapters_of_some_parts(kernel, parts, top_k, num_experts):
    config = sizes(num_experts, 33, 17)
    weights = random_weights(config)
    adapters = (random_adapter(config, 2, parts=parts),)
    adapters = tuple(one.mapped(lambda t: t + 0.1) for one in adapters)  # expert 1 has its part too
    batch = random_batch(config, 5, top_k)
    batch = with_adapters(batch, torch.zeros(5, dtype=torch.int32))
    found = experts_of(weights, kernel, adapters)(batch)
    assert_close(found, merged_truth(weights, adapters, batch), torch.float32)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits(kernel, dtype):
    config = sizes(4, 48, 32)
    weights, adapters = random_weights(config, dtype), mixed_adapters(config)
    batch = batch_with_holes(config, dtype=dtype)
    wide = converted(weights, torch.float64)
    truth = merged_truth(wide, adapters, batch)
    noise = torch.zeros_like(truth)
    for number, adapter in ((-1, LoraWeights()), *enumerate(adapters)):
        base = converted(merged(wide, adapter or LoraWeights()), dtype)
        chosen = batch.adapter_ids == number
        noise[chosen] = plain_experts(base, batch).double()[chosen]
    assert_close(experts_of(weights, kernel, adapters)(batch), truth, dtype, noise=noise)


FORMATS = [
    (WeightFormat.INT8_G32, "ungated"),
    (WeightFormat.INT8_CHANNEL, "gpt-oss"),
    (WeightFormat.INT4_G32, "separate"),
    (WeightFormat.INT4_G32, "gpt-oss"),
    (WeightFormat.FP8, "gpt-oss"),
    (WeightFormat.MXFP4, "gpt-oss"),
]


@pytest.mark.parametrize("kernel", ["torch", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("weight_format, layout", FORMATS)
def test_packed_experts(kernel, weight_format, layout):
    """The truth is the dequantized experts with the adapter merged in."""
    config = dataclasses.replace(CONFIGS[layout], hidden_size=96, intermediate_size=160)
    weights = quantized(random_weights(config), weight_format)
    adapters = mixed_adapters(config)
    batch = batch_with_holes(config, 40)
    truth = merged_truth(dequantized(weights), adapters, batch)
    error = frobenius_error(experts_of(weights, kernel, adapters)(batch), truth)
    bound = 3e-6
    if kernel == "cpu":
        bound = 1.3 * cpu_products_bound(weights.schemes[0], torch.float32)
    assert error <= bound


@pytest.mark.parametrize("kernel", ["reference", "torch"])
def test_what_is_rounded_for_the_weights_is_not_for_adapters(kernel):
    """Base weights of 0, rows and hidden values rounded to int8: the adapter meets neither."""
    config = dataclasses.replace(
        sizes(2, 32, 32), gate_up=GateUp.UNGATED, activation=ACTIVATIONS["identity"]
    )
    zero = random_weights(config).mapped(torch.zeros_like)
    weights = quantized(zero, WeightFormat.INT8_G32)
    adapters = (random_adapter(config, 4, seed=5).mapped(lambda t: t + 0.05),)
    batch = with_adapters(random_batch(config, 6), torch.zeros(6, dtype=torch.int32))
    experts = experts_of(weights, kernel, adapters, activation_dtype=ActivationDtype.INT8)
    truth = merged_truth(dequantized(weights), adapters, batch)
    assert_close(experts(batch), truth, torch.float32)


def test_gradients_reach_the_rows_and_the_weights():
    config = CONFIGS["gpt-oss"]
    adapters, batch = mixed_adapters(config), batch_with_holes(config)
    found = []
    for kernel in ("reference", "torch"):
        experts = RoutedExperts(config, options=ExpertsOptions(kernel=kernel))
        generator = torch.Generator().manual_seed(0)
        for parameter in experts.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(drawn)
        experts.set_lora(adapters)
        rows = batch.hidden_states.clone().requires_grad_()
        out = experts(dataclasses.replace(batch, hidden_states=rows))
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append([rows.grad, *(p.grad for p in experts.parameters())])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, torch.float32)


# --------------------------------------------------------------------------- what may not change


@kernels
@pytest.mark.parametrize("layout", ["rms", "gpt-oss"])
def test_rows_without_an_adapter_are_what_they_were(kernel, layout):
    config = dataclasses.replace(CONFIGS[layout], hidden_size=40, intermediate_size=24)
    weights, batch = random_weights(config), batch_with_holes(config)
    before = experts_of(weights, kernel)(with_adapters(batch, None))
    experts = experts_of(weights, kernel, mixed_adapters(config))
    none = torch.full((NUM_ROWS,), -1, dtype=torch.int32)
    assert torch.equal(experts(with_adapters(batch, None)), before)
    assert torch.equal(experts(with_adapters(batch, none)), before)
    untouched = (batch.adapter_ids == -1) | (batch.adapter_ids == 2)
    if kernel != "torch":  # whose products of other numbers of rows may round otherwise
        assert torch.equal(experts(batch)[untouched], before[untouched])
    experts.set_lora(())
    assert torch.equal(experts(with_adapters(batch, None)), before)


def one_case(weight_format: WeightFormat, num_rows: int) -> tuple[ExpertWeights, ExpertBatch]:
    config = dataclasses.replace(CONFIGS["gpt-oss"], hidden_size=176, intermediate_size=104)
    weights = random_weights(config, torch.bfloat16)
    if weight_format.scheme.is_quantized:
        weights = quantized(weights, weight_format)
    return weights, batch_with_holes(config, num_rows, 3, torch.bfloat16)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    yield torch.set_num_threads
    torch.set_num_threads(1)


def check_rows(weights: ExpertWeights, batch: ExpertBatch, set_threads, weight_on) -> None:
    """A row's bits whatever is beside it, and whoever computes it."""
    experts = experts_of(weights, "cpu", mixed_adapters(weights.config), weight_on)
    whole = experts(batch)
    for start, stop in pairwise((0, 1, 2, 5, 18, len(whole))):
        part = experts(some_rows(batch, slice(start, stop)))
        assert torch.equal(part, whole[start:stop])
    for number in (2, 3, 7):
        set_threads(number)
        assert torch.equal(experts(batch), whole)
        assert torch.equal(experts(some_rows(batch, slice(2, 3))), whole[2:3])
    set_threads(1)


@needs_cpu
@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("weight_format", [WeightFormat.BF16, WeightFormat.INT4_G32])
def test_a_row_does_not_depend_on_batch_or_threads(weight_format, weight_on, num_threads):
    check_rows(*one_case(weight_format, 60), num_threads, weight_on)


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight_format", WeightFormat, ids=lambda f: f.value)
def test_rows_of_every_format_on_every_path(path, weight_format, num_threads):
    with forced_path(path):
        check_rows(*one_case(weight_format, 300), num_threads, WeightOn.OUTPUT)


def test_a_row_of_the_reference_does_not_depend_on_its_batch():
    config = CONFIGS["interleaved"]
    experts = experts_of(random_weights(config), "reference", mixed_adapters(config))
    batch = batch_with_holes(config)
    whole = experts(batch)
    for row in range(NUM_ROWS):
        assert torch.equal(experts(some_rows(batch, slice(row, row + 1)))[0], whole[row])


# --------------------------------------------------------------------------------- the C++ kernel


@needs_cpu
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["rms-scale-first", "interleaved", "ungated-bias"])
def test_every_path_and_odd_sizes(path, layout):
    config = dataclasses.replace(CONFIGS[layout], hidden_size=77, intermediate_size=141)
    weights, adapters = random_weights(config), mixed_adapters(config)
    batch = batch_with_holes(config, 30)
    with forced_path(path):
        found = experts_of(weights, "cpu", adapters)(batch)
    assert_close(found, merged_truth(weights, adapters, batch), torch.float32)


def test_hidden_columns_in_another_order():
    """Act-order: the down projection's columns, and so what an adapter adds, lie otherwise."""
    config = dataclasses.replace(CONFIGS["gpt-oss"], hidden_size=64, intermediate_size=96)
    weights = matrices(config, *PERMUTED["int8, per output"])
    adapters, batch = mixed_adapters(config), batch_with_holes(config, 40)
    truth = merged_truth(dequantized(weights), adapters, batch)
    for kernel in ("torch", *(("cpu",) if missing() is None else ())):
        error = frobenius_error(experts_of(weights, kernel, adapters)(batch), truth)
        assert error <= (1.3 * cpu_products_bound(weights.schemes[0], torch.float32))


@needs_cpu
@pytest.mark.slow
def test_calls_that_need_several_passes():
    config = sizes(3, 2048, 16)
    weights = quantized(random_weights(config), WeightFormat.INT8_G32)
    batch = batch_with_holes(config, 8001, 3)
    experts = experts_of(weights, "cpu", mixed_adapters(config))
    parts = [some_rows(batch, slice(start, start + 900)) for start in range(0, 8001, 900)]
    assert torch.equal(experts(batch), torch.cat([experts(part) for part in parts]))


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("weight_format", WeightFormat, ids=lambda f: f.value)
@by_layout
def test_the_whole_matrix(path, layout, weight_format, weight_on):
    config = dataclasses.replace(CONFIGS[layout], hidden_size=160, intermediate_size=96)
    weights = random_weights(config)
    if weight_format.scheme.is_quantized:
        weights = quantized(weights, weight_format)
    adapters, batch = mixed_adapters(config), batch_with_holes(config, 64)
    truth = merged_truth(dequantized(weights), adapters, batch, weight_on)
    with forced_path(path):
        found = experts_of(weights, "cpu", adapters, weight_on)(batch)
    bound = 1e-5
    if weight_format.scheme.is_quantized:
        bound = 1.3 * cpu_products_bound(weights.schemes[0], torch.float32)
    assert frobenius_error(found, truth) <= bound


# ---------------------------------------------------------------------------- experts with adapters


@kernels
def test_no_rows(kernel):
    config = CONFIGS["stacked"]
    experts = experts_of(random_weights(config), kernel, mixed_adapters(config))
    batch = with_adapters(random_batch(config, 0), torch.zeros(0, dtype=torch.int32))
    assert experts(batch).shape == (0, 8)


@kernels
def test_adapters_are_exchanged_while_the_weights_stay_packed(kernel):
    config = sizes(4, 32, 24)
    experts = RoutedExperts(config, options=ExpertsOptions(kernel=kernel))
    weights = random_weights(config)
    for name, values in (("gate_up_proj", weights.gate_up_proj), ("down_proj", weights.down_proj)):
        getattr(experts, name).data.copy_(values.values)
    batch = with_adapters(random_batch(config, 4), torch.tensor([0, 1, -1, 0], dtype=torch.int32))
    with torch.no_grad():
        experts(with_adapters(batch, None))
        held = experts.state.held
        for seed in (1, 2):
            adapters = (random_adapter(config, 3, seed=seed), random_adapter(config, 2, seed=9))
            experts.set_lora(adapters)
            assert experts.state.held.fingerprint == held.fingerprint
            truth = merged_truth(weights, adapters, batch)
            assert_close(experts(batch), truth, torch.float32)
        expected = experts(batch)
        assert not any("lora" in name for name in experts.state_dict())
        for other in (
            copy.deepcopy(experts),
            pickle.loads(pickle.dumps(experts)),
            experts.to("cpu"),
        ):
            assert torch.equal(other(batch), expected)
        experts.to(torch.bfloat16)  # weights are converted, adapters are not
        assert experts.lora[0].up.a.dtype is torch.float32
        assert_close(
            experts(dataclasses.replace(batch, hidden_states=batch.hidden_states.bfloat16())),
            truth,
            torch.bfloat16,
        )


def test_kernels_without_adapters_say_so():
    config = CONFIGS["stacked"]
    experts = RoutedExperts(config)
    plain = experts.problem(torch.float32, needs_grad=False)
    experts.set_lora([None, random_adapter(config, 2)])
    asked = experts.problem(torch.float32, needs_grad=False)
    assert asked == dataclasses.replace(plain, has_lora=True)
    for name in kernel_names():
        kernel = get_kernel(name)
        assert kernel.has_lora == (name in WITH_LORA)
        on_device = dataclasses.replace(asked, device=(kernel.devices or ("cpu",))[0])
        if not kernel.has_lora:
            assert kernel.unsupported(on_device) == "adds no LoRA adapters"
    with pytest.raises(NoKernelFits, match="grouped_mm: adds no LoRA adapters"):
        select_kernel(asked, kernel="grouped_mm")
    experts.set_lora([None, LoraWeights()])
    assert experts.problem(torch.float32, needs_grad=False) == plain


def test_adapters_that_are_laid_out_stay_where_they_are():
    """So that what a migration has moved is not undone by the next adapter."""
    config = CONFIGS["stacked"]
    experts = experts_of(random_weights(config), "torch", (random_adapter(config, 2),))
    first = experts.lora[0]
    experts.set_lora((*experts.lora, random_adapter(config, 3)))
    assert experts.lora[0].gate.a is first.gate.a
    assert experts.lora[0].down.b.data_ptr() == first.down.b.data_ptr()


def bad(part: LowRank, **change: Tensor) -> LoraWeights:
    return LoraWeights(down=dataclasses.replace(part, **change))


def test_adapters_that_do_not_fit_are_refused():
    config = CONFIGS["stacked"]
    experts = RoutedExperts(config)
    down = random_adapter(config, 2).down
    huge = down.a.clone()
    huge[0, 0, 0] = float("inf")
    for adapter, message in (
        (random_adapter(sizes(4), 2), r"A and B of gate of adapter 1 .*must fit these experts"),
        (random_adapter(sizes(5, 8, 7), 2), r"must fit these experts; got \(5, 2, 8\), \(5, 6, 2"),
        (bad(down, a=down.a.long()), r"A of down of adapter 1 .*must be fp32, bf16 or fp16"),
        (bad(down, b=down.b.double()), r"B of down of adapter 1 .*must be fp32, bf16 or fp16"),
        (bad(down, a=huge), "must be finite"),
        (bad(down, b=down.b.to("meta")), "must be where the experts are"),
    ):
        with pytest.raises(InputError, match=message):
            experts.set_lora([None, adapter])
    assert experts.lora == ()
    ungated = RoutedExperts(CONFIGS["ungated"])
    with pytest.raises(InputError, match="must have no gate where experts are ungated"):
        ungated.set_lora([random_adapter(config, 2, parts=("gate",))])
    with pytest.raises(ConfigError, match="must be A"):
        LowRank(down.a, down.b.mT)


@kernels
def test_rows_must_ask_for_adapters_that_there_are(kernel):
    config = CONFIGS["stacked"]
    experts = experts_of(random_weights(config), kernel, (random_adapter(config, 2),))
    batch = random_batch(config, 3)
    for ids, message in (
        (torch.tensor([0, 1, 0], dtype=torch.int32), r"must be in \[-1, 1\).* got 0 to 1"),
        (torch.tensor([0, -2, 0], dtype=torch.int32), "got -2 to 0"),
        (torch.tensor([0, 0, 0]), "must be .rows,. int32"),
        (torch.tensor([0, 0], dtype=torch.int32), "got 3 rows"),
    ):
        with pytest.raises(InputError, match=message):
            experts(with_adapters(batch, ids))
    with pytest.raises(InputError, match=r"must be in \[-1, 0\)"):
        experts_of(random_weights(config), kernel)(
            with_adapters(batch, torch.zeros(3, dtype=torch.int32))
        )


# ---------------------------------------------------------------------------------------- layers


def two_adapters(config: ExpertsConfig) -> list[LoraWeights]:
    return [random_adapter(config, rank, seed=rank) for rank in (3, 2)]


def layer_with_adapters(kernel: str, **options) -> tuple[FusedMoE, TokenInputs, Tensor]:
    config = moe_config(NUM_EXPERTS, **options)
    layer = build_layer(config, kernel=kernel)
    layer.experts.set_lora(two_adapters(config.experts))
    ids = torch.tensor([0, 1, -1, 0, 1, 0, -1], dtype=torch.int32)
    return layer, TokenInputs(adapter_ids=ids), rows_of(7)


@kernels
def test_every_runner_takes_adapters_along(kernel):
    whole, tokens, rows = layer_with_adapters(kernel, deterministic=kernel != "torch")
    with torch.no_grad():
        expected = whole(rows, tokens)
        assert not torch.allclose(expected, whole(rows), atol=1e-3)
        for runner in (RunnerConfig(max_rows_per_pass=3), RunnerConfig(overlap_min_tokens=2)):
            config = dataclasses.replace(whole.moe_config, runner=runner)
            layer = build_layer(config, kernel=kernel)
            layer.experts.set_lora(whole.experts.lora)
            assert_close(layer(rows, tokens), expected, torch.float32)
        whole.sources = (lambda found, count: tokens,)
        assert torch.equal(whole(rows), expected)


@pytest.mark.parametrize(
    "kernel",
    [pytest.param("torch", marks=pytest.mark.slow), pytest.param("cpu", marks=needs_cpu)],
)
def test_compiled_graphs(kernel):
    """A graph takes adapters that are exchanged later, and rows that ask for none."""
    config = CONFIGS["gpt-oss"]
    weights, batch = random_weights(config), batch_with_holes(config)
    experts = experts_of(weights, kernel, mixed_adapters(config))

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(rows: Tensor, ids: Tensor, topk_weights: Tensor, adapter_ids: Tensor) -> Tensor:
        return experts(ExpertBatch(rows, ids, topk_weights, adapter_ids=adapter_ids))

    tensors = (batch.hidden_states, batch.local_ids, batch.topk_weights, batch.adapter_ids)
    assert_close(compiled(*tensors), experts(batch), torch.float32)
    experts.set_lora(mixed_adapters(config)[::-1])
    truth = merged_truth(weights, mixed_adapters(config)[::-1], batch)
    assert_close(compiled(*tensors), truth, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["torch", pytest.param("cpu", marks=needs_cpu)])
def test_compiled_layers(kernel):
    layer, tokens, rows = layer_with_adapters(kernel)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for adapters in (layer.experts.lora, [random_adapter(layer.experts.experts_config, 4)] * 2):
            layer.experts.set_lora(adapters)
            assert_close(compiled(rows, tokens), layer(rows, tokens), torch.float32)
            assert_close(compiled(rows), layer(rows), torch.float32)


# ----------------------------------------------------------------------------------------- ranks


def loaded(whole: FusedMoE, layer: FusedMoE) -> FusedMoE:
    """The whole layer's adapters on a rank."""
    spread = layer.plan.spread
    adapters = [one and shard_lora(one, spread) for one in whole.experts.lora]
    layer.experts.set_lora(adapters)
    return layer


@pytest.mark.parametrize("ep_size, tp_size", [(2, 1), (2, 2)])
@pytest.mark.parametrize("dispatcher, held", WAYS)
def test_ranks_agree_with_one_process(dispatcher, held, ep_size, tp_size):
    whole, tokens, rows = layer_with_adapters("reference")
    with torch.no_grad():
        expected, plain = whole(rows, tokens), whole(rows)
    parallel = ParallelConfig(
        ep_size=ep_size,
        tp_size=tp_size,
        tokens=held,
        dispatcher=dispatcher,
        num_redundant_experts=2,
        eplb=EplbConfig(),
    )

    def work(transport: Transport) -> None:
        layer = loaded(whole, rank_layer(whole, parallel, transport))
        mine, wanted, start = tokens, expected, 0
        if held is TokensHeld.OWN:  # other tokens on each rank, of which one asks for nothing
            start = 2 * transport.rank
            mine = tokens.slice(start, 7)
            if transport.rank == 1:
                mine, wanted = TokenInputs(), plain
        assert_close(layer(rows[start:], mine), wanted[start:], torch.float32)

    virtual_ranks.run(ep_size * tp_size, work)


def test_an_adapter_is_cut_from_all_experts():
    whole, _, _ = layer_with_adapters("reference")

    def work(transport: Transport) -> None:
        layer = rank_layer(whole, ParallelConfig(ep_size=2), transport)
        part = random_adapter(sizes(NUM_EXPERTS - 1), 2)
        with pytest.raises(ConfigError, match=r"gate of an adapter \(5 experts\) must be of all"):
            shard_lora(part, layer.plan.spread)

    virtual_ranks.run(2, work)


def test_records_carry_adapters():
    layout = Wire(WireFormat.INT8, torch.bfloat16, 24, 3)
    ids, weights = torch.zeros(4, 3, dtype=torch.int32), torch.ones(4, 3)
    rows = torch.randn(4, 24).bfloat16()
    adapters = torch.tensor([3, -1, 0, 7], dtype=torch.int32)
    found = layout.read(layout.write(rows, ids, weights, adapters))
    assert torch.equal(found.adapter_ids, adapters)
    assert frobenius_error(found.hidden_states, rows) < 0.02
    assert layout.read(layout.write(rows, ids, weights)).adapter_ids.tolist() == [-1] * 4


def test_deep_ep_brings_no_adapters_along():
    dispatcher = DeepEpDispatcher.__new__(DeepEpDispatcher)
    ids = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(InputError, match=r"deep_ep, whose rows bring none along.* Use all_to_all"):
        dispatcher.dispatch(torch.zeros(2, 8), ids, torch.ones(2, 1), [2], ids[:, 0])


@kernels
def test_adapters_move_with_their_experts(kernel):
    """What was cut for the old placement answers with the new one, and what comes later does."""
    whole, tokens, rows = layer_with_adapters(kernel)
    old, new = two_placements(NUM_EXPERTS, 2, seed=3)
    more = random_adapter(whole.moe_config.experts, 4, seed=11)
    with torch.no_grad():
        expected = whole(rows, tokens)
        whole.experts.set_lora([*whole.experts.lora[:1], more])
        expected_more = whole(rows, tokens)
        whole.experts.set_lora(two_adapters(whole.moe_config.experts))

    def work(transport: Transport) -> None:
        layer = balanced(
            transport, whole, SHARED, DispatcherName.ALL_REDUCE, placement=old, kernel=kernel
        )
        loaded(whole, layer)
        moved = Moved(layer, new)
        while not moved.migration.is_over:
            assert_close(layer(rows, tokens), expected, torch.float32)
            moved.migration.step()
        assert moved.migration.num_moved > 0
        assert_close(layer(rows, tokens), expected, torch.float32)
        there = dataclasses.replace(layer.plan.spread, placement=new)
        layer.experts.set_lora([layer.experts.lora[0], shard_lora(more, there)])
        assert_close(layer(rows, tokens), expected_more, torch.float32)

    virtual_ranks.run(2, work)


def test_adapters_loaded_in_a_migration_begin_its_layer_anew():
    whole, tokens, rows = layer_with_adapters("reference")
    old, new = two_placements(NUM_EXPERTS, 2, seed=3)
    with torch.no_grad():
        expected = whole(rows, tokens)

    def work(transport: Transport) -> list[Phase]:
        layer = balanced(transport, whole, SHARED, DispatcherName.ALL_REDUCE, placement=old)
        moved = Moved(layer, new)
        for step in range(20):
            moved.migration.set_slots(LayerSlots(layer.slots()))
            moved.migration.step()
            if step == 1:
                loaded(whole, layer)
            if moved.migration.is_over:
                break
        assert moved.migration.failure is None
        assert_close(layer(rows, tokens), expected, torch.float32)
        return [entry.phase for entry in moved.migration.journal]

    prepared, verified, committed = Phase.PREPARED, Phase.VERIFIED, Phase.COMMITTED
    assert virtual_ranks.run(2, work) == [[prepared, prepared, verified, committed]] * 2


# ---------------------------------------------------------------------- models of Transformers


def test_sources_bring_adapters_to_both_forms():
    """A block of ours, and experts in the family's own block."""
    outputs = []
    for model, asks in (
        (converted_model("gpt_oss"), FusedMoE),
        (one_line("gpt_oss"), PackedExperts),
    ):
        before = output("gpt_oss", model)  # adopts
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.set_lora([random_adapter(module.experts_config, 2)])
            if isinstance(module, asks):
                module.sources = (
                    lambda found, count: dataclasses.replace(
                        found, adapter_ids=torch.zeros(count, dtype=torch.int32)
                    ),
                )
        outputs.append(output("gpt_oss", model))
        assert frobenius_error(outputs[-1], before) > 0.01
    assert_close(*outputs, torch.float32)


def test_experts_of_a_family_s_router_replay_nothing():
    model = one_line("gpt_oss")
    output("gpt_oss", model)
    experts = next(m for m in model.modules() if isinstance(m, PackedExperts))
    experts.sources = (lambda found, count: TokenInputs(replayed_ids=torch.zeros(count, 2)),)
    with pytest.raises(InputError, match=r"replayed_ids .* must be for a layer whose"):
        output("gpt_oss", model)


def test_experts_with_adapters_are_not_spread():
    whole = build_layer(moe_config(NUM_EXPERTS), kernel="reference").experts
    whole.set_lora(two_adapters(whole.experts_config))
    plan = plan_experts(whole, whole.options, lambda m: (m.experts_config, dict(m.storage)))

    def work(transport: Transport) -> None:
        ranks = ExpertParallel.over(ParallelConfig(ep_size=2), transport)
        spread = Spread.of_experts(whole.experts_config, ranks)
        with pytest.raises(InputError, match=r"must not be spread over ranks.* then load them"):
            plan.sharded(spread)

    virtual_ranks.run(2, work)
