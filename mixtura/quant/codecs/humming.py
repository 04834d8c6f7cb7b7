"""Humming's own files: one stream of integers or small floats a row, with up to two scales.

    W[n, k] = (level(code[n, k]) - zero[n, k // g]) * weight_scale[...] * weight_scale_2[...]

`weight (N, K * bits / 32)` is the packing of `QuantizedMatrix.values` in 32-bit words. Integers are
unsigned, whatever their name says; without `zero_point` the zero is `2 ** (bits - 1)`. `zero_point
(N * bits / 32, G)` is packed along N.

Source: Humming, `HummingWeightSchema` and `dequantize_weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationGroup, ActivationScheme
from mixtura.quant.codecs.checks import (
    check_encodable,
    check_finite,
    check_numbers,
    check_positive,
    header_of,
    is_dense,
    read_choice,
    read_setting,
)
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat, Part
from mixtura.quant.codecs.words import bytes_of, count_codes, count_words, words_of
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.packing import pack_codes, unpack_codes
from mixtura.quant.scheme import SCALE_DTYPES, Code, GlobalScale, QuantScheme, ZeroPoint

_FLOATS = {(f"e{code.exponent_bits}m{code.mantissa_bits}"): code for code in Code if code.is_float}
_INTEGER = re.compile(r"u?int([1-8])")
_FLOAT = re.compile(r"float([1-8])_?(e\d+m\d+)")
_UNQUANTIZED = ("bfloat16", "float16", "float32")


class ScaleType(Enum):
    """What shares a weight scale."""

    GROUP = "group"
    CHANNEL = "channel"
    BLOCK = "block"
    TENSOR = "tensor"


@dataclass(frozen=True)
class HummingFormat(MatrixFormat):
    """How matrices lie in a Humming file.

    Attributes:
        code, bits: of a weight. scale_type: what shares a scale.
        group_shape: rows and columns that share one; None is all.
        second_scale: granularity of `weight_scale_2`.
        has_zero_point: whether there are zero points.
    """

    code: Code
    bits: int
    scale_type: ScaleType
    group_shape: tuple[int | None, int | None]
    second_scale: GlobalScale
    has_zero_point: bool
    activations: ActivationScheme | None = None

    def shape_of(
        self, headers: Mapping[str, Header], shape: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        num_rows, num_words = header_of(headers, "weight", 2).shape
        return num_rows, count_codes("weight", num_words, self.bits)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        num_rows, num_columns = shape
        group_rows, group_columns = self.group_shape
        grid = (
            -(-num_rows // (group_rows or num_rows)),
            -(-num_columns // (group_columns or num_columns)),
        )
        row_words = count_words("input features", num_columns, self.bits)
        parts = {
            "weight": Part((torch.int32,), (num_rows, row_words)),
            "weight_scale": Part(
                SCALE_DTYPES, (1,) if self.scale_type is ScaleType.TENSOR else grid
            ),
        }
        if self.has_zero_point:
            zero_words = count_words("output features", num_rows, self.bits)
            parts["zero_point"] = Part((torch.int32,), (zero_words, grid[1]))
        if self.second_scale is not GlobalScale.NONE:
            size = 1 if self.second_scale is GlobalScale.MATRIX else num_rows
            parts["weight_scale_2"] = Part((torch.float32,), (size,))
        return parts

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Decoded:
        num_rows, _ = shape
        scales, second = tensors["weight_scale"], tensors.get("weight_scale_2")
        values = bytes_of(tensors["weight"])
        if self.scale_type is ScaleType.TENSOR:
            check_positive("weight_scale", scales.float())
        check_finite("weight_scale", scales)
        check_numbers("weight", values, self.code)
        zero_points = None
        if self.has_zero_point:
            rows = bytes_of(tensors["zero_point"].t())
            codes = unpack_codes(rows, num_rows, self.bits)
            zero_points = codes.t().contiguous()
        if second is not None and self.second_scale is GlobalScale.MATRIX:
            check_positive("weight_scale_2", second)
            second = second.reshape(())
        elif second is not None:
            check_finite("weight_scale_2", second)
        is_tensor = self.scale_type is ScaleType.TENSOR
        grid = scales.view(1, 1) if is_tensor else scales.contiguous()
        scheme = self._scheme(scales.dtype)
        return Decoded(QuantizedMatrix(scheme, shape, values, grid, zero_points, second))

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        matrix = decoded.matrix
        wanted = self._scheme(matrix.scheme.scale_dtype or torch.bfloat16)
        check_encodable(matrix, wanted, "Humming")
        assert matrix.scales is not None
        is_tensor = self.scale_type is ScaleType.TENSOR
        parts = {
            "weight": words_of(matrix.values),
            "weight_scale": matrix.scales.view(1) if is_tensor else matrix.scales,
        }
        if matrix.zero_points is not None:
            rows = pack_codes(matrix.zero_points.t().to(torch.uint8), self.bits)
            parts["zero_point"] = words_of(rows).t().contiguous()
        if matrix.global_scale is not None:
            parts["weight_scale_2"] = matrix.global_scale.reshape(-1)
        return parts

    def _scheme(self, scale_dtype: torch.dtype) -> QuantScheme:
        zero_point = ZeroPoint.NONE
        if self.code is Code.INT:
            zero_point = ZeroPoint.INTEGER if self.has_zero_point else ZeroPoint.MID
        return QuantScheme(
            self.code, self.bits, self.group_shape, scale_dtype, zero_point, self.second_scale
        )


@dataclass(frozen=True)
class Humming(Codec):
    """Humming's own files, configured: every matrix has one format."""

    name: ClassVar[str] = "Humming"
    methods: ClassVar[tuple[str, ...]] = ("humming",)
    suffixes: ClassVar[Mapping[str, str]] = {
        ".weight": "weight",
        ".weight_scale": "weight_scale",
        ".weight_scale_2": "weight_scale_2",
        ".zero_point": "zero_point",
    }

    format: HummingFormat

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        code, bits = _read_code(config, "b_dtype", "weight_dtype", "dtype")
        has_zero_point = read_choice(config, "has_zero_point", choices=(False, True), default=False)
        for key, value in (("is_fp_zero_point", False), ("hadamard_block_size", 0)):
            read_choice(config, key, choices=(value,), default=value)
        scale_type, group_shape = _read_groups(config)
        second = read_choice(
            config, "weight_scale_2_type", choices=("none", "tensor", "channel"), default="none"
        )
        if has_zero_point and (code is not Code.INT or group_shape[0] != 1):
            raise CheckpointError(
                f"has_zero_point (True) must go with integers in groups or channels; got "
                f"{code.value}, {scale_type.value}. Fetch the configuration again."
            )
        granularity = {
            "none": GlobalScale.NONE,
            "tensor": GlobalScale.MATRIX,
            "channel": GlobalScale.ROW,
        }
        format = HummingFormat(
            code,
            bits,
            scale_type,
            group_shape,
            granularity[second],
            has_zero_point,
            _read_activations(config),
        )
        return cls(format)

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        return None if is_dense(headers) else self.format

    def expects(self, name: str) -> bool:
        return True


