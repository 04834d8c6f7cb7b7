"""Transformers' experts of e4m3 codes in blocks of 128x128, whose products are kernels of the hub.

They round rows to e4m3 codes with a scale for each 128 columns. Source: `FP8Experts` and
`ALL_FP8_EXPERTS_FUNCTIONS` of transformers 5.23, `integrations/finegrained_fp8.py`. Not yet run on
a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mixtura.bench.cases import Case
from mixtura.bench.contenders import Layer
from mixtura.config import ActivationDtype, ExpertsConfig
from mixtura.quant.formats import WeightFormat

MODULE = "transformers.integrations.finegrained_fp8"

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "deepgemm")
"""Those that have experts of such codes."""

BLOCK = (128, 128)


def refusal(name: str, case: Case) -> str | None:
    """Why an implementation does not run quantized experts on a GPU, or None."""
    if name not in IMPLEMENTATIONS:
        return "runs dense experts alone"
    if case.weights is not WeightFormat.FP8_BLOCK:
        return f"reads no {case.weights.value} experts here; --weights bf16 measures its dense ones"
    if not _is_plain(case.shape.experts):
        return "Transformers' fp8 experts are plain ones, without biases"
    if case.rounds_to is not ActivationDtype.FP8:
        return "rounds rows to fp8, which was not asked for or is not to be had on this device"
    try:
        importlib.import_module(MODULE)
    except ImportError as error:
        return f"Transformers cannot be imported: {error}"
    has_kernels = importlib.util.find_spec("kernels")
    return None if has_kernels else "the package kernels, which has its fp8 products, is missing"


def bind(name: str, layer: Layer) -> nn.Module:
    """The module on the codes and scales of a layer, which it shares."""
    config, stacks = layer.case.shape.experts, layer.stacks
    hf_config = SimpleNamespace(
        _experts_implementation=name,
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.intermediate_size,
        hidden_act="silu",
    )
    with torch.device("meta"):
        experts: Any = _module_class()(hf_config, block_size=BLOCK)
    for role in ("gate_up_proj", "down_proj"):
        matrix = getattr(stacks, role)
        codes = matrix.values.view(torch.float8_e4m3fn)
        setattr(experts, role, nn.Parameter(codes, requires_grad=False))
        scales = nn.Parameter(matrix.scales, requires_grad=False)
        setattr(experts, f"{role}_scale_inv", scales)
    module: nn.Module = experts
    return module


@functools.cache
def _module_class() -> Any:
    """A class of our own: what makes the implementation a choice changes the class it is given."""
    fp8 = importlib.import_module(MODULE)
    own = type("Fp8Experts", (fp8.FP8Experts,), {})
    return fp8.use_experts_implementation(own, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS)


def _is_plain(config: ExpertsConfig) -> bool:
    sizes = (config.num_experts, config.hidden_size, config.intermediate_size)
    return config == ExpertsConfig(
        num_experts=sizes[0], hidden_size=sizes[1], intermediate_size=sizes[2]
    )
