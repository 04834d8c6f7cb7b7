"""The C++ kernel against the reference, on every instruction set that this processor has."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from expert_cases import (
    ACTIVATIONS,
    CONFIGS,
    batch_of,
    build_layer,
    converted,
    dense_tensors,
    dequantized,
    moe_config,
    problem_of,
    quantized,
    random_batch,
    random_weights,
    rows_of,
    sizes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import frobenius_error, products_bound, relative_error
from torch import Tensor

from mixtura.bench.cases import Case, find_shape
from mixtura.bench.weights import LayerWeights, random_batches
from mixtura.config import ActivationDtype, ExpertsConfig, GateUp, WeightOn
from mixtura.dispatch.contract import sum_slots
from mixtura.errors import ConfigError, GradientUnsupported, InputError, NoKernelFits
from mixtura.experts import ExpertsOptions, RoutedExperts
from mixtura.kernels import get_kernel, select_kernel
from mixtura.kernels.cpu import CpuKernel, PackedLayer, pack_layer, panels, run_packed, unpack_layer
from mixtura.kernels.cpu.arithmetic import Arithmetic, arithmetic_for
from mixtura.kernels.cpu.extension import (
    cpu_flags,
    current_path,
    emulated_paths,
    extension,
    forced_path,
    missing,
    runnable_paths,
)
from mixtura.kernels.cpu.panels import ACTIVATION_GROUP
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dense, group_scales
from mixtura.quant.packing import pack_codes
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme, ZeroPoint
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

PATHS = runnable_paths() + emulated_paths() if missing() is None else ()
PACKED_FORMATS = [format for format in WeightFormat if format.scheme.is_quantized]
ROW_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = {Arithmetic.F32: torch.float32, Arithmetic.BF16: torch.bfloat16}

SMALL_SAMPLE = 1.3
"""The bounds of the table are for many rows; of a few, the error may be this much larger."""

ANY_SIZES = 8.0
"""And where a hidden layer of one or two columns may carry a whole output: the worst case."""

FEW = 64
"""Fewer outputs have errors of their own, not those of the table."""

TYPICAL_OUTPUT = 0.3
"""The root mean square of the outputs of random experts, less than it is."""

REFERENCE = get_kernel("reference")
TESTS = Path(__file__).resolve().parent

by_format = pytest.mark.parametrize("weight_format", WeightFormat, ids=lambda f: f.value)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    with forced_path(request.param):
        yield request.param


@pytest.fixture(params=["openmp", "pool"])
def threads(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to have threads."""
    before = extension().threads()
    if not extension().choose_threads(request.param):
        pytest.skip(f"no {request.param} threads here")
    yield request.param
    extension().choose_threads(before)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, which is the kernel's."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def assert_same_bits(left: ExpertWeights, right: ExpertWeights) -> None:
    for mine, theirs in zip(left.tensors(), right.tensors(), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        mine, theirs = mine.detach().contiguous(), theirs.detach().contiguous()
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def bound(
    weights: ExpertWeights, rows: torch.dtype, activation_dtype: ActivationDtype | None = None
) -> float:
    """The table's bound for the arithmetic of the current path."""
    bounds = []
    for scheme in weights.schemes:
        arithmetic = arithmetic_for(scheme, activation_dtype, has_bf16=extension().has_bf16())
        columns = None
        if arithmetic is Arithmetic.INT8:
            columns = scheme.group_shape[1] or ACTIVATION_GROUP
        bounds.append(products_bound(DTYPES.get(arithmetic, torch.int8), columns, rows))
    return max(bounds)


def truth_of(
    weights: ExpertWeights, batch: ExpertBatch, weight_on: WeightOn = WeightOn.OUTPUT
) -> tuple[Tensor, Tensor]:
    """Rows and terms in fp32, with the weights that packed ones stand for."""
    wide = dequantized(weights)
    wide = converted(wide, torch.float32)
    widened = dataclasses.replace(batch, hidden_states=batch.hidden_states.float())
    return (
        REFERENCE.run(wide, widened, weight_on=weight_on),
        REFERENCE.run(wide, widened, weight_on=weight_on, reduce=False),
    )


def run(
    packed: PackedLayer,
    batch: ExpertBatch,
    weight_on: WeightOn = WeightOn.OUTPUT,
    *,
    reduce: bool = True,
) -> Tensor:
    return run_packed(packed, batch, weight_on is WeightOn.INPUT, reduce)


def check(
    weights: ExpertWeights,
    batch: ExpertBatch,
    weight_on: WeightOn = WeightOn.OUTPUT,
    *,
    activation_dtype: ActivationDtype | None = None,
    truth: tuple[Tensor, Tensor] | None = None,
    slack: float = SMALL_SAMPLE,
) -> None:
    """Pack, unpack, run both ways, and compare with the reference."""
    packed = pack_layer(weights, activation_dtype)
    assert_same_bits(unpack_layer(packed), weights)
    expected, terms = truth or truth_of(weights, batch, weight_on)
    found = run(packed, batch, weight_on)
    found_terms = run(packed, batch, weight_on, reduce=False)
    dtype = batch.hidden_states.dtype
    assert (found.dtype, found_terms.dtype) == (dtype, torch.float32)
    limit = bound(weights, dtype, activation_dtype)
    if limit > 1e-3:
        limit *= slack
    sample = sample_of(weights, batch)
    assert error_of_sample(found, expected, sample) <= limit
    assert error_of_sample(found_terms, terms, sample) <= limit


def sample_of(weights: ExpertWeights, batch: ExpertBatch) -> int:
    """How many independent values an error is averaged over."""
    config = weights.config
    return len(batch.hidden_states) * min(config.hidden_size, config.intermediate_size)


def error_of_sample(found: Tensor, expected: Tensor, sample: int) -> float:
    """The Frobenius error; of a small sample, what it would be over a large one.

    A lone output may be the small difference of large products, and its error far from the mean.
    """
    if sample >= FEW:
        return frobenius_error(found, expected)
    size = max(float(expected.norm()), TYPICAL_OUTPUT * expected.numel() ** 0.5, 1e-30)
    return float((found.float() - expected).norm()) / size / (1.0 + 5.0 * max(sample, 1) ** -0.5)


def with_format(weights: ExpertWeights, weight_format: WeightFormat) -> ExpertWeights:
    if weight_format.scheme.is_quantized:
        return quantized(weights, weight_format)
    return converted(weights, weight_format.scheme.values_dtype)


# ------------------------------------------------------------------------------------- every format


Combination = tuple[str, WeightFormat, str, torch.dtype, WeightOn, torch.dtype | None]

EVERYTHING: list[Combination] = list(
    itertools.product(
        PATHS, WeightFormat, CONFIGS, ROW_DTYPES, WeightOn, (None, ActivationDtype.BF16)
    )
)


def covering(seed: int = 0) -> list[Combination]:
    """Each path with each format, and with it one of everything else by chance."""
    order = random.Random(seed)
    shuffled = order.sample(EVERYTHING, len(EVERYTHING))
    return list({(name, weight_format): rest for rest in shuffled
                 for name, weight_format, *_ in [rest]}.values())  # fmt: skip


@cache
def medium_weights(name: str, weight_format: WeightFormat) -> ExpertWeights:
    config = dataclasses.replace(CONFIGS[name], hidden_size=176, intermediate_size=136)
    return with_format(random_weights(config), weight_format)


@cache
def medium_truth(
    name: str, weight_format: WeightFormat, dtype: torch.dtype, weight_on: WeightOn
) -> tuple[ExpertBatch, tuple[Tensor, Tensor]]:
    weights = medium_weights(name, weight_format)
    batch = random_batch(weights.config, 9, 2, dtype)
    return batch, truth_of(weights, batch, weight_on)


@pytest.mark.parametrize("activation_dtype", [None, ActivationDtype.BF16])
@by_format
def test_the_documented_error(weight_format, activation_dtype):
    """On N(0,1) rows, with enough of them, the error is the table's."""
    config = sizes(2, 512, 384)
    weights = with_format(random_weights(config), weight_format)
    batch = random_batch(config, 40, 1)
    expected, _ = truth_of(weights, batch)
    for name in PATHS:
        with forced_path(name):
            found = run(pack_layer(weights, activation_dtype), batch)
            limit = bound(weights, torch.float32, activation_dtype)
            assert frobenius_error(found, expected) <= limit, name


def check_combination(combination: Combination) -> None:
    name, weight_format, layout, dtype, weight_on, activation_dtype = combination
    batch, truth = medium_truth(layout, weight_format, dtype, weight_on)
    with forced_path(name):
        check(
            medium_weights(layout, weight_format),
            batch,
            weight_on,
            activation_dtype=activation_dtype,
            truth=truth,
        )


def name_of(combination: Combination) -> str:
    words = (part.value if hasattr(part, "value") else str(part) for part in combination)
    return "-".join(words).replace("torch.", "")


@pytest.mark.parametrize("combination", covering(), ids=name_of)
def test_formats_and_layouts(combination):
    check_combination(combination)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
@by_format
def test_every_format_in_every_layout(name, weight_format):
    for combination in EVERYTHING:
        if combination[:2] == (name, weight_format):
            check_combination(combination)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_layouts(path, config):
    for dtype, weight_on in itertools.product(ROW_DTYPES, WeightOn):
        check(random_weights(config, dtype), random_batch(config, 7, 2, dtype), weight_on)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_activations(path, activation):
    config = dataclasses.replace(sizes(4, 37, 70), activation=activation)
    weights, batch = random_weights(config), random_batch(config, 20)
    check(weights, batch)
    # Far from zero too, where exponentials end.
    far = dataclasses.replace(batch, hidden_states=batch.hidden_states * 60)
    check(weights, far)
    check(quantized(weights, WeightFormat.INT8_G32), batch, activation_dtype=ActivationDtype.BF16)


# ------------------------------------------------------------------------------- every other scheme


def scheme(
    code: Code,
    bits: int,
    group: tuple[int | None, int | None],
    scale: torch.dtype = torch.float32,
    zero: ZeroPoint | None = None,
    global_scale: GlobalScale = GlobalScale.NONE,
) -> QuantScheme:
    symmetric = ZeroPoint.MID if code is Code.INT else ZeroPoint.NONE
    return QuantScheme(code, bits, group, scale, zero or symmetric, global_scale)


def super_blocks(
    bits: int, columns: int, super_columns: int, zero: ZeroPoint = ZeroPoint.MID
) -> QuantScheme:
    dtype = torch.int8 if zero is ZeroPoint.MID else torch.uint8
    return QuantScheme(
        Code.INT, bits, (1, columns), dtype, zero_point=zero, super_columns=super_columns
    )


# Of more bits than bf16 has, and with two zeros, as in FP4 of bitsandbytes.
FRACTIONS = (0.0, *torch.linspace(-1, 1, 14).erfinv().clamp(-3, 3).tolist(), -0.0)
NF4 = QuantScheme(Code.CODEBOOK, 4, (1, 64), torch.float32, codebook=FRACTIONS)
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
SCHEMES: dict[str, tuple[QuantScheme, torch.dtype | None]] = {
    "int8, zeros": (scheme(Code.INT, 8, (1, 32), zero=ZeroPoint.INTEGER), torch.uint8),
    "int8, wide zeros": (scheme(Code.INT, 8, (1, 128), zero=ZeroPoint.INTEGER), torch.int16),
    "int4, zeros": (scheme(Code.INT, 4, (1, 128), zero=ZeroPoint.INTEGER), torch.uint8),
    "int4, wide zeros": (
        scheme(Code.INT, 4, (1, 16), torch.float16, ZeroPoint.INTEGER),
        torch.int16,
    ),
    "int8, minima": (scheme(Code.INT, 8, (1, 32), zero=ZeroPoint.MINIMUM), torch.float32),
    "int8, bf16 minima": (
        scheme(Code.INT, 8, (1, 64), torch.bfloat16, ZeroPoint.MINIMUM),
        torch.bfloat16,
    ),
    "int4, fp16 minima": (
        scheme(Code.INT, 4, (1, 32), torch.float16, ZeroPoint.MINIMUM),
        torch.float16,
    ),
    "int4, minima and a global scale": (
        scheme(Code.INT, 4, (1, 16), zero=ZeroPoint.MINIMUM, global_scale=GlobalScale.ROW),
        torch.float32,
    ),
    "int4, zeros and a global scale": (
        scheme(Code.INT, 4, (1, 32), E4M3, ZeroPoint.INTEGER, GlobalScale.MATRIX),
        torch.uint8,
    ),
    "int4, super-blocks with minima": (super_blocks(4, 32, 256, ZeroPoint.MINIMUM), None),
    "int4, super-blocks": (super_blocks(4, 16, 128), None),
    "int8, super-blocks": (super_blocks(8, 16, 256), None),
    "int4, per output": (scheme(Code.INT, 4, (1, None), torch.float16), None),
    "int8, per matrix": (scheme(Code.INT, 8, (None, None)), None),
    "int8, blocks": (scheme(Code.INT, 8, (64, 64), torch.bfloat16), None),
    "int8, flat blocks": (scheme(Code.INT, 8, (3, 256)), None),
    "int4, odd blocks": (scheme(Code.INT, 4, (7, 48), E8M0), None),
    "int4, all rows": (scheme(Code.INT, 4, (None, 32), torch.bfloat16), None),
    "int4, groups of 80": (scheme(Code.INT, 4, (1, 80)), None),
    "int8, e8m0": (scheme(Code.INT, 8, (1, 32), E8M0), None),
    "int8, e4m3": (scheme(Code.INT, 8, (1, 16), E4M3), None),
    "codebook": (NF4, None),
    "codebook, per output": (dataclasses.replace(NF4, group_shape=(1, None)), None),
    "e2m1, fp16": (scheme(Code.E2M1, 4, (1, 64), torch.float16), None),
    "e2m1, per output": (scheme(Code.E2M1, 4, (1, None), torch.bfloat16), None),
    "e2m1, per row": (
        scheme(Code.E2M1, 4, (1, 16), E4M3, global_scale=GlobalScale.ROW),
        None,
    ),
    "e2m1, blocks with zeros' shape": (
        scheme(Code.E2M1, 4, (16, 16), global_scale=GlobalScale.MATRIX),
        None,
    ),
    "e4m3, mx": (scheme(Code.E4M3, 8, (1, 32), E8M0), None),
    "e4m3, per matrix": (scheme(Code.E4M3, 8, (None, None)), None),
    "e4m3, groups of 112": (scheme(Code.E4M3, 8, (1, 112), torch.bfloat16), None),
    "e4m3, global": (
        scheme(Code.E4M3, 8, (128, 128), E4M3, global_scale=GlobalScale.ROW),
        None,
    ),
}
"""Schemes without a name, each with the dtype of its zero points."""


def random_matrix(
    shape: tuple[int, int, int],
    scheme: QuantScheme,
    zeros: torch.dtype | None,
    generator: torch.Generator,
) -> QuantizedMatrix:
    """Codes by chance, with scales that make weights of about the usual size."""
    num_levels = 2**scheme.bits
    codes = torch.randint(num_levels, shape, generator=generator).to(torch.uint8)
    if scheme.code is Code.E4M3:
        codes = torch.where((codes & 127) > 120, codes & 0x87, codes)  # no NaN, few large ones
    levels = torch.tensor(scheme.levels)[codes.long()]
    middle = num_levels / 2 if scheme.code is Code.INT else 0.0
    usual = 1 / (float((levels - middle).square().mean().sqrt()) * shape[-1] ** 0.5)
    specs = scheme.tensors_for(shape)
    tensors = {"values": pack_codes(codes, scheme.bits)}
    around = torch.rand(specs["scales"].shape, generator=generator) + 0.5
    if "global_scale" in specs:
        tensors["global_scale"] = torch.rand(specs["global_scale"].shape, generator=generator) + 0.5
        tensors["global_scale"] *= usual
        usual = 1.0
    signs = torch.where(torch.rand(around.shape, generator=generator) < 0.2, -1.0, 1.0)
    if "permutation" in specs:
        order = torch.rand(specs["permutation"].shape, generator=generator).argsort(-1)
        tensors["permutation"] = order.int()
    if scheme.super_columns is not None:
        return of_super_blocks(shape, scheme, tensors, around * signs, usual)
    if scheme.scale_dtype is E8M0:
        tensors["scales"] = (around * usual).log2().round().exp2().to(E8M0)
    else:
        tensors["scales"] = (around * usual * signs).to(scheme.scale_dtype)
    if "zero_points" in specs:
        near = torch.rand(around.shape, generator=generator)
        if scheme.zero_point is ZeroPoint.INTEGER:
            shift = (near * num_levels / 2 + num_levels / 4).round()
            tensors["zero_points"] = shift.to(zeros)
            if zeros is torch.int16:
                tensors["zero_points"][..., :1] = num_levels  # as GPTQ may have it
        else:
            minima = tensors["scales"].float() * middle * (near + 0.5)
            tensors["zero_points"] = minima.to(zeros)
    return QuantizedMatrix(scheme, shape, **tensors)


def of_super_blocks(
    shape: tuple[int, int, int],
    scheme: QuantScheme,
    tensors: dict[str, Tensor],
    around: Tensor,
    usual: float,
) -> QuantizedMatrix:
    """Levels of up to 48, signed or not, times fp16 scales of super-blocks."""
    specs = scheme.tensors_for(shape)
    is_signed = scheme.scale_dtype is torch.int8
    levels = (around if is_signed else around.abs()) * 32
    tensors["scales"] = levels.round().to(scheme.scale_dtype)
    blocks = torch.linspace(0.8, 1.2, math.prod(specs["super_scales"].shape)) * usual / 32
    tensors["super_scales"] = blocks.view(specs["super_scales"].shape).half()
    tensors["super_scales"][:, 1::2] *= -1
    if "super_minima" in specs:
        tensors["zero_points"] = (around.abs() * 32).round().to(torch.uint8)  # to the middle
        tensors["super_minima"] = tensors["super_scales"] * 2.0 ** (scheme.bits - 1)
    return QuantizedMatrix(scheme, shape, **tensors)


def matrices(
    config: ExpertsConfig, scheme: QuantScheme, zeros: torch.dtype | None = None, seed: int = 0
) -> ExpertWeights:
    """Random weights in any scheme."""
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(config)

    def matrix(old: QuantizedMatrix | None) -> QuantizedMatrix | None:
        return None if old is None else random_matrix(old.shape, scheme, zeros, generator)

    return dataclasses.replace(
        weights,
        gate_up_proj=matrix(weights.gate_up_proj),
        up_proj=matrix(weights.up_proj),
        down_proj=matrix(weights.down_proj),
    )


@cache
def scheme_case(name: str, layout: str) -> tuple[ExpertWeights, ExpertBatch, tuple[Tensor, Tensor]]:
    config = dataclasses.replace(CONFIGS[layout], hidden_size=336, intermediate_size=160)
    weights = matrices(config, *SCHEMES[name])
    batch = random_batch(config, 7)
    return weights, batch, truth_of(weights, batch)


@pytest.mark.parametrize("layout", ["stacked", "gpt-oss", "separate", "ungated-bias"])
@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_without_a_name(name, layout):
    weights, batch, truth = scheme_case(name, layout)
    for path in PATHS:
        with forced_path(path):
            check(weights, batch, truth=truth)
            check(weights, batch, truth=truth, activation_dtype=ActivationDtype.BF16)


def multiplied_out(weights: ExpertWeights) -> ExpertWeights:
    """The same with fp32 scales and minima of groups."""

    def matrix(old: QuantizedMatrix) -> QuantizedMatrix:
        flat = dataclasses.replace(old.scheme, scale_dtype=torch.float32, super_columns=None)
        zeros = old.zero_points
        if zeros is not None:
            as_scales = dataclasses.replace(old, scales=zeros, super_scales=old.super_minima)
            zeros = group_scales(as_scales)
        return QuantizedMatrix(flat, old.shape, old.values, group_scales(old), zeros)

    return dataclasses.replace(
        weights,
        gate_up_proj=matrix(weights.gate_up_proj),
        down_proj=matrix(weights.down_proj),
    )


@pytest.mark.parametrize("name", [name for name in SCHEMES if "super-blocks" in name])
def test_super_blocks_give_what_their_scales_multiplied_out_give(path, name):
    """Bit for bit, with few rows of an expert and with many."""
    weights = matrices(sizes(2, 336, 304), *SCHEMES[name])
    packed, other = pack_layer(weights), pack_layer(multiplied_out(weights))
    for num_rows in (1, 40):
        batch = random_batch(weights.config, num_rows, 1)
        assert torch.equal(run(packed, batch), run(other, batch))
    assert packed.num_bytes < other.num_bytes


def test_projections_in_two_schemes(path):
    config = sizes(3, 200, 72)
    first, second = (with_format(random_weights(config), f) for f in
                     (WeightFormat.INT4_G32, WeightFormat.BF16))  # fmt: skip
    for up, down in ((first, second), (second, first)):
        weights = dataclasses.replace(up, down_proj=down.down_proj)
        check(weights, random_batch(config, 6))


def test_a_group_of_zeros_and_the_ends_of_the_scales(path):
    config = sizes(2, 64, 64)
    weights = random_weights(config)
    weights.gate_up_proj.values[:, :, 32:] = 0.0
    weights.down_proj.values[0] *= 1e-20
    weights.down_proj.values[1] *= 1e20
    batch = random_batch(config, 8)
    for weight_format in (WeightFormat.INT8_G32, WeightFormat.MXFP4, WeightFormat.FP8_BLOCK):
        check(quantized(weights, weight_format), batch)


def test_rows_of_zeros_give_what_the_biases_give(path):
    config = dataclasses.replace(CONFIGS["bias"], hidden_size=72, intermediate_size=40)
    batch = random_batch(config, 4)
    batch.hidden_states[::2] = 0.0
    for weight_format in (WeightFormat.FP32, WeightFormat.INT8_CHANNEL, WeightFormat.NVFP4):
        check(with_format(random_weights(config), weight_format), batch)
    plain = quantized(random_weights(sizes(3, 72, 40)), WeightFormat.INT4_G32)
    assert not run(pack_layer(plain), random_batch_of_zeros(plain.config)).any()


def random_batch_of_zeros(config: ExpertsConfig) -> ExpertBatch:
    batch = random_batch(config, 3)
    return dataclasses.replace(batch, hidden_states=torch.zeros_like(batch.hidden_states))


# -------------------------------------------------------------------------------------------- sizes


SIZES = [
    (176, 352), (352, 176), (704, 60), (44, 1407), (1407, 33), (2880, 16), (8, 2880),
    (8, 6), (1, 1), (17, 33), (15, 16), (16, 15), (129, 127), (300, 31),
]  # fmt: skip


@cache
def size_case(
    hidden: int, inner: int, weight_format: WeightFormat
) -> tuple[ExpertWeights, ExpertBatch, tuple[Tensor, Tensor]]:
    config = sizes(2, hidden, inner)
    weights = with_format(random_weights(config), weight_format)
    batch = random_batch(config, 12, 1)
    return weights, batch, truth_of(weights, batch)


@pytest.mark.parametrize("hidden, inner", SIZES)
@by_format
def test_odd_sizes(hidden, inner, weight_format):
    weights, batch, truth = size_case(hidden, inner, weight_format)
    for path in PATHS:
        with forced_path(path):
            check(weights, batch, truth=truth)


@pytest.mark.slow
@by_format
def test_the_sizes_of_gpt_oss(path, weight_format):
    config = sizes(2, 2880, 2880)
    weights = with_format(random_weights(config), weight_format)
    check(weights, random_batch(config, 3, 1))


EDGES: dict[str, list[list[int]]] = {
    "one row": [[3, 0]],
    "empty experts": [[1, 3], [3, 1], [1, 3]],
    "all to the first": [[0]] * 150,
    "all to the last": [[4]] * 7,
    "slots without an expert": [[-1, 2], [2, -1], [4, 0]],
    "a row without experts": [[1, 2], [-1, -1], [0, 4]],
    "no expert at all": [[-1, -1], [-1, -1]],
    "an expert twice in a row": [[2, 2], [0, 2], [4, 4]],
    "every expert": [[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]],
    "no rows": [],
}


@pytest.mark.parametrize("ids", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("weight_format", [WeightFormat.BF16, WeightFormat.INT4_G32])
def test_edges(path, ids, weight_format):
    config = dataclasses.replace(CONFIGS["rms-scale-first"], hidden_size=40, intermediate_size=24)
    weights = with_format(random_weights(config), weight_format)
    batch = batch_of(random_batch(config, len(ids)), ids) if ids else random_batch(config, 0)
    check(weights, batch)
    packed = pack_layer(weights)
    out = run(packed, batch)
    assert not out[[row for row, experts in enumerate(ids) if max(experts, default=-1) < 0]].any()
    assert not run(packed, batch, reduce=False)[batch.local_ids < 0].any()


@pytest.mark.parametrize("num_experts", [1, 64, 300])
def test_one_expert_and_many(path, num_experts):
    config = sizes(num_experts, 40, 24)
    weights = quantized(random_weights(config), WeightFormat.INT8_G32)
    check(weights, random_batch(config, 12, 1))


def test_terms_are_added_in_fp32_in_the_order_of_the_slots(path):
    config = dataclasses.replace(
        sizes(2, 2, 2), gate_up=GateUp.UNGATED, activation=ACTIVATIONS["identity"]
    )
    identity = torch.eye(2).expand(2, 2, 2).bfloat16()
    packed = pack_layer(ExpertWeights(config, dense(identity), dense(identity)))
    rows = torch.ones(1, 2, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1, 0]], dtype=torch.int32)
    out = run(packed, ExpertBatch(rows, ids, torch.tensor([[256.0, 1.0, 1.0]])))
    assert out.tolist() == [[258.0, 258.0]]  # in bf16, 256 + 1 would be 256
    wide = run(packed, ExpertBatch(rows.float(), ids, torch.tensor([[1e8, -1e8, 1.0]])))
    assert wide.tolist() == [[1.0, 1.0]]
    other = run(packed, ExpertBatch(rows.float(), ids, torch.tensor([[1.0, 1e8, -1e8]])))
    assert other.tolist() == [[0.0, 0.0]]


