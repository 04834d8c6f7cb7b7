"""The shapes of a model's experts, as far as kernels for a GPU depend on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixtura.config import GatePrecision, RoutingConfig, RunnerConfig
from mixtura.errors import ConfigError, UnsupportedModel
from mixtura.experts import ExpertsOptions
from mixtura.hf.adopt import layer_index
from mixtura.hf.blocks import BlockOptions, read_top_k
from mixtura.hf.convert import config_owners, plan_layers
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.explain import in_format, quantized_here, with_matrices
from mixtura.hf.load import configured_dtype, empty_model, load_config
from mixtura.hf.load_checks import check_no_formats
from mixtura.hf.outline import Outline
from mixtura.hf.packed_load import PackedLoad
from mixtura.kernels.triton import TritonKernel
from mixtura.kernels.triton.candidates import LayerShape
from mixtura.kernels.triton.packed.experts import quantization_of
from mixtura.kernels.triton.packed.layout import unreadable_experts
from mixtura.kernels.triton.packed.quantization import Quantization
from mixtura.quant.formats import WeightFormat
from mixtura.types import ExpertWeights

DTYPES = (torch.bfloat16, torch.float16)


def layer_shapes(
    model: str | Path,
    dtype: torch.dtype | None = None,
    weights: WeightFormat | str | None = None,
) -> tuple[LayerShape, ...]:
    """The distinct shapes of a model's MoE layers, from its configuration.

    Of a quantized checkpoint that is here, headers say what the experts are stored in; no weight is
    read.

    Args:
        model: a directory with config.json, a GGUF file, or a hub id.
        dtype: of rows, and of dense weights; the configuration's unless given, and bf16 where that
            is neither bf16 nor fp16.
        weights: the quantized format that dense experts are to be kept in.

    Raises:
        CheckpointError: the configuration or a file is missing or broken.
        ConfigError: the weight format is none, or dense.
        InputError: a format for a checkpoint that is quantized already.
        UnsupportedModel: there are no experts that the kernels run, or only the configuration of a
            quantized checkpoint is here.
    """
    format = _quantized_format(weights)
    config, checkpoint = quantized_here(model)
    if checkpoint is not None:
        check_no_formats(checkpoint, format)
    else:
        config = load_config(model)
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedModel(
                f"the weights of the model ({model}) must be here to be tuned for, as their "
                f"headers say what they are; got a quantized checkpoint's configuration alone. "
                f"Download it, and give its directory."
            )
    if dtype is None:
        found = configured_dtype(config)
        dtype = found if found in DTYPES else torch.bfloat16
    empty = empty_model(config, dtype)
    load = None if checkpoint is None else PackedLoad(empty, Outline(checkpoint))
    options = BlockOptions(experts=ExpertsOptions(), runner=RunnerConfig(), gate=GatePrecision.FP32)
    blocks, alone, reasons = plan_layers(empty, options)
    owners = config_owners(empty)
    plans: dict[str, tuple[ExpertsPlan, int | None]] = {
        (name if plan.spec.experts is None else f"{name}.{plan.spec.experts}"): (
            plan.experts,
            plan.layer.config.routing.top_k,
        )
        for name, plan in blocks.items()
    }
    plans |= {name: (plan, _top_k(owners[name], name)) for name, plan in alone.items()}
    shapes = []
    for name, (plan, top_k) in plans.items():
        if top_k is None:
            reasons[name] = "how many experts a token visits is not known"
            continue
        given = _stored(name, plan, load, dtype) or _wanted(plan, format)
        reason = None if given is None else _unreadable(given)
        if reason is not None:
            reasons[name] = reason
        elif given is None:
            shapes.append(LayerShape(plan.config, dtype, top_k))
        else:
            shapes.append(LayerShape(given.config, dtype, top_k, _quantization(given)))
    if not shapes:
        why = "; ".join(dict.fromkeys(reasons.values())) or "no MoE layer"
        raise UnsupportedModel(
            f"the model ({model}) must have experts that mixtura runs to be tuned; got {why}. See "
            f"'mixtura explain'."
        )
    return tuple(dict.fromkeys(shapes))


def _quantized_format(weights: WeightFormat | str | None) -> WeightFormat | None:
    format = WeightFormat.parse(weights) if isinstance(weights, str) else weights
    if format is not None and not format.scheme.is_quantized:
        raise ConfigError(
            f"weights ({format.value}) must be a quantized format to be tuned for; got a dense "
            f"one. Give dtype instead."
        )
    return format


def _stored(
    name: str, plan: ExpertsPlan, load: PackedLoad | None, dtype: torch.dtype
) -> ExpertWeights | None:
    """The experts as a quantized checkpoint has them, without memory; None where they are dense."""
    packed = None if load is None else load.experts.get(name)
    if load is None or packed is None:
        return None
    config, matrices = load.reader.matrices(packed, dtype)
    return replace(
        with_matrices(plan, config, matrices, load.reader.inputs(packed)),
        activations=load.reader.activations(packed),
    )


def _wanted(plan: ExpertsPlan, format: WeightFormat | None) -> ExpertWeights | None:
    return None if format is None else in_format(plan.weights(), format)


def _unreadable(weights: ExpertWeights) -> str | None:
    """Why no kernel reads these quantized experts, or None."""
    return unreadable_experts(weights.schemes, weights.has_unlike_gate_up)


def _quantization(weights: ExpertWeights) -> Quantization:
    """How the kernels multiply them, with the activations that the checkpoint means."""
    rounding = TritonKernel().activations(None, weights.activations, weights.schemes)
    return quantization_of(weights, rounding)


def _top_k(owner: Any, name: str) -> int | None:
    """K of experts behind a router of the family's own; None where it is not known."""
    try:
        return RoutingConfig.from_hf(owner, layer_index=layer_index(name)).top_k
    except (UnsupportedModel, ConfigError):
        return read_top_k(owner)
