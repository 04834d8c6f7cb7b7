"""compressed-tensors, as llm-compressor writes it.

    W = (code - zero) * scale             integers
    W = level[code] * scale               floats, scales float or e8m0
    W = level[code] * scale / global      NVFP4: `weight_global_scale` divides

| format               | codes                                    | read as                        |
| -------------------- | ---------------------------------------- | ------------------------------ |
| pack-quantized       | weight_packed i32, words along K         | int of 1 to 8 bits             |
| int-quantized        | weight i8                                | int of 1 to 8 bits, one a byte |
| float-, naive-       | weight f8                                | e4m3 per tensor, row, block    |
| nvfp4-pack-quantized | weight_packed u8, weight_scale f8        | NVFP4                          |
| mxfp4-, mxfp6-       | weight_packed u8, weight_scale u8 (e8m0) | e2m1 or e2m3 in groups of 32   |
| mxfp8-quantized      | weight f8, weight_scale u8 (e8m0)        | e4m3 in groups of 32           |

Names, dtypes and shapes in the file say which of these it is; the group of the configuration says
the width of integers, sizes of groups, and how activations are quantized.

Source: compressed-tensors 0.20, `compressors/` and `quantization/`.
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
from mixtura.quant.codecs.code_layouts import CodeLayout, RowBytes, RowWords, SignedBytes
from mixtura.quant.codecs.compressed_tensors_config import (
    CompressedTensorsConfig,
    ConfigGroup,
    QuantizationArgs,
    Strategy,
)
from mixtura.quant.codecs.contract import Codec, Header, MatrixFormat
from mixtura.quant.codecs.float_matrices import (
    E8M0_DTYPES,
    FLOAT8_CODES,
    GroupShape,
    float8_matrix,
    input_scale_of,
    microscaled_matrix,
    needed_header,
    nvfp4_matrix,
    unknown_parts,
)
from mixtura.quant.codecs.grid_layouts import (
    Arrangement,
    GridLayout,
    PlainZeros,
    ScalarLayout,
    WordZeros,
    ZeroLayout,
)
from mixtura.quant.codecs.module_names import naming
from mixtura.quant.codecs.stored_matrix import SHAPE_PART, StoredMatrix
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

_UNREAD = ("input_zero_point",)


class _Kind(Enum):
    """What the parts of a matrix are."""

    PACKED_INT = auto()
    PLAIN_INT = auto()
    FLOAT8 = auto()
    MXFP8 = auto()
    PACKED_MX = auto()
    NVFP4 = auto()

    def fits(self, weights: QuantizationArgs) -> bool:
        """Whether weights that are quantized like this can be stored as these parts."""
        if self in (_Kind.PACKED_INT, _Kind.PLAIN_INT):
            return not weights.is_float
        if not weights.is_float:
            return False
        is_grouped = weights.strategy in (Strategy.GROUP, Strategy.TENSOR_GROUP)
        return {
            _Kind.FLOAT8: weights.bits == 8,
            _Kind.MXFP8: weights.bits == 8 and is_grouped,
            _Kind.PACKED_MX: weights.bits in (4, 6) and is_grouped,
            _Kind.NVFP4: weights.bits == 4 and is_grouped,
        }[self]


@dataclass(frozen=True)
class CompressedTensors(Codec):
    """compressed-tensors, configured."""

    name: ClassVar[str] = "compressed-tensors"
    methods: ClassVar[tuple[str, ...]] = ("compressed-tensors", "compressed_tensors")
    suffixes: ClassVar[Mapping[str, str]] = {
        f".{part}": part
        for part in (
            "weight",
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
            "weight_g_idx",
            "weight_global_scale",
            "input_scale",
            "input_zero_point",
            "input_global_scale",
        )
    }

    config: CompressedTensorsConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(CompressedTensorsConfig.from_config(config))

    def expects(self, name: str) -> bool:
        return self.config.expects(module_of(name))

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        with naming(name):
            return None if is_dense(headers) else self._format_of(module_of(name), headers)

    def _format_of(self, module: str, headers: Mapping[str, Header]) -> StoredMatrix:
        kind = _kind_of(headers)
        if kind is None:
            raise unknown_parts(self.name, headers)
        group = self._group_for(module, kind)
        assert group.weights is not None
        weights, activations = group.weights, group.activations
        match kind:
            case _Kind.PACKED_INT | _Kind.PLAIN_INT:
                layout = _integers(headers, kind, group)
            case _Kind.FLOAT8:
                layout = _float8(headers, weights, activations)
            case _Kind.MXFP8:
                layout = microscaled_matrix(
                    headers, Code.E4M3, activations, group_columns=_columns(weights)
                )
            case _Kind.PACKED_MX:
                layout = microscaled_matrix(
                    headers,
                    Code.E2M1 if weights.bits == 4 else Code.E2M3,
                    activations,
                    codes_part="weight_packed",
                    group_columns=_columns(weights),
                )
            case _Kind.NVFP4:
                layout = nvfp4_matrix(
                    headers,
                    activations,
                    codes_part="weight_packed",
                    global_part="weight_global_scale",
                    is_reciprocal=True,
                    input_scale=None,
                    group_columns=_columns(weights),
                )
        return _with_other_parts(layout, headers)

    def _group_for(self, module: str, kind: _Kind) -> ConfigGroup:
        """The group that targets a matrix, or one that can have written its parts."""
        target = self.config.group_of(module)
        candidates = (() if target is None else (target,)) + self.config.groups
        for group in candidates:
            if group.weights is not None and kind.fits(group.weights):
                return group
        raise CheckpointError(
            f"parts ({kind.name.lower()}) must be of a kind that config_groups describes; got "
            f"{len(self.config.groups)} groups of other kinds. Fetch config.json and the weights "
            f"again, both of one model."
        )


def _kind_of(headers: Mapping[str, Header]) -> _Kind | None:
    packed, weight = headers.get("weight_packed"), headers.get("weight")
    scale = headers.get("weight_scale")
    if scale is None or (packed is None) == (weight is None):
        return None
    is_e8m0, is_float = scale.dtype in E8M0_DTYPES, scale.dtype in SCALE_FLOATS
    if packed is not None:
        kinds = {
            (torch.int32, is_float): _Kind.PACKED_INT,
            (torch.uint8, is_e8m0): _Kind.PACKED_MX,
            (torch.uint8, scale.dtype is torch.float8_e4m3fn): _Kind.NVFP4,
        }
        return kinds.get((packed.dtype, True))
    assert weight is not None
    if weight.dtype is torch.int8 and is_float:
        return _Kind.PLAIN_INT
    if weight.dtype in FLOAT8_CODES and (is_float or is_e8m0):
        return _Kind.FLOAT8 if is_float else _Kind.MXFP8
    return None


def _integers(headers: Mapping[str, Header], kind: _Kind, group: ConfigGroup) -> StoredMatrix:
    weights = group.weights
    assert weights is not None
    bits, scale = weights.bits, needed_header(headers, "weight_scale")
    codes: CodeLayout
    if kind is _Kind.PACKED_INT:
        codes = RowWords("weight_packed", bits)
    elif bits == 8:
        codes = RowBytes("weight", 8, torch.int8, flip=0x80)
    else:
        codes = SignedBytes("weight", bits)
    if group.is_preset and scale.shape[-1:] == (1,):  # W8A16 has meant rows, too
        weights = dataclasses.replace(weights, strategy=Strategy.CHANNEL)
    shape, arrangement = _grouping(headers, codes.part, weights)
    zero_point = ZeroPoint.MID if weights.is_symmetric else ZeroPoint.INTEGER
    return StoredMatrix(
        QuantScheme(Code.INT, bits, shape, scale.dtype, zero_point),
        group.activations,
        codes,
        GridLayout("weight_scale", scale.dtype, arrangement),
        zero_points=_zeros(headers, weights, codes.part, arrangement),
        column_groups="weight_g_idx" if "weight_g_idx" in headers else None,
        shape_dtype=_shape_dtype(headers),
    )


def _shape_dtype(headers: Mapping[str, Header]) -> torch.dtype | None:
    if SHAPE_PART not in headers:
        return None
    return torch.int32 if headers[SHAPE_PART].dtype is torch.int32 else torch.int64


def _zeros(
    headers: Mapping[str, Header],
    weights: QuantizationArgs,
    codes_part: str,
    arrangement: Arrangement,
) -> ZeroLayout | None:
    """Zero points: words along N, or a number per group, as older and unpacked files have it."""
    header = headers.get("weight_zero_point")
    if header is None and weights.is_symmetric:
        return None
    middle = 2 ** (weights.bits - 1) if not weights.is_float else 0
    dtype = header.dtype if header is not None else torch.int8
    if header is None and codes_part == "weight_packed":
        dtype = torch.int32
    if dtype is torch.int32 and codes_part == "weight_packed":
        return WordZeros("weight_zero_point", weights.bits)
    return PlainZeros("weight_zero_point", dtype, middle, arrangement)


def _float8(
    headers: Mapping[str, Header],
    weights: QuantizationArgs,
    activations: ActivationScheme | None,
) -> StoredMatrix:
    group = _grouping(headers, "weight", weights)
    layout = float8_matrix(headers, "weight_scale", group, activations)
    zeros = _zeros(headers, weights, "weight", group[1])
    return dataclasses.replace(layout, zero_points=zeros)


def _grouping(
    headers: Mapping[str, Header], codes_part: str, weights: QuantizationArgs
) -> tuple[GroupShape, Arrangement]:
    """What shares a scale, and how scales of that are stored in a tensor of these dims."""
    stack = len(headers[codes_part].shape) - 2
    num_dims = len(needed_header(headers, "weight_scale").shape) - max(stack, 0)
    match weights.strategy:
        case Strategy.TENSOR:
            return (None, None), Arrangement.of_tensor(num_dims)
        case Strategy.CHANNEL:
            return (1, None), Arrangement.of_channels(num_dims)
        case Strategy.GROUP | Strategy.TENSOR_GROUP:
            return (1, weights.group_size), Arrangement.GRID
        case Strategy.BLOCK:
            assert weights.block is not None
            return weights.block, Arrangement.GRID
    raise CheckpointError(
        f"strategy ({weights.strategy.value}) must be one that weights have; got one of "
        f"activations. Fetch config.json again."
    )


def _columns(weights: QuantizationArgs) -> int:
    assert weights.group_size is not None
    return weights.group_size


def _with_other_parts(layout: StoredMatrix, headers: Mapping[str, Header]) -> StoredMatrix:
    """Add what belongs to activations."""
    input_scale: ScalarLayout | None
    is_two_level = layout.scheme.scale_dtype is torch.float8_e4m3fn
    if "input_global_scale" in headers or (is_two_level and "input_scale" not in headers):
        input_scale = input_scale_of(
            headers, layout.activations, "input_global_scale", is_reciprocal=True
        )
    else:
        input_scale = input_scale_of(headers, layout.activations)
    unread = tuple((part, headers[part]) for part in _UNREAD if part in headers)
    return dataclasses.replace(layout, input_scale=input_scale, unread=unread)
