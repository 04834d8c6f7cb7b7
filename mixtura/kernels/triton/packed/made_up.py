"""Quantized experts that nobody trained: to be compiled for, or timed with."""

from __future__ import annotations

from math import isfinite, sqrt
from statistics import mean

import torch
from torch import Tensor

from mixtura.config import ExpertsConfig, GateUp
from mixtura.kernels.triton.launch import cdiv
from mixtura.kernels.triton.packed.experts import PackedWeights
from mixtura.kernels.triton.packed.layout import WORD_BITS, Layout, has_factors
from mixtura.kernels.triton.packed.pack import PackedMatrix
from mixtura.kernels.triton.packed.quantization import Quantization
from mixtura.quant.activations import ActivationScheme, StaticInputs
from mixtura.quant.scheme import Code, QuantScheme

_WORDS = {1: torch.uint8, 2: torch.int16}
"""Of codes, by bytes of an operand."""

_WORDS_OF_ZEROS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}

STATIC_SCALE = 2.0**-5
"""Of rows: codes of normal ones reach their ends."""


def empty_experts(
    config: ExpertsConfig,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device | str = "meta",
) -> PackedWeights:
    """Experts with rows of a dtype, without contents: as `pack_experts` would lay them out."""

    def vector(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def inputs(rounding: ActivationScheme | None) -> StaticInputs | None:
        if rounding is None or not rounding.is_static:
            return None
        return StaticInputs(rounding, torch.empty(count, dtype=torch.float32, device=device))

    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    rows = inner * (1 if config.gate_up is GateUp.UNGATED else 2)
    first, second = quantization.layouts(config)
    return PackedWeights(
        config,
        _empty_matrix(first, quantization.gate_up, (count, rows, hidden), device),
        _empty_matrix(second, quantization.down, (count, hidden, inner), device),
        vector(count, config.up_size) if config.has_bias else None,
        vector(count, hidden) if config.has_bias else None,
        vector(hidden) if config.post_norm is not None else None,
        inputs(quantization.gate_up_rounding),
        inputs(quantization.down_rounding),
    )


def _empty_matrix(
    layout: Layout, scheme: QuantScheme, shape: tuple[int, int, int], device: torch.device | str
) -> PackedMatrix:
    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def grid(bits: int) -> Tensor:
        words = cdiv(layout.scales_per_step * bits, WORD_BITS)
        return empty(count, steps, words, cdiv(num_rows, layout.group_rows))

    count, num_rows, num_columns = shape
    steps = cdiv(num_columns, layout.depth)
    words = layout.operand if layout.fields == 1 else _WORDS[layout.operand.itemsize]
    zeros = None
    if layout.zero is None:
        zeros = grid(layout.zero_bits) if layout.is_grouped else empty(count, num_rows)
    return PackedMatrix(
        layout,
        shape,
        empty(count, steps, num_rows, layout.run, dtype=words),
        grid(8 * layout.scale_field.itemsize) if layout.is_grouped else None,
        zeros,
        empty(count, num_rows, dtype=torch.float32) if has_factors(scheme) else None,
    )


def random_experts(
    config: ExpertsConfig, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> PackedWeights:
    """Experts with random codes and scales, whose outputs are of a size like their inputs'."""
    made = empty_experts(config, quantization, dtype, device)
    _fill_(made.gate_up, quantization.gate_up)
    _fill_(made.down, quantization.down)
    for vector in (made.gate_up_bias, made.down_bias, made.post_norm):
        if vector is not None:
            vector.normal_()
    for inputs in (made.gate_up_inputs, made.down_inputs):
        if inputs is not None:
            inputs.scales.fill_(STATIC_SCALE)
    return made


def _fill_(matrix: PackedMatrix, scheme: QuantScheme) -> None:
    layout, raw = matrix.layout, matrix.codes.view(torch.uint8)
    raw.random_(0, 256)
    if layout.code.is_float and layout.bits == 8:
        # Infinities and NaN have the largest exponent: they get another one.
        last = 1 << layout.code.mantissa_bits
        exponent = (2**layout.code.exponent_bits - 1) * last
        raw.copy_(torch.where((raw & exponent) == exponent, raw & (0xFF - last), raw))
    scale = 1 / (_level_size(scheme) * matrix.shape[2] ** 0.5)
    if matrix.scales is not None:
        _fill_words_(matrix.scales, layout.scale_field, scale)
        scale = 1.0
    if matrix.factors is not None:
        matrix.factors.uniform_(0.75 * scale, 1.25 * scale)
    if matrix.zeros is not None:
        middle = 2 ** (scheme.bits - 1)
        if layout.is_grouped:
            zeros = _WORDS_OF_ZEROS[layout.zero_bits]
            fields = torch.empty(
                *matrix.zeros.shape, WORD_BITS // layout.zero_bits, dtype=zeros, device=raw.device
            )
            matrix.zeros.copy_(fields.random_(middle - 1, middle + 2).view(torch.int32).squeeze(-1))
        else:
            matrix.zeros.random_(middle - 1, middle + 2)


def _fill_words_(words: Tensor, field: torch.dtype, scale: float) -> None:
    """Words of random scales from `scale` to twice as much."""
    shape = (*words.shape, WORD_BITS // (8 * field.itemsize))
    random = torch.rand(shape, device=words.device).add_(1).mul_(scale)
    words.copy_(random.to(field).view(torch.int32).squeeze(-1))


def _level_size(scheme: QuantScheme) -> float:
    """The mean size of finite levels, less the middle of whole numbers."""
    middle = 2 ** (scheme.bits - 1) if scheme.code is Code.INT else 0
    squares = [(level - middle) ** 2 for level in scheme.levels if isfinite(level)]
    return sqrt(mean(squares))
