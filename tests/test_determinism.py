"""`deterministic=True`: a row alone, in any batch, on any threads and ranks, has the same bits."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import virtual_ranks
from expert_cases import build_layer, moe_config, quantized, random_weights, rows_of
from families import tiny_model
from spread_layers import rank_layer
from tolerances import RTOL, assert_close, relative_error
from torch import Tensor, nn

from mixtura import convert
from mixtura.bench import determinism as slowdown
from mixtura.config import (
    ActivationDtype,
    DispatcherName,
    EplbConfig,
    GatePrecision,
    MoEConfig,
    NativeGate,
    NoComputeExperts,
    NoComputeKind,
    ParallelConfig,
    Renormalize,
    ScoreFunction,
    SharedExpertsConfig,
    Simulation,
    SimulationConfig,
    TokensHeld,
    WireFormat,
)
from mixtura.errors import ConfigError, InputError, NoKernelFits, UnsupportedModel
from mixtura.experts import RowActivation, RowLinear, SharedExperts
from mixtura.hf.adopt import adopt_class
from mixtura.hf.attention import attention_by_sequence, attention_forward
from mixtura.hf.explain import explain
from mixtura.kernels.cpu.extension import forced_path, missing, runnable_paths
from mixtura.kernels.cpu.row_linear import row_linear, takes_row_linear
from mixtura.kernels.reference.linear import linear_by_row
from mixtura.kernels.row_linear import row_invariant_linear
from mixtura.layer import FusedMoE
from mixtura.parallel import Placement, Topology, Transport
from mixtura.parallel.ranks import check_deterministic_ranks
from mixtura.quant.formats import WeightFormat

SIZES = (1, 2, 3, 8, 17, 64)
HIDDEN = 96
SHARED = SharedExpertsConfig(intermediate_size=67, has_sigmoid_gate=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP32_SLOWLY = [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
needs_extension = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> Iterator[Tensor]:
    """Places of rows, shuffled, in batches of each size."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        yield torch.randperm(max(sizes), generator=generator)[:size]


def assert_rows_alone(
    run: Callable[[Tensor], Tensor], rows: Tensor, sizes: tuple[int, ...] = SIZES
) -> Tensor:
    """Rows have the same bits in every batch; returns those."""
    with torch.no_grad():
        expected = run(rows)
        for order in batches(sizes):
            found = run(rows[order])
            assert torch.equal(found, expected[order]), len(order)
    return expected


def layer_config(**changes: Any) -> MoEConfig:
    return moe_config(
        13, 3, HIDDEN, experts={"intermediate_size": 48}, deterministic=True, **changes
    )


# ---------------------------------------------------------------------------------- linear layers


@needs_extension
@pytest.mark.parametrize("path", runnable_paths() if missing() is None else [])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_linear_is_the_reference_and_its_rows_stand_alone(path, dtype):
    """Columns that end in a chunk, in a vector, and in neither; more rows than one task takes."""
    generator = torch.Generator().manual_seed(0)
    with forced_path(path):
        for num_rows, num_columns in ((1, 16), (7, 33), (67, 1030), (130, 2048)):
            weight = torch.randn(num_rows, num_columns, generator=generator).to(dtype)
            bias = torch.randn(num_rows, generator=generator).to(dtype)
            rows = torch.randn(70, num_columns, generator=generator).to(dtype)
            found = assert_rows_alone(
                lambda x, w=weight, b=bias: row_linear(x, w, b), rows, (1, 2, 3, 5, 17, 70)
            )
            truth = rows.double() @ weight.double().T + bias.double()
            assert found.dtype == dtype
            assert relative_error(found, truth) < RTOL[dtype]


@needs_extension
def test_row_linear_does_not_depend_on_the_number_of_threads():
    weight, rows = rows_of(700, 1100), rows_of(300, 1100, seed=2)
    with threads(1):
        expected = row_linear(rows, weight)
    for count in (2, 3):
        with threads(count):
            assert torch.equal(row_linear(rows, weight), expected)
            assert torch.equal(row_linear(rows[5:6], weight), expected[5:6])


@needs_extension
def test_row_linear_takes_rows_and_weights_of_two_dtypes():
    rows, weight = rows_of(5, 48), rows_of(9, 48, seed=2)
    for rows_as, weight_as in itertools.permutations(DTYPES, 2):
        x, w = rows.to(rows_as), weight.to(weight_as)
        found = row_linear(x, w)
        assert found.dtype == rows_as
        assert relative_error(found, x.double() @ w.double().T) < RTOL[rows_as]