def test_a_sum_is_that_of_its_rounded_terms(path):
    """Bit for bit: ranks that add terms of each other have them rounded."""
    config = sizes(5, 72, 40)
    packed, batch = pack_layer(random_weights(config)), random_batch(config, 30)
    terms = run(packed, batch, reduce=False)
    assert torch.equal(run(packed, batch), sum_slots(terms, torch.float32))


def test_inputs_need_not_be_contiguous(path):
    config = sizes(3, 40, 24)
    packed, batch = pack_layer(random_weights(config)), random_batch(config, 6)
    strided = ExpertBatch(
        batch.hidden_states.T.contiguous().T,
        batch.local_ids.repeat_interleave(2, 1)[:, ::2],
        batch.topk_weights.T.contiguous().T,
    )
    assert torch.equal(run(packed, strided), run(packed, batch))


# ------------------------------------------------------------------- rows, threads and their number


@cache
def large_case(weight_format: WeightFormat) -> tuple[ExpertWeights, ExpertBatch]:
    config = dataclasses.replace(CONFIGS["gpt-oss"], hidden_size=176, intermediate_size=104)
    weights = with_format(random_weights(config), weight_format)
    ids = torch.randint(-1, 5, (200, 3), generator=torch.Generator().manual_seed(2))
    return weights, batch_of(random_batch(config, 200), ids.tolist())


