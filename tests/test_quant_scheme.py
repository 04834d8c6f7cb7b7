"""Schemes and round-to-nearest quantization, against plain loops and brute force."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixtura.errors import ConfigError, InputError, MixturaError
from mixtura.quant.formats import SHORT_NAMES, WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dense, dequantize, stack_experts
from mixtura.quant.packing import expand_groups, pack_codes, unpack_codes
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme, ZeroPoint

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
E2M1_LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

DENSE_FORMATS = (WeightFormat.FP32, WeightFormat.FP16, WeightFormat.BF16)
PACKED_FORMATS = [format for format in WeightFormat if format not in DENSE_FORMATS]


def int_scheme(
    bits: int,
    group: tuple[int | None, int | None],
    zero_point: ZeroPoint = ZeroPoint.MID,
    scale_dtype: torch.dtype = BF16,
) -> QuantScheme:
    return QuantScheme(Code.INT, bits, group, scale_dtype, zero_point)


# Beside the formats with a name: what only a scheme can say.
SYMMETRIC_INTS = {
    "int2-g16": int_scheme(2, (1, 16)),
    "int3-g32-fp16": int_scheme(3, (1, 32), scale_dtype=FP16),
    "int4": int_scheme(4, (1, None), scale_dtype=FP32),
    "int4-tensor": int_scheme(4, (None, None), scale_dtype=FP32),
    "int8-block": int_scheme(8, (4, 24)),
} | {format.value: format.scheme for format in PACKED_FORMATS if format.value.startswith("int")}
ASYMMETRIC_INTS = {
    f"int{bits}-{group[1]}-asymmetric-{scale_dtype}": int_scheme(
        bits, group, ZeroPoint.INTEGER, scale_dtype
    )
    for bits, group, scale_dtype in [
        (4, (1, 32), BF16),
        (4, (1, 64), FP16),
        (4, (1, 128), BF16),
        (4, (1, None), FP32),
        (8, (1, 32), FP32),
        (8, (1, 128), BF16),
    ]
}
FLOATS = {
    "mxfp8": QuantScheme(Code.E4M3, 8, (1, 32), E8M0),
    "mxfp8-e5m2": QuantScheme(Code.E5M2, 8, (1, 32), E8M0),
    "mxfp6-e2m3": QuantScheme(Code.E2M3, 6, (1, 32), E8M0),
    "mxfp6-e3m2": QuantScheme(Code.E3M2, 6, (1, 32), E8M0),
    "fp4-bf16-scales": QuantScheme(Code.E2M1, 4, (1, 16), BF16),
    "fp8-tensor": QuantScheme(Code.E4M3, 8, (None, None), FP32),
} | {format.value: format.scheme for format in PACKED_FORMATS if "fp" in format.value}
ALL_PACKED = SYMMETRIC_INTS | ASYMMETRIC_INTS | FLOATS


def by_name(schemes: dict[str, QuantScheme]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scheme", schemes.values(), ids=schemes.keys())


def random_weight(shape: tuple[int, ...], seed: int = 0, exponent: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.empty(shape[-1]).uniform_(0.2, 5.0, generator=generator)
    return weight * 2.0**exponent


def assert_same(left: QuantizedMatrix, right: QuantizedMatrix) -> None:
    assert (left.scheme, left.shape) == (right.scheme, right.shape)
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        other = right.tensors[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        bits, other_bits = tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        assert torch.equal(bits, other_bits), name


def at_elements(grid: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """One value per group, read at every element by plain indexing, in float64."""
    *_, num_rows, num_columns = matrix.shape
    group_rows, group_columns = matrix.scheme.group_shape
    rows = torch.arange(num_rows) // (group_rows or num_rows)
    columns = torch.arange(num_columns) // (group_columns or num_columns)
    return grid.float().double()[..., rows[:, None], columns]


def steps(matrix: QuantizedMatrix) -> Tensor:
    """The value of one level at every element, in float64."""
    assert matrix.scales is not None
    step = at_elements(matrix.scales, matrix)
    if matrix.global_scale is not None:
        step = step * matrix.global_scale.double().reshape(*matrix.shape[:-2], 1, 1)
    return step


# --- the meaning of a scheme ---------------------------------------------------------------------


def reference_level(scheme: QuantScheme, code: int) -> Fraction:
    if scheme.codebook is not None:
        return Fraction(scheme.codebook[code])
    if scheme.code is Code.INT:
        return Fraction(code)
    if scheme.code is Code.E2M1:
        return Fraction(E2M1_LEVELS[code % 8]) * (-1 if code >= 8 else 1)
    assert scheme.code is Code.E4M3
    return Fraction(torch.tensor(code, dtype=torch.uint8).view(E4M3).float().item())


def reference_dequantize(matrix: QuantizedMatrix) -> list[list[Fraction]]:
    """One matrix, element by element in exact arithmetic, from the bits of each row."""
    scheme, (num_rows, num_columns) = matrix.scheme, matrix.shape
    assert matrix.scales is not None
    weight = [[Fraction(0)] * num_columns for _ in range(num_rows)]
    for n in range(num_rows):
        row_bits = int.from_bytes(bytes(matrix.values[n].tolist()), "little")
        for k in range(num_columns):
            value = reference_level(scheme, (row_bits >> k * scheme.bits) % 2**scheme.bits)
            group_rows, group_columns = scheme.group_shape
            group = n // (group_rows or num_rows), k // (group_columns or num_columns)
            scale = Fraction(matrix.scales[group].float().item())
            if scheme.super_columns is not None:
                assert matrix.super_scales is not None
                scale *= Fraction(matrix.super_scales[n, k // scheme.super_columns].item())
            if scheme.zero_point is ZeroPoint.MID:
                value = (value - 2 ** (scheme.bits - 1)) * scale
            elif matrix.zero_points is None:
                value = value * scale
            else:
                zero = Fraction(matrix.zero_points[group].float().item())
                if matrix.super_minima is not None and scheme.super_columns is not None:
                    zero *= Fraction(matrix.super_minima[n, k // scheme.super_columns].item())
                is_minimum = scheme.zero_point is ZeroPoint.MINIMUM
                value = value * scale - zero if is_minimum else (value - zero) * scale
            if matrix.global_scale is not None:
                value *= Fraction(matrix.global_scale.expand(num_rows)[n].item())
            column = k if matrix.permutation is None else int(matrix.permutation[k])
            weight[n][column] = value
    return weight


def tiny_matrix(scheme: QuantScheme, shape: tuple[int, ...], seed: int) -> QuantizedMatrix:
    """Random codes and powers of two as scales, so that fp32 arithmetic is exact."""
    generator = torch.Generator().manual_seed(seed)

    def integers(shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    specs = scheme.tensors_for(shape)
    tensors = {}
    for name, spec in specs.items():
        if name == "values":
            codes = integers(shape, 0, 2**scheme.bits).to(torch.uint8)
            if scheme.code is Code.E4M3:
                codes[codes % 128 == 127] = 0  # no NaN
            tensors[name] = pack_codes(codes, scheme.bits)
        elif name == "permutation":
            order = torch.rand(spec.shape, generator=generator).argsort(-1)
            tensors[name] = order.to(torch.int32)
        elif name == "zero_points":
            tensors[name] = integers(spec.shape, 0, 2**scheme.bits + 1).to(spec.dtypes[-1])
        elif name == "scales" and scheme.super_columns is not None:
            low = torch.iinfo(spec.dtypes[0]).min // 2
            tensors[name] = integers(spec.shape, low, low + 128).to(spec.dtypes[0])
        else:
            scale = 2.0 ** integers(spec.shape, -3, 4)
            if scheme.scale_dtype is not E8M0:
                scale *= 1 - 2.0 * integers(spec.shape, 0, 2)  # negative ones are legal
            tensors[name] = scale.to(spec.dtypes[0])
    return QuantizedMatrix(scheme, shape, **tensors)


SUPER: dict[str, Any] = {"super_columns": 4, "scale_dtype": torch.int8}
MEANINGS = {
    **{
        f"int{bits}-{zero_point.value}": int_scheme(bits, (1, 4), zero_point, FP16)
        for bits in range(1, 9)
        for zero_point in (ZeroPoint.MID, ZeroPoint.INTEGER, ZeroPoint.MINIMUM)
    },
    "channel": int_scheme(4, (1, None)),
    "matrix": int_scheme(4, (None, None)),
    "columns": int_scheme(4, (None, 3)),
    "block": QuantScheme(Code.E4M3, 8, (2, 4), FP32),
    "block-minimum": int_scheme(5, (2, 4), ZeroPoint.MINIMUM, FP32),
    "mxfp4": QuantScheme(Code.E2M1, 4, (1, 4), E8M0),
    "nvfp4": QuantScheme(Code.E2M1, 4, (1, 4), E4M3, global_scale=GlobalScale.MATRIX),
    "row-global": QuantScheme(Code.E2M1, 4, (1, 4), E4M3, global_scale=GlobalScale.ROW),
    "minimum-global": dataclasses.replace(
        int_scheme(4, (1, 4), ZeroPoint.MINIMUM), global_scale=GlobalScale.ROW
    ),
    "permuted": dataclasses.replace(int_scheme(4, (1, 4), ZeroPoint.INTEGER), has_permutation=True),
    "super-block": dataclasses.replace(int_scheme(6, (1, 2)), **SUPER),
    "super-block-minimum": dataclasses.replace(
        int_scheme(4, (1, 4), ZeroPoint.MINIMUM), super_columns=8, scale_dtype=torch.uint8
    ),
    "codebook": QuantScheme(
        Code.CODEBOOK, 3, (1, 4), FP32, codebook=(-8.0, -3.0, -1.0, 0.0, 0.5, 2.0, 5.0, 9.0)
    ),
}


@by_name(MEANINGS)
@pytest.mark.parametrize("shape", [(3, 10), (5, 8), (1, 1)], ids=str)
def test_dequantize_agrees_with_a_double_loop(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    matrix = tiny_matrix(scheme, shape, seed=1)
    assert dequantize(matrix).tolist() == reference_dequantize(matrix)


@by_name(MEANINGS)
def test_dequantize_of_a_stack_is_that_of_its_experts(scheme: QuantScheme) -> None:
    matrix = tiny_matrix(scheme, (3, 5, 10), seed=2)
    weight = dequantize(matrix)
    assert weight.shape == (3, 5, 10)
    for index in range(3):
        assert weight[index].tolist() == reference_dequantize(matrix.expert(index))


def test_dequantize_by_hand() -> None:
    scheme = int_scheme(4, (1, 2), ZeroPoint.INTEGER, FP32)
    values = torch.tensor([[0x21, 0x0F]], dtype=torch.uint8)  # codes 1, 2 | 15
    scales = torch.tensor([[0.5, 2.0]])
    zero_points = torch.tensor([[1, 16]], dtype=torch.int16)
    matrix = QuantizedMatrix(scheme, (1, 3), values, scales, zero_points)
    assert dequantize(matrix).tolist() == [[0.0, 0.5, -2.0]]
    permuted = QuantizedMatrix(
        dataclasses.replace(scheme, has_permutation=True),
        (1, 3),
        values,
        scales,
        zero_points,
        permutation=torch.tensor([2, 0, 1], dtype=torch.int32),
    )
    assert dequantize(permuted).tolist() == [[0.5, -2.0, 0.0]]


@pytest.mark.parametrize("dtype", [FP16, BF16, torch.float64])
def test_dequantize_rounds_fp32_once(dtype: torch.dtype) -> None:
    for shape in [(4, 48), (2, 4, 48)]:
        matrix = quantize(random_weight(shape), WeightFormat.NVFP4)
        weight = dequantize(matrix, dtype)
        assert weight.dtype is dtype
        assert torch.equal(weight, dequantize(matrix).to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("num_codes", [1, 2, 7, 8, 9, 33])
def test_packing_is_a_little_endian_stream(bits: int, num_codes: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (2, 3, num_codes), generator=generator).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 3, math.ceil(num_codes * bits / 8))
    for i, j in itertools.product(range(2), range(3)):
        stream = sum(code << k * bits for k, code in enumerate(codes[i, j].tolist()))
        assert int.from_bytes(bytes(packed[i, j].tolist()), "little") == stream
    assert torch.equal(unpack_codes(packed, num_codes, bits), codes)


def test_float_levels() -> None:
    def levels(code: Code, bits: int) -> Tensor:
        return torch.tensor(QuantScheme(code, bits, (1, None), FP32).levels)

    def assert_bitwise(found: Tensor, wanted: Tensor) -> None:
        assert torch.equal(found.signbit()[~found.isnan()], wanted.signbit()[~found.isnan()])
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)

    all_bytes = torch.arange(256, dtype=torch.uint8)
    assert_bitwise(levels(Code.E4M3, 8), all_bytes.view(E4M3).float())
    assert_bitwise(levels(Code.E5M2, 8), all_bytes.view(torch.float8_e5m2).float())
    half = torch.tensor(E2M1_LEVELS)
    assert_bitwise(levels(Code.E2M1, 4), torch.cat([half, -half]))
    e2m3 = levels(Code.E2M3, 6)[:32].tolist()
    assert e2m3[:17] == [0.125 * i for i in range(17)]
    assert e2m3[17:25] == [2.25 + 0.25 * i for i in range(7)] + [4.0]
    assert e2m3[25:] == [4.5 + 0.5 * i for i in range(7)]
    e3m2 = levels(Code.E3M2, 6)[:32].tolist()
    assert e3m2[:5] == [0.0, 0.0625, 0.125, 0.1875, 0.25] and e3m2[28:] == [16.0, 20.0, 24.0, 28.0]
    tops = [QuantScheme(c, b, (1, 1), FP32).max_level for c, b in [(Code.E4M3, 8), (Code.E5M2, 8)]]
    assert tops == [448.0, 57344.0]
    assert int_scheme(3, (1, 8)).levels == (0, 1, 2, 3, 4, 5, 6, 7)


def test_expand_groups_agrees_with_a_double_loop() -> None:
    grid = torch.arange(6.0).reshape(2, 3)
    for group, shape in [((2, 2), (4, 6)), ((3, 4), (5, 9)), ((4, 4), (7, 12))]:
        spread = expand_groups(grid, group, shape)
        wanted = [
            [grid[n // group[0], k // group[1]] for k in range(shape[1])] for n in range(shape[0])
        ]
        assert torch.equal(spread, torch.tensor(wanted))
    assert expand_groups(grid[:1, :1], (9, 9), (5, 9)).broadcast_to(5, 9).eq(grid[0, 0]).all()


# --- quantize: scales ----------------------------------------------------------------------------


def groups_of(weight: Tensor, scheme: QuantScheme) -> list[list[Tensor]]:
    num_rows, num_columns = weight.shape
    group_rows, group_columns = scheme.group_shape
    row_blocks = weight.split(group_rows or num_rows)
    return [list(rows.split(group_columns or num_columns, dim=1)) for rows in row_blocks]


def grid_of(weight: Tensor, scheme: QuantScheme, reduce: Callable[[Tensor], float]) -> Tensor:
    grid = [[reduce(group) for group in row] for row in groups_of(weight, scheme)]
    return torch.tensor(grid, dtype=FP32)


def amax(group: Tensor) -> float:
    return group.abs().max().item()


SHAPES = [(5, 300), (3, 32), (7, 33), (1, 1), (130, 257)]


@by_name(SYMMETRIC_INTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_symmetric_int_scales(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = random_weight(shape)
    matrix = quantize(weight, scheme)
    assert matrix.scales is not None and scheme.scale_dtype is not None
    exact = grid_of(weight, scheme, amax) / (2 ** (scheme.bits - 1) - 1)
    assert torch.equal(matrix.scales, exact.to(scheme.scale_dtype))


@by_name(ASYMMETRIC_INTS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("shift", [1.0, -20.0, 20.0])
def test_asymmetric_int_scales_and_zero_points(
    scheme: QuantScheme, shape: tuple[int, int], shift: float
) -> None:
    weight = random_weight(shape) + shift
    matrix = quantize(weight, scheme)
    assert matrix.scales is not None and matrix.zero_points is not None
    low = grid_of(weight, scheme, lambda group: min(group.min().item(), 0.0))
    high = grid_of(weight, scheme, lambda group: max(group.max().item(), 0.0))
    exact = (high - low).double() / (2**scheme.bits - 1)
    spacing = torch.finfo(matrix.scales.dtype).eps  # relative, at most
    scales = matrix.scales.float()
    assert (scales >= exact * (1 - 2.0**-22)).all(), "rounded up, but for fp32 arithmetic"
    assert (scales <= exact * (1 + spacing + 2.0**-22)).all()
    assert torch.equal(matrix.zero_points.float(), (-low / scales).round())


@by_name({name: scheme for name, scheme in FLOATS.items() if scheme.scale_dtype in (FP32, BF16)})
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_scales(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = random_weight(shape)
    matrix = quantize(weight, scheme)
    assert matrix.scales is not None and scheme.scale_dtype is not None
    top = 6.0 if scheme.code is Code.E2M1 else 448.0
    exact = grid_of(weight, scheme, amax) / top
    assert torch.equal(matrix.scales, exact.to(scheme.scale_dtype))


@by_name({name: scheme for name, scheme in FLOATS.items() if scheme.scale_dtype is E8M0})
@pytest.mark.parametrize("exponent", [0, -100, -140, 115])
def test_e8m0_scales_follow_the_ocp_rule(scheme: QuantScheme, exponent: int) -> None:
    weight = random_weight((5, 300), exponent=exponent)
    weight[0, :5] = torch.tensor([0.25, 1.0, 2.0**-1, 7.99, 8.0]) * 2.0**exponent
    matrix = quantize(weight, scheme)
    assert matrix.scales is not None
    top_exponent = {Code.E2M1: 2, Code.E2M3: 2, Code.E3M2: 4, Code.E4M3: 8, Code.E5M2: 15}
    floor_log2 = grid_of(weight, scheme, lambda group: math.frexp(amax(group))[1] - 1)
    wanted = (floor_log2 - top_exponent[scheme.code]).clamp(min=-127) + 127
    assert torch.equal(matrix.scales.view(torch.uint8).float(), wanted)


def test_nvfp4_scales() -> None:
    weight = random_weight((5, 70))
    matrix = quantize(weight, WeightFormat.NVFP4)
    assert matrix.global_scale is not None and matrix.scales is not None
    assert torch.equal(matrix.global_scale, weight.abs().max() / 2688)
    exact = grid_of(weight, matrix.scheme, amax) / 6 / matrix.global_scale
    assert torch.equal(matrix.scales.float(), exact.to(E4M3).float())
    assert matrix.scales.float().max() == 448
    stack = quantize(torch.stack([weight, weight * 4]), WeightFormat.NVFP4)
    assert stack.global_scale is not None
    assert torch.equal(stack.global_scale, matrix.global_scale * torch.tensor([1.0, 4.0]))


# --- quantize: codes -----------------------------------------------------------------------------


def assert_within_half_a_step(weight: Tensor, matrix: QuantizedMatrix) -> None:
    error = (weight.double() - dequantize(matrix, torch.float64)).abs()
    assert (error <= steps(matrix) * (0.5 + 1e-4)).all()


def assert_nearest(weight: Tensor, matrix: QuantizedMatrix) -> None:
    """No level of the code is nearer to an element than the one it got."""
    step = steps(matrix)
    levels = torch.tensor([level for level in matrix.scheme.levels if math.isfinite(level)])
    error = (weight.double() - dequantize(matrix, torch.float64)).abs()
    candidates = levels.double().reshape(-1, *[1] * weight.dim()) * step
    best = (weight.double() - candidates).abs().amin(0)
    assert (error <= best + 1e-6 * (weight.double().abs() + step)).all()


@by_name(SYMMETRIC_INTS | ASYMMETRIC_INTS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 50)], ids=str)
@pytest.mark.parametrize("exponent", [0, 10, -9])
def test_int_error_is_at_most_half_a_step(
    scheme: QuantScheme, shape: tuple[int, ...], exponent: int
) -> None:
    weight = random_weight(shape, exponent=exponent)
    assert_within_half_a_step(weight, quantize(weight, scheme))


@by_name(ASYMMETRIC_INTS)
@pytest.mark.parametrize("shift", [-3.0, 0.7, 50.0])
def test_asymmetric_int_holds_zero_exactly(scheme: QuantScheme, shift: float) -> None:
    weight = random_weight((6, 100)) + shift
    weight[:, ::9] = 0.0
    matrix = quantize(weight, scheme)
    assert_within_half_a_step(weight, matrix)
    assert (dequantize(matrix)[:, ::9] == 0).all()


@by_name(FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES[:4], (3, 4, 50)], ids=str)
@pytest.mark.parametrize("exponent", [0, 60, -60])
def test_float_codes_are_nearest(
    scheme: QuantScheme, shape: tuple[int, ...], exponent: int
) -> None:
    weight = random_weight(shape, exponent=exponent)
    assert_nearest(weight, quantize(weight, scheme))


def test_float_ties_go_to_the_even_code() -> None:
    top = [6.0]
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    weight = torch.tensor([ties + [-tie for tie in ties] + top])
    matrix = quantize(weight, WeightFormat.MXFP4)
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert dequantize(matrix).tolist() == [even + [-value for value in even] + top]
    assert matrix.values[0, 0].item() == 0x20  # 0.0 in the low nibble, then 1.0
    wide = torch.linspace(-448, 448, 7169).reshape(1, -1)  # eighths: all ties from 2 up are met
    fp8 = quantize(wide, WeightFormat.FP8)
    assert torch.equal(fp8.values, wide.to(E4M3).view(torch.uint8))
    integers = torch.tensor([[0.5, 1.5, -0.5, -2.5, 7.0]])
    assert dequantize(quantize(integers, WeightFormat.INT4_G32)).tolist() == [[0, 2, 0, -2, 7]]


def test_mxfp4_saturates_above_six() -> None:
    weight = torch.tensor([[7.9, -7.9, 0.4]])
    assert dequantize(quantize(weight, WeightFormat.MXFP4)).tolist() == [[6.0, -6.0, 0.5]]


def test_int4_bytes_by_hand() -> None:
    weight = torch.tensor([[7.0, -7.0, 1.0, 0.0, 3.0]])
    matrix = quantize(weight, WeightFormat.INT4_G32)
    assert matrix.values.tolist() == [[0x1F, 0x89, 0x0B]]
    assert matrix.scales is not None and matrix.scales.tolist() == [[1.0]]
    assert quantize(weight, WeightFormat.INT8_CHANNEL).values.tolist() == [[255, 1, 146, 128, 182]]
    asymmetric = int_scheme(4, (1, None), ZeroPoint.INTEGER)
    matrix = quantize(torch.tensor([[-7.0, 8.0, 0.5, 1.5]]), asymmetric)  # zero point 7
    assert matrix.values.tolist() == [[0xF0, 0x97]]


def test_num_bytes_of_every_format() -> None:
    sizes = {}
    for format in WeightFormat:
        matrix = quantize(random_weight((2, 128, 256)), format)
        assert matrix.scheme == format.scheme and matrix.shape == (2, 128, 256)
        assert matrix.dtype == format.scheme.values_dtype
        assert matrix.is_quantized == (format not in DENSE_FORMATS)
        sizes[format.value] = matrix.num_bytes / (2 * 128 * 256) * 8
    assert sizes == {
        "fp32": 32, "fp16": 16, "bf16": 16,
        "int8-channel": 8.125, "int8-g32": 8.5, "int8-g64": 8.25, "int8-g128": 8.125,
        "int4-g32": 4.5, "int4-g64": 4.25, "int4-g128": 4.125,
        "fp8": 8.125, "fp8-block": 8 + 32 / 128**2,
        "mxfp4": 4.25, "nvfp4": 4.5 + 32 / 128 / 256,
    }  # fmt: skip


# --- quantize: edges -----------------------------------------------------------------------------


@by_name(ALL_PACKED)
@pytest.mark.parametrize("shape", [(3, 200), (2, 3, 47)], ids=str)
def test_groups_of_zeros_have_a_positive_scale(scheme: QuantScheme, shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    nonzero = weight.clone()
    nonzero[..., -1, -1] = 3.0
    for candidate in (weight, nonzero):
        matrix = quantize(candidate, scheme)
        step = steps(matrix)
        assert (step > 0).all() and step.isfinite().all()
        back = dequantize(matrix)
        assert torch.equal(back == 0, candidate == 0)


@by_name(ALL_PACKED)
@pytest.mark.parametrize("exponent", [-149, -130, -126, 125])
def test_extreme_magnitudes_stay_finite(scheme: QuantScheme, exponent: int) -> None:
    weight = random_weight((4, 70)).clamp(-6.9, 6.9) * 2.0**exponent
    if scheme.scale_dtype is FP16 and exponent > 0:
        with pytest.raises(InputError, match=r"at most 65504, the maximum of float16"):
            quantize(weight, scheme)
        return
    matrix = quantize(weight, scheme)
    assert (steps(matrix) > 0).all() and dequantize(matrix).isfinite().all()
    if exponent > 0:
        assert steps(matrix).max() <= 1.004 * weight.abs().max()
    if scheme.code is Code.INT:
        assert_within_half_a_step(weight, matrix)


@by_name(ALL_PACKED)
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float64])
def test_the_input_dtype_does_not_matter(scheme: QuantScheme, dtype: torch.dtype) -> None:
    weight = random_weight((3, 5, 70)).to(dtype)
    assert_same(quantize(weight, scheme), quantize(weight.float(), scheme))


@by_name(ALL_PACKED)
def test_a_stack_is_quantized_expert_by_expert(scheme: QuantScheme) -> None:
    weight = random_weight((3, 5, 70)) * torch.tensor([1.0, 30.0, 0.01]).reshape(3, 1, 1)
    before = weight.clone()
    stack = quantize(weight, scheme)
    for index in range(3):
        assert_same(stack.expert(index), quantize(weight[index], scheme))
    assert torch.equal(weight, before)
    assert_same(quantize(weight.mT.contiguous().mT, scheme), stack)


@by_name(
    {
        name: scheme
        for name, scheme in ALL_PACKED.items()
        if scheme.group_shape[1] is not None and scheme.global_scale is GlobalScale.NONE
    }
)
def test_a_partial_last_group_equals_that_group_alone(scheme: QuantScheme) -> None:
    group_rows, group_columns = scheme.group_shape
    assert group_columns is not None
    first = 2 * group_columns
    weight = random_weight((2 * (group_rows or 3) - 1, first + group_columns - 3))
    whole, tail = quantize(weight, scheme), quantize(weight[:, first:], scheme)
    assert torch.equal(dequantize(whole)[:, first:], dequantize(tail))


@by_name(SYMMETRIC_INTS | FLOATS | {format.value: format.scheme for format in DENSE_FORMATS})
@pytest.mark.parametrize("shape", [(5, 300), (3, 6, 47)], ids=str)
def test_quantizing_again_changes_nothing(scheme: QuantScheme, shape: tuple[int, ...]) -> None:
    once = quantize(random_weight(shape), scheme)
    twice = quantize(dequantize(once), scheme)
    assert torch.equal(twice.values, once.values)
    for name, tensor in once.tensors.items():
        tolerance = 2.0**-23 if tensor.dtype is FP32 and name != "values" else 0
        again = twice.tensors[name].float()
        torch.testing.assert_close(again, tensor.float(), rtol=tolerance, atol=0)


def test_quantizing_again_may_narrow_asymmetric_ranges() -> None:
    scheme = int_scheme(4, (1, None), ZeroPoint.INTEGER, FP32)
    weight = torch.tensor([[-6.5, 8.5]])  # zero point 6, 8.5 rounds to 8: codes 0 and 14
    once = quantize(weight, scheme)
    assert once.values.tolist() == [[0xE0]]
    twice = quantize(dequantize(once), scheme)
    assert twice.values.tolist() == [[0xF0]]


class LargestFloat(TorchDispatchMode):
    """Records the most elements that any fp32 or wider result had."""

    num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (FP32, torch.int32, torch.int64):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@by_name(ALL_PACKED)
def test_one_expert_at_a_time_is_wide(scheme: QuantScheme) -> None:
    weight = random_weight((6, 128, 128)).to(BF16)
    with LargestFloat() as quantizing:
        matrix = quantize(weight, scheme)
    with LargestFloat() as dequantizing:
        dequantize(matrix, BF16)
    one_expert = 128 * 144  # columns padded to the group, at most
    assert 128 * 128 <= quantizing.num_elements <= one_expert
    assert 128 * 128 <= dequantizing.num_elements <= one_expert


# --- dense matrices, views, stacks ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)], ids=str)
def test_dense_copies_nothing_and_is_differentiable(shape: tuple[int, ...]) -> None:
    parameter = torch.nn.Parameter(random_weight(shape))
    matrix = dense(parameter)
    assert matrix.values is parameter and dequantize(matrix) is parameter
    assert matrix.scheme == QuantScheme.dense(FP32) and not matrix.is_quantized
    assert matrix.dtype is FP32 and matrix.num_bytes == 4 * parameter.numel()
    factor = random_weight(shape, seed=3)
    loss = (dequantize(matrix, torch.float64) * factor).sum() + dequantize(matrix).sum()
    loss.backward()
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, factor + 1)


def test_quantize_to_dense_formats() -> None:
    weight = random_weight((2, 3, 40)).requires_grad_()
    assert quantize(weight, WeightFormat.FP32).values is weight
    half = quantize(weight, WeightFormat.BF16)
    assert half.values.dtype is BF16 and torch.equal(half.values, weight.to(BF16))
    dequantize(half).sum().backward()
    assert weight.grad is not None and weight.grad.eq(1).all()
    packed = quantize(weight, WeightFormat.NVFP4)
    assert not any(tensor.requires_grad for tensor in packed.tensors.values())


@pytest.mark.parametrize("format", WeightFormat)
def test_an_expert_is_a_view(format: WeightFormat) -> None:
    stack = quantize(random_weight((3, 5, 40)), format)
    expert = stack.expert(2)
    assert stack.is_stack and not expert.is_stack and expert.shape == (5, 40)
    assert expert.tensors.keys() == stack.tensors.keys()
    for name, tensor in expert.tensors.items():
        whole = stack.tensors[name]
        assert tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert tensor.storage_offset() == 2 * whole.stride(0)
    assert torch.equal(dequantize(expert), dequantize(stack)[2])


def test_gradients_flow_through_an_expert() -> None:
    parameter = torch.nn.Parameter(random_weight((3, 2, 4)))
    dequantize(dense(parameter).expert(1)).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.sum((1, 2)).tolist() == [0, 8, 0]


@by_name(MEANINGS)
def test_stack_experts_is_the_inverse_of_expert(scheme: QuantScheme) -> None:
    stack = tiny_matrix(scheme, (3, 5, 10), seed=4)
    again = stack_experts((stack.expert(index) for index in range(3)), 3)
    assert_same(again, stack)


def test_matrices_are_frozen() -> None:
    matrix = dense(torch.ones(2, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        matrix.values = torch.zeros(2, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        matrix.scheme.bits = 4


def test_schemes_are_values() -> None:
    schemes = {format.scheme for format in WeightFormat}
    assert len(schemes) == len(WeightFormat)
    assert int_scheme(4, (1, 32)) == WeightFormat.INT4_G32.scheme
    assert str(WeightFormat.INT4_G32.scheme) == "int4, group 1x32, scale bfloat16, zero point mid"
    assert (
        str(WeightFormat.INT8_CHANNEL.scheme) == "int8, group 1xall, scale float32, zero point mid"
    )
    nvfp4 = "e2m1, group 1x16, scale float8_e4m3fn, global scale per matrix"
    assert str(WeightFormat.NVFP4.scheme) == nvfp4
    assert str(WeightFormat.BF16.scheme) == "bfloat16"
    permuted = dataclasses.replace(int_scheme(4, (None, 8)), has_permutation=True)
    assert str(permuted) == "int4, group allx8, scale bfloat16, zero point mid, permuted"


def test_format_names() -> None:
    names = [format.value for format in WeightFormat]
    assert names == [
        "fp32", "fp16", "bf16", "int8-channel", "int8-g32", "int8-g64", "int8-g128",
        "int4-g32", "int4-g64", "int4-g128", "fp8", "fp8-block", "mxfp4", "nvfp4",
    ]  # fmt: skip
    assert [WeightFormat.parse(name) for name in names] == list(WeightFormat)
    assert not SHORT_NAMES.keys() & set(names)
    assert {name: WeightFormat.parse(name).value for name in SHORT_NAMES} == {
        "int4": "int4-g128",
        "int8": "int8-g128",
    }


# --- errors --------------------------------------------------------------------------------------

INT4 = WeightFormat.INT4_G32.scheme
FULL = int_scheme(4, (1, 32), ZeroPoint.INTEGER, FP32)
VALUES, SCALES = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 2)
ZEROS = torch.zeros(2, 2, dtype=torch.uint8)


def full_matrix(**changes: Any) -> QuantizedMatrix:
    parts = {"scheme": FULL, "shape": (2, 64), "values": VALUES, "scales": SCALES}
    return QuantizedMatrix(**(parts | {"zero_points": ZEROS} | changes))


def with_nan(row: int, column: int) -> Tensor:
    weight = torch.ones(2, 3, 8)
    weight[1, row, column] = math.nan
    return weight


CONFIG_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "group": (lambda: int_scheme(4, (1, 0)), r"group_shape \(\(1, 0\)\) must be positive"),
    "bits": (lambda: int_scheme(9, (1, 32)), r"bits \(9\) must be 1 to 8; got code int"),
    "no-bits": (lambda: int_scheme(0, (1, 32)), r"bits \(0\) must be 1 to 8"),
    "float-bits": (
        lambda: QuantScheme(Code.E2M1, 8, (1, 32), E8M0),
        r"bits \(8\) must be 4; got code e2m1",
    ),
    "values-dtype": (
        lambda: dataclasses.replace(INT4, values_dtype=torch.int8),
        r"values_dtype \(torch.int8\) must be torch.uint8",
    ),
    "scale-dtype": (
        lambda: int_scheme(4, (1, 32), scale_dtype=torch.int8),
        r"scale_dtype \(torch.int8\) must be one of float32, float16, bfloat16, float8_e4m3fn",
    ),
    "no-scale": (
        lambda: QuantScheme(Code.E4M3, 8, (1, None)),
        r"scale_dtype \(None\) must be one of",
    ),
    "int-without-zero": (
        lambda: QuantScheme(Code.INT, 4, (1, 32), FP32),
        r"zero_point \(none\) must say what is subtracted; got code int",
    ),
    "float-with-zero": (
        lambda: QuantScheme(Code.E2M1, 4, (1, 32), E8M0, ZeroPoint.MID),
        r"zero_point \(mid\) must be none; got code e2m1",
    ),
    "super-block-of-float-scales": (
        lambda: dataclasses.replace(INT4, super_columns=256),
        r"scale_dtype \(torch.bfloat16\) must be one of uint8, int8",
    ),
    "super-block-of-rows": (
        lambda: dataclasses.replace(int_scheme(4, (2, 4)), **SUPER),
        r"super_columns \(4\) must be a multiple of the columns of a group .*; got \(2, 4\)",
    ),
    "super-block-of-parts": (
        lambda: dataclasses.replace(int_scheme(4, (1, 3)), **SUPER),
        r"super_columns \(4\) must be a multiple of the columns of a group .*; got \(1, 3\)",
    ),
    "short-codebook": (
        lambda: QuantScheme(Code.CODEBOOK, 3, (1, 32), FP32, codebook=(0.0, 1.0)),
        r"codebook \(2\) must hold 2 \*\* bits levels",
    ),
    "no-codebook": (
        lambda: QuantScheme(Code.CODEBOOK, 3, (1, 32), FP32),
        r"codebook \(None\) must hold",
    ),
    "codebook-of-int": (
        lambda: dataclasses.replace(INT4, codebook=(0.0,) * 16),
        r"codebook \(16\) must hold .* None for others; got code int, 4 bits",
    ),
    "dense-dtype": (
        lambda: dense(torch.ones(2, 2, dtype=torch.int32)),
        r"dtype of a dense matrix \(torch.int32\) must be one of float32, float16, bfloat16, float",
    ),
    "dense-bits": (
        lambda: QuantScheme(Code.DENSE, 16, values_dtype=FP32),
        r"dense scheme \(torch.float32\) must have 32 bits and describe no scales",
    ),
    "dense-scales": (
        lambda: QuantScheme(Code.DENSE, 32, scale_dtype=FP32, values_dtype=FP32),
        r"dense scheme \(torch.float32\) must have 32 bits and describe no scales",
    ),
    "dense-permutation": (
        lambda: QuantScheme(Code.DENSE, 32, has_permutation=True, values_dtype=FP32),
        r"dense scheme \(torch.float32\) must have 32 bits and describe no scales",
    ),
    "one-dim": (lambda: dense(torch.ones(4)), r"shape \(\(4,\)\) must be \(N, K\) or \(L, N, K\)"),
    "four-dims": (lambda: dense(torch.ones(1, 1, 2, 2)), r"shape .* must be .*; got 4 dims"),
    "empty": (lambda: dense(torch.ones(0, 4)), r"shape .* must be .* with positive sizes"),
    "missing": (
        lambda: full_matrix(zero_points=None),
        r"zero_points \(matrix \(2, 64\), int4, .*\) must be a tensor \(2, 2\) of uint8, int16"
        r".*; got None",
    ),
    "superfluous": (
        lambda: full_matrix(global_scale=torch.ones(())),
        r"global_scale \(\(\)\) must be None in a matrix of scheme 'int4, .*'; got a tensor",
    ),
    "values-shape": (
        lambda: full_matrix(values=VALUES[:, :31]),
        r"values .* must be a tensor \(2, 32\) of uint8 .*; got shape \(2, 31\)",
    ),
    "values-type": (
        lambda: full_matrix(values=VALUES.to(torch.int8)),
        r"values .* must be a tensor \(2, 32\) of uint8 .*; got dtype torch.int8",
    ),
    "scales-shape": (
        lambda: full_matrix(scales=SCALES[:, :1]),
        r"scales .* must be a tensor \(2, 2\) of float32 .*; got shape \(2, 1\)",
    ),
    "scales-type": (lambda: full_matrix(scales=SCALES.to(BF16)), r"scales .*; got dtype torch.bf"),
    "device": (
        lambda: full_matrix(scales=SCALES.to("meta")),
        r"scales .* on the device of values; got device meta beside values on cpu",
    ),
    "permutation": (
        lambda: full_matrix(
            scheme=dataclasses.replace(FULL, has_permutation=True), permutation=torch.arange(64)
        ),
        r"permutation .* must be a tensor \(64,\) of int32 .*; got dtype torch.int64",
    ),
    "format": (
        lambda: WeightFormat.parse("int4_g32"),
        r"weight format \(int4_g32\) must be one of fp32, .*, nvfp4, int4, int8; "
        r".* Did you mean int4-g32\?",
    ),
    "unlike-format": (
        lambda: WeightFormat.parse("gguf"),
        r"weight format \(gguf\) must be one of fp32, .*, nvfp4, int4, int8; "
        r".* Use one of these names\.",
    ),
    "stack-shapes": (
        lambda: stack_experts([dense(torch.ones(2, 2)), dense(torch.ones(2, 3))], 2),
        r"matrix \(1\) must be of one shape .*; got 'float32', shape \(2, 3\)",
    ),
    "stack-of-stacks": (
        lambda: stack_experts([dense(torch.ones(1, 2, 2))], 1),
        r"matrix \(0\) must be of one shape \(N, K\)",
    ),
    "stack-dtypes": (
        lambda: stack_experts([full_matrix(), full_matrix(zero_points=ZEROS.to(torch.int16))], 2),
        r"matrix \(1\) must be of one shape \(N, K\), scheme and dtypes",
    ),
    "too-few": (
        lambda: stack_experts([dense(torch.ones(2, 2))], 2),
        r"num_experts \(2\) must count the matrices; got 1\.",
    ),
    "too-many": (
        lambda: stack_experts([dense(torch.ones(2, 2))] * 3, 2),
        r"num_experts \(2\) must count the matrices; got 3\.",
    ),
    "none": (lambda: stack_experts([], 0), r"num_experts \(0\) must count the matrices; got 0\."),
    "write-codebook": (
        lambda: quantize(torch.ones(2, 8), MEANINGS["codebook"]),
        r"scheme \(codebook, .*\) must be one that round-to-nearest can write; got a codebook",
    ),
    "write-permutation": (
        lambda: quantize(torch.ones(2, 8), MEANINGS["permuted"]),
        r"scheme .*; got a permutation",
    ),
    "write-minimum": (
        lambda: quantize(torch.ones(2, 8), MEANINGS["int4-minimum"]),
        r"scheme .*; got zero point minimum",
    ),
    "write-one-bit": (
        lambda: quantize(torch.ones(2, 8), int_scheme(1, (1, 8))),
        r"scheme .*; got 1 bits with scales torch.bfloat16",
    ),
    "write-int-e8m0": (
        lambda: quantize(torch.ones(2, 8), int_scheme(4, (1, 8), scale_dtype=E8M0)),
        r"scheme .*; got 4 bits with scales torch.float8_e8m0fnu",
    ),
    "write-int-e4m3": (
        lambda: quantize(torch.ones(2, 8), int_scheme(4, (1, 8), scale_dtype=E4M3)),
        r"scheme .*; got 4 bits with scales torch.float8_e4m3fn",
    ),
    "write-row-global": (
        lambda: quantize(torch.ones(2, 8), MEANINGS["row-global"]),
        r"scheme .*; got global scale row with scales torch.float8_e4m3fn",
    ),
    "write-no-global": (
        lambda: quantize(torch.ones(2, 8), QuantScheme(Code.E2M1, 4, (1, 16), E4M3)),
        r"scheme .*; got global scale none with scales torch.float8_e4m3fn",
    ),
    "write-int-global": (
        lambda: quantize(
            torch.ones(2, 8), dataclasses.replace(INT4, global_scale=GlobalScale.MATRIX)
        ),
        r"scheme .*; got global scale matrix with scales torch.bfloat16",
    ),
}
INPUT_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "expert-of-matrix": (
        lambda: dense(torch.ones(2, 3)).expert(0),
        r"expert \(0\) must index a stack \(L, N, K\); got a matrix \(2, 3\)",
    ),
    "expert-beyond": (
        lambda: dense(torch.ones(4, 2, 3)).expert(4),
        r"expert \(4\) must be in 0\.\.3; got 4",
    ),
    "expert-negative": (lambda: dense(torch.ones(4, 2, 3)).expert(-1), r"expert \(-1\) must be in"),
    "to-int": (
        lambda: dequantize(full_matrix(), torch.int8),
        r"dtype \(torch.int8\) must be one of float32, float16, bfloat16, float64",
    ),
    "int-weight": (
        lambda: quantize(torch.ones(2, 8, dtype=torch.int64), INT4),
        r"weight \(dtype torch.int64\) must be float64, float32, float16 or bfloat16",
    ),
    "fp8-weight": (lambda: quantize(torch.ones(2, 8).to(E4M3), INT4), r"weight \(dtype torch.floa"),
    "vector": (
        lambda: quantize(torch.ones(8), INT4),
        r"weight \(shape \(8,\)\) must be \(N, K\) or \(L, N, K\) with positive sizes; got 1 dims",
    ),
    "no-experts": (
        lambda: quantize(torch.ones(0, 2, 8), INT4),
        r"weight .* with positive sizes; got 3 dims, 0 elements",
    ),
    "nan": (
        lambda: quantize(with_nan(2, 5), INT4),
        r"weight \(expert 1, row 2, column 5\) must be finite as torch.float32; got nan",
    ),
    "dense-nan": (
        lambda: quantize(with_nan(2, 5), WeightFormat.BF16),
        r"weight \(expert 1, row 2, column 5\) must be finite as torch.bfloat16; got nan",
    ),
    "inf": (
        lambda: quantize(torch.tensor([[1.0, -math.inf]]), WeightFormat.FP8),
        r"weight \(row 0, column 1\) must be finite as torch.float32; got -inf",
    ),
    "overflow": (
        lambda: quantize(torch.tensor([[1.0], [1e300]], dtype=torch.float64), INT4),
        r"weight \(row 1, column 0\) must be finite as torch.float32; got inf",
    ),
    "dense-overflow": (
        lambda: quantize(torch.tensor([[1.0, 7e4]]), WeightFormat.FP16),
        r"weight \(row 0, column 1\) must be finite as torch.float16; got inf",
    ),
    "fp16-scale": (
        lambda: quantize(torch.full((1, 8), 1e6), int_scheme(4, (1, 8), scale_dtype=FP16)),
        r"weight \(scale 142857\) must need scales of at most 65504",
    ),
}


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        pytest.param(error, *case, id=name)
        for error, cases in [(ConfigError, CONFIG_ERRORS), (InputError, INPUT_ERRORS)]
        for name, case in cases.items()
    ],
)
def test_error(error: type[MixturaError], call: Callable[[], object], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert re.fullmatch(r".+ \(.*\) must .+; got .+\. .+[.?]", str(raised.value))


def test_a_full_matrix_is_legal() -> None:
    """The cases above change one thing of this one."""
    assert dequantize(full_matrix()).eq(0).all()


# --- properties ----------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 140)))
    weight = random_weight(shape, seed=draw(st.integers(0, 2**31)))
    weight *= 2.0 ** draw(st.integers(-10, 10))
    weight[:, draw(st.integers(0, 139)) :] = 0  # often whole groups of zeros
    if draw(st.booleans()):
        weight = weight.abs() * draw(st.sampled_from([-1, 1]))
    return weight.to(draw(st.sampled_from([FP32, BF16])))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(weight=weights(), scheme=st.sampled_from(list(ALL_PACKED.values())))
def test_codes_are_as_near_as_the_group_allows(weight: Tensor, scheme: QuantScheme) -> None:
    matrix = quantize(weight, scheme)
    if scheme.code is Code.INT:
        assert_within_half_a_step(weight, matrix)
    else:
        assert_nearest(weight, matrix)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(weight=weights(), format=st.sampled_from(PACKED_FORMATS))
def test_quantizing_again_changes_no_code(weight: Tensor, format: WeightFormat) -> None:
    once = quantize(weight, format)
    if format is WeightFormat.NVFP4:
        assert once.scales is not None
        coarse = once.scales.float() < 2.0**-6  # subnormal scales: the blocks that may change
        if (coarse & (once.scales.float() > 2.0**-9)).any():
            return
    assert torch.equal(quantize(dequantize(once), format).values, once.values)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weight=weights(), format=st.sampled_from(PACKED_FORMATS), power=st.integers(-8, 8))
def test_a_power_of_two_moves_only_the_scale(
    weight: Tensor, format: WeightFormat, power: int
) -> None:
    matrix, scaled = quantize(weight, format), quantize(weight * 2.0**power, format)
    assert torch.equal(matrix.values, scaled.values)
    assert torch.equal(dequantize(matrix) * 2.0**power, dequantize(scaled))
