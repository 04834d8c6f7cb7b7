"""Activations rounded with stored scales: what that means, and the kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_cases import (
    batch_of,
    converted,
    dequantized,
    plain_activation,
    quantized,
    random_batch,
    random_weights,
    sizes,
)
from static_activations import E4M3, FLIPS, INT8, Deaf, batch
from tolerances import frobenius_error
from torch import Tensor

from mixtura.config import ActivationDtype, GateUp, WeightOn
from mixtura.errors import ConfigError, NoKernelFits
from mixtura.hf.linears import adopt_linear
from mixtura.kernels import get_kernel, register_kernel, select_kernel
from mixtura.kernels.contract import in_words
from mixtura.kernels.cpu import pack_layer, run_packed, unpack_layer
from mixtura.kernels.cpu.extension import emulated_paths, forced_path, missing, runnable_paths
from mixtura.kernels.cpu.linear import pack_linear
from mixtura.kernels.registry import unregister_kernel
from mixtura.kernels.torch import TorchKernel, _run_grouped
from mixtura.quant.activations import (
    ActivationGroup,
    ActivationScheme,
    StaticInputs,
    round_activations,
)
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dense, dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, QuantScheme
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

SCHEMES = (INT8, E4M3)
SCALES = (0.02, 0.01, 0.0, 0.03, 0.025)
ALL_SCALES = (0.02, 0.01, 0.015, 0.03, 0.025)
REFERENCE = get_kernel("reference")
PATHS = runnable_paths() + emulated_paths() if missing() is None else ()

by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.code_words)
by_weight_on = pytest.mark.parametrize("weight_on", WeightOn, ids=lambda w: w.value)


def with_inputs(
    weights: ExpertWeights, scheme: ActivationScheme, scales: tuple[float, ...] = SCALES
) -> ExpertWeights:
    values = torch.tensor(scales)
    return dataclasses.replace(
        weights,
        gate_up_inputs=StaticInputs(scheme, values),
        down_inputs=StaticInputs(scheme, values / 2),
    )


def without_inputs(weights: ExpertWeights) -> ExpertWeights:
    return dataclasses.replace(weights, gate_up_inputs=None, down_inputs=None)


# ------------------------------------------------------------------------------------ the meaning


def rounded_one_by_one(x: float, scheme: ActivationScheme, scale: float) -> float:
    """Of one activation, from the definition."""
    if scale == 0 or math.isnan(x):
        return x
    quotient = float(torch.tensor(x) / torch.tensor(scale))  # in fp32
    if scheme.code is Code.INT:
        return float(max(-128, min(127, round(max(-1e6, min(1e6, quotient)))))) * scale
    levels = QuantScheme(Code.E4M3, 8, (1, None), torch.float32).levels
    finite = sorted({abs(level) for level in levels if math.isfinite(level)})
    size = min(abs(quotient), finite[-1])
    best = min(
        range(len(finite)), key=lambda code: (abs(finite[code] - size), code % 2)
    )  # codes count up with the numbers: an even one ends in a mantissa of 0
    return math.copysign(finite[best], quotient) * scale


@by_scheme
@pytest.mark.parametrize("scale", [0.0, 0.3, 0.5])
def test_the_meaning_is_the_definition(scheme: ActivationScheme, scale: float) -> None:
    scale = float(torch.tensor(scale))
    ties = [k / 2 for k in range(-520, 520)]
    small = [k / 2048 for k in range(-140, 140)]
    large = [17.0, 18.0, 19.0, 448.0, 464.0, 500.0, 1e9, -1e9, math.inf, -math.inf]
    values = [x * (scale or 1) for x in (*ties, *small, *large)]
    expected = torch.tensor([rounded_one_by_one(x, scheme, scale) for x in values])
    found = round_activations(torch.tensor(values), scheme, torch.tensor(scale))
    assert torch.equal(found, expected)
    assert round_activations(torch.tensor([math.nan]), scheme, torch.tensor(scale)).isnan().all()


def test_each_row_has_its_own_scale_and_its_dtype() -> None:
    rows = torch.tensor([[1.3, -2.2], [1.3, -2.2], [1.3, -2.2]], dtype=torch.bfloat16)
    found = round_activations(rows, INT8, torch.tensor([[1.0], [0.0], [0.5]]))
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, torch.stack([rows[0].round(), rows[1], torch.tensor([1.5, -2.0])]))


def test_other_schemes_are_no_static_inputs() -> None:
    dynamic = ActivationScheme(Code.INT, 8, ActivationGroup.TOKEN)
    with pytest.raises(ConfigError, match=r"static inputs \(int8 per token\) must be int8 or e4m3"):
        StaticInputs(dynamic, torch.ones(2))
    with pytest.raises(ConfigError, match=r"fp32 scales, one for an expert; got torch\.float16"):
        StaticInputs(INT8, torch.ones(2).half())
    with pytest.raises(ConfigError, match=r"gate_up_inputs \(\(2,\)\) must have the shape"):
        with_inputs(random_weights(sizes(5)), INT8, (1.0, 1.0))


# ------------------------------------------------------------------------------------ the kernels


def plainly(weights: ExpertWeights, given: ExpertBatch, weight_on: WeightOn) -> Tensor:
    """A double loop over rows and slots with dense matrices, separate from the kernels."""
    wide = dequantized(without_inputs(weights))
    gate_up, down = wide.gate_up_proj.values, wide.down_proj.values
    out = torch.zeros_like(given.hidden_states)
    for row, ids in enumerate(given.local_ids.tolist()):
        for slot, expert in enumerate(ids):
            if expert < 0:
                continue
            weight, x = given.topk_weights[row, slot], given.hidden_states[row]
            if weight_on is WeightOn.INPUT:
                x, weight = x * weight, torch.tensor(1.0)
            assert weights.gate_up_inputs is not None and weights.down_inputs is not None
            scheme = weights.gate_up_inputs.scheme
            x = round_activations(x, scheme, weights.gate_up_inputs.scales[expert])
            gate, up = (gate_up[expert] @ x).chunk(2)
            hidden = plain_activation(gate, up, weights.config.activation)
            hidden = round_activations(hidden, scheme, weights.down_inputs.scales[expert])
            out[row] += weight * (down[expert] @ hidden)
    return out


@by_scheme
@by_weight_on
@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_reference_and_torch_round_the_inputs(
    scheme: ActivationScheme, weight_on: WeightOn, num_rows: int
) -> None:
    config = sizes(5, 64, 32)
    weights = with_inputs(quantized(random_weights(config), WeightFormat.INT8_CHANNEL), scheme)
    given = batch(config, num_rows)
    expected = plainly(weights, given, weight_on)
    for kernel in (REFERENCE, TorchKernel()):
        packed = kernel.pack(weights)
        assert frobenius_error(kernel.run(packed, given, weight_on=weight_on), expected) < FLIPS
    grouped = _run_grouped(weights, given, weight_on).sum(1)
    assert frobenius_error(grouped, expected) < FLIPS
    if num_rows > 1:  # and that is another result than without
        unrounded = REFERENCE.run(without_inputs(weights), given, weight_on=weight_on)
        assert frobenius_error(unrounded, expected) > 3 * FLIPS


def test_torch_rounds_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtura.kernels.torch.eager.ROWS_PER_PASS", 2)
    config = sizes(5, 64, 32)
    weights, given = with_inputs(random_weights(config), INT8), batch(config, 9)
    expected = plainly(weights, given, WeightOn.OUTPUT)
    assert frobenius_error(TorchKernel().run(weights, given), expected) < FLIPS


def test_torch_rounds_in_a_compiled_graph() -> None:
    config = sizes(3, 8, 8)
    weights, given = with_inputs(random_weights(config), E4M3, (0.1, 0.0, 0.3)), batch(config, 4)

    @torch.compile(backend="eager", fullgraph=True)
    def run(rows: Tensor) -> Tensor:
        return TorchKernel().run(weights, dataclasses.replace(given, hidden_states=rows))

    with torch.no_grad():
        expected = plainly(weights, given, WeightOn.OUTPUT)
        assert frobenius_error(run(given.hidden_states), expected) < FLIPS


@pytest.fixture(params=PATHS or [pytest.param("", marks=pytest.mark.skip(missing() or ""))])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    with forced_path(request.param):
        yield request.param


@by_scheme
@pytest.mark.parametrize("weight_format", ["fp32", "int8-channel", "int4-g32", "fp8"])
def test_every_path_of_the_cpu_rounds_the_inputs(
    path: str, scheme: ActivationScheme, weight_format: str
) -> None:
    config = sizes(5, 160, 96)
    weights = dense_or_packed(random_weights(config), WeightFormat.parse(weight_format))
    # On the input with one scale for all, and on the output with one for each.
    for scales, weight_on, num_rows in (
        (ALL_SCALES, WeightOn.OUTPUT, 30),
        ((0.02,) * 5, WeightOn.INPUT, 5),
        ((0.02,) * 5, WeightOn.OUTPUT, 1),
        (ALL_SCALES, WeightOn.INPUT, 0),
    ):
        rounded = with_inputs(weights, scheme, scales)
        given, on_input = batch(config, num_rows), weight_on is WeightOn.INPUT
        expected = TorchKernel().run(rounded, given, weight_on=weight_on)
        packed = pack_layer(rounded)
        found = run_packed(packed, given, on_input, True)
        assert frobenius_error(found, expected) < FLIPS
        terms = run_packed(packed, given, on_input, False)
        assert frobenius_error(terms.sum(1), expected) < FLIPS
        for mine, theirs in zip(unpack_layer(packed).tensors(), rounded.tensors(), strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def dense_or_packed(weights: ExpertWeights, weight_format: WeightFormat) -> ExpertWeights:
    if weight_format.scheme.is_quantized:
        return quantized(weights, weight_format)
    return converted(weights, weight_format.scheme.values_dtype)


@pytest.mark.parametrize("num_rows", [1, 40])
def test_the_lowest_codes_are_multiplied_exactly(path: str, num_rows: int) -> None:
    """-128 times -128, in pairs: more than 16 bits hold."""
    config = dataclasses.replace(sizes(1, 64, 32), gate_up=GateUp.UNGATED)
    weights = quantized(random_weights(config), WeightFormat.INT8_CHANNEL)
    lowest = torch.zeros_like(weights.gate_up_proj.values)  # q + 128
    weights = dataclasses.replace(
        weights, gate_up_proj=dataclasses.replace(weights.gate_up_proj, values=lowest)
    )
    rounded = dataclasses.replace(
        weights, gate_up_inputs=StaticInputs(INT8, torch.tensor([1 / 64]))
    )
    rows = torch.full((num_rows, 64), -5.0)
    given = ExpertBatch(rows, torch.zeros(num_rows, 1, dtype=torch.int32), torch.ones(num_rows, 1))
    as_it_saturates = dataclasses.replace(given, hidden_states=torch.full_like(rows, -2.0))
    expected = TorchKernel().run(without_inputs(rounded), as_it_saturates)
    found = run_packed(pack_layer(rounded), given, False, True)
    # The input of down is the kernel's own int8.
    assert frobenius_error(found, expected) < 1e-2


@by_scheme
def test_an_expert_without_a_scale_runs_as_if_no_file_had_one(
    path: str, scheme: ActivationScheme
) -> None:
    config = sizes(5, 64, 32)
    weights = quantized(random_weights(config), WeightFormat.FP8)
    rounded = with_inputs(weights, scheme)
    rows = random_batch(config, 6, 1)
    given = batch_of(rows, [[2]] * 6)
    assert SCALES[2] == 0
    assert torch.equal(
        run_packed(pack_layer(rounded), given, False, True),
        run_packed(pack_layer(weights), given, False, True),
    )
    none = with_inputs(weights, scheme, (0.0,) * 5)
    assert torch.equal(
        run_packed(pack_layer(none), rows, False, True),
        run_packed(pack_layer(weights), rows, False, True),
    )


@by_scheme
@pytest.mark.parametrize("weight_format", ["int8-channel", "fp8"])
def test_nan_stays_in_its_row(path: str, scheme: ActivationScheme, weight_format: str) -> None:
    config = sizes(5, 64, 32)
    weights = quantized(random_weights(config), WeightFormat.parse(weight_format))
    given = random_batch(config, 6, 2)
    packed = pack_layer(with_inputs(weights, scheme, ALL_SCALES))
    sound = run_packed(packed, given, False, True)
    rows = given.hidden_states.clone()
    rows.view(torch.int32)[3, 5] = 0x7FFF0000  # what bf16 has for a NaN of ones
    found = run_packed(packed, dataclasses.replace(given, hidden_states=rows), False, True)
    assert found[3].isnan().all()
    assert torch.equal(found[[0, 1, 2, 4, 5]], sound[[0, 1, 2, 4, 5]])


def test_rows_do_not_depend_on_the_batch(path: str) -> None:
    config = sizes(5, 64, 32)
    weights = with_inputs(quantized(random_weights(config), WeightFormat.INT4_G32), INT8)
    packed, given = pack_layer(weights), batch(config, 20)
    whole = run_packed(packed, given, False, True)
    for row in (0, 7, 19):
        one = ExpertBatch(
            given.hidden_states[row : row + 1],
            given.local_ids[row : row + 1],
            given.topk_weights[row : row + 1],
        )
        assert torch.equal(run_packed(packed, one, False, True)[0], whole[row])


@by_scheme
@pytest.mark.parametrize("scale", [0.3, 0.5])
def test_the_cpu_rounds_as_is_meant(path: str, scheme: ActivationScheme, scale: float) -> None:
    """Ties, small numbers and large ones times the identity, in every arithmetic."""
    inputs = StaticInputs(scheme, torch.tensor(scale))
    ties, small = torch.arange(-520, 520) / 2, torch.arange(-140, 140) / 2048
    large = torch.tensor([464.0, 500.0, 1e9, -1e9, math.inf, -math.inf, 1e-40, -1e-40])
    rows = torch.cat([ties, small, large]).view(-1, 16) * scale
    expected = round_activations(rows, scheme, inputs.scales)
    for dtype in (torch.float32, torch.bfloat16):
        found = pack_linear(dense(torch.eye(16, dtype=dtype)), inputs=inputs)(rows)
        assert torch.equal(found, expected)
    times_127 = quantize(127 * torch.eye(16), WeightFormat.INT8_CHANNEL)  # with a scale of 1
    found = pack_linear(times_127, inputs=inputs)(rows)
    assert torch.allclose(found / 127, expected, rtol=1e-6, atol=0)


@by_scheme
@pytest.mark.parametrize("weight_format", ["int8-channel", "int4-g32", "fp8"])
def test_a_linear_layer_rounds_its_rows(
    path: str, scheme: ActivationScheme, weight_format: str
) -> None:
    matrix = quantize(torch.randn(40, 64), WeightFormat.parse(weight_format))
    inputs, bias = StaticInputs(scheme, torch.tensor(0.01)), torch.randn(40)
    rows = torch.randn(7, 64)
    rounded = round_activations(rows, scheme, inputs.scales)
    expected = F.linear(rounded, dequantize(matrix), bias)
    linear = pack_linear(matrix, bias, inputs=inputs)
    assert frobenius_error(linear(rows), expected) < 1e-5
    wide = pack_linear(matrix, bias, inputs=inputs, activation_dtype=ActivationDtype.BF16)
    plain = pack_linear(matrix, bias, activation_dtype=ActivationDtype.BF16)
    assert torch.equal(wide(rows), plain(rows))


# ------------------------------------------------------------------------------------ the choice


@pytest.fixture
def deaf() -> Iterator[None]:
    register_kernel("deaf", Deaf)
    yield
    unregister_kernel("deaf")


def problem(**changes: Any) -> ExpertsProblem:
    scheme = WeightFormat.INT8_CHANNEL.scheme
    found = ExpertsProblem(sizes(), (scheme,), torch.float32, "cpu", roundings=(INT8,))
    return dataclasses.replace(found, **changes)


@pytest.mark.usefixtures("deaf")
def test_a_kernel_that_ignores_the_scales_is_passed_over() -> None:
    decision = select_kernel(problem())
    assert decision.kernel.name != "deaf" and decision.is_fallback
    reason = decision.rejections[0].reason
    assert reason == "does not round activations to int8 with stored scales"
    with pytest.raises(NoKernelFits, match="deaf: does not round activations to int8"):
        select_kernel(problem(), strict=True)
    assert select_kernel(problem(roundings=())).kernel.name == "deaf"


def test_rounded_activations_have_no_gradient() -> None:
    dense = (QuantScheme.dense(torch.float32),)
    with pytest.raises(NoKernelFits, match="torch: activations rounded to int8 have no gradient"):
        select_kernel(problem(schemes=dense, needs_grad=True))


def test_another_arithmetic_lets_the_scales_go() -> None:
    weights = with_inputs(random_weights(sizes()), INT8)
    assert weights.roundings(None) == weights.roundings(ActivationDtype.INT8) == (INT8,)
    assert weights.roundings(ActivationDtype.BF16) == ()
    assert with_inputs(weights, E4M3).roundings(ActivationDtype.INT8) == ()
    assert weights.rounded_for(ActivationDtype.INT8) is weights
    assert weights.rounded_for(ActivationDtype.BF16).inputs == ()
    given = batch(sizes(), 4)
    for kernel in (REFERENCE, TorchKernel()):
        found = kernel.run(kernel.pack(weights, ActivationDtype.BF16), given)
        assert torch.equal(found, kernel.run(without_inputs(weights), given))


def test_how_it_runs_is_said() -> None:
    words = "activations rounded to int8 with the file's scales"
    assert in_words((INT8,)) == words and in_words(()) is None
    assert TorchKernel().how(problem()) == REFERENCE.how(problem()) == words
    assert TorchKernel().how(problem(roundings=())) is None
    if missing() is None:
        with forced_path("portable"):
            kernel = get_kernel("cpu")
            assert kernel.how(problem()) == f"portable, int8 products, {words}"
            assert kernel.how(problem(roundings=())) == "portable, int8 activations"
            e4m3 = kernel.how(problem(roundings=(E4M3,)))
            assert e4m3 == f"portable, fp32 products, {words.replace('int8', 'e4m3')}"


def test_a_move_takes_the_scales_along() -> None:
    linear = torch.nn.Linear(32, 8, bias=False).requires_grad_(False)
    inputs = StaticInputs(INT8, torch.tensor(0.1))
    adopt_linear(linear, quantize(linear.weight, WeightFormat.INT8_G32), torch.float32, inputs)
    moved: Any = linear.to("meta")
    assert moved.inputs.scales.device.type == "meta"
