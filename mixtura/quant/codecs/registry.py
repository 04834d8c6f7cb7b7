"""Which checkpoint families are read, and which one a configuration means.

A new family is a new file and a line in the table, or a plug-in under a value of `quant_method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from inspect import isabstract
from typing import Any, cast

from mixtura.entry_points import Group, PlugIns, wrong_offer
from mixtura.errors import CheckpointError
from mixtura.quant.codecs.contract import Codec

_FAMILIES: dict[str, tuple[str, ...]] = {
    "gptq:Gptq": ("gptq", "auto_gptq", "gptq_marlin"),
    "awq:Awq": ("awq", "auto_awq", "awq_marlin"),
    "autoround:AutoRound": ("auto-round", "auto_round", "intel/auto-round", "inc"),
    "bitsandbytes:BitsAndBytes": ("bitsandbytes",),
    "humming:Humming": ("humming",),
    "compressed_tensors:CompressedTensors": ("compressed-tensors", "compressed_tensors"),
    "fp8:Fp8": (
        "fp8",
        "fbgemm_fp8",
        "deepseek_v4_fp8",
        "w4afp8",
        "blockwise_int8",
        "w8a8_int8",
    ),
    "modelopt:ModelOpt": ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed", "mxfp8"),
    "quark:Quark": ("quark",),
    "mxfp4:GptOss": ("mxfp4", "gpt_oss_mxfp4"),
    "gguf:Gguf": ("gguf",),
}
"""Module in this folder and its class -> values of `quant_method`; imported when first asked for.

The first value is the family's own name, the others are what some writers and engines call it.
"""

_SIGNATURES: tuple[tuple[str, frozenset[str]], ...] = (
    ("modelopt", frozenset({"quant_algo"})),
    ("bitsandbytes", frozenset({"load_in_4bit"})),
    ("bitsandbytes", frozenset({"load_in_8bit"})),
    ("humming", frozenset({"b_dtype"})),
    ("awq", frozenset({"w_bit", "q_group_size"})),
    ("awq", frozenset({"bits", "zero_point"})),
    ("gptq", frozenset({"bits", "desc_act"})),
    ("gptq", frozenset({"bits", "sym"})),
)
"""Settings that tell the family of a configuration without a method; the first that fits counts."""


def _built_in() -> tuple[str, ...]:
    return tuple(method for methods in _FAMILIES.values() for method in methods)


def _accept(name: str, offered: object) -> type[Codec]:
    """A family from what a package offers."""
    if not (isinstance(offered, type) and issubclass(offered, Codec)) or isabstract(offered):
        raise wrong_offer(name, "be a Codec with all its methods", repr(offered))
    if name != name.lower() or name not in offered.methods:
        rule = "read the quant_method that it is named after, in lower case"
        raise wrong_offer(name, rule, ", ".join(offered.methods))
    return offered


PLUG_INS: PlugIns[type[Codec]] = PlugIns(Group.CODECS, _accept, _built_in)
"""Families of other packages, by `quant_method`."""


def method_names() -> tuple[str, ...]:
    """Every value of `quant_method` that is read."""
    return (*_built_in(), *PLUG_INS.names())


def codec_class(method: str) -> type[Codec]:
    """The family that reads a `quant_method`.

    Raises:
        CheckpointError: there is none; the message lists the methods.
        PlugInError: it is that of a plug-in that cannot be used.
    """
    for family, methods in _FAMILIES.items():
        if method in methods:
            module, _, name = family.partition(":")
            found = getattr(import_module(f"mixtura.quant.codecs.{module}"), name)
            return cast(type[Codec], found)
    if method in PLUG_INS.names():
        return PLUG_INS.load(method)
    raise CheckpointError(
        f"quant_method ({method!r}) must be one of {', '.join(method_names())}; got another. Use a "
        f"checkpoint of one of these, or an unquantized one and quantize it while it loads."
    )


def codec_for(quantization_config: Mapping[str, Any]) -> Codec:
    """The codec that reads the checkpoint that a configuration describes.

    Args:
        quantization_config: that entry of a `config.json`, or all of one of the files that hold a
            configuration: `config.json`, `hf_quant_config.json`, `quantize_config.json`. For GGUF
            it is `{"container": "gguf", "ggml_type": ...}`.

    Raises:
        CheckpointError: no family reads it, or the family does not read these settings.

    >>> codec_for({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}).name
    'GPTQ'
    """
    config = _normalized(quantization_config)
    return codec_class(config["quant_method"]).from_config(config)


def _normalized(document: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization settings of a document, with a `quant_method` in lower case."""
    config = dict(document)
    outer = config
    if isinstance(config.get("text_config"), Mapping) and "quantization_config" not in config:
        outer = dict(config["text_config"])
    if "quantization_config" in outer:
        config = dict(_mapping(outer["quantization_config"], "quantization_config"))
        # DeepSeek-V4 says beside the configuration what its experts are stored in.
        if "expert_dtype" in outer:
            config.setdefault("expert_dtype", outer["expert_dtype"])
    elif "quantization" in config:  # hf_quant_config.json
        inner = _mapping(config.pop("quantization"), "quantization")
        config = {**config, **inner}
    method = config.get("quant_method") or config.get("method") or _guess_method(config)
    if not isinstance(method, str):
        raise CheckpointError(
            f"quant_method ({method!r}) must be one of {', '.join(method_names())}; got none, and "
            f"no settings that tell. Fetch config.json again."
        )
    return {**config, "quant_method": method.lower()}


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise CheckpointError(
        f"{key} ({value!r}) must be an object with settings; got {type(value).__name__}. Fetch "
        f"config.json again, or load the model as an unquantized one."
    )


def _guess_method(config: Mapping[str, Any]) -> str | None:
    if config.get("container") == "gguf":
        return "gguf"
    return next((method for method, keys in _SIGNATURES if keys <= config.keys()), None)
