"""`FusedMoE` against dense formulas: all experts on all tokens, weighed by a plain choice."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import gc
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_cases import (
    build_layer,
    converted,
    cpu_products_bound,
    dequantized,
    moe_config,
    plain_expert,
    quantized,
    random_weights,
    rows_of,
)
from tolerances import RTOL, assert_close, frobenius_error, relative_error
from torch import Tensor, nn

import mixtura.layer
from mixtura.config import (
    SWIGLU_OAI,
    GatePrecision,
    GateUp,
    GroupLimit,
    MoEConfig,
    NativeGate,
    NoComputeExperts,
    NoComputeKind,
    Renormalize,
    RunnerConfig,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
    SharedExpertsConfig,
    WeightOn,
)
from mixtura.errors import GradientUnsupported, InputError, NoKernelFits
from mixtura.experts import RoutedExperts
from mixtura.layer import FusedMoE, check_ids, is_moe_layer
from mixtura.quant.formats import WeightFormat
from mixtura.types import ExpertWeights, TokenInputs

SHARED = SharedExpertsConfig(intermediate_size=10, has_sigmoid_gate=True)
Slots = list[tuple[int, float]]
"""(expert id, weight) of one token."""


# -------------------------------------------------------------------------- choices in plain Python


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def best(values: list[float], count: int) -> list[int]:
    """Indices of the largest values; ties to the lower index."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def choose_softmax(logits: list[float], layer: FusedMoE, token: int) -> Slots:
    scores = softmax(logits)
    return [(expert, scores[expert]) for expert in best(scores, layer.moe_config.routing.top_k)]


def choose_softmax_of_the_chosen(logits: list[float], layer: FusedMoE, token: int) -> Slots:
    ids = best(logits, layer.moe_config.routing.top_k)
    return list(zip(ids, softmax([logits[expert] for expert in ids]), strict=True))


def choose_deepseek(logits: list[float], layer: FusedMoE, token: int) -> Slots:
    """Sigmoid scores; a bias chooses two of four groups by their two best, then experts in them."""
    routing = layer.moe_config.routing
    bias = layer.gate.selection_bias.tolist()
    scores = [sigmoid(logit) for logit in logits]
    selection = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // 4
    groups = [sorted(selection[g * size : (g + 1) * size])[-2:] for g in range(4)]
    kept = best([sum(group) for group in groups], 2)
    allowed = [
        value if expert // size in kept else -math.inf for expert, value in enumerate(selection)
    ]
    ids = best(allowed, routing.top_k)
    total = sum(scores[expert] for expert in ids) + routing.epsilon
    return [(expert, scores[expert] / total * routing.scale) for expert in ids]


def choose_by_table(logits: list[float], layer: FusedMoE, token: int) -> Slots:
    scores = softmax(logits)
    ids = layer.gate.hash_table[TOKEN_IDS[token]].tolist()
    return [(expert, scores[expert]) for expert in ids]


def choose_with_shared(logits: list[float], layer: FusedMoE, token: int) -> Slots:
    """The last two logits are gates of the shared experts, which are experts 6 and 7."""
    shared = [(6 + index, sigmoid(gate)) for index, gate in enumerate(logits[6:])]
    return choose_softmax(logits[:6], layer, token) + shared


TOKEN_IDS = [3, 0, 7, 7, 1, 9, 2]
Choose = Callable[[list[float], FusedMoE, int], Slots]

