"""The reference kernel against a double loop in plain Python floats, on tiny integers."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass

import pytest
import torch
from expert_cases import ACTIVATIONS
from tolerances import assert_close
from torch import Tensor, nn

from mixtura.config import (
    SWIGLU_OAI,
    Activation,
    ActivationFunction,
    ExpertsConfig,
    GateUp,
    LimitOn,
    PostNorm,
    WeightOn,
)
from mixtura.experts import ExpertsOptions, RoutedExperts
from mixtura.kernels.reference import run_expert
from mixtura.kernels.reference.activation import activate, split_gate_up
from mixtura.kernels.reference.norm import post_norm
from mixtura.quant.matrix import dense
from mixtura.types import ExpertBatch, ExpertWeights

Row = list[float]
Matrix = list[Row]

NUM_EXPERTS, HIDDEN, INNER = 3, 4, 5
EXACT_ACTIVATIONS = {
    "relu": Activation(function=ActivationFunction.RELU),
    "relu2": Activation(function=ActivationFunction.RELU_SQUARED),
    "identity": Activation(function=ActivationFunction.IDENTITY),
    "limit-gate-identity": Activation(function=ActivationFunction.IDENTITY, limit=2.0),
    "limit-activated-relu2": Activation(
        function=ActivationFunction.RELU_SQUARED, limit=3.0, limit_on=LimitOn.ACTIVATED
    ),
    "offset-identity": Activation(function=ActivationFunction.IDENTITY, up_offset=1.0),
}
"""Activations that stay within the integers, so that fp32 is exact."""

LAYOUTS = {
    "stacked": (GateUp.STACKED, False, False),
    "stacked-bias": (GateUp.STACKED, False, True),
    "stacked-transposed": (GateUp.STACKED, True, False),
    "interleaved": (GateUp.INTERLEAVED, False, False),
    "interleaved-transposed-bias": (GateUp.INTERLEAVED, True, True),
    "separate": (GateUp.SEPARATE, False, False),
    "separate-transposed": (GateUp.SEPARATE, True, False),
    "ungated": (GateUp.UNGATED, False, False),
    "ungated-bias": (GateUp.UNGATED, False, True),
    "ungated-transposed-bias": (GateUp.UNGATED, True, True),
}


@dataclass(frozen=True)
class PlainExpert:
    """One expert as a paper writes it: gate, up and down matrices of Python numbers."""

    gate: Matrix
    up: Matrix
    down: Matrix
    gate_bias: Row
    up_bias: Row
    down_bias: Row


def plain_function(g: float, activation: Activation) -> float:
    match activation.function:
        case ActivationFunction.SILU:
            cap = activation.gate_softcap
            linear = g if cap is None else cap * math.tanh(g / cap)
            return linear / (1 + math.exp(-activation.alpha * g))
        case ActivationFunction.GELU:
            return 0.5 * g * (1 + math.erf(g / math.sqrt(2)))
        case ActivationFunction.GELU_TANH:
            return 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        case ActivationFunction.RELU:
            return max(g, 0.0)
        case ActivationFunction.RELU_SQUARED:
            return max(g, 0.0) ** 2
        case ActivationFunction.SIGMOID:
            return 1 / (1 + math.exp(-g))
        case ActivationFunction.TANH:
            return math.tanh(g)
        case ActivationFunction.IDENTITY:
            return g


def plain_activation(g: float, u: float | None, activation: Activation) -> float:
    limit, on = activation.limit, activation.limit_on
    if limit is not None and on is LimitOn.GATE:
        g = min(g, limit)
    f = plain_function(g, activation)
    if limit is not None and on is LimitOn.ACTIVATED:
        f = min(f, limit)
    if u is None:
        return f
    if limit is not None:
        u = max(-limit, min(u, limit))
    if activation.up_softcap is not None:
        u = activation.up_softcap * math.tanh(u / activation.up_softcap)
    return f * (u + activation.up_offset)


def product(matrix: Matrix, vector: Row, bias: Row) -> Row:
    return [
        sum(w * x for w, x in zip(row, vector, strict=True)) + b
        for row, b in zip(matrix, bias, strict=True)
    ]


def plain_norm(x: Row, weight: Row, kind: PostNorm, epsilon: float) -> Row:
    if kind is PostNorm.RMS_SCALE_FIRST:
        x = [value * (1 + w) for value, w in zip(x, weight, strict=True)]
    rms = math.sqrt(sum(value * value for value in x) / len(x) + epsilon)
    if kind is PostNorm.RMS_SCALE_FIRST:
        return [value / rms for value in x]
    return [value / rms * w for value, w in zip(x, weight, strict=True)]


def plain_run(
    expert: PlainExpert, x: Row, config: ExpertsConfig, norm_weight: Row | None = None
) -> Row:
    up = product(expert.up, x, expert.up_bias)
    if config.gate_up is GateUp.UNGATED:
        hidden = [plain_activation(u, None, config.activation) for u in up]
    else:
        gate = product(expert.gate, x, expert.gate_bias)
        hidden = [plain_activation(g, u, config.activation) for g, u in zip(gate, up, strict=True)]
    out = product(expert.down, hidden, expert.down_bias)
    if config.post_norm is not None:
        assert norm_weight is not None
        out = plain_norm(out, norm_weight, config.post_norm, config.post_norm_epsilon)
    return out


def integers(generator: random.Random, *shape: int) -> list:
    if len(shape) == 1:
        return [float(generator.randint(-2, 2)) for _ in range(shape[0])]
    return [integers(generator, *shape[1:]) for _ in range(shape[0])]


def plain_experts(has_bias: bool, seed: int = 0) -> list[PlainExpert]:
    generator = random.Random(seed)

    def bias(size: int) -> Row:
        return integers(generator, size) if has_bias else [0.0] * size

    return [
        PlainExpert(
            integers(generator, INNER, HIDDEN),
            integers(generator, INNER, HIDDEN),
            integers(generator, HIDDEN, INNER),
            bias(INNER),
            bias(INNER),
            bias(HIDDEN),
        )
        for _ in range(NUM_EXPERTS)
    ]


def stored(experts: list[PlainExpert], config: ExpertsConfig) -> dict[str, Tensor]:
    """Parameters of an experts module by name, laid out element by element."""
    pairs = [list(zip(e.gate, e.up, strict=True)) for e in experts]
    biases = [list(zip(e.gate_bias, e.up_bias, strict=True)) for e in experts]
    match config.gate_up:
        case GateUp.STACKED:
            first = {"gate_up_proj": [e.gate + e.up for e in experts]}
            bias = {"gate_up_proj_bias": [e.gate_bias + e.up_bias for e in experts]}
        case GateUp.INTERLEAVED:
            first = {"gate_up_proj": [[row for pair in e for row in pair] for e in pairs]}
            bias = {"gate_up_proj_bias": [[b for pair in e for b in pair] for e in biases]}
        case GateUp.SEPARATE:
            first = {"gate_proj": [e.gate for e in experts], "up_proj": [e.up for e in experts]}
            bias = {}
        case GateUp.UNGATED:
            first = {"up_proj": [e.up for e in experts]}
            bias = {"up_proj_bias": [e.up_bias for e in experts]}
    tensors = {name: torch.tensor(value) for name, value in first.items()}
    tensors["down_proj"] = torch.tensor([e.down for e in experts])
    if config.is_transposed:
        tensors = {name: value.transpose(1, 2).contiguous() for name, value in tensors.items()}
    if config.has_bias:
        tensors |= {name: torch.tensor(value) for name, value in bias.items()}
        tensors["down_proj_bias"] = torch.tensor([e.down_bias for e in experts])
    return tensors


def module_of(
    experts: list[PlainExpert], config: ExpertsConfig, weight_on: WeightOn, norm: Row | None = None
) -> RoutedExperts:
    options = ExpertsOptions(kernel="reference", weight_on=weight_on)
    module = RoutedExperts(config, options=options)
    tensors = stored(experts, config)
    if norm is not None:
        tensors["post_expert_norm.weight"] = torch.tensor(norm)
    module.load_state_dict(tensors)
    return module


IDS = [[0, 2], [1, 1], [-1, 2], [2, 0], [-1, -1]]
WEIGHTS = [[1.0, 2.0], [3.0, -1.0], [5.0, 0.5], [0.25, 4.0], [1.0, 1.0]]


def plain_forward(
    experts: list[PlainExpert],
    rows: Matrix,
    config: ExpertsConfig,
    weight_on: WeightOn = WeightOn.OUTPUT,
    norm: Row | None = None,
) -> list[Matrix]:
    """The terms (M,K,H) of every slot."""
    terms: list[Matrix] = []
    for row, ids, weights in zip(rows, IDS, WEIGHTS, strict=True):
        slots = []
        for expert, weight in zip(ids, weights, strict=True):
            if expert < 0:
                slots.append([0.0] * HIDDEN)
            elif weight_on is WeightOn.INPUT:
                weighed = [weight * value for value in row]
                slots.append(plain_run(experts[expert], weighed, config, norm))
            else:
                out = plain_run(experts[expert], row, config, norm)
                slots.append([weight * value for value in out])
        terms.append(slots)
    return terms


def config_of(
    layout: str, activation: Activation, post_norm: PostNorm | None = None
) -> ExpertsConfig:
    gate_up, is_transposed, has_bias = LAYOUTS[layout]
    if gate_up is GateUp.UNGATED:
        activation = dataclasses.replace(activation, up_offset=0.0, up_softcap=None)
    return ExpertsConfig(
        num_experts=NUM_EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        activation=activation,
        gate_up=gate_up,
        is_transposed=is_transposed,
        has_bias=has_bias,
        post_norm=post_norm,
        post_norm_epsilon=0.5,
    )


def compare(
    config: ExpertsConfig,
    weight_on: WeightOn = WeightOn.OUTPUT,
    *,
    norm: Row | None = None,
    is_exact: bool = False,
) -> None:
    experts = plain_experts(config.has_bias)
    rows = integers(random.Random(7), len(IDS), HIDDEN)
    expected = torch.tensor(
        plain_forward(experts, rows, config, weight_on, norm), dtype=torch.float64
    )
    module = module_of(experts, config, weight_on, norm)
    batch = ExpertBatch(
        torch.tensor(rows), torch.tensor(IDS, dtype=torch.int32), torch.tensor(WEIGHTS)
    )
    with torch.no_grad():
        terms, total = module(batch, reduce=False), module(batch)
    assert terms.dtype == total.dtype == torch.float32
    if is_exact:
        assert torch.equal(terms.double(), expected)
        assert torch.equal(total.double(), expected.sum(1))
    else:
        assert_close(terms, expected, torch.float32)
        assert_close(total, expected.sum(1), torch.float32)
    assert expected.abs().max() > 0.1  # the case says something


@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("activation", EXACT_ACTIVATIONS.values(), ids=EXACT_ACTIVATIONS.keys())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integer_activations_are_exact(layout, activation, weight_on):
    compare(config_of(layout, activation), weight_on, is_exact=True)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_activation_in_every_layout(layout, activation):
    compare(config_of(layout, activation))


@pytest.mark.parametrize("weight_on", WeightOn)
@pytest.mark.parametrize("kind", PostNorm)
@pytest.mark.parametrize("layout", ["stacked", "interleaved-transposed-bias", "ungated-bias"])
def test_post_norm(layout, kind, weight_on):
    norm = [2.0, -1.0, 0.5, 3.0]
    compare(config_of(layout, Activation(), kind), weight_on, norm=norm)


def test_weight_on_input_differs_from_weight_on_output():
    config = config_of("stacked", Activation())
    experts, rows = plain_experts(False), integers(random.Random(7), len(IDS), HIDDEN)
    on_input = plain_forward(experts, rows, config, WeightOn.INPUT)
    assert on_input != plain_forward(experts, rows, config)


@pytest.mark.parametrize(
    "gate, up, expected", [(1.0, 2.0, 2.53739), (10.0, -9.0, -41.99972), (-3.0, 0.5, -0.02711)]
)
def test_gpt_oss_activation_fixtures(gate, up, expected):
    result = activate(torch.tensor([gate]), torch.tensor([up]), SWIGLU_OAI)
    assert result.item() == pytest.approx(expected, abs=6e-6)
    assert plain_activation(gate, up, SWIGLU_OAI) == pytest.approx(expected, abs=6e-6)


def test_gpt_oss_fixtures_through_a_whole_expert():
    """Identity matrices: gate and up are the row's two numbers."""
    config = ExpertsConfig(
        num_experts=1,
        hidden_size=2,
        intermediate_size=1,
        activation=SWIGLU_OAI,
        gate_up=GateUp.INTERLEAVED,
    )
    weights = ExpertWeights(
        config,
        gate_up_proj=dense(torch.eye(2).unsqueeze(0)),
        down_proj=dense(torch.tensor([[[1.0], [0.0]]])),
    )
    rows = torch.tensor([[1.0, 2.0], [10.0, -9.0], [-3.0, 0.5]])
    outputs = torch.stack([run_expert(weights, 0, row) for row in rows])
    expected = torch.tensor([[2.53739, 0.0], [-41.99972, 0.0], [-0.02711, 0.0]])
    torch.testing.assert_close(outputs, expected, rtol=0, atol=6e-6)


