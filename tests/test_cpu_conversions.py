"""Codes that the C++ kernel reads as others: the same levels, and the given bytes back."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from expert_cases import CONFIGS, problem_of, random_batch, sizes
from test_cpu_amx import EMULATED
from test_cpu_amx import check as check_tiles
from test_cpu_kernel import E4M3, E8M0, PATHS, check, matrices, scheme, super_blocks, truth_of

from mixtura.config import ActivationDtype
from mixtura.kernels.cpu import CpuKernel, pack_layer, unpack_layer
from mixtura.kernels.cpu.conversions import as_read, conversion_of
from mixtura.kernels.cpu.extension import forced_path, missing
from mixtura.kernels.cpu.linear import pack_linear, run_linear
from mixtura.quant.codecs.gguf_blocks import LAYOUTS
from mixtura.quant.ggml_types import GgmlType
from mixtura.quant.matrix import QuantizedMatrix, dequantize
from mixtura.quant.packing import pack_codes, unpack_codes
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme, ZeroPoint

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

IQ4_LEVELS = LAYOUTS[GgmlType.IQ4_NL].scheme.levels


def codebook(levels: tuple[float, ...], columns: int = 32) -> QuantScheme:
    bits = len(levels).bit_length() - 1
    return QuantScheme(Code.CODEBOOK, bits, (1, columns), torch.float16, codebook=levels)


CONVERTED: dict[str, tuple[QuantScheme, torch.dtype | None]] = {
    "int2 as int4, zeros": (
        scheme(Code.INT, 2, (1, 32), torch.float16, ZeroPoint.INTEGER),
        torch.uint8,
    ),
    "int2 as int4, minima": (scheme(Code.INT, 2, (1, 16), zero=ZeroPoint.MINIMUM), torch.float32),
    "int3 as int4": (scheme(Code.INT, 3, (1, 16), torch.bfloat16), None),
    "int3 as int4, per output": (scheme(Code.INT, 3, (1, None)), None),
    "int5 as int8, minima": (
        scheme(Code.INT, 5, (1, 32), torch.float16, ZeroPoint.MINIMUM),
        torch.float16,
    ),
    "int6 as int8": (scheme(Code.INT, 6, (1, 16)), None),
    "int2 as int4, super-blocks": (super_blocks(2, 16, 256, ZeroPoint.MINIMUM), None),
    "int6 as int8, super-blocks": (super_blocks(6, 16, 256), None),
    "codebook of 16 as int8, super-blocks": (
        dataclasses.replace(codebook(IQ4_LEVELS), scale_dtype=torch.int8, super_columns=256),
        None,
    ),
    "int7 as int8, wide zeros": (
        scheme(Code.INT, 7, (1, 64), zero=ZeroPoint.INTEGER),
        torch.int16,
    ),
    "codebook of 16 as int8": (codebook(IQ4_LEVELS), None),
    "codebook of 4 as int4": (codebook((-1.0, 0.0, 1.0, 2.0), 256), None),
    "codebook of 2 as int4": (codebook((-1.0, 1.0), 128), None),
    "e2m3 as e4m3": (scheme(Code.E2M3, 6, (1, 32), E8M0), None),
    "e3m2 as e4m3, global": (
        scheme(Code.E3M2, 6, (1, 16), E4M3, global_scale=GlobalScale.MATRIX),
        None,
    ),
}
"""Schemes by what becomes of their codes, each with the dtype of its zero points."""

by_name = pytest.mark.parametrize("name", CONVERTED)


def every_code(scheme: QuantScheme, zeros: torch.dtype | None) -> QuantizedMatrix:
    """A matrix that holds every code, in rows that do not end with a byte."""
    num_codes = 2**scheme.bits
    columns = torch.arange(3 * num_codes + 5)
    codes = torch.stack([columns, columns + 1]) % num_codes
    shape = tuple(codes.shape)
    tensors = {"values": pack_codes(codes.to(torch.uint8), scheme.bits)}
    for name, spec in scheme.tensors_for(shape).items():
        if name not in tensors:
            dtype = zeros if name == "zero_points" and zeros else spec.dtypes[0]
            tensors[name] = torch.full(spec.shape, 2.0).to(dtype)
    return QuantizedMatrix(scheme, shape, **tensors)


@by_name
def test_every_code_keeps_its_level(name):
    matrix = every_code(*CONVERTED[name])
    conversion = conversion_of(matrix.scheme)
    assert conversion is not None
    assert str(conversion) == name.partition(",")[0]
    columns = matrix.shape[1]
    values = conversion.apply(matrix.values, columns)
    read = dataclasses.replace(matrix, scheme=conversion.read, values=values)
    expected, found = dequantize(matrix), dequantize(read)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # signs of zeros too
    assert torch.equal(conversion.undo(values, columns), matrix.values)


def test_what_has_codes_of_its_own_keeps_them():
    kept = [
        QuantScheme.dense(torch.bfloat16),
        scheme(Code.INT, 4, (1, 32)),
        scheme(Code.INT, 8, (1, 32)),
        scheme(Code.E2M1, 4, (1, 32), E8M0),
        scheme(Code.E4M3, 8, (1, 32), E8M0),
        scheme(Code.E5M2, 8, (1, 32), E8M0),
        QuantScheme.of_blocks("iq2_xxs"),
        codebook((-0.5, 0.0, 0.5, 1.0)),  # no whole numbers
        codebook((-129.0, 0.0, 1.0, 2.0)),
        codebook((-1.0, 0.0, 1.0, 128.0)),
        codebook((0.0, -0.0, 1.0, 2.0)),  # which of the zeros would be lost
        codebook((1.0, 1.0, 0.0, 2.0)),
        codebook((1.0, 2.0, 0.0, math.inf)),
    ]
    for one in kept:
        assert conversion_of(one) is None
        assert as_read(one) is one
    assert as_read(codebook((-8.0, 7.0))).bits == 4
    assert as_read(codebook((-8.0, 8.0))).bits == as_read(codebook((-9.0, 7.0))).bits == 8


@pytest.mark.parametrize(
    "name, layout",
    list(zip(CONVERTED, itertools.cycle(["gpt-oss", "separate", "ungated-bias"]), strict=False)),
)
def test_experts_on_every_path(name, layout):
    config = dataclasses.replace(CONFIGS[layout], hidden_size=333, intermediate_size=160)
    weights = matrices(config, *CONVERTED[name])
    batch = random_batch(config, 7)
    truth = truth_of(weights, batch)
    for path in PATHS:
        with forced_path(path):
            check(weights, batch, truth=truth)
            check(weights, batch, truth=truth, activation_dtype=ActivationDtype.BF16)


@pytest.mark.skipif(EMULATED not in PATHS, reason="the emulation needs AVX-512-BF16")
@pytest.mark.parametrize("name", ["int2 as int4, minima", "int6 as int8", "e2m3 as e4m3"])
def test_tiles(name):
    check_tiles(matrices(sizes(1, 176, 80), *CONVERTED[name]))


def test_a_linear_layer():
    config = sizes(1, 70, 48)
    weights = matrices(config, *CONVERTED["int3 as int4"])
    matrix = weights.down_proj.expert(0)
    linear = pack_linear(matrix, activation_dtype=ActivationDtype.BF16)
    assert torch.equal(linear.unpacked().values, matrix.values)
    rows = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    expected = rows @ dequantize(matrix).T
    assert (run_linear(linear, rows) - expected).norm() <= 4e-3 * expected.norm()


def test_the_kernel_says_what_it_converts():
    schemes = tuple(CONVERTED[name][0] for name in ("int3 as int4", "codebook of 16 as int8"))
    problem = dataclasses.replace(problem_of(sizes()), schemes=(*schemes, schemes[0]))
    assert CpuKernel().unsupported(problem) is None
    how = CpuKernel().how(problem)
    assert how.endswith("int8 activations, int3 as int4, codebook of 16 as int8")
    plain = dataclasses.replace(problem, schemes=(scheme(Code.INT, 4, (1, 32)),))
    assert CpuKernel().how(plain).endswith("int8 activations")


def test_int8_activations_are_refused_for_small_floats():
    asked = dataclasses.replace(
        problem_of(sizes()),
        schemes=(CONVERTED["e2m3 as e4m3"][0],),
        activation_dtype=ActivationDtype.INT8,
    )
    assert str(CpuKernel().unsupported(asked)).endswith("e2m1 codes, not with e2m3")


def test_memory_is_that_of_the_codes_that_are_read():
    config = sizes(2, 1024, 1024)
    for name, bits in (("int2 as int4, zeros", 4.75), ("int6 as int8", 10.0)):
        packed = pack_layer(matrices(config, *CONVERTED[name]))
        num_weights = 2 * 3 * 1024**2
        assert packed.num_bytes * 8 / num_weights == pytest.approx(bits, rel=0.01)


def test_unpacked_experts_have_the_scheme_they_came_with():
    weights = matrices(sizes(2, 40, 24), *CONVERTED["int3 as int4"])
    assert unpack_layer(pack_layer(weights)).gate_up_proj.scheme == weights.gate_up_proj.scheme


def test_rows_of_odd_widths_come_back():
    """The unused bits of a row's last byte are zeros again."""
    for bits, columns in itertools.product((1, 2, 3, 5, 6, 7), (1, 7, 33)):
        conversion = conversion_of(scheme(Code.INT, bits, (1, 32)))
        assert conversion is not None
        codes = torch.arange(3 * columns).reshape(3, columns) % 2**bits
        values = pack_codes(codes.to(torch.uint8), bits)
        read = conversion.apply(values, columns)
        middle = 2 ** (conversion.read.bits - 1) - 2 ** (bits - 1)
        assert torch.equal(unpack_codes(read, columns, conversion.read.bits), codes + middle)
        assert torch.equal(conversion.undo(read, columns), values)