CASES: dict[str, tuple[MoEConfig, Choose]] = {
    "softmax": (moe_config(), choose_softmax),
    "softmax after top-k": (
        moe_config(routing={"score_order": ScoreOrder.AFTER_TOP_K}, has_gate_bias=True),
        choose_softmax_of_the_chosen,
    ),
    "gpt-oss experts": (
        moe_config(
            experts={
                "gate_up": GateUp.INTERLEAVED,
                "is_transposed": True,
                "has_bias": True,
                "activation": SWIGLU_OAI,
            }
        ),
        choose_softmax,
    ),
    "sigmoid, bias, groups, scale": (
        moe_config(
            8,
            3,
            routing={
                "score": ScoreFunction.SIGMOID,
                "selection_bias": SelectionBias.ON_SCORE,
                "groups": GroupLimit(num_expert_groups=4, topk_groups=2),
                "renormalize": Renormalize.SUM,
                "epsilon": 1e-20,
                "scale": 2.5,
            },
            shared=SHARED,
        ),
        choose_deepseek,
    ),
    "scale on the output": (
        moe_config(routing={"scale": 3.0, "scale_on": ScaleOn.OUTPUT}, shared=SHARED),
        choose_softmax,
    ),
    "weight on the input": (
        moe_config(routing={"weight_on": WeightOn.INPUT}, experts={"has_bias": True}),
        choose_softmax,
    ),
    "zero experts": (
        moe_config(
            5, 3, routing={"no_compute": NoComputeExperts(kind=NoComputeKind.ZERO, count=3)}
        ),
        choose_softmax,
    ),
    "identity experts": (
        moe_config(
            5, 3, routing={"no_compute": NoComputeExperts(kind=NoComputeKind.IDENTITY, count=3)}
        ),
        choose_softmax,
    ),
    "constant experts": (
        moe_config(
            5, 3, routing={"no_compute": NoComputeExperts(kind=NoComputeKind.CONSTANT, count=3)}
        ),
        choose_softmax,
    ),
    "latent": (
        moe_config(
            experts={"hidden_size": 12},
            has_latent=True,
            shared=SHARED,
            routing={"scale": 3.0, "scale_on": ScaleOn.OUTPUT},
        ),
        choose_softmax,
    ),
    "latent identity experts": (
        moe_config(
            experts={"hidden_size": 12},
            has_latent=True,
            routing={"no_compute": NoComputeExperts(kind=NoComputeKind.IDENTITY, count=3)},
        ),
        choose_softmax,
    ),
    "hash routing": (moe_config(routing={"hash_routing": True}), choose_by_table),
    "fused shared experts": (
        moe_config(routing={"num_fused_shared_experts": 2, "fused_shared_gate": True}),
        choose_with_shared,
    ),
    "shared": (moe_config(shared=SHARED), choose_softmax),
}
by_case = pytest.mark.parametrize("name", CASES)


def tokens_for(config: MoEConfig, num_tokens: int = len(TOKEN_IDS)) -> TokenInputs:
    if not config.routing.hash_routing:
        return TokenInputs()
    return TokenInputs(input_ids=torch.tensor(TOKEN_IDS)[:num_tokens])


def layer_of(config: MoEConfig, **options: Any) -> FusedMoE:
    """A random layer; tables of ids too."""
    layer = build_layer(config, **options)
    if config.routing.hash_routing:
        generator = torch.Generator().manual_seed(5)
        order = torch.rand(20, config.routing.num_experts, generator=generator).argsort(1)
        layer.gate.hash_table = order[:, : config.routing.top_k].int()
    return layer


def dense_formula(
    layer: FusedMoE, rows: Tensor, choose: Choose, weights: ExpertWeights | None = None
) -> Tensor:
    """The layer's meaning in float64: every expert on every row."""
    config, part = layer.moe_config, {k: v.double() for k, v in layer.state_dict().items()}
    rows = rows.double()
    weights = converted(weights or layer.experts.expert_weights, torch.float64)
    logits = rows @ part["gate.weight"].T + part.get("gate.bias", torch.zeros(()))
    inner = rows @ part["latent_in.weight"].T if config.has_latent else rows
    total = torch.zeros_like(inner)
    for token, token_logits in enumerate(logits.tolist()):
        row = inner[token : token + 1]
        for expert, weight in choose(token_logits, layer, token):
            total[token] += slot(layer, weights, expert, weight, row)
    if config.has_latent:
        total = total @ part["latent_out.weight"].T
    if config.routing.scale_on is ScaleOn.OUTPUT:
        total = total * config.routing.scale
    if config.shared is None:
        return total
    up = rows @ part["shared_experts.up_proj.weight"].T
    gate = rows @ part["shared_experts.gate_proj.weight"].T
    shared = (gate * torch.sigmoid(gate) * up) @ part["shared_experts.down_proj.weight"].T
    return total + shared * torch.sigmoid(rows @ part["shared_expert_gate.weight"].T)