def row(batch: ExpertBatch, start: int, stop: int | None = None) -> ExpertBatch:
    part = slice(start, stop or start + 1)
    return ExpertBatch(batch.hidden_states[part], batch.local_ids[part], batch.topk_weights[part])


@by_format
def test_a_row_does_not_depend_on_its_batch(path, weight_format):
    weights, batch = large_case(weight_format)
    packed = pack_layer(weights)
    out, terms = run(packed, batch), run(packed, batch, reduce=False)
    alone = [run(packed, row(batch, index)) for index in range(0, 200, 7)]
    assert torch.equal(torch.cat(alone), out[::7])
    for start, stop in ((0, 5), (5, 18), (18, 100), (100, 200)):
        assert torch.equal(run(packed, row(batch, start, stop)), out[start:stop])
        assert torch.equal(run(packed, row(batch, start, stop), reduce=False), terms[start:stop])


@by_format
def test_a_row_does_not_depend_on_the_number_of_threads(num_threads, threads, weight_format):
    weights, batch = large_case(weight_format)
    packed = pack_layer(weights)
    expected, first = run(packed, batch), run(packed, row(batch, 0))
    short = extension().num_short_teams()
    for number in (1, 2, 3, (os.cpu_count() or 1) + 5):
        num_threads(number)
        for _ in range(3):
            assert torch.equal(run(packed, batch), expected)
            assert torch.equal(run(packed, row(batch, 0)), first)
    assert extension().num_short_teams() == short


