"""AMD Quark: fp8, int8, int4, microscaled floats, and codes quantized in two stages.

    W = (code - zero) * scale
    W = level[code] * scale                            floats
    W = code * weight_scale_2 * weight_scale           int4 in fp8; NVFP4: level[code] likewise

| weight dtype            | stored                                                               |
| ----------------------- | -------------------------------------------------------------------- |
| fp8_e4m3                | weight f8; weight_scale (), (N,), or a grid of blocks                |
| fp8_e4m3, e8m0 scales   | MXFP8: weight_scale u8 (N, K/32)                                     |
| int8                    | weight i8; weight_scale () or (N,); weight_zero_point alike          |
| int4, uint4 per_group   | weight i32 (K, N/8); weight_scale (K/g, N); zero points (K/g, N/8)   |
| int4, uint4 per_channel | weight i32 (N, K/8); weight_scale (N,); zero points (N/8,)           |
| fp8_e4m3, then int4     | weight i32 (N, K/8); weight_scale (); weight_scale_2 (N,)            |
| fp4, fp6_e2m3, fp6_e3m2 | weight u8 (N, K/2 or 3K/4); weight_scale u8 (N, K/32), e8m0          |
| fp4 in two stages       | NVFP4: weight u8; weight_scale f8 (N, K/16); weight_scale_2 ()       |

`pack_method` says how eight codes lie in a word: `reorder` is AWQ's order. int4 is in two's
complement. Parts say which row it is, the configuration what they leave open.

Source: amd-quark 0.13, `torch/utils/pack.py` and `torch/export/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Self

import torch

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationScheme
from mixtura.quant.codecs.checks import SCALE_FLOATS, is_dense, module_of
from mixtura.quant.codecs.code_layouts import NibbleWords, RowBytes
from mixtura.quant.codecs.contract import Codec, Header, MatrixFormat
from mixtura.quant.codecs.float_matrices import (
    E8M0_DTYPES,
    FLOAT8_CODES,
    MX_COLUMNS,
    NVFP4_COLUMNS,
    GroupShape,
    float8_matrix,
    granularity,
    input_scale_of,
    microscaled_matrix,
    needed_header,
    nvfp4_matrix,
    scalar_of,
    unknown_parts,
)
from mixtura.quant.codecs.grid_layouts import (
    Arrangement,
    GridLayout,
    NibbleZeros,
    PlainZeros,
    ZeroLayout,
)
from mixtura.quant.codecs.module_names import naming
from mixtura.quant.codecs.quark_config import QuarkConfig, QuarkLayer, QuarkSpec
from mixtura.quant.codecs.stored_matrix import StoredMatrix
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme, ZeroPoint


class _Kind(Enum):
    """What the parts of a matrix are."""

    FLOAT8 = auto()
    MXFP8 = auto()
    INT8 = auto()
    INT4 = auto()
    INT4_IN_FP8 = auto()
    PACKED_MX = auto()
    NVFP4 = auto()

    def fits(self, weight: tuple[QuarkSpec, ...]) -> bool:
        """Whether weights that are quantized in these stages can be stored as these parts."""
        dtypes = {spec.dtype for spec in weight}
        is_single = len(weight) == 1
        return {
            _Kind.FLOAT8: is_single and dtypes <= {"fp8_e4m3", "fp8_e5m2"},
            _Kind.MXFP8: is_single and dtypes <= {"fp8_e4m3", "fp8_e5m2"},
            _Kind.INT8: is_single and dtypes == {"int8"},
            _Kind.INT4: is_single and dtypes <= {"int4", "uint4"},
            _Kind.INT4_IN_FP8: not is_single and "int4" in dtypes,
            _Kind.PACKED_MX: is_single and dtypes <= {"fp4", "fp6_e2m3", "fp6_e3m2"},
            _Kind.NVFP4: not is_single and "fp4" in dtypes,
        }[self]


@dataclass(frozen=True)
class Quark(Codec):
    """Quark, configured."""

    name: ClassVar[str] = "Quark"
    methods: ClassVar[tuple[str, ...]] = ("quark",)
    suffixes: ClassVar[Mapping[str, str]] = {
        f".{part}": part
        for part in (
            "weight",
            "weight_scale",
            "weight_scale_2",
            "weight_zero_point",
            "weight_zero_point_2",
            "input_scale",
            "input_scale_2",
            "input_zero_point",
        )
    }

    config: QuarkConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(QuarkConfig.from_config(config))

    def expects(self, name: str) -> bool:
        return self.config.expects(module_of(name))

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        with naming(name):
            return None if is_dense(headers) else self._format_of(module_of(name), headers)

    def _format_of(self, module: str, headers: Mapping[str, Header]) -> StoredMatrix:
        kind = _kind_of(headers)
        if kind is None:
            raise unknown_parts(self.name, headers)
        layer = self._layer_for(module, kind)
        weight, activations = layer.weight, layer.activations
        match kind:
            case _Kind.FLOAT8:
                block = weight[0].block if weight[0].scheme == "per_block" else None
                group = granularity(headers, "weight_scale", block)
                scale = input_scale_of(headers, activations)
                return float8_matrix(headers, "weight_scale", group, activations, scale)
            case _Kind.MXFP8 | _Kind.PACKED_MX:
                return microscaled_matrix(
                    headers,
                    FLOAT8_CODES.get(headers["weight"].dtype, weight[0].code),
                    activations,
                    group_columns=weight[0].group_size or MX_COLUMNS,
                    input_scale=input_scale_of(headers, activations),
                )
            case _Kind.NVFP4:
                return nvfp4_matrix(
                    headers,
                    activations,
                    codes_part="weight",
                    global_part="weight_scale_2",
                    is_reciprocal=False,
                    input_scale=input_scale_of(headers, activations, "input_scale_2"),
                    group_columns=_spec(weight, Code.E2M1).group_size or NVFP4_COLUMNS,
                )
            case _Kind.INT8:
                return _int8(headers, weight[0], activations)
            case _Kind.INT4:
                return self._int4(headers, weight[0], activations)
            case _Kind.INT4_IN_FP8:
                return self._int4_in_fp8(headers, _spec(weight, Code.INT), activations)

    def _layer_for(self, module: str, kind: _Kind) -> QuarkLayer:
        """How the configuration quantizes a matrix, or a way that can have written its parts."""
        for layer in (self.config.layer_of(module), *self.config.layers):
            if layer.weight and kind.fits(layer.weight):
                return layer
        raise CheckpointError(
            f"parts ({kind.name.lower()}) must be of a kind that quantization_config describes; "
            f"got {len(self.config.layers)} descriptions of other kinds. Fetch config.json and the "
            f"weights again, both of one model."
        )

    def _int4(
        self,
        headers: Mapping[str, Header],
        spec: QuarkSpec,
        activations: ActivationScheme | None,
    ) -> StoredMatrix:
        """Words along N of a transposed matrix where scales are per group, else along K."""
        is_grouped, is_signed = spec.scheme == "per_group", spec.dtype == "int4"
        words = NibbleWords("weight", is_grouped, self.config.is_interleaved, is_signed)
        scale = _float_header(headers, "weight_scale")
        if is_grouped:
            group: GroupShape = (1, spec.group_size)
            arrangement = Arrangement.TRANSPOSED
        else:
            group, arrangement = granularity(headers, "weight_scale", None)
        zeros = self._nibble_zeros(headers, "weight_zero_point", words, is_grouped)
        return StoredMatrix(
            QuantScheme(Code.INT, 4, group, scale.dtype, _zero_point(headers, spec, zeros)),
            activations,
            words,
            GridLayout("weight_scale", scale.dtype, arrangement),
            zero_points=zeros,
            input_scale=input_scale_of(headers, activations),
            unread=_unread(headers),
        )

    def _int4_in_fp8(
        self,
        headers: Mapping[str, Header],
        spec: QuarkSpec,
        activations: ActivationScheme | None,
    ) -> StoredMatrix:
        words = NibbleWords("weight", False, self.config.is_interleaved, is_signed=True)
        scale = _float_header(headers, "weight_scale_2")
        zeros = self._nibble_zeros(headers, "weight_zero_point_2", words, False)
        return StoredMatrix(
            QuantScheme(
                Code.INT,
                4,
                (1, None),
                scale.dtype,
                _zero_point(headers, spec, zeros),
                GlobalScale.MATRIX,
            ),
            activations,
            words,
            GridLayout("weight_scale_2", scale.dtype, Arrangement.of_channels(len(scale.shape))),
            zero_points=zeros,
            global_scale=scalar_of(headers, "weight_scale", 0),
            input_scale=input_scale_of(headers, activations),
            unread=_unread(headers),
        )

    def _nibble_zeros(
        self, headers: Mapping[str, Header], part: str, words: NibbleWords, is_grouped: bool
    ) -> ZeroLayout | None:
        if part not in headers:
            return None
        if headers[part].dtype is not torch.int32:
            raise CheckpointError(
                f"{part} ({headers[part].dtype}) must be words of eight codes in int32; got "
                f"{headers[part].dtype}. Use a checkpoint with integer zero points."
            )
        along_n = dataclasses.replace(words, part=part, is_transposed=True)
        return NibbleZeros(along_n, is_flat=not is_grouped)


def _kind_of(headers: Mapping[str, Header]) -> _Kind | None:
    weight, scale = headers.get("weight"), headers.get("weight_scale")
    if weight is None or scale is None:
        return None
    is_e8m0, is_float = scale.dtype in E8M0_DTYPES, scale.dtype in SCALE_FLOATS
    is_two_stage = "weight_scale_2" in headers
    if weight.dtype in FLOAT8_CODES and (is_e8m0 or is_float):
        return _Kind.MXFP8 if is_e8m0 else _Kind.FLOAT8
    if weight.dtype is torch.uint8 and is_e8m0:
        return _Kind.PACKED_MX
    if weight.dtype is torch.uint8 and scale.dtype is torch.float8_e4m3fn and is_two_stage:
        return _Kind.NVFP4
    if weight.dtype is torch.int8 and is_float:
        return _Kind.INT8
    if weight.dtype is torch.int32 and is_float:
        return _Kind.INT4_IN_FP8 if is_two_stage else _Kind.INT4
    return None


def _int8(
    headers: Mapping[str, Header], spec: QuarkSpec, activations: ActivationScheme | None
) -> StoredMatrix:
    if spec.scheme not in ("per_tensor", "per_channel"):
        raise CheckpointError(
            f"qscheme ({spec.scheme}) must be per_tensor or per_channel for int8; got "
            f"{spec.scheme}. Use another checkpoint of the model."
        )
    scale = needed_header(headers, "weight_scale")
    group, arrangement = granularity(headers, "weight_scale", None)
    header = headers.get("weight_zero_point")
    zeros = header and PlainZeros("weight_zero_point", header.dtype, 128, arrangement)
    return StoredMatrix(
        QuantScheme(Code.INT, 8, group, scale.dtype, _zero_point(headers, spec, zeros)),
        activations,
        RowBytes("weight", 8, torch.int8, flip=0x80),
        GridLayout("weight_scale", scale.dtype, arrangement),
        zero_points=zeros,
        input_scale=input_scale_of(headers, activations),
        unread=_unread(headers),
    )


def _spec(weight: tuple[QuarkSpec, ...], code: Code) -> QuarkSpec:
    return next(spec for spec in weight if spec.code is code)


def _zero_point(
    headers: Mapping[str, Header], spec: QuarkSpec, zeros: ZeroLayout | None
) -> ZeroPoint:
    if spec.is_symmetric:
        return ZeroPoint.MID
    if zeros is None:
        raise CheckpointError(
            f"zero points (none) must be there, as {spec.dtype} is not symmetric; got only "
            f"{', '.join(sorted(headers))}. Fetch the weights again."
        )
    return ZeroPoint.INTEGER


def _float_header(headers: Mapping[str, Header], part: str) -> Header:
    header = needed_header(headers, part)
    if header.dtype not in SCALE_FLOATS:
        raise CheckpointError(
            f"{part} ({header.dtype}) must be float32, bfloat16 or float16; got {header.dtype}. "
            f"Fetch the weights again."
        )
    return header


def _unread(headers: Mapping[str, Header]) -> tuple[tuple[str, Header], ...]:
    return tuple((part, headers[part]) for part in ("input_zero_point",) if part in headers)
