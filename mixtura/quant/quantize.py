"""Round-to-nearest quantization of weights: the inverse of `dequantize`, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixtura.errors import ConfigError, InputError
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dense, stack_experts
from mixtura.quant.packing import expand_groups, pack_codes
from mixtura.quant.scheme import DENSE_DTYPES, Code, GlobalScale, QuantScheme, ZeroPoint

__all__ = ["quantize"]

# A group of zeros, or of weights too small for the dtype, gets this scale: smallest normal values,
# and for e4m3 the smallest value, as NVFP4 blocks far below the largest one need its subnormals.
_SMALLEST_SCALE = {
    torch.float32: 2.0**-126,
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-14,
    torch.float8_e4m3fn: 2.0**-9,
}
_E4M3_MAX = 448.0
_FLOAT32_BIAS = 127
_FLOAT32_MANTISSA_BITS = 23


class Grids(NamedTuple):
    """What the codes of a matrix (N, K) are multiplied by: its scales and zero points."""

    scales: Tensor
    zero_points: Tensor | None = None
    global_scale: Tensor | None = None


def quantize(weight: Tensor, format: WeightFormat | QuantScheme) -> QuantizedMatrix:
    """Quantize a weight by rounding each element to the nearest value its group can hold.

    With `amax` the largest magnitude of a group and `top` the largest level of the code
    (`2 ** (bits - 1) - 1` for symmetric integers):

        scale = amax / top                                  rounded to the scale dtype
        scale = 2 ** (floor(log2(amax)) - floor(log2(top)))  e8m0; beyond `top` saturates
        global = amax of the matrix / (top * 448),  scale = amax / top / global    e4m3
        code = nearest level to w / (scale * global), ties to even

    With INTEGER zero points, `lo <= 0 <= hi` the range of the group and 0 in it:
    `scale = (hi - lo) / (2 ** bits - 1)` rounded up, `zero = round(-lo / scale)`. The smallest
    scale is 2**-126 (fp16: 2**-14, e4m3: 2**-9, e8m0: 2**-127), so a group of zeros has a positive
    one. Quantizing `dequantize(q)` again gives the codes of `q`, and its scales but for the last
    bit of fp32 ones, with two exceptions: INTEGER zero points (the codes need not span the range),
    and groups with e4m3 scales so small (below 2**-6) that the dtype holds them coarsely.

    One expert at a time is in fp32. N and K need not be divisible by the group: the last group of
    a row or column of groups is then shorter.

    Args:
        weight: `(N, K)` or `(L, N, K)`, float64, float32, float16 or bfloat16; gradients stop here
            unless the format is dense.
        format: what to make of it. Of the schemes: dense ones; INT of 2 to 8 bits, zero point MID
            or INTEGER, scales fp32, bf16 or fp16; floats with scales in these or in e8m0, or in
            e4m3 with a global scale per matrix.

    Returns:
        A matrix of the scheme; a dense one shares memory with `weight` where the dtype is the same.

    Raises:
        InputError: `weight` has another shape or dtype, holds an element that is not finite (the
            message says where), or is too large for the format.
        ConfigError: the scheme is not one of these.

    Source: OCP Microscaling Formats (MX) 1.0, section 6.3, for e8m0 scales.

    >>> matrix = quantize(torch.tensor([[0.5, -3.5, 7.0, 0.0]]), WeightFormat.INT4_G32)
    >>> matrix.values.tolist(), matrix.scales.tolist()
    ([[72, 143]], [[1.0]])
    """
    scheme = format.scheme if isinstance(format, WeightFormat) else format
    check_weight(weight)
    if not scheme.is_quantized:
        return _convert(weight, scheme)
    check_scheme(scheme)
    if weight.dim() == 2:
        return _quantize_matrix(weight, scheme, where="")
    experts = (
        _quantize_matrix(expert, scheme, where=f"expert {index}, ")
        for index, expert in enumerate(weight)
    )
    return stack_experts(experts, len(weight))


def check_weight(weight: Tensor) -> None:
    """Raise `InputError` for a weight of a shape or dtype that cannot be quantized."""
    if weight.dtype not in DENSE_DTYPES:
        raise InputError(
            f"weight (dtype {weight.dtype}) must be float64, float32, float16 or bfloat16; "
            f"got {weight.dtype}. Dequantize it first."
        )
    if weight.dim() not in (2, 3) or weight.numel() == 0:
        raise InputError(
            f"weight (shape {tuple(weight.shape)}) must be (N, K) or (L, N, K) with positive "
            f"sizes; got {weight.dim()} dims, {weight.numel()} elements. "
            "Put the expert axis first; leave an empty matrix out."
        )


def check_scheme(scheme: QuantScheme) -> None:
    """Raise `ConfigError` for a scheme that `quantize` cannot write."""
    plain_scale = scheme.scale_dtype in (torch.float32, torch.bfloat16, torch.float16)
    is_nvfp4_like = scheme.scale_dtype is torch.float8_e4m3fn
    if scheme.code is Code.CODEBOOK:
        reason = "a codebook"
    elif scheme.code is Code.BLOCKS:
        reason = "raw blocks"
    elif scheme.has_permutation:
        reason = "a permutation, which calibration finds"
    elif scheme.zero_point is ZeroPoint.MINIMUM:
        reason = "zero point minimum"
    elif scheme.code is Code.INT and (scheme.bits < 2 or not plain_scale):
        reason = f"{scheme.bits} bits with scales {scheme.scale_dtype}"
    elif scheme.global_scale is not (GlobalScale.MATRIX if is_nvfp4_like else GlobalScale.NONE):
        reason = f"global scale {scheme.global_scale.value} with scales {scheme.scale_dtype}"
    else:
        return
    raise ConfigError(
        f"scheme ({scheme}) must be one that round-to-nearest can write; got {reason}. "
        "Use the scheme of a WeightFormat, or one that the docstring of quantize lists."
    )


def check_finite(matrix: Tensor, where: str) -> None:
    """Raise `InputError` for an element of a matrix (N, K) that is not finite."""
    is_finite = torch.isfinite(matrix)
    if not is_finite.all():
        row, column = (~is_finite).nonzero()[0].tolist()
        raise InputError(
            f"weight ({where}row {row}, column {column}) must be finite as {matrix.dtype}; "
            f"got {matrix[row, column].item()}. Repair the weight, or leave it unquantized."
        )


def _convert(weight: Tensor, scheme: QuantScheme) -> QuantizedMatrix:
    converted = weight.to(scheme.values_dtype)
    experts = converted.detach().reshape(-1, *converted.shape[-2:])
    for index, expert in enumerate(experts):
        where = f"expert {index}, " if weight.dim() == 3 else ""
        check_finite(expert, where)
    return dense(converted)


def _quantize_matrix(weight: Tensor, scheme: QuantScheme, where: str) -> QuantizedMatrix:
    weight = weight.detach().float()
    check_finite(weight, where)
    return round_to(weight, scheme, nearest_grids(weight, scheme))


def nearest_grids(weight: Tensor, scheme: QuantScheme) -> Grids:
    """The scales and zero points that `quantize` rounds a finite fp32 matrix (N, K) with."""
    if scheme.zero_point is ZeroPoint.INTEGER:
        return Grids(*_asymmetric_grids(weight, scheme))
    scales, global_scale = _symmetric_grids(weight, scheme)
    return Grids(scales, None, global_scale)


def round_to(weight: Tensor, scheme: QuantScheme, grids: Grids) -> QuantizedMatrix:
    """A finite fp32 matrix (N, K) with the codes that are nearest to it under given grids."""
    shape = tuple(weight.shape)
    scales, zero_points, global_scale = grids
    step = scales.float() if global_scale is None else scales.float() * global_scale
    group_size = scheme.group_size(shape)
    ratio = weight / expand_groups(step, group_size, shape)
    if scheme.code.is_float:
        codes = _nearest_float_codes(ratio, scheme)
    elif zero_points is not None:
        zeros = expand_groups(zero_points.float(), group_size, shape)
        codes = (ratio.round_() + zeros).clamp_(0, 2**scheme.bits - 1)
    else:
        middle = 2 ** (scheme.bits - 1)
        codes = (ratio.round_() + middle).clamp_(1, 2 * middle - 1)
    values = pack_codes(codes.to(torch.uint8), scheme.bits)
    return QuantizedMatrix(scheme, shape, values, scales, zero_points, global_scale)


def reduce_groups(weight: Tensor, scheme: QuantScheme, reduce: Callable[..., Tensor]) -> Tensor:
    """`(N, K)` to one value per group `(GN, GK)`; partial groups are filled up with zeros."""
    group_rows, group_columns = scheme.group_size(tuple(weight.shape))
    num_rows, num_columns = weight.shape
    padded = torch.nn.functional.pad(
        weight, (0, -num_columns % group_columns, 0, -num_rows % group_rows)
    )
    groups = padded.reshape(
        padded.shape[0] // group_rows, group_rows, padded.shape[1] // group_columns, group_columns
    )
    return reduce(groups, dim=(1, 3))


def _symmetric_grids(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    assert scheme.scale_dtype is not None
    amax = reduce_groups(weight.abs(), scheme, torch.amax)
    if scheme.scale_dtype is torch.float8_e8m0fnu:
        return _e8m0_scales(amax, scheme), None
    top = scheme.max_level if scheme.code.is_float else 2 ** (scheme.bits - 1) - 1
    if scheme.scale_dtype is torch.float8_e4m3fn:
        global_scale = round_scales(amax.amax() / (top * _E4M3_MAX), torch.float32)
        return round_scales(amax / top / global_scale, torch.float8_e4m3fn), global_scale
    return round_scales(amax / top, scheme.scale_dtype), None


def _asymmetric_grids(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    assert scheme.scale_dtype is not None
    top = 2**scheme.bits - 1
    low = reduce_groups(weight, scheme, torch.amin).clamp(max=0)
    high = reduce_groups(weight, scheme, torch.amax).clamp(min=0)
    exact = high / top - low / top  # high - low could overflow
    scales = round_scales(exact, scheme.scale_dtype)
    # Up, so that the codes reach both ends. The next value above a positive float is its bits + 1.
    bits = scales.view(torch.int32 if scales.itemsize == 4 else torch.int16)
    scales = (bits + (scales.float() < exact)).view(scales.dtype)
    zeros = (-low / scales.float()).round().clamp(0, top)
    return scales, zeros.to(torch.uint8)


def round_scales(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive scales in their dtype, none below the smallest; not for e8m0.

    Raises:
        InputError: a scale is too large for fp16.
    """
    largest = torch.finfo(dtype).max
    if dtype is torch.float16 and exact.max() > largest:
        raise InputError(
            f"weight (scale {exact.max().item():g}) must need scales of at most {largest:g}, the "
            "maximum of float16; got a larger one. Use scales in bfloat16 or float32."
        )
    return exact.clamp(_SMALLEST_SCALE[dtype], largest).to(dtype)