@pytest.mark.slow
def test_calls_that_need_several_passes():
    """What lies between the phases is bounded: more tokens go through in passes."""
    config = sizes(3, 2048, 16)
    packed = pack_layer(quantized(random_weights(config), WeightFormat.INT8_G32))
    ids = torch.randint(-1, 3, (8001, 8), generator=torch.Generator().manual_seed(2))
    batch = batch_of(random_batch(config, 8001), ids.tolist())
    expected = [run(packed, row(batch, start, start + 900)) for start in range(0, 8001, 900)]
    assert torch.equal(run(packed, batch), torch.cat(expected))


def test_two_threads_may_call_at_once(num_threads, threads):
    num_threads(2)
    work = [(pack_layer(weights), batch) for weights, batch in
            map(large_case, (WeightFormat.INT4_G32, WeightFormat.BF16))]  # fmt: skip
    expected = [run(*item) for item in work]
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def call(index: int) -> None:
        try:
            torch.set_num_threads(1 + index % 3)
            start.wait()
            for turn in range(20):
                chosen = (index + turn) % 2
                assert torch.equal(run(*work[chosen]), expected[chosen])
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert failures == []


def run_python(script: str, *arguments: str, timeout: float = 120.0) -> str:
    """What a fresh interpreter prints."""
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_child_of_fork_runs_it_alone(threads):
    """Threads do not survive a fork; a child that waited for them would wait for ever."""
    printed = run_python(
        """
        import os, sys
        import torch
        from expert_cases import quantized, random_batch, random_weights, sizes
        from mixtura.kernels.cpu import pack_layer, run_packed
        from mixtura.kernels.cpu.extension import extension
        from mixtura.quant.formats import WeightFormat

        assert extension().choose_threads(sys.argv[1])
        torch.set_num_threads(2)
        torch.randn(400, 400) @ torch.randn(400, 400)  # torch's own threads
        config = sizes(3, 64, 64)
        packed = pack_layer(quantized(random_weights(config), WeightFormat.INT4_G32))
        batch = random_batch(config, 50)
        expected = run_packed(packed, batch, False, True)
        short = extension().num_short_teams()
        child = os.fork()
        if child == 0:
            same = all(
                torch.equal(run_packed(packed, batch, False, True), expected) for _ in range(3)
            )
            os._exit(0 if same and extension().num_short_teams() == short + 3 else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert torch.equal(run_packed(packed, batch, False, True), expected)
        print("done")
        """,
        threads,
    )
    assert printed == "done\n"


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_anything_agrees_with_the_reference(data):
    draw = data.draw
    layout = draw(st.sampled_from(sorted(CONFIGS)))
    config = dataclasses.replace(
        CONFIGS[layout],
        num_experts=draw(st.integers(1, 6)),
        hidden_size=draw(st.integers(1, 150)),
        intermediate_size=draw(st.integers(1, 150)),
    )
    seed = draw(st.integers(0, 99))
    weight_format = draw(st.sampled_from(WeightFormat))
    weights = with_format(random_weights(config, seed=seed), weight_format)
    num_rows, top_k = draw(st.integers(0, 14)), draw(st.integers(1, 4))
    choice = st.integers(-1, config.num_experts - 1)
    ids = draw(
        st.lists(
            st.lists(choice, min_size=top_k, max_size=top_k), min_size=num_rows, max_size=num_rows
        )
    )
    dtype = draw(st.sampled_from(ROW_DTYPES))
    batch = random_batch(config, num_rows, 1, dtype, seed=seed)
    batch = batch_of(batch, ids) if ids else batch
    weight_on = draw(st.sampled_from(WeightOn))
    torch.set_num_threads(draw(st.integers(1, 4)))
    activation_dtype = draw(st.sampled_from([None, ActivationDtype.BF16]))
    packed_formats = weight_format.scheme.is_quantized
    if sample_of(weights, batch) < FEW:
        # One row's hidden values may be far from normal, and so may the error of their int8 codes.
        activation_dtype = ActivationDtype.BF16
    with forced_path(draw(st.sampled_from(PATHS))):
        check(
            weights,
            batch,
            weight_on,
            slack=ANY_SIZES,
            activation_dtype=activation_dtype if packed_formats else None,
        )
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------ numbers without end


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@by_format
def test_what_is_not_finite_stays_in_its_row(path, weight_format, bad):
    weights, batch = large_case(weight_format)
    packed, batch = pack_layer(weights), row(batch, 0, 9)
    clean = run(packed, batch)
    rows = batch.hidden_states.clone()
    rows[3, 5] = bad
    ids = batch.local_ids.clone()
    ids[3] = torch.tensor([1, -1, 2])
    clean_ids = run(packed, ExpertBatch(batch.hidden_states, ids, batch.topk_weights))
    for dtype in (torch.float32, torch.bfloat16):
        out = run(packed, ExpertBatch(rows.to(dtype), ids, batch.topk_weights))
        assert not out[3].isfinite().any()
        others = [index for index in range(9) if index != 3]
        assert out[others].isfinite().all()
        if dtype is torch.float32:
            assert torch.equal(out[others], clean_ids[others])
            assert torch.equal(out[others], clean[others])


