"""How rows are rounded before a product; the meaning of the inputs of `ExpertWeights`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtura.quant.activations import ActivationScheme, StaticInputs, round_activations
from mixtura.quant.matrix import QuantizedMatrix


def round_inputs(
    x: Tensor,
    inputs: StaticInputs | None,
    scales: Tensor | None,
    activations: ActivationScheme | None,
    stacks: Sequence[QuantizedMatrix | None],
) -> Tensor:
    """Rows as they are multiplied: with a stored scale where there is one, else with a found one.

    Args:
        x: (..., K).
        inputs: what they are rounded to with stored scales.
        scales: those of the rows' experts, of a shape that fits `x`; 0 where there is none.
        activations: what they are rounded to with scales found while running.
        stacks: what multiplies them; a found scale is of products with quantized weights alone.

    Returns:
        (..., K) in the dtype of `x`.
    """
    is_quantized = any(stack is not None and stack.is_quantized for stack in stacks)
    found = x
    if activations is not None and is_quantized:
        found = round_activations(x, activations)
    if inputs is None or scales is None:
        return found
    return torch.where(scales > 0, round_activations(x, inputs.scheme, scales), found)
