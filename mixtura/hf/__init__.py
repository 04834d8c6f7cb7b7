"""The Transformers plug: conversion, loading, adapters, and the experts function "mixtura"."""

from __future__ import annotations

from typing import Any, NoReturn

from mixtura.plugin import NAME, is_supported, missing_transformers, transformers_version

if is_supported(transformers_version()):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from mixtura.hf.capture import capture_routing
    from mixtura.hf.convert import convert, is_converted, moe_layers
    from mixtura.hf.experts import experts_forward
    from mixtura.hf.load import from_pretrained, load_config
    from mixtura.hf.lora.adapters import (
        adapter_names,
        load_adapter,
        select_adapters,
        unload_adapter,
    )
    from mixtura.hf.packed_config import packed_config
    from mixtura.hf.replay import replay_routing

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
else:

    def _unavailable(*_: Any, **__: Any) -> NoReturn:
        raise missing_transformers(transformers_version())

    convert = from_pretrained = is_converted = load_config = moe_layers = _unavailable
    capture_routing = packed_config = replay_routing = _unavailable
    adapter_names = load_adapter = select_adapters = unload_adapter = _unavailable

__all__ = [
    "adapter_names",
    "capture_routing",
    "convert",
    "from_pretrained",
    "is_converted",
    "load_adapter",
    "load_config",
    "moe_layers",
    "packed_config",
    "replay_routing",
    "select_adapters",
    "unload_adapter",
]