def slot(
    layer: FusedMoE, weights: ExpertWeights, expert: int, weight: float, row: Tensor
) -> Tensor:
    """What one slot adds to a token. (1,H) -> (H,)."""
    routing = layer.moe_config.routing
    no_compute = expert - routing.num_experts - routing.num_fused_shared_experts
    if routing.no_compute is not None and no_compute >= 0:
        match routing.no_compute.kind:
            case NoComputeKind.ZERO:
                return torch.zeros_like(row[0])
            case NoComputeKind.IDENTITY:
                return weight * row[0]
            case NoComputeKind.CONSTANT:
                return weight * layer.gate.constants[no_compute].double()
    if routing.weight_on is WeightOn.INPUT:
        return plain_expert(weights, expert, row * weight)[0]
    return weight * plain_expert(weights, expert, row)[0]


# ------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@by_case
def test_the_layer_is_its_dense_formula(name, kernel):
    config, choose = CASES[name]
    layer, rows = layer_of(config, kernel=kernel), rows_of(len(TOKEN_IDS))
    with torch.no_grad():
        out = layer(rows, tokens_for(config))
        expected = dense_formula(layer, rows, choose)
    assert out.dtype == torch.float32
    assert_close(out, expected, torch.float32)


@by_case
def test_deterministic_is_the_same_formula(name):
    config, choose = CASES[name]
    layer = layer_of(dataclasses.replace(config, deterministic=True))
    rows = rows_of(len(TOKEN_IDS))
    with torch.no_grad():
        out = layer(rows, tokens_for(config))
        assert_close(out, dense_formula(layer, rows, choose), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_case
def test_low_precision(name, dtype):
    """The gate is in fp32, so that the choice is that of the formula."""
    config, choose = CASES[name]
    layer, rows = layer_of(config).to(dtype), rows_of(len(TOKEN_IDS)).to(dtype)
    with torch.no_grad():
        out = layer(rows, tokens_for(config))
        expected = dense_formula(layer, rows, choose)
    assert out.dtype == dtype
    # Rounded after every linear map: gate/up, down, latent, shared.
    assert relative_error(out, expected) < 2 * RTOL[dtype]


def test_float64_experts():
    config, choose = CASES["softmax"]
    layer, rows = layer_of(config).double(), rows_of(7).double()
    with torch.no_grad():
        expected = dense_formula(layer, rows, choose)
        assert_close(layer(rows).float(), expected, torch.float32)  # the gate is in fp32
        assert layer(rows).dtype == torch.float64


def test_custom_routing():
    def custom(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[5, 0]]).expand(logits.shape[0], top_k)
        return torch.tensor([[0.25, 2.0]]).expand(logits.shape[0], top_k), ids

    layer, rows = build_layer(moe_config(), custom_routing=custom), rows_of(4)
    with torch.no_grad():
        expected = dense_formula(layer, rows, lambda *_: [(5, 0.25), (0, 2.0)])
        assert_close(layer(rows), expected, torch.float32)


@pytest.mark.parametrize("weight_format", [WeightFormat.INT8_CHANNEL, WeightFormat.MXFP4])
def test_quantized_experts(weight_format):
    config = moe_config(shared=SHARED)
    weights = quantized(random_weights(config.experts), weight_format)
    layer, rows = build_layer(config, weights=weights), rows_of(5)
    assert not any(name.startswith("experts.") for name, _ in layer.named_parameters())
    with torch.no_grad():
        expected = dense_formula(layer, rows, choose_softmax, dequantized(weights))
        bound = cpu_products_bound(weights.gate_up_proj.scheme, torch.float32)
        assert frobenius_error(layer(rows), expected) <= bound
        plain = build_layer(config, weights=weights, kernel="torch")
        assert_close(plain(rows), expected, torch.float32)
    with pytest.raises(GradientUnsupported, match=r"Use torch.no_grad\(\)"):
        layer(rows)