def _read_code(config: Mapping[str, Any], *keys: str) -> tuple[Code, int]:
    value = read_setting(config, *keys)
    name = str(value).lower()
    if integer := _INTEGER.fullmatch(name):
        return Code.INT, int(integer[1])
    number = _FLOAT.fullmatch(name)
    code = _FLOATS.get(number[2]) if number else None
    if (
        number is None
        or code is None
        or 1 + code.exponent_bits + code.mantissa_bits != int(number[1])
    ):
        raise CheckpointError(
            f"{keys[0]} ({value!r}) must be uint1 to uint8, int1 to int8, or a float out of "
            f"{', '.join(_FLOATS)}; got another. Use a checkpoint of a kind that is read."
        )
    return code, int(number[1])


def _read_groups(config: Mapping[str, Any]) -> tuple[ScaleType, tuple[int | None, int | None]]:
    columns = _read_size(config, "weight_scale_group_size", "group_size")
    rows = _read_size(config, "weight_scale_group_size_n", "group_size_n")
    default = ScaleType.GROUP if columns else ScaleType.CHANNEL
    if rows is not None and rows > 1:
        default = ScaleType.BLOCK
    name = read_choice(
        config,
        "weight_scale_type",
        "scale_type",
        choices=tuple(type.value for type in ScaleType),
        default=default.value,
    )
    scale_type = ScaleType(name)
    if scale_type in (ScaleType.GROUP, ScaleType.BLOCK) and columns is None:
        raise CheckpointError(
            f"weight_scale_group_size (0) must be above 0 for weight_scale_type {name}; got 0. "
            f"Fetch the configuration again."
        )
    shapes: dict[ScaleType, tuple[int | None, int | None]] = {
        ScaleType.GROUP: (1, columns),
        ScaleType.CHANNEL: (1, None),
        ScaleType.BLOCK: (rows or 1, columns),
        ScaleType.TENSOR: (None, None),
    }
    return scale_type, shapes[scale_type]


def _read_size(config: Mapping[str, Any], *keys: str) -> int | None:
    size = read_setting(config, *keys) or 0
    if type(size) is not int or size < 0:
        raise CheckpointError(
            f"{keys[0]} ({size!r}) must be 0 or a positive integer; got {size!r}. Fetch the "
            f"configuration again."
        )
    return size or None


def _read_activations(config: Mapping[str, Any]) -> ActivationScheme | None:
    if str(read_setting(config, "a_dtype", "input_dtype") or _UNQUANTIZED[0]) in _UNQUANTIZED:
        return None
    code, bits = _read_code(config, "a_dtype", "input_dtype")
    columns = _read_size(config, "input_scale_group_size")
    read_choice(
        config, "quant_mode", choices=("dynamic_group", "dynamic_token"), default="dynamic_group"
    )
    per = ActivationGroup.TOKEN if columns is None else ActivationGroup.GROUP
    return ActivationScheme(code, bits, per, columns)
