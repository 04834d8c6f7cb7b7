"""What the experts compute between their products; the same with and without a graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mixtura.kernels.reference.activation import activate, split_gate_up
from mixtura.kernels.reference.inputs import round_inputs
from mixtura.kernels.reference.norm import post_norm
from mixtura.kernels.torch.lora import AdaptedRows
from mixtura.quant.activations import StaticInputs
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.types import ExpertWeights

Linear = Callable[[Tensor, QuantizedMatrix, Tensor | None], Tensor]
"""Each expert's linear map on its rows: (N, in), stack (L, out, in), bias (L, out) -> (N, out)."""


PerRow = Callable[[Tensor], Tensor]
"""A value of each expert -> that of each row's expert: (L,) -> (N,)."""


def run_experts(
    weights: ExpertWeights,
    rows: Tensor,
    linear: Linear,
    per_row: PerRow,
    lora: AdaptedRows | None = None,
) -> Tensor:
    """The experts on rows sorted by expert, before routing weights. (N, H) -> (N, H).

    Args:
        lora: whose rows' adapters add to the products, where some have one.
    """
    config = weights.config

    def rounded(x: Tensor, inputs: StaticInputs | None, *stacks: QuantizedMatrix | None) -> Tensor:
        scales = None if inputs is None else per_row(inputs.scales).unsqueeze(1)
        return round_inputs(x, inputs, scales, weights.activations, stacks)

    x = rounded(rows, weights.gate_up_inputs, weights.gate_up_proj, weights.up_proj)
    first = linear(x, weights.gate_up_proj, weights.gate_up_bias)
    gate, up = split_gate_up(first, config.gate_up)
    if weights.up_proj is not None:
        up = linear(x, weights.up_proj, None)
    if lora is not None:
        gate, up = lora.add_gate_up(gate, up, rows)
    hidden = activate(gate, up, config.activation)
    x = rounded(hidden, weights.down_inputs, weights.down_proj)
    out = linear(x, weights.down_proj, weights.down_bias)
    if lora is not None:
        out = lora.add_down(out, hidden)
    if config.post_norm is not None:
        assert weights.post_norm is not None
        out = post_norm(out, weights.post_norm, config.post_norm, config.post_norm_epsilon)
    return out
