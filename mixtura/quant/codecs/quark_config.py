"""The configuration of Quark: how layers are quantized, by pattern and by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.checks import read_choice, read_group_size, read_setting
from mixtura.quant.codecs.config_values import read_block, read_names, read_object
from mixtura.quant.codecs.module_names import is_listed
from mixtura.quant.scheme import Code

_CODES = {
    "fp8_e4m3": (Code.E4M3, 8),
    "fp8_e5m2": (Code.E5M2, 8),
    "int8": (Code.INT, 8),
    "int4": (Code.INT, 4),
    "uint4": (Code.INT, 4),
    "fp4": (Code.E2M1, 4),
    "fp6_e2m3": (Code.E2M3, 6),
    "fp6_e3m2": (Code.E3M2, 6),
}
"""dtype of a specification -> the code and its bits."""

_SCHEMES = ("per_tensor", "per_channel", "per_group", "per_block")
_LINEAR = ("Linear", "nn.Linear", "torch.nn.Linear")
_BLOCK = (128, 128)


@dataclass(frozen=True)
class QuarkSpec:
    """One stage of quantizing a tensor.

    Attributes:
        dtype: of the codes, by Quark's name. scheme: what shares a scale, with its size.
        is_symmetric: without zero points. is_dynamic: scales are found while running.
        has_power_scales: they are e8m0 codes.
    """

    dtype: str
    scheme: str
    group_size: int | None
    block: tuple[int, int]
    is_symmetric: bool
    is_dynamic: bool
    has_power_scales: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read it.

        Raises:
            CheckpointError: a value is none that is read.
        """
        dtype = read_choice(config, "dtype", choices=tuple(_CODES))
        scheme = read_choice(config, "qscheme", choices=_SCHEMES)
        group_size = None
        if scheme == "per_group":
            group_size = read_group_size(config, "group_size")
        return cls(
            dtype,
            scheme,
            group_size,
            read_block(config, "block_size") or _BLOCK,
            # Writers say nothing of floats, which are symmetric.
            read_choice(config, "symmetric", choices=(True, False), default=dtype != "uint4"),
            read_choice(config, "is_dynamic", choices=(True, False), default=False),
            config.get("scale_format") == "e8m0",
        )

    @property
    def code(self) -> Code:
        """The code of its dtype."""
        return _CODES[self.dtype][0]

    @property
    def activations(self) -> ActivationScheme | None:
        """As a scheme of activations; None, as they come, for what has none."""
        code, bits = _CODES[self.dtype]
        per = {
            "per_tensor": ActivationGroup.TENSOR,
            "per_channel": ActivationGroup.TOKEN,
            "per_group": ActivationGroup.GROUP,
        }.get(self.scheme)
        if per is None or not self.is_symmetric:
            return None
        is_static = per is ActivationGroup.TENSOR and not self.is_dynamic
        extra = ActivationExtra.POWER_SCALES if self.has_power_scales else None
        return ActivationScheme(code, bits, per, self.group_size, is_static, extra)


@dataclass(frozen=True)
class QuarkLayer:
    """How a layer is quantized. Attributes: the stages of its weight and of its inputs."""

    weight: tuple[QuarkSpec, ...]
    inputs: tuple[QuarkSpec, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read an entry such as `global_quant_config`.

        Raises:
            CheckpointError: a value is none that is read.
        """
        return cls(_stages(config, "weight"), _stages(config, "input_tensors"))

    @property
    def activations(self) -> ActivationScheme | None:
        """How inputs are quantized; two stages are NVFP4's, the second one of the scales."""
        if not self.inputs:
            return None
        first = self.inputs[0]
        if len(self.inputs) == 1 or first.code is not Code.E2M1:
            return first.activations
        is_static = not self.inputs[1].is_dynamic
        return ActivationScheme(
            Code.E2M1, 4, ActivationGroup.GROUP, first.group_size, is_static=is_static
        )


@dataclass(frozen=True)
class QuarkConfig:
    """A `quantization_config`.

    Attributes:
        excluded: patterns of modules that are not quantized.
        patterns: (pattern, layer), the first that fits a module counts; before `default`.
        default: of all other layers; that of linear layers if there is one for their class.
        is_interleaved: whether the eight codes of a word are in AWQ's order.
    """

    excluded: tuple[str, ...]
    patterns: tuple[tuple[str, QuarkLayer], ...]
    default: QuarkLayer
    is_interleaved: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read it.

        Raises:
            CheckpointError: a value is missing or none that is read.
        """
        export = read_object(config, "export")
        pack_method = read_choice(
            export, "pack_method", choices=("reorder", "order"), default="reorder"
        )
        layers, classes = (
            read_object(config, key) for key in ("layer_quant_config", "layer_type_quant_config")
        )
        patterns = tuple((name, _layer(layers, name)) for name in layers)
        linear = next((name for name in _LINEAR if name in classes), None)
        default = _layer(config, "global_quant_config")
        if linear is not None:
            default = _layer(classes, linear)
        return cls(read_names(config, "exclude"), patterns, default, pack_method == "reorder")

    @property
    def layers(self) -> tuple[QuarkLayer, ...]:
        """Every way in which a layer may be quantized."""
        return (*(layer for _, layer in self.patterns), self.default)

    def layer_of(self, module: str) -> QuarkLayer:
        """How a module is meant to be quantized, unless it is excluded."""
        found = (layer for pattern, layer in self.patterns if is_listed(module, [pattern]))
        return next(found, self.default)

    def expects(self, module: str) -> bool:
        """Whether a module is meant to be quantized."""
        return bool(self.layer_of(module).weight) and not is_listed(module, self.excluded)


def _layer(config: Mapping[str, Any], name: str) -> QuarkLayer:
    try:
        return QuarkLayer.from_config(read_object(config, name))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _stages(config: Mapping[str, Any], key: str) -> tuple[QuarkSpec, ...]:
    """A specification, a list of them, or null."""
    value = read_setting(config, key)
    if value is None:
        return ()
    specs = value if isinstance(value, list) else [value]
    return tuple(QuarkSpec.from_config(read_object({key: spec}, key)) for spec in specs)
