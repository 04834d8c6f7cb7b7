"""The shapes of a model's experts, as far as kernels for a GPU depend on them, from its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mixtura.config import GatePrecision, RoutingConfig, RunnerConfig
from mixtura.errors import ConfigError, UnsupportedModel
from mixtura.experts import ExpertsOptions
from mixtura.hf.adopt import layer_index
from mixtura.hf.blocks import BlockOptions, read_top_k
from mixtura.hf.convert import config_owners, plan_layers
from mixtura.hf.gguf_checkpoint import is_gguf
from mixtura.hf.load import configured_dtype, empty_model, load_config
from mixtura.kernels.triton.candidates import LayerShape

DTYPES = (torch.bfloat16, torch.float16)


def layer_shapes(model: str | Path, dtype: torch.dtype | None = None) -> tuple[LayerShape, ...]:
    """The distinct shapes of a model's MoE layers. Nothing but the configuration is read.

    Args:
        model: a directory with config.json, or a hub id.
        dtype: of the weights; the configuration's unless given, and bf16 where that is neither bf16
            nor fp16.

    Raises:
        CheckpointError: the configuration is missing or broken.
        UnsupportedModel: there are no experts that we run, or they are quantized.
    """
    config: Any = load_config(model)
    if is_gguf(model) or getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"the experts of the model ({model}) must be dense to be tuned; got a quantized "
            f"checkpoint. Tune the dense model that it was made from."
        )
    if dtype is None:
        found = configured_dtype(config)
        dtype = found if found in DTYPES else torch.bfloat16
    empty = empty_model(config, dtype)
    options = BlockOptions(experts=ExpertsOptions(), runner=RunnerConfig(), gate=GatePrecision.FP32)
    blocks, experts, reasons = plan_layers(empty, options)
    owners = config_owners(empty)
    shapes = [
        LayerShape(plan.experts.config, dtype, plan.layer.config.routing.top_k)
        for plan in blocks.values()
    ]
    for name, alone in experts.items():
        top_k = _top_k(owners[name], name)
        if top_k is None:
            reasons[name] = "how many experts a token visits is not known"
        else:
            shapes.append(LayerShape(alone.config, dtype, top_k))
    if not shapes:
        why = "; ".join(dict.fromkeys(reasons.values())) or "no MoE layer"
        raise UnsupportedModel(
            f"the model ({model}) must have experts that mixtura runs to be tuned; got {why}. See "
            f"'mixtura explain'."
        )
    return tuple(dict.fromkeys(shapes))


def _top_k(owner: Any, name: str) -> int | None:
    """K of experts behind a router of the family's own; None where it is not known."""
    try:
        return RoutingConfig.from_hf(owner, layer_index=layer_index(name)).top_k
    except (UnsupportedModel, ConfigError):
        return read_top_k(owner)
