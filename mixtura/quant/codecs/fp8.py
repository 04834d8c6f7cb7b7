"""`fp8` checkpoints: e4m3 per matrix, row or block, DeepSeek-V4's FP4 experts, and int8 kin.

    W = level[code] * scale

| stored                                     | what it is                                         |
| ------------------------------------------ | -------------------------------------------------- |
| weight f8, weight_scale (), (1,)           | per matrix; input_scale with static activations    |
| weight f8, weight_scale (N,), (N, 1)       | per row, as fbgemm writes it                       |
| weight f8, weight_scale_inv or scale       | per block; it multiplies, whatever its name        |
| weight i8 (N, K/2), scale e8m0 (N, K/32)   | MXFP4 experts of DeepSeek-V4                        |
| weight i8 (N, K/2), weight_scale_inv       | w4afp8: int4 in groups of 128                      |
| weight i8 (N, K), weight_scale_inv         | blockwise_int8: blocks                             |
| weight i8 (N, K), weight_scale (N, 1)      | w8a8_int8: per row                                 |

Source: DeepSeek-V3's and V4's `inference/kernel.py`; Transformers 5.23 `finegrained_fp8.py`; SGLang
0.5 for the last three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.checks import (
    SCALE_FLOATS,
    is_dense,
    module_of,
    read_choice,
)
from mixtura.quant.codecs.code_layouts import RowBytes
from mixtura.quant.codecs.config_values import read_block, read_names
from mixtura.quant.codecs.contract import Codec, Header, MatrixFormat
from mixtura.quant.codecs.float_matrices import (
    E8M0_DTYPES,
    FLOAT8_CODES,
    FP8_STATIC,
    FP8_TOKEN,
    GroupShape,
    float8_matrix,
    granularity,
    input_scale_of,
    microscaled_matrix,
    unknown_parts,
)
from mixtura.quant.codecs.grid_layouts import Arrangement, GridLayout
from mixtura.quant.codecs.module_names import is_listed, is_stack_of_experts, naming
from mixtura.quant.codecs.stored_matrix import StoredMatrix
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

_BLOCK = (128, 128)
_INT4_COLUMNS = 128
_SCALE_PARTS = ("weight_scale_inv", "weight_scale", "scale")
_INPUT_PARTS = ("input_scale", "activation_scale")
_BLOCKS_WITHOUT_SETTING = ((128, 128), (32, 32))  # of DeepSeek-V4 and V4.1
_INT8_TOKEN = ActivationScheme(Code.INT, 8, ActivationGroup.TOKEN)
_INT8_GROUPS = ActivationScheme(Code.INT, 8, ActivationGroup.GROUP, _BLOCK[1])


@dataclass(frozen=True)
class Fp8(Codec):
    """fp8, configured.

    Attributes:
        method: the `quant_method`. block: rows and columns that share a scale, where it says so.
        is_static: whether activations of matrices with one scale have a stored scale.
        ignored: modules that are not quantized.
    """

    name: ClassVar[str] = "fp8"
    methods: ClassVar[tuple[str, ...]] = (
        "fp8",
        "fbgemm_fp8",
        "deepseek_v4_fp8",
        "w4afp8",
        "blockwise_int8",
        "w8a8_int8",
    )
    suffixes: ClassVar[Mapping[str, str]] = {
        ".weight": "weight",
        ".weight_scale_inv": "weight_scale_inv",
        ".weight_scale": "weight_scale",
        ".scale": "scale",
        ".input_scale": "input_scale",
        ".activation_scale": "activation_scale",
        "_scale_inv": "weight_scale_inv",
        "_activation_scale": "activation_scale",
    }

    method: str
    block: tuple[int, int] | None
    is_static: bool
    ignored: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        method = read_choice(config, "quant_method", choices=cls.methods, default="fp8")
        scheme = read_choice(
            config, "activation_scheme", choices=("dynamic", "static"), default="dynamic"
        )
        block = read_block(config, "weight_block_size")
        if block is None and method in ("w4afp8", "blockwise_int8"):
            block = _BLOCK
        ignored = read_names(config, "modules_to_not_convert", "ignored_layers")
        return cls(method, block, scheme == "static", ignored)

    def split(self, tensor: str) -> tuple[str, str] | None:
        return (tensor, "weight") if is_stack_of_experts(tensor) else super().split(tensor)

    def expects(self, name: str) -> bool:
        return not is_listed(module_of(name), self.ignored)

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        with naming(name):
            return None if is_dense(headers) else self._format_of(headers)

    def _format_of(self, headers: Mapping[str, Header]) -> StoredMatrix:
        found = next((part for part in _SCALE_PARTS if part in headers), None)
        weight = headers.get("weight")
        if found is None or weight is None:
            raise unknown_parts(self.name, headers)
        if weight.dtype in FLOAT8_CODES:
            return self._float8(headers, found)
        if weight.dtype is torch.int8 and headers[found].dtype in E8M0_DTYPES:
            activations = _groups(self.block or _BLOCK, headers[found])
            return microscaled_matrix(headers, Code.E2M1, activations, scale_part=found)
        if weight.dtype is torch.int8 and headers[found].dtype in SCALE_FLOATS:
            layout = self._integers(headers, found)
            if layout is not None:
                return layout
        raise unknown_parts(self.name, headers)

    def _float8(self, headers: Mapping[str, Header], scale_part: str) -> StoredMatrix:
        block = self._block_of(headers, scale_part)
        group = granularity(headers, scale_part, block)
        activations: ActivationScheme | None
        if group[0] == block:
            activations = _groups(block, headers[scale_part])
        else:
            is_static = self.is_static and group[0] == (None, None)
            activations = FP8_STATIC if is_static else FP8_TOKEN
        part = next((part for part in _INPUT_PARTS if part in headers), "input_scale")
        input_scale = input_scale_of(headers, activations, part)
        return float8_matrix(headers, scale_part, group, activations, input_scale)

    def _block_of(self, headers: Mapping[str, Header], scale_part: str) -> tuple[int, int] | None:
        """The block size; that of DeepSeek-V4 by its grid where the configuration has none."""
        weight, scale = headers["weight"].shape, headers[scale_part].shape
        if scale_part == "weight_scale" and len(scale) == 2 and scale[1:] == (1,):
            # A column: blocks if the matrix is as narrow as one.
            is_blocks = self.block is not None and scale == _grid(weight, self.block)
            return self.block if is_blocks else None
        if self.block is not None or scale_part != "scale":
            return self.block
        fitting = (block for block in _BLOCKS_WITHOUT_SETTING if _grid(weight, block) == scale)
        return next(fitting, None)

    def _integers(self, headers: Mapping[str, Header], scale_part: str) -> StoredMatrix | None:
        scale = headers[scale_part]
        group: GroupShape
        arrangement, activations = Arrangement.GRID, _INT8_TOKEN
        codes = RowBytes("weight", 8, torch.int8, flip=0x80)
        if self.method == "w4afp8":
            codes = RowBytes("weight", 4, torch.int8, flip=0x88)
            group, activations = (1, _INT4_COLUMNS), FP8_STATIC
        elif self.method == "blockwise_int8":
            assert self.block is not None
            group, activations = self.block, _INT8_GROUPS
        elif self.method == "w8a8_int8":
            group, arrangement = granularity(headers, scale_part, None)
        else:
            return None
        return StoredMatrix(
            QuantScheme(Code.INT, codes.bits, group, scale.dtype, ZeroPoint.MID),
            activations,
            codes,
            GridLayout(scale_part, scale.dtype, arrangement),
            input_scale=input_scale_of(headers, activations),
        )


def _groups(block: tuple[int, int], scale: Header) -> ActivationScheme:
    """Activations beside weights in blocks: their scales are powers of two where the weights' are.

    `scale_fmt`, which says so too, is "ue8m0" even where DeepSeek-V4's weights have fp32 scales.
    """
    extra = ActivationExtra.POWER_SCALES if scale.dtype in E8M0_DTYPES else None
    return ActivationScheme(Code.E4M3, 8, ActivationGroup.GROUP, block[1], extra=extra)


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    if len(shape) < 2:
        return ()
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
