"""NVIDIA ModelOpt: fp8, NVFP4 and microscaled floats.

    W = level[code] * weight_scale                     fp8, MXFP4, MXFP8
    W = level[code] * weight_scale * weight_scale_2    NVFP4: both multiply

| quant_algo                | weight      | weight_scale                       | besides        |
| ------------------------- | ----------- | ---------------------------------- | -------------- |
| FP8                       | f8          | f32 ()                             | input_scale    |
| FP8_PER_CHANNEL_PER_TOKEN | f8          | f32 (N,)                           |                |
| FP8_PB_WO                 | f8          | f32 (GN, 1, GK, 1), blocks of 128  |                |
| NVFP4, W4A16_NVFP4        | u8 (N, K/2) | f8 (N, K/16)                       | weight_scale_2 |
| MXFP8                     | f8          | u8 (N, K/32), e8m0                 |                |
| MXFP4, W4A8_MXFP4_FP8     | u8 (N, K/2) | u8 (N, K/32), e8m0                 |                |

MIXED_PRECISION names one of these for every layer in `quantized_layers`. The parts say which it
is; the algorithm, how activations are quantized. What needs a factor for its inputs
(`pre_quant_scale`), as AWQ does, is refused.

Source: nvidia-modelopt 0.47, `torch/export/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationScheme
from mixtura.quant.codecs.checks import (
    SCALE_FLOATS,
    is_dense,
    module_of,
    read_choice,
    read_group_size,
    read_setting,
)
from mixtura.quant.codecs.config_values import read_names, read_object
from mixtura.quant.codecs.contract import Codec, Header, MatrixFormat
from mixtura.quant.codecs.float_matrices import (
    E8M0_DTYPES,
    FLOAT8_CODES,
    FP8_STATIC,
    FP8_TOKEN,
    MX_COLUMNS,
    MXFP8_ACTIVATIONS,
    NVFP4_ACTIVATIONS,
    NVFP4_COLUMNS,
    float8_matrix,
    granularity,
    input_scale_of,
    microscaled_matrix,
    nvfp4_matrix,
    unknown_parts,
)
from mixtura.quant.codecs.module_names import is_listed, is_stack_of_experts, naming
from mixtura.quant.codecs.stored_matrix import StoredMatrix
from mixtura.quant.scheme import Code

_BLOCK = (128, 128)
_MIXED = "mixed_precision"
_ACTIVATIONS: dict[str, ActivationScheme | None] = {
    "fp8": FP8_STATIC,
    "fp8_per_channel_per_token": FP8_TOKEN,
    "fp8_pb_wo": None,
    "nvfp4": NVFP4_ACTIVATIONS,
    "w4a16_nvfp4": None,
    "mxfp8": MXFP8_ACTIVATIONS,
    "mxfp4": None,
    "w4a8_mxfp4_fp8": FP8_STATIC,
}
"""Algorithms that are read, in lower case -> how they quantize activations."""

_METHOD_ALGORITHMS = {"mxfp8": "mxfp8", "modelopt_mxfp8": "mxfp8", "modelopt_fp4": "nvfp4"}
"""What some values of `quant_method` say where no `quant_algo` does."""


@dataclass(frozen=True)
class _Algorithm:
    """How a layer is quantized. Attributes: `has_blocks`: whether a grid of scales is of blocks."""

    activations: ActivationScheme | None
    group_size: int | None = None
    has_blocks: bool = False


@dataclass(frozen=True)
class ModelOpt(Codec):
    """ModelOpt, configured.

    Attributes:
        default: the algorithm of every layer, None with MIXED_PRECISION.
        layers: with MIXED_PRECISION, the algorithm of each layer by name.
        ignored: modules that are not quantized.
    """

    name: ClassVar[str] = "ModelOpt"
    methods: ClassVar[tuple[str, ...]] = (
        "modelopt",
        "modelopt_fp4",
        "modelopt_mxfp8",
        "modelopt_mixed",
        "mxfp8",
    )
    suffixes: ClassVar[Mapping[str, str]] = {
        ".weight": "weight",
        ".weight_scale": "weight_scale",
        ".weight_scale_2": "weight_scale_2",
        ".input_scale": "input_scale",
        ".pre_quant_scale": "pre_quant_scale",
        "_weight_scale": "weight_scale",
        "_weight_scale_2": "weight_scale_2",
        "_input_scale": "input_scale",
    }

    default: _Algorithm | None
    layers: Mapping[str, _Algorithm]
    ignored: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        if isinstance(config.get("quantization"), Mapping):  # hf_quant_config.json, all of it
            config = {**config, **config["quantization"]}
        ignored = read_names(config, "ignore", "exclude_modules", "ignored_layers")
        layers = read_object(config, "quantized_layers")
        method = read_choice(config, "quant_method", choices=cls.methods, default="modelopt")
        if config.get("quant_algo") is None:
            algorithm = _MIXED if layers else _METHOD_ALGORITHMS.get(method)
            algorithm = algorithm or _algorithm_of_groups(config)
            if algorithm is None and config.get("kv_cache_quant_algo") is not None:
                return cls(None, {}, ignored)  # only the KV cache is quantized
            config = {**config, "quant_algo": algorithm}
        if str(config["quant_algo"]).lower() != _MIXED:
            return cls(_algorithm(config), {}, ignored)
        found = {layer: _algorithm(read_object(layers, layer)) for layer in layers}
        return cls(None, found, ignored)

    def split(self, tensor: str) -> tuple[str, str] | None:
        return (tensor, "weight") if is_stack_of_experts(tensor) else super().split(tensor)

    def expects(self, name: str) -> bool:
        is_quantized = self._algorithm_of(module_of(name)) is not None
        return is_quantized and not is_listed(module_of(name), self.ignored)

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        with naming(name):
            return None if is_dense(headers) else self._format_of(module_of(name), headers)

    def _format_of(self, module: str, headers: Mapping[str, Header]) -> StoredMatrix:
        if "pre_quant_scale" in headers:
            raise CheckpointError(
                f"pre_quant_scale ({headers['pre_quant_scale'].shape}) must be left out, as a "
                f"factor for inputs is not read; got one. Use a checkpoint of the model that is "
                f"quantized without AWQ."
            )
        weight, scale = headers.get("weight"), headers.get("weight_scale")
        if weight is None or scale is None:
            raise unknown_parts(self.name, headers)
        algorithm = self._algorithm_of(module) or _Algorithm(None)
        activations = algorithm.activations
        input_scale = input_scale_of(headers, activations)
        is_e8m0 = scale.dtype in E8M0_DTYPES
        if weight.dtype is torch.uint8 and scale.dtype is torch.float8_e4m3fn:
            return nvfp4_matrix(
                headers,
                activations,
                codes_part="weight",
                global_part="weight_scale_2",
                is_reciprocal=False,
                input_scale=input_scale,
                group_columns=algorithm.group_size or NVFP4_COLUMNS,
            )
        if is_e8m0 and (weight.dtype is torch.uint8 or weight.dtype in FLOAT8_CODES):
            return microscaled_matrix(
                headers,
                FLOAT8_CODES.get(weight.dtype, Code.E2M1),
                activations,
                group_columns=algorithm.group_size or MX_COLUMNS,
                input_scale=input_scale,
            )
        if weight.dtype in FLOAT8_CODES and scale.dtype in SCALE_FLOATS:
            has_blocks = algorithm.has_blocks or len(scale.shape) == len(weight.shape) + 2
            group = granularity(headers, "weight_scale", _BLOCK if has_blocks else None)
            return float8_matrix(headers, "weight_scale", group, activations, input_scale)
        raise unknown_parts(self.name, headers)

    def _algorithm_of(self, module: str) -> _Algorithm | None:
        while self.default is None and module and module not in self.layers:
            module = module.rpartition(".")[0]  # a list may name all experts by what holds them
        return self.default or self.layers.get(module)


def _algorithm(config: Mapping[str, Any]) -> _Algorithm:
    """Read a `quant_algo` and what the configuration says beside it."""
    found = read_choice(config, "quant_algo", choices=tuple(_ACTIVATIONS))
    activations = _ACTIVATIONS[found]
    groups = read_object(config, "config_groups")
    inputs = [read_object(groups, group).get("input_activations") for group in groups]
    if groups and not any(inputs):
        activations = None
    elif activations is not None and any(inputs):
        dynamic = next(read_setting(args, "dynamic") for args in inputs if args)
        is_static = activations.is_static and dynamic is not True
        activations = dataclasses.replace(activations, is_static=is_static)
    group_size = None
    if read_setting(config, "group_size") is not None:
        group_size = read_group_size(config, "group_size")
    for group in groups:
        weights = read_object(read_object(groups, group), "weights")
        if group_size is None and read_setting(weights, "group_size") is not None:
            group_size = read_group_size(weights, "group_size")
    return _Algorithm(activations, group_size, has_blocks=found == "fp8_pb_wo")


def _algorithm_of_groups(config: Mapping[str, Any]) -> str | None:
    """The algorithm that `config_groups` describe where none is named."""
    groups = read_object(config, "config_groups")
    for group in groups:
        weights = read_object(read_object(groups, group), "weights")
        match weights.get("type"), weights.get("num_bits"), weights.get("group_size"):
            case "float", 4, int(size):
                return "mxfp4" if size == MX_COLUMNS else "nvfp4"
            case "float", 8, int():
                return "mxfp8"
            case "float", 8, None:
                return "fp8"
    return None