@by_case
def test_gradients_reach_every_parameter(name):
    config, _ = CASES[name]
    layers = [layer_of(config, kernel=kernel) for kernel in ("torch", "reference")]
    found = []
    for layer in layers:
        rows = rows_of(len(TOKEN_IDS)).requires_grad_()
        layer(rows, tokens_for(config)).square().sum().backward()
        found.append({"rows": rows.grad} | {n: p.grad for n, p in layer.named_parameters()})
    for role, gradient in found[1].items():
        assert gradient is not None, role
        assert gradient.any(), role
        assert relative_error(found[0][role], gradient) < 4 * RTOL[torch.float32], role


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8)])
@by_case
def test_no_tokens(name, shape):
    config, _ = CASES[name]
    layer = layer_of(config)
    assert layer(torch.zeros(shape), tokens_for(config, 0)).shape == shape
    with torch.no_grad():
        assert layer(torch.zeros(shape), tokens_for(config, 0)).shape == shape


def test_leading_dimensions_are_tokens():
    layer, rows = build_layer(moe_config(shared=SHARED)), rows_of(12)
    with torch.no_grad():
        expected = layer(rows)
        assert torch.equal(layer(rows.view(3, 4, 8)), expected.view(3, 4, 8))
        assert torch.equal(layer(rows.view(2, 3, 2, 8)), expected.view(2, 3, 2, 8))
        transposed = rows.view(3, 4, 8).transpose(0, 1)
        assert_close(layer(transposed), expected.view(3, 4, 8).transpose(0, 1), torch.float32)
        assert layer(rows[0]).shape == (8,)


# -------------------------------------------------------------------------------------- wrong input


def test_wrong_width():
    with pytest.raises(InputError, match=r"\(\(3, 9\)\) must have 8 columns; got 9"):
        build_layer(moe_config())(rows_of(3, 9))


@pytest.mark.parametrize("name", ["softmax", "shared", "latent"])
def test_wrong_dtype(name):
    message = r"\(torch.bfloat16\) must have the dtype of the weights; got torch.float32 there"
    with pytest.raises(InputError, match=message):
        build_layer(CASES[name][0])(rows_of(3).bfloat16())


@pytest.mark.parametrize("name", ["softmax", "shared", "latent"])
def test_wrong_device(name):
    with pytest.raises(InputError, match=r"\(meta\) must be on the device of the weights; got cpu"):
        build_layer(CASES[name][0])(rows_of(3).to("meta"))


def test_a_layer_on_the_meta_device_runs_there():
    layer = FusedMoE(moe_config(shared=SHARED), device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------------- debug, NaN, observers


def test_debug_names_tokens_with_nan_logits():
    layer, rows = build_layer(moe_config(debug=True)), rows_of(5)
    layer(rows)
    rows[[1, 3]] = float("nan")
    with pytest.raises(InputError, match=r"router logits of tokens \[1, 3\] must be numbers"):
        layer(rows)


@pytest.mark.parametrize("bad", [-1, 6, 1000])
def test_debug_finds_bad_replayed_ids(bad):
    layer, rows = build_layer(moe_config(debug=True)), rows_of(2)
    good = TokenInputs(replayed_ids=torch.tensor([[0, 5], [3, 1]]))
    assert layer(rows, good).shape == (2, 8)
    with pytest.raises(InputError, match=f"got .*{bad}"):
        layer(rows, TokenInputs(replayed_ids=torch.tensor([[0, bad], [3, 1]])))


@pytest.mark.parametrize("bad", [-2, 6])
def test_debug_finds_bad_ids_of_a_custom_routing(bad):
    def custom(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return logits[:, :top_k], torch.full((logits.shape[0], top_k), bad)

    layer = build_layer(moe_config(debug=True), custom_routing=custom)
    with pytest.raises(InputError, match=rf"expert ids must be in \[-1, 6\); got {bad} to {bad}"):
        layer(rows_of(2))


def test_check_ids():
    check_ids(torch.tensor([[-1, 5]]), 6)
    check_ids(torch.zeros(0, 2, dtype=torch.int32), 6)
    with pytest.raises(InputError, match=r"\[-1, 5\); got -1 to 5"):
        check_ids(torch.tensor([[-1, 5]]), 5)


@pytest.mark.parametrize("deterministic", [False, True])
@by_case
def test_a_nan_token_is_nan_and_leaves_the_others_alone(name, deterministic):
    config, _ = CASES[name]
    layer = layer_of(dataclasses.replace(config, deterministic=deterministic))
    rows = rows_of(len(TOKEN_IDS))
    with torch.no_grad():
        expected = layer(rows, tokens_for(config))
        rows[2] = float("nan")
        output = layer.run(rows, tokens_for(config))
    out, ids = output.hidden_states, output.routing.topk_ids
    others = torch.arange(len(rows)) != 2
    assert out[2].isnan().all()
    assert_close(out[others], expected[others], torch.float32)
    assert ids.min() >= -1
    assert ids.max() < config.experts.num_experts


def test_observers_see_the_choice_before_slots_without_experts_are_taken_out():
    config, _ = CASES["identity experts"]
    layer, rows = build_layer(config), rows_of(20)
    seen: list[tuple[Tensor, Tensor]] = []
    layer.observers = (lambda ids, weights: seen.append((ids, weights)),)
    with torch.no_grad():
        routing = layer.run(rows).routing
    ((ids, weights),) = seen
    assert ids.shape == weights.shape == (20, 3)
    assert (ids >= 5).any()
    assert (ids >= 0).all()
    assert torch.equal(routing.topk_ids, torch.where(ids >= 5, -1, ids).int())
    assert torch.equal(routing.topk_weights, torch.where(ids >= 5, 0.0, weights))
    logits = rows @ layer.gate.weight.T
    assert_close(weights, logits.softmax(-1).gather(1, ids).detach(), torch.float32)
    assert_close(routing.router_logits, logits.detach(), torch.float32)


def test_every_observer_is_called_once_a_pass():
    layer = build_layer(moe_config(runner=RunnerConfig(max_rows_per_pass=2)))
    calls: list[str] = []
    layer.observers = (
        lambda ids, weights: calls.append(f"first {len(ids)}"),
        lambda ids, weights: calls.append(f"second {len(ids)}"),
    )
    layer(rows_of(3))
    assert calls == ["first 1", "second 1", "first 2", "second 2"]


# -------------------------------------------------------------------------------------- determinism


LARGE = {
    "shared": moe_config(13, 3, 67, experts={"intermediate_size": 35}, shared=SHARED),
    "latent": moe_config(
        13, 3, 67, experts={"intermediate_size": 35, "hidden_size": 41}, has_latent=True
    ),
    "sigmoid": moe_config(
        16,
        3,
        67,
        routing={
            "score": ScoreFunction.SIGMOID,
            "selection_bias": SelectionBias.ON_SCORE,
            "groups": GroupLimit(num_expert_groups=4, topk_groups=2),
            "renormalize": Renormalize.SUM,
        },
        experts={"intermediate_size": 35, "activation": SWIGLU_OAI, "has_bias": True},
    ),
    "constant": moe_config(
        13,
        5,
        67,
        routing={"no_compute": NoComputeExperts(kind=NoComputeKind.CONSTANT, count=11)},
    ),
    "fused": moe_config(
        13, 3, 67, routing={"num_fused_shared_experts": 1, "fused_shared_gate": True}
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", LARGE.values(), ids=LARGE.keys())
def test_deterministic_rows_do_not_depend_on_the_batch(config, dtype):
    layer = build_layer(dataclasses.replace(config, deterministic=True)).to(dtype)
    rows = rows_of(16, 67).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = layer(rows)
        for size in range(1, 17):
            order = torch.randperm(16, generator=generator)[:size]
            assert torch.equal(layer(rows[order]), expected[order]), size


@pytest.mark.parametrize("name", ["shared", "latent", "sigmoid"])
def test_deterministic_rows_do_not_depend_on_the_number_of_threads(name):
    """Sizes at which torch splits every product over threads."""
    config = LARGE[name]
    inner = 70 if name == "latent" else 600
    config = dataclasses.replace(
        config,
        hidden_size=600,
        experts=dataclasses.replace(config.experts, hidden_size=inner, intermediate_size=480),
        shared=SharedExpertsConfig(intermediate_size=70, has_sigmoid_gate=True),
        deterministic=True,
    )
    layer, rows = build_layer(config), rows_of(8, 600)
    with torch.no_grad():
        expected = layer(rows)
        torch.set_num_threads(2)
        try:
            assert torch.equal(layer(rows), expected)
            assert torch.equal(layer(rows[3:4]), expected[3:4])
        finally:
            torch.set_num_threads(1)


def test_without_determinism_the_fast_kernel_is_chosen():
    layer, strict = build_layer(moe_config()), build_layer(moe_config(deterministic=True))
    chosen = [
        candidate.experts.decide(candidate.experts.problem(torch.float32, needs_grad=False)).kernel
        for candidate in (layer, strict)
    ]
    assert chosen[0].name != "reference"
    assert chosen[1].is_row_invariant


def test_a_kernel_that_is_insisted_on():
    layer = build_layer(moe_config(), kernel="reference")
    problem = layer.experts.problem(torch.float32, needs_grad=False)
    assert layer.experts.decide(problem).kernel.name == "reference"
    torch_alone = build_layer(moe_config(deterministic=True), kernel="torch", strict=True)
    assert torch_alone.experts.options.strict
    with pytest.raises(NoKernelFits, match=r"torch: its rows depend on the batch around them"):
        torch_alone(rows_of(2))


# ----------------------------------------------------------------------------------- gate precision


@pytest.mark.parametrize(
    "gate, native, expected",
    [
        (GatePrecision.FP32, NativeGate(), torch.float32),
        (GatePrecision.NATIVE, NativeGate(), torch.bfloat16),
        (GatePrecision.NATIVE, NativeGate(fp32_logits=True), torch.float32),
    ],
)
def test_native_gates_keep_their_logits(gate, native, expected):
    config = moe_config(routing={"native": native}, gate=gate)
    layer, rows = build_layer(config).bfloat16(), rows_of(4).bfloat16()
    with torch.no_grad():
        output = layer.run(rows)
    assert output.routing.router_logits.dtype == expected
    assert output.routing.topk_weights.dtype == torch.float32
    wide = rows.float() @ layer.gate.weight.float().T
    logits = rows @ layer.gate.weight.T if expected == torch.bfloat16 else wide
    assert_close(output.routing.router_logits, logits.detach(), expected)


@pytest.mark.parametrize("fp32_weights", [True, False])
def test_native_weights_are_rounded_where_the_family_rounds_them(fp32_weights):
    config = moe_config(
        routing={"native": NativeGate(fp32_weights=fp32_weights)}, gate=GatePrecision.NATIVE
    )
    layer = build_layer(config).bfloat16()
    weights = layer.run(rows_of(9).bfloat16()).routing.topk_weights
    assert torch.equal(weights, weights.bfloat16().float()) is not fp32_weights


# ----------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    "name, backend",
    [("sigmoid, bias, groups, scale", "aot_eager"), ("latent", "eager"), ("softmax", "aot_eager")],
)
def test_compiled(name, backend):
    config, _ = CASES[name]
    layer, rows = layer_of(config), rows_of(7)
    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True, backend=backend)
    found = []
    for call in (layer, function):
        layer.zero_grad()
        leaf = rows.clone().requires_grad_()
        out = call(leaf)
        out.square().sum().backward()
        found.append([out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for eager, traced in zip(*found, strict=True):
        assert relative_error(traced, eager) < 4 * RTOL[torch.float32]
    with torch.no_grad():
        assert_close(function(rows), layer(rows), torch.float32)


def test_compiled_with_dynamic_shapes_and_leading_dimensions():
    layer = build_layer(moe_config(shared=SHARED))
    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for shape in ((3, 5, 8), (2, 9, 8), (4, 3, 8)):
            rows = rows_of(shape[0] * shape[1]).view(shape)
            assert_close(function(rows), layer(rows), torch.float32)


# ----------------------------------------------------------------------------- a module like others


@by_case
def test_state_dict_round_trip(name):
    config, _ = CASES[name]
    layer, other = layer_of(config), layer_of(config)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(layer.state_dict())
    rows, tokens = rows_of(len(TOKEN_IDS)), tokens_for(config)
    with torch.no_grad():
        assert torch.equal(other(rows, tokens), layer(rows, tokens))


@by_case
def test_deepcopy(name):
    config, _ = CASES[name]
    layer, rows, tokens = layer_of(config), rows_of(len(TOKEN_IDS)), tokens_for(config)
    with torch.no_grad():
        expected = layer(rows, tokens)
        clone = copy.deepcopy(layer)
        assert torch.equal(clone(rows, tokens), expected)
        for parameter in clone.parameters():
            parameter.zero_()
        assert torch.equal(layer(rows, tokens), expected)


def test_names_of_parameters():
    layer = FusedMoE(CASES["latent"][0])
    assert set(layer.state_dict()) == {
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_experts.gate_proj.weight",
        "shared_experts.up_proj.weight",
        "shared_experts.down_proj.weight",
        "shared_expert_gate.weight",
        "latent_in.weight",
        "latent_out.weight",
    }


def test_half():
    layer, rows = build_layer(moe_config(shared=SHARED)), rows_of(5)
    with torch.no_grad():
        expected = layer(rows)
        out = layer.half()(rows.half())
    assert out.dtype == torch.float16
    assert relative_error(out, expected) < 4 * RTOL[torch.float16]


def test_is_moe_layer():
    layer = FusedMoE(moe_config())
    assert is_moe_layer(layer)
    assert is_moe_layer(layer.experts)
    assert is_moe_layer(RoutedExperts(moe_config().experts))
    assert not is_moe_layer(layer.gate)
    assert not is_moe_layer(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["shared", "sigmoid, bias, groups, scale"])
def test_two_threads_on_one_layer_agree(name):
    layer = layer_of(CASES[name][0])
    batches = [rows_of(size, seed=size) for size in (3, 11)]
    with torch.no_grad():
        expected = [layer(rows) for rows in batches]
    start, failures = threading.Barrier(2), []

    def work(rows: Tensor, wanted: Tensor) -> None:
        try:
            start.wait()
            with torch.no_grad():
                for _ in range(50):
                    assert torch.equal(layer(rows), wanted)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_a_thousand_calls_leave_nothing_behind():
    layer, rows = build_layer(moe_config(shared=SHARED)), rows_of(3)

    def call(times: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                layer(rows)

    def measured() -> tuple[int, int]:
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        return sys.getallocatedblocks(), resident

    call(500)  # the interpreter's own tables settle
    blocks, resident = measured()
    call(1000)
    blocks_after, resident_after = measured()
    assert blocks_after - blocks < 500  # one forgotten object a call would be 1,000
    assert resident_after - resident < 16 * 2**20


def test_the_example_in_the_docstring():
    results = doctest.testmod(mixtura.layer)
    assert results.attempted > 0
    assert results.failed == 0


def test_a_table_of_ids_takes_the_rows_that_are_loaded():
    config = moe_config(routing={"hash_routing": True})
    layer, fresh = layer_of(config), FusedMoE(config)
    assert layer.gate.hash_table.shape[0] > 1
    fresh.load_state_dict(layer.state_dict())
    assert fresh.gate.hash_table.equal(layer.gate.hash_table)
    state = layer.state_dict()
    state["gate.hash_table"] = state["gate.hash_table"][:, :1]
    with pytest.raises(RuntimeError, match="hash_table"):
        FusedMoE(config).load_state_dict(state)