def test_split_gate_up_gives_views():
    stored = torch.arange(6.0)
    gate, up = split_gate_up(stored, GateUp.STACKED)
    assert (gate.tolist(), up.tolist()) == ([0, 1, 2], [3, 4, 5])
    gate, up = split_gate_up(stored, GateUp.INTERLEAVED)
    assert (gate.tolist(), up.tolist()) == ([0, 2, 4], [1, 3, 5])
    assert gate.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    for layout in (GateUp.SEPARATE, GateUp.UNGATED):
        assert split_gate_up(stored, layout) == (stored, None)


def test_post_norm_rounds_to_the_rows_dtype_between_scale_and_norm():
    """Muse Spark multiplies by 1 + w, rounds to bf16, and norms that."""
    rows, weight = torch.randn(50, 64).bfloat16(), torch.randn(64).bfloat16()
    product = rows.float() * (1 + weight).float()
    expected, unrounded = (
        scaled * (scaled.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        for scaled in (product.bfloat16().float(), product)
    )
    result = post_norm(rows, weight, PostNorm.RMS_SCALE_FIRST, 1e-6)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected.bfloat16())
    assert not torch.equal(result, unrounded.bfloat16())


def test_float64_rows_are_computed_in_float64():
    """The truth for a float64 kernel has float64's precision."""
    config = config_of("stacked-bias", Activation())
    experts, rows = plain_experts(True), integers(random.Random(7), len(IDS), HIDDEN)
    module = module_of(experts, config, WeightOn.OUTPUT).double()
    ids, weights = torch.tensor(IDS, dtype=torch.int32), torch.tensor(WEIGHTS).double()
    batch = ExpertBatch(torch.tensor(rows).double(), ids, weights)
    expected = torch.tensor(plain_forward(experts, rows, config), dtype=torch.float64)
    with torch.no_grad():
        terms, total = module(batch, reduce=False), module(batch)
    assert terms.dtype == total.dtype == torch.float64
    assert_close(terms, expected, torch.float64)
    assert_close(total, expected.sum(1), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rows_are_summed_in_fp32_and_rounded_once(dtype):
    config = config_of("stacked", EXACT_ACTIVATIONS["identity"])
    experts, rows = plain_experts(False), integers(random.Random(7), len(IDS), HIDDEN)
    module = module_of(experts, config, WeightOn.OUTPUT).to(dtype)
    ids, weights = torch.tensor(IDS, dtype=torch.int32), torch.tensor(WEIGHTS)
    batch = ExpertBatch(torch.tensor(rows).to(dtype), ids, weights)
    expected = torch.tensor(plain_forward(experts, rows, config))
    with torch.no_grad():
        terms, total = module(batch, reduce=False), module(batch)
    assert terms.dtype == torch.float32
    assert torch.equal(terms, expected)  # small integers are exact
    assert torch.equal(total, expected.sum(1).to(dtype))


def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_number_of_threads():
    torch.manual_seed(0)
    config = ExpertsConfig(num_experts=4, hidden_size=177, intermediate_size=301)
    module = RoutedExperts(config, options=ExpertsOptions(kernel="reference"))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(-1, 4, (6, 3), dtype=torch.int32)
    whole = ExpertBatch(torch.randn(6, 177), ids, torch.rand(6, 3))
    before = torch.get_num_threads()
    with torch.no_grad():
        expected = module(whole)
        for start, stop in [(0, 1), (1, 3), (2, 6), (5, 6)]:
            part = ExpertBatch(
                whole.hidden_states[start:stop], ids[start:stop], whole.topk_weights[start:stop]
            )
            assert torch.equal(module(part), expected[start:stop])
        try:
            torch.set_num_threads(2)
            assert torch.equal(module(whole), expected)
        finally:
            torch.set_num_threads(before)
