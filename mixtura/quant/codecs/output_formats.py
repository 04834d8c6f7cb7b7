"""Which family's files a weight format is written in: the configuration, and a matrix's parts.

| weight format  | files                                   | parts                               |
| -------------- | --------------------------------------- | ----------------------------------- |
| int4-*, int8-* | compressed-tensors pack-quantized       | weight_packed i32, weight_shape,    |
|                |                                         | weight_scale bf16                   |
| fp8            | compressed-tensors float-quantized      | weight f8, weight_scale f32 (N, 1)  |
| fp8-block      | fp8, as of DeepSeek-V3                  | weight f8, weight_scale_inv f32     |
| mxfp4          | compressed-tensors mxfp4-pack-quantized | weight_packed u8, weight_scale u8   |
| nvfp4          | compressed-tensors nvfp4-pack-quantized | weight_packed u8, weight_scale f8,  |
|                |                                         | weight_global_scale f32             |

Scales of integers are bf16 throughout: engines keep them in the model's dtype, and rounding once,
before the codes are chosen, costs less than rounding after it.

Source: compressed-tensors 0.20 `quantization/quant_scheme.py` for the presets W4A16, W8A16,
FP8_DYNAMIC, MXFP4A16 and NVFP4A16; DeepSeek-V3's `config.json` for the blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant.codecs.checks import module_of
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat
from mixtura.quant.codecs.registry import codec_for
from mixtura.quant.formats import SHORT_NAMES, WeightFormat
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme

_TOKEN_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token"}


@dataclass(frozen=True)
class OutputFormat:
    """How matrices of one weight format are written.

    Attributes:
        format: the weight format. scheme: what is written, with the scale dtype of the files.
        codec: what reads the files. template: the configuration without the modules left dense.
        ignore_key: where the configuration lists those.
        codes: part and dtype of the codes. scales: of the scales.
        shares_global_scale: whether matrices that engines merge must have one global scale.
    """

    format: WeightFormat
    scheme: QuantScheme
    codec: Codec
    template: Mapping[str, Any] = field(repr=False)
    ignore_key: str
    codes: tuple[str, torch.dtype]
    scales: tuple[str, torch.dtype]

    @classmethod
    def of(cls, format: WeightFormat) -> OutputFormat:
        """How a weight format is written.

        Raises:
            ConfigError: it is a dense one.
        """
        scheme = format.scheme
        if not scheme.is_quantized:
            names = [f.value for f in WeightFormat if f.scheme.is_quantized]
            raise ConfigError(
                f"weight format ({format.value}) must be one of "
                f"{', '.join([*names, *SHORT_NAMES])} to quantize a checkpoint; got a dense one. "
                f"Use one of these."
            )
        codes, scales = ("weight", torch.float8_e4m3fn), ("weight_scale", torch.float32)
        if format is WeightFormat.FP8_BLOCK:
            template, ignore_key = _block_template(scheme), "modules_to_not_convert"
            scales = ("weight_scale_inv", torch.float32)
        else:
            if scheme.code is Code.INT:
                scheme = dataclasses.replace(scheme, scale_dtype=torch.bfloat16)
                codes, scales = ("weight_packed", torch.int32), ("weight_scale", torch.bfloat16)
            elif scheme.code is Code.E2M1:
                dtype = scheme.scale_dtype
                assert dtype is not None
                stored = torch.uint8 if dtype is torch.float8_e8m0fnu else dtype
                codes, scales = ("weight_packed", torch.uint8), ("weight_scale", stored)
            template, ignore_key = _compressed_template(scheme), "ignore"
        return cls(format, scheme, codec_for(template), template, ignore_key, codes, scales)

    def config(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint.

        Args:
            ignored: modules that stay dense.
        """
        return {**self.template, self.ignore_key: list(ignored)}

    @property
    def shares_global_scale(self) -> bool:
        """Whether matrices that engines merge, such as gate and up, need one global scale."""
        return self.scheme.global_scale is not GlobalScale.NONE

    def headers(self, shape: tuple[int, int]) -> dict[str, Header]:
        """The parts of a matrix (N, K) as they are stored."""
        specs = self.scheme.tensors_for(shape)
        row_bytes = specs["values"].shape[-1]
        part, dtype = self.codes
        found = {
            part: Header(dtype, (shape[0], -(-row_bytes // dtype.itemsize))),
            self.scales[0]: Header(self.scales[1], specs["scales"].shape),
        }
        if dtype is torch.int32:
            found["weight_shape"] = Header(torch.int64, (2,))
        if self.shares_global_scale:
            found["weight_global_scale"] = Header(torch.float32, (1,))
        return found

    def tensor_name(self, name: str, part: str) -> str:
        """What a part of the matrix with a dense name is called in the file."""
        return f"{module_of(name)}.{part}"

    def matrix_format(self, name: str, shape: tuple[int, int]) -> MatrixFormat:
        """How a matrix lies in the file.

        Args:
            name: its dense name.
            shape: (N, K).

        Raises:
            ConfigError: the files could not be read back as a matrix of that shape.
        """
        headers = self.headers(shape)
        found = self.codec.format_of(name, headers)
        assert found is not None
        try:
            stated = shape if "weight_shape" in headers else None
            is_whole = found.check_headers(name, headers, stated) == shape
        except CheckpointError:
            is_whole = False
        if not is_whole:
            raise ConfigError(
                f"{name} {shape} must have columns that fill bytes to be stored as "
                f"{self.format.value}; got {shape[1]}. Use another weight format."
            )
        return found

    def encode(
        self, name: str, matrix: QuantizedMatrix
    ) -> tuple[dict[str, Tensor], QuantizedMatrix]:
        """A matrix (N, K) as tensors of the file by name, and what reading them gives.

        The two matrices differ in the last bit of a global scale, of which the file has the
        reciprocal.
        """
        shape = (matrix.shape[0], matrix.shape[1])
        found = self.matrix_format(name, shape)
        parts = found.encode(Decoded(matrix))
        read = found.read(name, parts, shape).matrix
        return {self.tensor_name(name, part): value for part, value in parts.items()}, read


def _block_template(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(scheme.group_shape),
    }


def _compressed_template(scheme: QuantScheme) -> dict[str, Any]:
    columns = scheme.group_shape[1]
    strategy = "channel" if columns is None else "group"
    activations: dict[str, Any] | None = None
    scale_dtype: str | None = None
    if scheme.code is Code.INT:
        name = "pack-quantized"
    elif scheme.code is Code.E4M3:
        name, activations = "float-quantized", {**_TOKEN_FP8, "dynamic": True}
    elif scheme.global_scale is GlobalScale.NONE:
        name, scale_dtype = "mxfp4-pack-quantized", "torch.uint8"
    else:
        name, strategy, scale_dtype = "nvfp4-pack-quantized", "tensor_group", "torch.float8_e4m3fn"
    weights = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.code is Code.INT else "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": columns,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "scale_dtype": scale_dtype,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": name,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }
