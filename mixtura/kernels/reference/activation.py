"""The expert activation, written once in plain torch; every kernel is measured against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import Activation, ActivationFunction, GateUp, LimitOn


def split_gate_up(gate_up: Tensor, layout: GateUp) -> tuple[Tensor, Tensor | None]:
    """Gate and up halves (views) of the first projection's result. (.., 2I) -> (.., I), (.., I)."""
    if layout is GateUp.STACKED:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate, up
    if layout is GateUp.INTERLEAVED:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    return gate_up, None


def apply_function(gate: Tensor, activation: Activation) -> Tensor:
    """The scalar function f, in the dtype of `gate`. (.., I) -> (.., I)."""
    match activation.function:
        case ActivationFunction.SILU:
            if activation.gate_softcap is not None:
                cap = activation.gate_softcap
                return cap * torch.tanh(gate / cap) * torch.sigmoid(activation.alpha * gate)
            if activation.alpha != 1.0:
                return gate * torch.sigmoid(activation.alpha * gate)
            return F.silu(gate)
        case ActivationFunction.GELU:
            return F.gelu(gate)
        case ActivationFunction.GELU_TANH:
            return F.gelu(gate, approximate="tanh")
        case ActivationFunction.RELU:
            return F.relu(gate)
        case ActivationFunction.RELU_SQUARED:
            return F.relu(gate).square()
        case ActivationFunction.SIGMOID:
            return gate.sigmoid()
        case ActivationFunction.TANH:
            return gate.tanh()
        case ActivationFunction.IDENTITY:
            return gate


def activate(gate: Tensor, up: Tensor | None, activation: Activation) -> Tensor:
    """`f(gate) * (up + offset)` with the limits and soft-caps; `f(gate)` without `up`.

    Args:
        gate: (.., I), float. up: (.., I) of the same dtype, or None for ungated experts.

    Returns:
        (.., I) in the dtype of `gate`.
    """
    limit = activation.limit
    if limit is not None and activation.limit_on is LimitOn.GATE:
        gate = gate.clamp(max=limit)
    hidden = apply_function(gate, activation)
    if limit is not None and activation.limit_on is LimitOn.ACTIVATED:
        hidden = hidden.clamp(max=limit)
    if up is None:
        return hidden
    if limit is not None:
        up = up.clamp(-limit, limit)
    if activation.up_softcap is not None:
        up = activation.up_softcap * torch.tanh(up / activation.up_softcap)
    if activation.up_offset != 0.0:
        up = up + activation.up_offset
    return hidden * up
