"""AutoRound, or INC: tensors of another family under a configuration of its own.

`packing_format` names the family, and `extra_config` overrides settings for single modules; a
module with 16 bits is unquantized.

Source: the configuration that auto-round writes, and vLLM's reader of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from mixtura.errors import CheckpointError
from mixtura.quant.codecs.checks import (
    is_dense,
    module_of,
    read_choice,
    read_group_size,
    read_setting,
)
from mixtura.quant.codecs.contract import Codec, Header, MatrixFormat
from mixtura.quant.codecs.module_names import compiled_pattern
from mixtura.quant.codecs.registry import codec_class

_UNQUANTIZED_BITS = 16
_PATTERN_SIGNS = set(r"*+?^$()[]{}|\\")
"""A name in `extra_config` with one of these is a regular expression."""


def _gptq(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_integers(config)
    return {
        "quant_method": "gptq",
        "bits": read_setting(config, "bits"),
        "group_size": read_setting(config, "group_size"),
        "sym": read_choice(config, "sym", choices=(True, False)),
    }


def _awq(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_integers(config)
    return {
        "quant_method": "awq",
        "bits": read_setting(config, "bits"),
        "group_size": read_setting(config, "group_size"),
        "zero_point": not read_choice(config, "sym", choices=(True, False)),
    }


def _fp8(config: Mapping[str, Any]) -> dict[str, Any]:
    read_choice(config, "bits", choices=(8,), default=8)
    is_dynamic = read_choice(config, "act_dynamic", choices=(True, False), default=True)
    delegated: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic" if is_dynamic else "static",
    }
    blocks = read_setting(config, "group_size")
    if isinstance(blocks, list):
        delegated["weight_block_size"] = blocks
    return delegated


def _compressed_tensors(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = read_choice(
        config, "data_type", choices=("int", "fp", "nv_fp", "nv_fp4", "mx_fp", "mx_fp4", "mx_fp8")
    )
    bits = read_choice(config, "bits", choices=(2, 3, 4, 8))
    weights: dict[str, Any] = {"num_bits": bits, "symmetric": True, "dynamic": False}
    if kind.startswith("nv_fp"):
        name = "nvfp4-pack-quantized"
        weights |= {"type": "float", "strategy": "tensor_group", "group_size": 16}
    elif kind.startswith("mx_fp"):
        name = "mxfp4-pack-quantized" if bits == 4 else "mxfp8-quantized"
        weights |= {"type": "float", "strategy": "group", "group_size": 32}
        weights["scale_dtype"] = "torch.uint8"
    else:
        size = read_group_size(config, "group_size")
        name = "pack-quantized" if kind == "int" else "float-quantized"
        weights |= {"type": "int" if kind == "int" else "float", "group_size": size}
        weights["strategy"] = "channel" if size is None else "group"
        weights["symmetric"] = read_choice(config, "sym", choices=(True, False), default=True)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
    }


def _check_integers(config: Mapping[str, Any]) -> None:
    read_choice(config, "data_type", choices=("int",), default="int")


_PACKINGS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "llm_compressor": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
}
"""Word in `packing_format` -> the configuration that the family's own writer would have written."""


def _delegate(config: Mapping[str, Any]) -> Codec:
    value = read_setting(config, "packing_format", "backend") or "auto_round:auto_gptq"
    for word, translate in _PACKINGS.items():
        if word in str(value):
            delegated = translate(config)
            return codec_class(delegated["quant_method"]).from_config(delegated)
    raise CheckpointError(
        f"packing_format ({value!r}) must name one of {', '.join(_PACKINGS)}; got another. Export "
        f"the model again with one of these."
    )


@dataclass(frozen=True)
class AutoRound(Codec):
    """AutoRound, configured.

    Attributes:
        codec: reads modules that no override is about.
        overrides: names, or patterns to search in names, and the codec of each; None where the
            module is unquantized. An exact name counts before patterns, of which the first does.
        blocks: beginnings of the names of quantized modules; none is all.
    """

    name: ClassVar[str] = "AutoRound"
    methods: ClassVar[tuple[str, ...]] = ("auto-round", "auto_round", "intel/auto-round", "inc")
    suffixes: ClassVar[Mapping[str, str]] = {}

    codec: Codec
    overrides: Mapping[str | re.Pattern[str], Codec | None]
    blocks: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        extra = read_setting(config, "extra_config") or {}
        if not isinstance(extra, Mapping):
            raise CheckpointError(
                f"extra_config ({extra!r}) must map names of modules to settings; got "
                f"{type(extra).__name__}. Fetch the configuration again."
            )
        overrides = {_name_or_pattern(key): _override(key, extra[key], config) for key in extra}
        blocks = read_setting(config, "block_name_to_quantize", "to_quant_block_names") or ""
        names = blocks.split(",") if isinstance(blocks, str) else _flatten(blocks)
        return cls(_delegate(config), overrides, tuple(name.strip() for name in names if name))

    def split(self, tensor: str) -> tuple[str, str] | None:
        return self.codec.split(tensor)

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        if is_dense(headers):
            return None
        return (self._codec_for(name) or self.codec).format_of(name, headers)

    def expects(self, name: str) -> bool:
        codec = self._codec_for(name)
        is_in_block = not self.blocks or module_of(name).startswith(self.blocks)
        is_named = module_of(name) in self.overrides
        return codec is not None and (is_in_block or is_named) and codec.expects(name)

    def _codec_for(self, name: str) -> Codec | None:
        module = module_of(name)
        if module in self.overrides:
            return self.overrides[module]
        fitting = (
            codec
            for key, codec in self.overrides.items()
            if isinstance(key, re.Pattern) and key.search(module)
        )
        return next(fitting, self.codec)


def _override(key: str, settings: Any, config: Mapping[str, Any]) -> Codec | None:
    if not isinstance(settings, Mapping):
        raise CheckpointError(
            f"extra_config ({key!r}) must map to settings; got {settings!r}. Fetch the "
            f"configuration again."
        )
    bits = read_setting(settings, "bits")
    if type(bits) is int and bits >= _UNQUANTIZED_BITS:
        return None
    return _delegate({**config, **settings})


def _name_or_pattern(key: str) -> str | re.Pattern[str]:
    return compiled_pattern("extra_config", key) if _PATTERN_SIGNS & set(key) else key


def _flatten(blocks: Any) -> list[str]:
    if isinstance(blocks, str):
        return [blocks]
    return [name for block in blocks for name in _flatten(block)]