def test_row_linear_leaves_what_it_cannot_read_to_the_loop():
    rows, weight = rows_of(3, 8), rows_of(5, 8, seed=2)
    for x, w in ((rows.double(), weight.double()), (rows, weight.T.contiguous().T)):
        assert not takes_row_linear(x, w, None)
        assert torch.equal(row_invariant_linear(x, w), linear_by_row(x, w))
    assert row_invariant_linear(rows.view(3, 1, 8)[:0], weight).shape == (0, 1, 5)
    nothing = row_invariant_linear(rows[:, :0], weight[:, :0], weight[:, 0])
    assert torch.equal(nothing, weight[:, 0].expand(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_linear_has_gradients(dtype):
    found = []
    for run in (row_invariant_linear, nn.functional.linear):
        inputs = [rows_of(6, 8, seed=1).view(3, 2, 8), rows_of(5, 8, seed=2), rows_of(1, 5)[0]]
        inputs = [x.to(dtype).requires_grad_() for x in inputs]
        out = run(*inputs)
        out.float().square().sum().backward()
        found.append([out, *(x.grad for x in inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, dtype)


@needs_extension
def test_row_linear_sees_weights_that_change():
    layer = RowLinear(16, 5)
    rows = rows_of(4, 16)
    with torch.no_grad():
        before = layer(rows)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        assert torch.equal(layer(rows), before * 2)
        layer.is_row_invariant = False
        assert torch.equal(layer(rows), nn.functional.linear(rows, layer.weight, layer.bias))


@needs_extension
@pytest.mark.slow
def test_row_linear_is_traced():
    layer, rows = RowLinear(16, 5), rows_of(4, 16)
    graph = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(graph(rows), layer(rows))


def test_activations_of_a_row_do_not_depend_on_its_place():
    """Rows of a width that no vector divides, of a function that torch computes in two ways."""
    function, rows = nn.SiLU(), rows_of(300, 39)
    plain = function(rows)
    adopt_class(function, RowActivation)
    expected = function(rows)
    assert torch.equal(torch.cat([function(row) for row in rows.split(1)]), expected)
    assert torch.equal(function(rows.view(20, 15, 39)).view(300, 39), expected)
    assert function(rows[:3, :0]).shape == (3, 0)
    assert_close(expected, plain, torch.float32)


# ------------------------------------------------------------------------------------------ layers

LAYERS: dict[str, dict[str, Any]] = {
    "shared": {"shared": SHARED},
    "bias": {"shared": SharedExpertsConfig(intermediate_size=67, is_gated=False, has_bias=True)},
    "zero": {"routing": {"no_compute": NoComputeExperts(kind=NoComputeKind.ZERO, count=3)}},
    "p_norm": {"routing": {"renormalize": Renormalize.P_NORM, "p_norm": 0.0}},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_row_of_a_layer_alone_and_in_batches(name, dtype):
    layer = build_layer(layer_config(**LAYERS[name])).to(dtype)
    rows = rows_of(64, HIDDEN).to(dtype)
    expected = assert_rows_alone(layer, rows)
    with torch.no_grad():
        again = copy.deepcopy(layer)(rows)
    assert torch.equal(again, expected)  # run to run, packed anew


@pytest.mark.parametrize("score", list(ScoreFunction))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_native_gates_and_soft_caps(score, dtype):
    """What torch computes elementwise must not depend on where in a batch a token stands."""
    routing: dict[str, Any] = {"score": score, "native": NativeGate(fp32_scores=False)}
    if score is ScoreFunction.SPARSEMIXER:
        routing["top_k"] = 2
    else:
        routing |= {"logit_softcap": 3.0, "renormalize": Renormalize.SUM}
    config = layer_config()
    rule = dataclasses.replace(config.routing, **routing)
    config = dataclasses.replace(config, routing=rule, gate=GatePrecision.NATIVE)
    assert_rows_alone(build_layer(config).to(dtype), rows_of(64, HIDDEN).to(dtype))


@pytest.mark.parametrize("count", [2, 3])
def test_a_layer_on_any_number_of_threads(count):
    config = layer_config(
        shared=dataclasses.replace(SHARED, intermediate_size=701),
    )
    config = dataclasses.replace(
        config,
        hidden_size=640,
        experts=dataclasses.replace(config.experts, hidden_size=640, intermediate_size=320),
    )
    layer, rows = build_layer(config), rows_of(64, 640)
    with threads(1), torch.no_grad():
        expected = layer(rows)
    with threads(count), torch.no_grad():
        assert torch.equal(layer(rows), expected)
        assert torch.equal(layer(rows[7:8]), expected[7:8])


FORMATS = [name for name in WeightFormat if name.scheme.is_quantized]
QUICK_FORMATS = (WeightFormat.INT4_G128, WeightFormat.INT8_G32, WeightFormat.MXFP4)


@pytest.mark.parametrize(
    "weights",
    [
        name if name in QUICK_FORMATS else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMATS
    ],
)
def test_every_weight_format(weights):
    config = layer_config()
    config = dataclasses.replace(
        config,
        hidden_size=128,
        experts=dataclasses.replace(config.experts, hidden_size=128, intermediate_size=128),
    )
    stored = quantized(random_weights(config.experts, dtype=torch.bfloat16), weights)
    for activation_dtype in (None, ActivationDtype.INT8):
        one = dataclasses.replace(config, activation_dtype=activation_dtype)
        layer = FusedMoE(one, weights=stored, dtype=torch.bfloat16)
        torch.nn.init.normal_(layer.gate.weight)
        assert_rows_alone(layer, rows_of(64, 128).bfloat16(), (1, 3, 17, 64))


# ------------------------------------------------------------------------------------------- ranks

WAYS = [
    (DispatcherName.ALL_TO_ALL, TokensHeld.OWN),
    (DispatcherName.ALL_TO_ALL, TokensHeld.SHARED),
    (DispatcherName.ALL_GATHER, TokensHeld.OWN),
    (DispatcherName.ALL_REDUCE, TokensHeld.SHARED),
]


@pytest.mark.parametrize("dtype", FP32_SLOWLY)
@pytest.mark.parametrize("dispatcher, held", WAYS)
def test_one_rank_and_two(dispatcher, held, dtype):
    """A request alone on one rank, and in a batch on two."""
    whole = build_layer(layer_config(shared=SHARED)).to(dtype)
    rows = rows_of(64, HIDDEN).to(dtype)
    with torch.no_grad():
        alone = torch.cat([whole(row) for row in rows.split(1)])
    parallel = ParallelConfig(ep_size=2, dispatcher=dispatcher, tokens=held)

    def work(transport: Transport) -> list[Tensor]:
        layer = rank_layer(whole, parallel, transport, kernel=None)
        own = [rows[order] for order in parts(transport.rank)]
        with torch.no_grad():
            return [layer(part) for part in own]

    def parts(rank: int) -> list[Tensor]:
        return list(batches((1, 3, 17, 64), seed=rank if held is TokensHeld.OWN else 0))

    for rank, outputs in enumerate(virtual_ranks.run(2, work)):
        for order, out in zip(parts(rank), outputs, strict=True):
            assert torch.equal(out, alone[order])


def test_replicas_are_alike():
    """Which replica of an expert a token takes changes nothing."""
    whole = build_layer(layer_config())
    rows = rows_of(33, HIDDEN)
    with torch.no_grad():
        expected = whole(rows)
    slots = [*range(13), 0, 5, 5]
    placement = Placement(
        torch.tensor(slots, dtype=torch.int32), 13, Topology.even(len(slots), 2, 1)
    )
    parallel = ParallelConfig(ep_size=2, num_redundant_experts=3, eplb=EplbConfig())

    def work(transport: Transport) -> list[Tensor]:
        layer = rank_layer(whole, parallel, transport, placement=placement, kernel=None)
        first, last = (
            torch.tensor(
                [choose(i for i, held in enumerate(slots) if held == e) for e in range(13)]
            )
            for choose in (min, max)
        )
        found = []
        for replicas in (first, last):
            layer.place = lambda ids, replicas=replicas: replicas[ids.long()].int()
            with torch.no_grad():
                found.append(layer(rows))
        return found

    for outputs in virtual_ranks.run(2, work):
        for out in outputs:
            assert torch.equal(out, expected)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", list(Simulation))
def test_a_simulation_is_refused(kind):
    with pytest.raises(ConfigError, match="must be None with deterministic=True"):
        layer_config(routing={"simulation": SimulationConfig(kind=kind)})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tp_size": 2}, "tp_size"),
        ({"wire": WireFormat.INT8}, "wire"),
        ({"wire": WireFormat.FP8}, "wire"),
    ],
)
def test_ranks_that_round_otherwise_are_refused(changes, message):
    parallel = ParallelConfig(ep_size=2, tokens=TokensHeld.OWN, **changes)
    with pytest.raises(ConfigError, match=f"{message} .* with deterministic=True"):
        check_deterministic_ranks(parallel)
    whole = build_layer(layer_config())
    if "wire" in changes:
        with pytest.raises(ConfigError, match="wire"):
            virtual_ranks.run(2, lambda transport: rank_layer(whole, parallel, transport))


def test_models_of_which_only_the_experts_are_ours_are_refused_layer_by_layer():
    model = tiny_model("ernie4_5_moe").model
    with pytest.raises(UnsupportedModel, match=r"deterministic \(True\)") as caught:
        convert(model, deterministic=True)
    assert not any(isinstance(module, RowLinear) for module in model.modules())
    text = str(caught.value)
    paths = [name for name, module in model.named_modules() if name.endswith("mlp.experts")]
    assert paths and all(f"\n  {path}: only its experts are ours" in text for path in paths)


def test_a_shared_expert_that_is_no_plain_map_is_refused_by_its_path():
    model = copy.deepcopy(tiny_model("qwen2_moe").model)

    class Noisy(nn.Linear):
        pass

    path = next(name for name, _ in model.named_modules() if name.endswith("shared_expert"))
    model.get_submodule(path).up_proj.__class__ = Noisy
    with pytest.raises(UnsupportedModel, match=r"shared_expert\.up_proj: Noisy is no plain"):
        convert(model, deterministic=True)


def test_shared_experts_and_their_gate_are_ours_where_other_layers_stay_plain(monkeypatch):
    """As on a GPU, where only MoE layers make the promise."""
    monkeypatch.setattr("mixtura.hf.determinism.missing", lambda: "no extension")
    model = convert(tiny_model("qwen2_moe").model, deterministic=True)
    ours = {name for name, module in model.named_modules() if isinstance(module, RowLinear)}
    maps = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")
    blocks = {name.split(".mlp.")[0] for name in ours}
    assert blocks
    expected = {f"{block}.mlp.{name}" for block in blocks for name in (*maps, "shared_expert_gate")}
    assert ours == expected


def test_jitter_in_training_is_refused_where_it_would_be_drawn():
    model = convert(copy.deepcopy(tiny_model("mixtral").model), deterministic=True)
    block = next(module for module in model.modules() if isinstance(module, FusedMoE))
    block.jitter_noise = 0.1
    rows = torch.randn(1, 3, block.moe_config.hidden_size)
    with torch.no_grad():
        block(rows)
        block.train()
        with pytest.raises(InputError, match="jitter_noise"):
            block(rows)


def test_a_kernel_whose_rows_depend_on_the_batch_is_refused():
    with pytest.raises(NoKernelFits, match="its rows depend on the batch around them"):
        convert(copy.deepcopy(tiny_model("qwen3_moe").model), kernel="torch", deterministic=True)


def test_explain_refuses_alike(tmp_path):
    model = tiny_model("ernie4_5_moe").model
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="only its experts are ours"):
        explain(tmp_path, deterministic=True)


# ------------------------------------------------------------------------------------------ models


def deterministic_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model = copy.deepcopy(tiny_model(family).model).to(dtype)
    model.set_attn_implementation("sdpa")
    return convert(model, deterministic=True)


@needs_extension
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_linear_layers_of_a_model_are_ours_and_go_back(family):
    model = deterministic_model(family)
    assert not any(type(module) is nn.Linear for module in model.modules())
    shared = [m for m in model.modules() if isinstance(m, SharedExperts)]
    assert all(type(m.up_proj).__name__ == "MixturaLinear" for m in shared)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        convert(model)
        plain = copy.deepcopy(tiny_model(family).model)
        plain.set_attn_implementation("sdpa")
        convert(plain)
        assert torch.equal(model(ids).logits, plain(ids).logits)


@needs_extension
@pytest.mark.parametrize("dtype", FP32_SLOWLY)
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe"])
def test_logits_of_a_prompt_alone_and_in_batches(family, dtype):
    model = deterministic_model(family, dtype)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (64, 9), generator=torch.Generator().manual_seed(0))
    assert_rows_alone(lambda batch: model(batch).logits, ids)


@needs_extension
@pytest.mark.parametrize("family", ["olmoe", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_logits_of_decode_steps_alone_and_in_batches(family):
    model = deterministic_model(family, torch.bfloat16)
    ids = torch.randint(
        model.config.vocab_size, (17, 12), generator=torch.Generator().manual_seed(0)
    )

    def run(batch: Tensor) -> Tensor:
        out = model(batch[:, :9], use_cache=True)
        steps = [out.logits[:, -1:]]
        for at in range(9, 12):
            out = model(batch[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        return torch.cat(steps, 1)

    assert_rows_alone(run, ids, (1, 2, 3, 8, 17))


@needs_extension
@pytest.mark.parametrize("dtype", FP32_SLOWLY)
@pytest.mark.parametrize("family", ["olmoe", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_generation_alone_and_padded_on_the_left(family, dtype):
    """Prompts of different lengths in one batch: every step's logits are those alone."""
    model = deterministic_model(family, dtype)
    prompts = [rows_of(length, 1, seed=length)[:, 0] for length in (5, 1, 12, 7, 12)]
    prompts = [(prompt.abs() * 40).long() % (model.config.vocab_size - 1) + 1 for prompt in prompts]

    def logits_of(ids: Tensor, mask: Tensor) -> Tensor:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=4,
            max_new_tokens=4,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1)

    alone = [logits_of(prompt[None], torch.ones_like(prompt)[None]) for prompt in prompts]
    for order in ([0, 1, 2, 3, 4], [3, 1], [4, 0, 1]):
        width = max(len(prompts[i]) for i in order)
        padded = [nn.functional.pad(prompts[i], (width - len(prompts[i]), 0)) for i in order]
        ids = torch.stack(padded)
        found = logits_of(ids, (ids != 0).long())
        for row, i in enumerate(order):
            assert torch.equal(found[row], alone[i][0]), (order, i)


@pytest.mark.parametrize("window, is_causal", [(None, True), (3, True), (None, False)])
def test_attention_by_sequence_is_attention(window, is_causal):
    """Masks that are causal, that have a window, and whose first keys nobody sees.

    What a module is without a mask does not count where there is one.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, n, 8, 16, generator=generator) for n in (4, 2, 2))
    places = torch.arange(8)
    mask = places[:, None] >= places
    if window is not None:
        mask = mask & (places[:, None] - places < window)
    mask = mask.repeat(3, 1, 1, 1)
    for sequence, padding in enumerate((0, 2, 5)):
        mask[sequence, :, :, :padding] = False
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = is_causal, 2
    found, _ = attention_by_sequence(module, query, key, value, mask)
    expected, _ = attention_forward(module, query, key, value, mask)
    for sequence, padding in enumerate((0, 2, 5)):
        assert_close(found[sequence, padding:], expected[sequence, padding:], torch.float32)
        assert not found[sequence, :padding].any()
        alone = [x[sequence : sequence + 1, :, padding:] for x in (query, key, value)]
        own = None if window is None else mask[sequence : sequence + 1, :, padding:, padding:]
        one, _ = attention_forward(module, *alone, own, is_causal=True)
        assert torch.equal(found[sequence, padding:], one[0])


@needs_extension
def test_the_slowdown_is_measured_and_layers_are_checked(monkeypatch):
    model = copy.deepcopy(tiny_model("qwen2_moe").model)
    found = slowdown.measure_slowdown(
        model, "tiny", num_prompt_tokens=20, num_new_tokens=3, repetitions=1
    )
    assert found.wrong_layers == () and found.num_layers > 0
    assert found.prompt_ratio > 0 and found.decode_ratio > 0
    assert "bitwise equal" in found.summary()
    convert(model, deterministic=True)
    prompt = torch.arange(20).view(1, 20)
    assert slowdown.wrong_layers(model, prompt) == []
    block = next(module for module in model.modules() if isinstance(module, FusedMoE))
    run = block.run
    monkeypatch.setattr(
        block,
        "run",
        lambda rows, tokens=None: dataclasses.replace(
            run(rows, tokens), hidden_states=run(rows, tokens).hidden_states + rows.mean()
        ),
    )
    assert len(slowdown.wrong_layers(model, prompt)) == 1
