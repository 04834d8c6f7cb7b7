"""Columns in another order (GPTQ act-order) on the C++ kernel: gathered, or folded into rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from expert_cases import CONFIGS, batch_of, random_batch, sizes
from test_cpu_amx import EMULATED
from test_cpu_amx import check as check_tiles
from test_cpu_kernel import (
    EDGES,
    PATHS,
    assert_same_bits,
    check,
    matrices,
    run,
    scheme,
    super_blocks,
    truth_of,
)
from test_static_activations import ALL_SCALES, E4M3, FLIPS, INT8, with_inputs
from tolerances import frobenius_error

from mixtura.config import ActivationDtype, ExpertsConfig, WeightOn
from mixtura.errors import InputError
from mixtura.kernels.cpu import pack_layer, unpack_layer
from mixtura.kernels.cpu.extension import forced_path, missing
from mixtura.kernels.cpu.linear import pack_linear, run_linear
from mixtura.kernels.torch import TorchKernel
from mixtura.quant.activations import StaticInputs, round_activations
from mixtura.quant.matrix import dequantize
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme, ZeroPoint
from mixtura.types import ExpertWeights

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def permuted(plain: QuantScheme) -> QuantScheme:
    return dataclasses.replace(plain, has_permutation=True)


SCHEMES: dict[str, tuple[QuantScheme, torch.dtype | None]] = {
    "int4": (permuted(scheme(Code.INT, 4, (1, 32), torch.float16)), None),
    "int4, zeros": (
        permuted(scheme(Code.INT, 4, (1, 128), torch.float16, ZeroPoint.INTEGER)),
        torch.uint8,
    ),
    "int8, per output": (permuted(scheme(Code.INT, 8, (1, None))), None),
    "int3, global scales": (
        permuted(scheme(Code.INT, 3, (1, 16), global_scale=GlobalScale.ROW)),
        None,
    ),
    "int4, shared rows": (permuted(scheme(Code.INT, 4, (48, 32), torch.bfloat16)), None),
    "int5, super-blocks": (permuted(super_blocks(5, 32, 256, ZeroPoint.MINIMUM)), None),
    "e4m3": (permuted(scheme(Code.E4M3, 8, (1, 64))), None),
}

INT4 = SCHEMES["int4"][0]


def projections(config: ExpertsConfig, gate_up: QuantScheme, down: QuantScheme) -> ExpertWeights:
    first, second = matrices(config, gate_up), matrices(config, down)
    return dataclasses.replace(first, down_proj=second.down_proj)


@pytest.mark.parametrize("layout", ["stacked", "gpt-oss", "ungated-bias"])
@pytest.mark.parametrize("name", SCHEMES)
def test_experts_on_every_path(name, layout):
    config = dataclasses.replace(CONFIGS[layout], hidden_size=333, intermediate_size=160)
    weights = matrices(config, *SCHEMES[name])
    batch = random_batch(config, 7)
    truth = truth_of(weights, batch)
    for path in PATHS[:: 1 if layout == "gpt-oss" else 3]:
        with forced_path(path):
            check(weights, batch, truth=truth)
            check(weights, batch, truth=truth, activation_dtype=ActivationDtype.BF16)


@pytest.mark.parametrize("is_first", [True, False])
def test_one_projection_of_two(is_first):
    config = dataclasses.replace(CONFIGS["bias"], hidden_size=64, intermediate_size=96)
    plain = dataclasses.replace(INT4, has_permutation=False)
    pair = (INT4, plain) if is_first else (plain, INT4)
    check(projections(config, *pair), random_batch(config, 40))


@pytest.mark.parametrize("ids", EDGES.values(), ids=EDGES.keys())
def test_edges(ids):
    config = sizes(5, 40, 24)
    weights = matrices(config, permuted(scheme(Code.INT, 8, (1, 16))))
    batch = random_batch(config, len(ids))
    check(weights, batch_of(batch, ids) if ids else batch)


def test_a_row_does_not_depend_on_its_batch():
    config = sizes(4, 176, 104)
    weights = matrices(config, *SCHEMES["int4"])
    packed, batch = pack_layer(weights), random_batch(config, 120)
    out = run(packed, batch)
    for start, stop in ((0, 1), (1, 4), (4, 60)):
        part = dataclasses.replace(
            batch,
            hidden_states=batch.hidden_states[start:stop],
            local_ids=batch.local_ids[start:stop],
            topk_weights=batch.topk_weights[start:stop],
        )
        assert torch.equal(run(packed, part), out[start:stop])


def test_columns_in_their_own_order_change_nothing():
    config = sizes(2, 64, 96)
    weights = matrices(config, *SCHEMES["int4"])

    def in_order(matrix, has_permutation):
        order = torch.arange(matrix.shape[-1], dtype=torch.int32).expand(2, -1).contiguous()
        return dataclasses.replace(
            matrix,
            scheme=dataclasses.replace(matrix.scheme, has_permutation=has_permutation),
            permutation=order if has_permutation else None,
        )

    def both(has_permutation):
        return dataclasses.replace(
            weights,
            gate_up_proj=in_order(weights.gate_up_proj, has_permutation),
            down_proj=in_order(weights.down_proj, has_permutation),
        )

    batch = random_batch(config, 9)
    assert torch.equal(run(pack_layer(both(True)), batch), run(pack_layer(both(False)), batch))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("inputs", [INT8, E4M3], ids=lambda inputs: inputs.code_words)
@pytest.mark.parametrize("name", ["int4, zeros", "int5, super-blocks", "e4m3"])
def test_with_stored_scales_of_inputs(path, inputs, name):
    """Gathered, weighed, rounded: of one scale and of many, on the input and on the output."""
    config = dataclasses.replace(sizes(5, 154, 96), has_bias=True)
    weights = matrices(config, *SCHEMES[name])
    one_scale = (0.02,) * 5
    for scales, weight_on, num_rows in (
        (one_scale, WeightOn.OUTPUT, 30),
        (one_scale, WeightOn.INPUT, 5),
        (ALL_SCALES, WeightOn.OUTPUT, 5),
        (ALL_SCALES, WeightOn.INPUT, 9),
    ):
        rounded = with_inputs(weights, inputs, scales)
        batch = random_batch(config, num_rows)
        expected = TorchKernel().run(rounded, batch, weight_on=weight_on)
        with forced_path(path):
            packed = pack_layer(rounded)
            found = run(packed, batch, weight_on)
        assert frobenius_error(found, expected) < FLIPS
        assert_same_bits(unpack_layer(packed), rounded)


def test_weights_on_the_input():
    config = sizes(3, 64, 96)
    weights = matrices(config, *SCHEMES["int4"])
    check(weights, random_batch(config, 9), WeightOn.INPUT)


@pytest.mark.skipif(EMULATED not in PATHS, reason="the emulation needs AVX-512-BF16")
@pytest.mark.parametrize("name", ["int4, zeros", "e4m3"])
def test_tiles(name):
    check_tiles(matrices(sizes(1, 176, 80), *SCHEMES[name]))


@pytest.mark.parametrize("path", PATHS)
def test_a_linear_layer(path):
    matrix = matrices(sizes(1, 70, 48), *SCHEMES["int4"]).down_proj.expert(0)
    rows = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    expected = rows @ dequantize(matrix).T
    with forced_path(path):
        linear = pack_linear(matrix, activation_dtype=ActivationDtype.BF16)
        found = run_linear(linear, rows)
    assert (found - expected).norm() <= 4e-3 * expected.norm()
    for name, tensor in linear.unpacked().tensors.items():
        assert torch.equal(tensor, matrix.tensors[name]), name


@pytest.mark.parametrize("path", PATHS)
def test_a_linear_layer_with_a_stored_scale_of_its_inputs(path):
    matrix = matrices(sizes(1, 70, 48), *SCHEMES["int4"]).down_proj.expert(0)
    rows = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    inputs = StaticInputs(INT8, torch.tensor(0.02))
    expected = round_activations(rows, INT8, inputs.scales) @ dequantize(matrix).T
    with forced_path(path):
        found = run_linear(pack_linear(matrix, inputs=inputs), rows)
    assert frobenius_error(found, expected) < 1e-5


def test_experts_come_back():
    weights = matrices(sizes(3, 64, 96), *SCHEMES["int4, zeros"])
    assert_same_bits(unpack_layer(pack_layer(weights)), weights)


@pytest.mark.parametrize("role", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("column", [-1, 64, 3])
def test_a_permutation_has_every_column_once(role, column):
    weights = matrices(sizes(2, 64, 64), *SCHEMES["int4"])
    matrix = getattr(weights, role)
    order = matrix.permutation.clone()
    order[1, 0], order[1, 1] = column, 3
    spoiled = dataclasses.replace(matrix, permutation=order)
    with pytest.raises(InputError, match=r"permutation \(expert 1\) must have each of 64 columns"):
        pack_layer(dataclasses.replace(weights, **{role: spoiled}))