def test_a_weight_that_is_no_number_stays_in_its_row(path):
    weights, batch = large_case(WeightFormat.INT4_G32)
    packed, batch = pack_layer(weights), row(batch, 0, 9)
    topk_weights = batch.topk_weights.clone()
    topk_weights[2, 0] = float("nan")
    ids = batch.local_ids.clamp(min=0)
    out = run(packed, ExpertBatch(batch.hidden_states, ids, topk_weights))
    assert out[2].isnan().all()
    assert out[[0, 1, *range(3, 9)]].isfinite().all()


def test_nan_survives_the_way_to_bf16_and_fp16(path):
    config = sizes(2, 40, 24)
    weights = random_weights(config)
    for dtype in ROW_DTYPES:
        batch = random_batch(config, 2, 2, dtype)
        batch.hidden_states[1] = float("nan")
        assert run(pack_layer(weights), batch)[1].isnan().all()


# ---------------------------------------------------------------------------------------- bad input


def spoiled(weights: ExpertWeights, name: str, value: float) -> ExpertWeights:
    old = weights.down_proj
    tensor = getattr(old, name)
    wide = tensor.float()
    wide.view(-1)[-1] = value
    changed = dataclasses.replace(old, **{name: wide.to(tensor.dtype)})
    return dataclasses.replace(weights, down_proj=changed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_must_be_finite(dtype, value):
    weights = matrices(sizes(2, 64, 32), scheme(Code.INT, 4, (1, 32), dtype))
    with pytest.raises(
        InputError, match=r"scales \(\(1, 63, 0\)\) must be finite; got -?(nan|inf)"
    ):
        pack_layer(spoiled(weights, "scales", value))


@pytest.mark.parametrize("name", ["INT8_CHANNEL", "MXFP4", "NVFP4", "FP8_BLOCK"])
def test_scales_of_every_format_must_be_finite(name):
    weights = quantized(random_weights(sizes(2, 64, 32)), WeightFormat[name])
    with pytest.raises(InputError, match=r"scales .* must be finite; got nan"):
        pack_layer(spoiled(weights, "scales", float("nan")))


def test_zero_points_and_global_scales_must_be_finite():
    minima = SCHEMES["int4, fp16 minima"]
    with pytest.raises(InputError, match=r"zero_points .* must be finite; got inf"):
        pack_layer(spoiled(matrices(sizes(2, 64, 32), *minima), "zero_points", float("inf")))
    weights = quantized(random_weights(sizes(2, 64, 32)), WeightFormat.NVFP4)
    with pytest.raises(InputError, match=r"global_scale .* must be finite; got nan"):
        pack_layer(spoiled(weights, "global_scale", float("nan")))


def test_numbers_of_super_blocks_must_be_finite():
    weights = matrices(sizes(2, 64, 32), *SCHEMES["int4, super-blocks with minima"])
    for name in ("super_scales", "super_minima"):
        with pytest.raises(InputError, match=rf"{name} \(.*\) must be finite; got nan"):
            pack_layer(spoiled(weights, name, float("nan")))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_must_be_numbers(code):
    weights = quantized(random_weights(sizes(2, 64, 32)), WeightFormat.FP8)
    weights.down_proj.values[1, 2, 3] = code
    with pytest.raises(InputError, match=r"values \(expert 1\) must be numbers; got NaN codes"):
        pack_layer(weights)


@pytest.mark.parametrize("expert", [-2, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("num_rows", [1, 300])
def test_ids_out_of_range_are_found_before_anything_runs(path, expert, num_rows):
    config = sizes(5, 40, 24)
    packed, batch = pack_layer(random_weights(config)), random_batch(config, num_rows)
    expected = run(packed, batch)
    ids = batch.local_ids.clone()
    ids[-1, -1] = expert
    with pytest.raises(InputError, match=r"local_ids \(.*\) must be in \[-1, 5\)"):
        run(packed, ExpertBatch(batch.hidden_states, ids, batch.topk_weights))
    assert torch.equal(run(packed, batch), expected)


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers one byte off."""
    size = tensor.numel() * tensor.itemsize
    memory = bytearray(size + tensor.itemsize)
    moved = torch.frombuffer(memory, dtype=torch.uint8)[1 : 1 + size]
    moved.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    found = torch.empty(0, dtype=tensor.dtype)
    address = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=1)
    assert found.numel() == 0
    return address.view(tensor.shape)


BAD: dict[str, tuple[Callable[[ExpertBatch], dict[str, Tensor]], str]] = {
    "rows of float64": (
        lambda b: {"hidden_states": b.hidden_states.double()},
        r"hidden_states \(3, 8\) must be \(rows, 8\) of float32 or float16 or bfloat16 on the "
        r"CPU; got torch.float64",
    ),
    "rows of integers": (lambda b: {"hidden_states": b.hidden_states.int()}, "hidden_states"),
    "too wide rows": (
        lambda b: {"hidden_states": torch.zeros(3, 9)},
        r"hidden_states \(3, 9\) must be \(rows, 8\)",
    ),
    "too many rows": (lambda b: {"hidden_states": torch.zeros(4, 8)}, r"hidden_states \(4, 8\)"),
    "flat rows": (lambda b: {"hidden_states": torch.zeros(24)}, r"hidden_states \(24,\)"),
    "rows elsewhere": (
        lambda b: {"hidden_states": b.hidden_states.to("meta")},
        "hidden_states .* on meta",
    ),
    "ids of int64": (
        lambda b: {"local_ids": b.local_ids.long()},
        r"local_ids \(3, 2\) must be \(rows, top_k\) of int32 on the CPU; got torch.int64",
    ),
    "flat ids": (lambda b: {"local_ids": b.local_ids[:, 0]}, r"local_ids \(3,\)"),
    "one id": (lambda b: {"local_ids": b.local_ids[0, 0]}, r"local_ids \(\)"),
    "deep ids": (lambda b: {"local_ids": b.local_ids[..., None]}, r"local_ids \(3, 2, 1\)"),
    "ids elsewhere": (lambda b: {"local_ids": b.local_ids.to("meta")}, "local_ids .* on meta"),
    "weights of float64": (
        lambda b: {"topk_weights": b.topk_weights.double()},
        r"topk_weights \(3, 2\) must be \(rows, top_k\), as local_ids of .*; got torch.float64",
    ),
    "weights of integers": (lambda b: {"topk_weights": b.topk_weights.int()}, "topk_weights"),
    "too few weights": (
        lambda b: {"topk_weights": b.topk_weights[:, :1]},
        r"topk_weights \(3, 1\) must be .* with local_ids \(3, 2\)",
    ),
    "weights elsewhere": (
        lambda b: {"topk_weights": b.topk_weights.to("meta")},
        "topk_weights .* on meta",
    ),
    "rows between addresses": (
        lambda b: {"hidden_states": misaligned(b.hidden_states)},
        r"hidden_states \(3, 8\) must be aligned to its elements",
    ),
    "ids between addresses": (
        lambda b: {"local_ids": misaligned(b.local_ids)},
        "local_ids .*align",
    ),
    "weights between addresses": (
        lambda b: {"topk_weights": misaligned(b.topk_weights)},
        "topk_weights .* aligned",
    ),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD.keys())
def test_a_wrong_argument_is_named(change, message):
    packed, batch = pack_layer(random_weights(sizes())), random_batch(sizes(), 3)
    with pytest.raises(InputError, match=message):
        run(packed, dataclasses.replace(batch, **change(batch)))


def test_narrow_routing_weights_are_widened():
    packed, batch = pack_layer(random_weights(sizes())), random_batch(sizes(), 3)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = dataclasses.replace(batch, topk_weights=batch.topk_weights.to(dtype))
        wide = dataclasses.replace(batch, topk_weights=narrow.topk_weights.float())
        assert torch.equal(run(packed, narrow), run(packed, wide))


def unsupported(weights_scheme: QuantScheme, **changes: object) -> str | None:
    problem = dataclasses.replace(problem_of(sizes()), schemes=(weights_scheme,), **changes)
    return CpuKernel().unsupported(problem)


def test_what_it_cannot_run_it_says():
    reads = unsupported(QuantScheme.dense(torch.float64))
    assert reads is not None and reads.endswith("codes, not float64")
    rows = unsupported(QuantScheme.dense(torch.float32), row_dtype=torch.float64)
    assert rows == "computes rows of fp32, fp16 and bf16, not torch.float64"
    infinities = unsupported(scheme(Code.E5M2, 8, (1, 32)))
    assert infinities is not None and infinities.endswith("not e5m2")
    levels = QuantScheme(Code.CODEBOOK, 5, (1, 32), torch.float32, codebook=(0.5,) * 32)
    assert str(unsupported(levels)).endswith("not codebook of 32")
    assert unsupported(NF4) is None
    asked = unsupported(NF4, activation_dtype=ActivationDtype.INT8)
    assert str(asked).endswith("e2m1 codes, not with codebook of 16")
    sorted_columns = dataclasses.replace(scheme(Code.INT, 4, (1, 32)), has_permutation=True)
    assert unsupported(sorted_columns) is None
    apart = unsupported(sorted_columns, experts=CONFIGS["separate"])
    assert str(apart).endswith("of one order of columns, and the projections have their own")
    for columns in (8, 24, 272, 512):
        assert f"these have {columns}" in str(unsupported(scheme(Code.INT, 4, (1, columns))))
    three = dataclasses.replace(super_blocks(4, 16, 256), super_columns=48)
    assert str(unsupported(three)).endswith("groups, and these have 3")
    two = scheme(Code.E4M3, 8, (1, None), global_scale=GlobalScale.MATRIX)
    assert unsupported(two) == "has one scale for an output, and these have two"
    whole = scheme(Code.INT, 8, (1, None), zero=ZeroPoint.INTEGER)
    assert unsupported(whole) == "reads zero points of groups, and these belong to whole outputs"
    separate = dataclasses.replace(problem_of(CONFIGS["separate"]), schemes=(
        WeightFormat.INT8_CHANNEL.scheme, WeightFormat.BF16.scheme))  # fmt: skip
    assert CpuKernel().unsupported(separate) is None  # gate and up may be alike
    unlike = dataclasses.replace(separate, has_unlike_gate_up=True)
    assert CpuKernel().unsupported(unlike) == "reads gate and up of one scheme, and they have two"
    assert "is for cpu" in str(unsupported(WeightFormat.BF16.scheme, device="cuda"))
    for weight_format in WeightFormat:
        assert unsupported(weight_format.scheme) is None


# ----------------------------------------------------------------------------------- what is packed


def test_packed_weights_are_a_copy(path):
    """What they are packed from may be freed or written over."""
    for name, dtype in itertools.product(CONFIGS, ROW_DTYPES):
        weights, batch = random_weights(CONFIGS[name], dtype), random_batch(CONFIGS[name], 4)
        packed = pack_layer(weights)
        expected, before = run(packed, batch), unpack_layer(packed)
        before = before.mapped(torch.clone)
        for tensor in weights.tensors():
            tensor.fill_(float("nan"))
        assert torch.equal(run(packed, batch), expected), name
        assert_same_bits(unpack_layer(packed), before)


def test_what_is_packed_under_autograd_has_no_history():
    weights = random_weights(CONFIGS["rms-scale-first"])
    for tensor in dense_tensors(weights).values():
        tensor.requires_grad_()
    packed = pack_layer(weights)
    for matrix in (packed.gate_up, packed.down):
        assert not any(tensor.requires_grad for tensor in matrix.tensors.values())
    assert not run(packed, random_batch(weights.config, 3)).requires_grad


def test_packed_bytes_are_those_of_the_weights():
    config = sizes(2, 1024, 1024)
    for weight_format in WeightFormat:
        weights = with_format(random_weights(config), weight_format)
        # A block's scale is kept for each of its rows: 4 bytes for 128 codes.
        extra = 0.032 if weight_format is WeightFormat.FP8_BLOCK else 0.01
        assert pack_layer(weights).num_bytes <= weights.num_bytes * (1 + extra), weight_format


def test_large_weights_start_on_a_huge_page():
    weights = random_weights(sizes(2, 1024, 512))
    for matrix in (pack_layer(weights).gate_up, pack_layer(weights).down):
        assert matrix.tensors["values"].data_ptr() % 2**21 == 0
        assert matrix.tensors["values"].is_contiguous()


def test_paths_are_forced_and_let_go():
    best = current_path()
    assert best == runnable_paths()[0]
    assert runnable_paths()[-1] == "portable"
    assert {"avx2", "fma", "f16c"} <= set(cpu_flags()) or runnable_paths() == ("portable",)
    with forced_path("portable"):
        assert current_path() == "portable"
        with pytest.raises(ConfigError, match=r"path \('sse'\) must be one that this processor"), \
             forced_path("sse"):  # fmt: skip
            pass
    assert current_path() == best


def test_paths_agree_with_each_other():
    """The same arithmetic everywhere: paths differ by rounding of fp32 sums, and by no more."""
    config = dataclasses.replace(CONFIGS["gpt-oss"], hidden_size=176, intermediate_size=104)
    batch = random_batch(config, 40)
    for weight_format in (WeightFormat.FP32, WeightFormat.INT4_G128, WeightFormat.INT8_G32):
        weights = with_format(random_weights(config), weight_format)
        results = []
        for name in PATHS:
            with forced_path(name):
                results.append(run(pack_layer(weights), batch))
        for other in results[1:]:
            # A sum that rounds another way may turn one int8 activation by one step.
            assert frobenius_error(other, results[0]) < 1e-3


# -------------------------------------------------------------------- in modules and under autograd


def test_the_default_on_a_cpu_and_in_a_module():
    config = CONFIGS["rms-scale-first"]
    weights, batch = random_weights(config), random_batch(config, 5)
    module = RoutedExperts(config, weights=weights)
    expected = truth_of(weights, batch)[0]
    with torch.no_grad():
        found = module.run_batch(batch)
    assert module.state.held is not None and module.state.held.kernel.name == "cpu"
    assert relative_error(found, expected) < 3e-6
    assert_same_bits(module.expert_weights, random_weights(config))
    decision = module.decide(module.problem(torch.float32, needs_grad=False))
    reasons = {rejection.kernel: rejection.reason for rejection in decision.rejections}
    assert reasons["torch"] == "cpu is preferred"


def test_gradients_run_through_torch():
    config = CONFIGS["bias"]
    weights, batch = random_weights(config), random_batch(config, 5)
    found = []
    for kernel in (None, "torch"):
        module = RoutedExperts(config, weights=weights, options=ExpertsOptions(kernel=kernel))
        with torch.no_grad():
            module.run_batch(batch)
        rows = batch.hidden_states.clone().requires_grad_()
        module.run_batch(dataclasses.replace(batch, hidden_states=rows)).square().sum().backward()
        found.append(rows.grad)
    assert torch.equal(*found)


def test_gradients_of_the_cpu_kernel_are_refused():
    with pytest.raises(NoKernelFits, match="cpu: has no backward, and gradients are needed"):
        select_kernel(problem_of(sizes(), needs_grad=True), kernel="cpu")
    config = CONFIGS["bias"]
    weights, batch = random_weights(config), random_batch(config, 5)
    module = RoutedExperts(config, weights=weights, options=ExpertsOptions(kernel="cpu"))
    topk_weights = batch.topk_weights.clone().requires_grad_()
    with pytest.raises(NoKernelFits, match="gradients are needed"):
        module.run_batch(dataclasses.replace(batch, topk_weights=topk_weights))
    module = RoutedExperts(config, weights=quantized(weights, WeightFormat.MXFP4))
    with pytest.raises(GradientUnsupported, match="must be dense to have gradients"):
        module.run_batch(dataclasses.replace(batch, topk_weights=topk_weights))


# ----------------------------------------------------------------------------------------- compiled


COMPILED = ["fp32", "int4-g32", "mxfp4"]


@pytest.mark.parametrize("weight_format", COMPILED)
@pytest.mark.parametrize("ran_before", [False, True])
def test_a_compiled_layer_is_the_layer(weight_format, ran_before):
    config, options = moe_config(), {}
    if weight_format != "fp32":
        packed = quantized(random_weights(config.experts), WeightFormat(weight_format))
        options = {"weights": packed}
    layer, other = build_layer(config, **options), build_layer(config, **options)
    other.load_state_dict(layer.state_dict())
    rows = rows_of(7)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = other(rows)
        if ran_before:
            layer(rows)
        function = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(function(rows), expected)
        assert torch.equal(function(rows), expected)
        held = layer.experts.state.held
        assert held is not None and held.kernel.name == "cpu" and held.is_only_copy
        layer.state_dict()  # brings the weights back: the graph packs them again
        assert torch.equal(function(rows), expected)
        assert torch.equal(layer(rows), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends_keep_the_experts_whole(backend):
    config = moe_config()
    layer = build_layer(config)
    rows = rows_of(7)
    torch._dynamo.reset()
    with torch.no_grad():
        function = torch.compile(layer, fullgraph=True, backend=backend)
        first = function(rows)
        assert relative_error(first, layer(rows)) < 1e-5
        assert torch.equal(function(rows), first)


def test_layers_that_are_alike_share_a_graph():
    config = moe_config()
    layers = [build_layer(config, seed=seed) for seed in range(12)]
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def function(layer: torch.nn.Module, rows: Tensor) -> Tensor:
        return layer(rows)

    with torch.no_grad():
        for layer in layers:
            rows = rows_of(7)
            layer(rows)
            assert torch.equal(function(layer, rows), layer(rows))
    assert len(graphs) <= 3


def test_opcheck_of_the_kernel():
    packed, batch = pack_layer(random_weights(sizes())), random_batch(sizes(), 3)
    operands = (batch.hidden_states, batch.local_ids, batch.topk_weights, None, packed.key)
    for reduce in (True, False):
        torch.library.opcheck(torch.ops.mixtura.cpu_experts.default, (*operands, False, reduce))


def test_a_graph_outlives_no_experts():
    batch = random_batch(sizes(), 3)
    gone = torch.tensor([2**40])
    with pytest.raises(InputError, match="must be alive while a compiled graph runs; got none"):
        torch.ops.mixtura.cpu_experts(
            batch.hidden_states, batch.local_ids, batch.topk_weights, None, gone, False, True
        )
    with pytest.raises(InputError, match="must be alive while a compiled graph runs; got none"):
        torch.ops.mixtura.experts(
            batch.hidden_states, batch.local_ids, batch.topk_weights, None, gone, True
        )


def test_problems_of_every_format_choose_it():
    for weight_format, dtype in itertools.product(PACKED_FORMATS, ROW_DTYPES):
        problem = ExpertsProblem(sizes(), (weight_format.scheme,), dtype, "cpu")
        assert select_kernel(problem, strict=True).kernel.name == "cpu"


# ------------------------------------------------------------------------ the arithmetic asked for


def experts_with(weight_format: WeightFormat, asked: ActivationDtype | None) -> RoutedExperts:
    weights = quantized(random_weights(sizes(4, 256, 128)), weight_format)
    options = ExpertsOptions(activation_dtype=asked)
    return RoutedExperts(weights.config, weights=weights, options=options)


def test_activations_are_rounded_to_what_is_asked_for():
    batch = random_batch(sizes(4, 256, 128), 40)
    truth = truth_of(experts_with(WeightFormat.INT4_G32, None).expert_weights, batch)[0]
    errors = {}
    for asked in (None, *CpuKernel.activation_dtypes):
        experts = experts_with(WeightFormat.INT4_G32, asked)
        decision = experts.decide(experts.problem(torch.float32, needs_grad=False))
        name = (asked or ActivationDtype.INT8).value
        words = decision.kernel.how(decision.problem)
        assert words.startswith(f"{extension().current()}, ")
        if extension().has_bf16():
            assert words.endswith(f", {name} activations")
        errors[asked] = frobenius_error(experts.run_batch(batch), truth)
    assert errors[None] == errors[ActivationDtype.INT8] > 2 * errors[ActivationDtype.BF16]


@pytest.mark.parametrize(
    ("weight_format", "asked", "reason"),
    [
        (
            WeightFormat.FP8,
            ActivationDtype.INT8,
            "multiplies int8 activations with integers and e2m1 codes, not with e4m3",
        ),
        (WeightFormat.INT4_G32, ActivationDtype.FP8, "has no fp8 activations"),
    ],
)
def test_an_arithmetic_that_the_cpu_has_not_runs_in_torch(weight_format, asked, reason):
    experts = experts_with(weight_format, asked)
    problem = experts.problem(torch.float32, needs_grad=False)
    decision = experts.decide(problem)
    assert decision.kernel.name == "torch" and decision.is_fallback
    assert [r.reason for r in decision.rejections if r.kernel == "cpu"] == [reason]
    with pytest.raises(NoKernelFits, match=f"cpu: {reason}"):
        select_kernel(problem, kernel="cpu", strict=True)


def test_weights_packed_for_bf16_do_not_run_where_there_is_none():
    if "avx512_bf16" not in runnable_paths():
        pytest.skip("no path with products of bf16")
    weights = random_weights(sizes(), torch.bfloat16)
    with forced_path("avx512_bf16"):
        packed = pack_layer(weights)
    with forced_path("portable"), pytest.raises(ValueError, match="must run on a path that has"):
        run(packed, random_batch(sizes(), 2, dtype=torch.bfloat16))


def test_packed_weights_may_lie_in_mapped_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(shape=find_shape("tiny"), num_tokens=7, weights=WeightFormat.INT4_G32)
    source = LayerWeights(case.shape, case.weights)
    batch = random_batches(case, 1, seed=0)[0]
    kernel = CpuKernel()
    expected = kernel.run(kernel.pack(source.stacks(0)), batch)
    count = 0

    def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nonlocal count
        count += 1
        size = math.prod(shape)
        (tmp_path / str(count)).write_bytes(bytes(size * dtype.itemsize))
        return torch.from_file(str(tmp_path / str(count)), True, size, dtype=dtype).view(shape)

    monkeypatch.setattr(panels, "allocate", mapped)
    packed = kernel.pack(source.stacks(0))
    assert count >= 4  # values and scales of two projections
    assert torch.equal(kernel.run(packed, batch), expected)
