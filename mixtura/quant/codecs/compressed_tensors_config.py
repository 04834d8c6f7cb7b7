"""The configuration of compressed-tensors: groups, targets, ignore lists, presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.checks import read_choice, read_group_size, read_setting
from mixtura.quant.codecs.config_values import read_block, read_names, read_object
from mixtura.quant.codecs.module_names import REGEX_PREFIX, is_listed, matches_regex
from mixtura.quant.scheme import Code

_FORMATS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_MX_COLUMNS = 32
_POWERS = ("torch.uint8", "uint8", "torch.float8_e8m0fnu", "float8_e8m0fnu")
"""What `scale_dtype` calls e8m0 codes."""


class Strategy(Enum):
    """What shares a scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TENSOR_GROUP = "tensor_group"  # groups, and a scale of the whole tensor (NVFP4)
    TOKEN = "token"


@dataclass(frozen=True)
class QuantizationArgs:
    """How one kind of tensor is quantized.

    Attributes:
        bits: of a code. is_float: else an integer. is_symmetric: without zero points.
        strategy: what shares a scale, with its size: group_size or block.
        is_static: whether scales are stored; of NVFP4 activations, that of the whole tensor.
        has_power_scales: whether they are e8m0 codes.
    """

    bits: int
    is_float: bool
    is_symmetric: bool
    strategy: Strategy
    group_size: int | None
    block: tuple[int, int] | None
    is_static: bool
    has_power_scales: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read `weights` or `input_activations` of a group.

        Raises:
            CheckpointError: a value is missing or is none that is read.
        """
        bits = read_choice(config, "num_bits", choices=tuple(range(1, 9)), default=8)
        kind = read_choice(config, "type", choices=("int", "float"), default="int")
        is_symmetric = read_choice(config, "symmetric", choices=(True, False), default=True)
        block = read_block(config, "block_structure")
        group_size = None
        if read_setting(config, "group_size") is not None:
            group_size = read_group_size(config, "group_size")
        inferred = Strategy.TENSOR
        if read_setting(config, "group_size") is not None:
            inferred = Strategy.CHANNEL if group_size is None else Strategy.GROUP
        names = tuple(strategy.value for strategy in Strategy)
        named = read_choice(config, "strategy", choices=names, default=inferred.value)
        strategy = Strategy(named)
        needed = {Strategy.GROUP: group_size, Strategy.TENSOR_GROUP: group_size}
        if (needed | {Strategy.BLOCK: block}).get(strategy, 1) is None:
            what = "block_structure" if strategy is Strategy.BLOCK else "group_size"
            raise CheckpointError(
                f"{what} (none) must be given for strategy {named}; got none. Fetch config.json "
                f"again."
            )
        dynamic = read_choice(config, "dynamic", choices=(True, False, "local"), default=False)
        return cls(
            bits,
            kind == "float",
            is_symmetric,
            strategy,
            group_size,
            block,
            is_static=dynamic is not True,
            has_power_scales=read_setting(config, "scale_dtype") in _POWERS,
        )

    @property
    def activations(self) -> ActivationScheme | None:
        """As a scheme of activations; None, as they come, for what has none (asymmetric ones)."""
        codes = {4: Code.E2M1, 6: Code.E2M3, 8: Code.E4M3}
        code = codes.get(self.bits) if self.is_float else Code.INT
        per = {
            Strategy.TENSOR: ActivationGroup.TENSOR,
            Strategy.TOKEN: ActivationGroup.TOKEN,
            Strategy.GROUP: ActivationGroup.GROUP,
            Strategy.TENSOR_GROUP: ActivationGroup.GROUP,
        }.get(self.strategy)
        if code is None or per is None or not self.is_symmetric:
            return None
        columns = self.group_size if per is ActivationGroup.GROUP else None
        is_static = self.is_static and self.strategy in (Strategy.TENSOR, Strategy.TENSOR_GROUP)
        extra = ActivationExtra.POWER_SCALES if self.has_power_scales else None
        return ActivationScheme(code, self.bits, per, columns, is_static, extra)


@dataclass(frozen=True)
class ConfigGroup:
    """Modules that are quantized alike.

    Attributes:
        targets: names of modules or classes, or regular expressions after `re:`.
        weights: None where only activations are quantized. activations: None: as they come.
        is_preset: whether sizes are those of a preset's name, which has changed its meaning.
    """

    targets: tuple[str, ...]
    weights: QuantizationArgs | None
    activations: ActivationScheme | None
    is_preset: bool = False

    @classmethod
    def from_config(cls, name: str, group: object) -> Self:
        """Read an entry of `config_groups`: an object, or the targets of a preset `name`.

        Raises:
            CheckpointError: a value is none that is read; the message names the group.
        """
        try:
            if isinstance(group, list):
                weights, activations = _preset(name)
                targets = read_names({"targets": group}, "targets")
                return cls(targets, weights, activations, is_preset=True)
            found = read_object({name: group}, name)
            read_choice(found, "format", choices=_FORMATS, default="dense")
            weights, inputs = (
                QuantizationArgs.from_config(read_object(found, key)) if found.get(key) else None
                for key in ("weights", "input_activations")
            )
        except CheckpointError as error:
            raise CheckpointError(f"config_groups, {name}: {error}") from None
        targets = read_names(found, "targets")
        return cls(targets, weights, inputs.activations if inputs else None)


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """A `quantization_config`. Attributes: groups in the file's order; names that are ignored."""

    groups: tuple[ConfigGroup, ...]
    ignored: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read it.

        Raises:
            CheckpointError: a value is none that is read.
        """
        read_choice(config, "format", choices=_FORMATS, default="dense")
        sparsity = read_object(config, "sparsity_config")
        read_choice(sparsity, "format", choices=("dense",), default="dense")
        groups = read_object(config, "config_groups")
        found = tuple(ConfigGroup.from_config(name, group) for name, group in groups.items())
        return cls(found, read_names(config, "ignore"))

    def group_of(self, module: str) -> ConfigGroup | None:
        """The group that targets a module: by its exact name, else a pattern, else a class.

        Classes of modules are not known here: any class counts, `Linear` before others.
        """
        for matches in (_is_exact, _is_pattern, _is_linear, _is_class):
            for group in self.groups:
                if any(matches(target, module) for target in group.targets):
                    return group
        return None

    def expects(self, module: str) -> bool:
        """Whether weights of a module are to be quantized."""
        group = self.group_of(module)
        is_target = group is not None and group.weights is not None
        return is_target and not is_listed(module, self.ignored)


def _is_exact(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith(REGEX_PREFIX) and matches_regex(module, target)


def _is_linear(target: str, module: str) -> bool:
    return target == "Linear"


def _is_class(target: str, module: str) -> bool:
    return target.isidentifier() and target[0].isupper()


def _int(bits: int, group_size: int | None = 128, is_symmetric: bool = True) -> QuantizationArgs:
    strategy = Strategy.CHANNEL if group_size is None else Strategy.GROUP
    return QuantizationArgs(bits, False, is_symmetric, strategy, group_size, None, True)


def _float(
    bits: int,
    strategy: Strategy,
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
) -> QuantizationArgs:
    return QuantizationArgs(bits, True, True, strategy, group_size, block, True)


def _microscaled(bits: int) -> QuantizationArgs:
    groups = _float(bits, Strategy.GROUP, _MX_COLUMNS)
    return dataclasses.replace(groups, has_power_scales=True)


def _dynamic(args: QuantizationArgs) -> ActivationScheme | None:
    return dataclasses.replace(args, is_static=False).activations


_NVFP4 = _float(4, Strategy.TENSOR_GROUP, 16)
_MXFP4 = _microscaled(4)
_MXFP6 = _microscaled(6)
_MXFP8 = _microscaled(8)
_FP8 = _float(8, Strategy.TENSOR)
_FP8_TOKEN = _dynamic(_float(8, Strategy.TOKEN))
_FP8_GROUPS = _dynamic(_float(8, Strategy.GROUP, 128))
_PRESETS: dict[str, tuple[QuantizationArgs | None, ActivationScheme | None]] = {
    "UNQUANTIZED": (None, None),
    "W4A16_ASYM": (_int(4, is_symmetric=False), None),
    "W4AFP8": (_int(4), _FP8_TOKEN),
    "FP8": (_FP8, _FP8.activations),
    "FP8_DYNAMIC": (_float(8, Strategy.CHANNEL), _FP8_TOKEN),
    "FP8_BLOCK": (_float(8, Strategy.BLOCK, block=(128, 128)), _FP8_GROUPS),
    "NVFP4": (_NVFP4, _NVFP4.activations),
    "NVFP4A16": (_NVFP4, None),
    "MXFP4": (_MXFP4, _dynamic(_MXFP4)),
    "MXFP4A16": (_MXFP4, None),
    "MXFP4XFP8": (_MXFP4, _FP8_GROUPS),
    "MXFP6A16": (_MXFP6, None),
    "MXFP6A8": (_MXFP6, _dynamic(_MXFP8)),
    "MXFP8": (_MXFP8, _dynamic(_MXFP8)),
    "MXFP8A16": (_MXFP8, None),
}
"""Presets by name -> how weights and activations are quantized. Those of integers are computed."""


def _preset(name: str) -> tuple[QuantizationArgs | None, ActivationScheme | None]:
    known = name.upper()
    if known in _PRESETS:
        return _PRESETS[known]
    match known.removeprefix("W").split("A"):
        case ["8", "8"] | ["INT8"]:
            return _int_preset(8, None, 8)
        case [bits, "4" | "8" | "16" as activation_bits] if bits in tuple("2345678"):
            return _int_preset(int(bits), 128, int(activation_bits))
    raise CheckpointError(
        f"config group ({name}) must be an object, or the name of a preset; got no preset of that "
        f"name: {', '.join(_PRESETS)}, W4A16, W4A8, W8A8, ... Fetch config.json again."
    )


def _int_preset(
    bits: int, group_size: int | None, activation_bits: int
) -> tuple[QuantizationArgs, ActivationScheme | None]:
    activations = None
    if activation_bits < 16:
        token = QuantizationArgs(activation_bits, False, True, Strategy.TOKEN, None, None, False)
        activations = token.activations
    return _int(bits, group_size), activations