def _e8m0_scales(amax: Tensor, scheme: QuantScheme) -> Tensor:
    top_exponent = math.frexp(scheme.max_level)[1] - 1
    # Zero and float32 subnormals have exponent -127 here, which is where e8m0 ends anyway.
    exponent = (amax.view(torch.int32) >> _FLOAT32_MANTISSA_BITS) - _FLOAT32_BIAS
    codes = (exponent - top_exponent + _FLOAT32_BIAS).clamp(min=0)
    return codes.to(torch.uint8).view(torch.float8_e8m0fnu)


def _nearest_float_codes(ratio: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes of the nearest levels, ties to the even code, saturating; the sign bit on top."""
    mantissa_bits = scheme.code.mantissa_bits
    magnitude = ratio.abs().clamp_(max=scheme.max_level)
    exponent = _level_exponents(magnitude, scheme)
    mantissa = (magnitude * _power_of_two(mantissa_bits - exponent)).round_().to(torch.int32)
    codes = ((exponent - _min_exponent(scheme)) << mantissa_bits) + mantissa
    sign = ratio.signbit().to(torch.int32) << (scheme.bits - 1)
    signed: Tensor = sign + codes
    return signed


def nearest_levels(ratio: Tensor, scheme: QuantScheme) -> Tensor:
    """The levels, less a zero point MID, of the codes that `round_to` gives to `weight / step`."""
    if not scheme.code.is_float:
        top = 2 ** (scheme.bits - 1) - 1
        return ratio.round().clamp_(-top, top)
    magnitude = ratio.abs().clamp_(max=scheme.max_level)
    # Levels of one exponent are 2 ** (exponent - mantissa_bits) apart.
    shift = scheme.code.mantissa_bits - _level_exponents(magnitude, scheme)
    levels = magnitude.mul_(_power_of_two(shift)).round_().mul_(_power_of_two(-shift))
    return levels.copysign_(ratio)


def _level_exponents(magnitude: Tensor, scheme: QuantScheme) -> Tensor:
    """int32 exponents of the largest powers of two in magnitudes; that of subnormal levels."""
    exponent = (magnitude.view(torch.int32) >> _FLOAT32_MANTISSA_BITS) - _FLOAT32_BIAS
    return exponent.clamp_(min=_min_exponent(scheme))


def _min_exponent(scheme: QuantScheme) -> int:
    return int(2 - 2 ** (scheme.code.exponent_bits - 1))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent in fp32: a power of two is its bits."""
    return ((exponent + _FLOAT32_BIAS) << _FLOAT32_MANTISSA_BITS).view(torch.float32)
