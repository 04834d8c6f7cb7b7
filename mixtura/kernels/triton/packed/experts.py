"""Quantized experts as the kernels have them, packed when they first run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.config import ExpertsConfig, GateUp
from mixtura.kernels.triton.packed.layout import Layout
from mixtura.kernels.triton.packed.pack import PackedMatrix, pack_matrix, unpack_matrix
from mixtura.kernels.triton.packed.quantization import Quantization
from mixtura.quant.activations import ActivationScheme, StaticInputs
from mixtura.types import ExpertWeights


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """The experts of a layer.

    Attributes:
        gate_up, down: the projections; up's rows follow gate's.
        gate_up_bias, down_bias, post_norm, gate_up_inputs, down_inputs, activations: of
            `ExpertWeights`, as they came.
    """

    config: ExpertsConfig
    gate_up: PackedMatrix
    down: PackedMatrix
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None
    gate_up_inputs: StaticInputs | None = None
    down_inputs: StaticInputs | None = None
    activations: ActivationScheme | None = None

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.gate_up.codes.device

    def slots(self) -> dict[str, Tensor]:
        """The tensors with a row for each expert, (L, ...)."""
        inputs = {"gate_up_inputs": self.gate_up_inputs, "down_inputs": self.down_inputs}
        scales = {name: one.scales for name, one in inputs.items() if one is not None}
        biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        named = {"gate_up": self.gate_up, "down": self.down}
        return {
            **{
                f"{role}.{name}": tensor
                for role, matrix in named.items()
                for name, tensor in matrix.tensors.items()
            },
            **{name: bias for name, bias in biases.items() if bias is not None},
            **scales,
        }


@torch.no_grad()
def pack_experts(
    weights: ExpertWeights, held: ExpertWeights, rounding: ActivationScheme | None
) -> PackedWeights:
    """Lay the experts out.

    Args:
        weights: quantized; `unreadable_experts` is None.
        held: the same with those stored scales that are used.
        rounding: what rows are rounded to with scales found while running; stored ones go before.

    Raises:
        InputError: see `pack_matrix`.
    """
    config = weights.config
    gate_up, down = weights.gate_up_proj, weights.down_proj
    first = [gate_up] if weights.up_proj is None else [gate_up, weights.up_proj]
    gate_up_layout, down_layout = quantization_of(held, rounding).layouts(config)
    interleaves = config.gate_up is GateUp.INTERLEAVED
    return PackedWeights(
        config,
        pack_matrix(first, gate_up_layout, interleaves=interleaves),
        pack_matrix([down], down_layout),
        _own(weights.gate_up_bias),
        _own(weights.down_bias),
        _own(weights.post_norm),
        _own_inputs(weights.gate_up_inputs),
        _own_inputs(weights.down_inputs),
        weights.activations,
    )


def quantization_of(weights: ExpertWeights, rounding: ActivationScheme | None) -> Quantization:
    """How experts are quantized, with rows rounded so where they have no stored scales."""
    first, second = weights.gate_up_inputs, weights.down_inputs
    return Quantization(
        weights.gate_up_proj.scheme,
        weights.down_proj.scheme,
        rounding if first is None else first.scheme,
        rounding if second is None else second.scheme,
    )


def unpack_experts(packed: PackedWeights) -> ExpertWeights:
    """The weights that `pack_experts` was given."""
    gate_up, *up = unpack_matrix(packed.gate_up)
    (down,) = unpack_matrix(packed.down)
    return ExpertWeights(
        packed.config,
        gate_up_proj=gate_up,
        down_proj=down,
        up_proj=up[0] if up else None,
        gate_up_bias=packed.gate_up_bias,
        down_bias=packed.down_bias,
        post_norm=packed.post_norm,
        gate_up_inputs=packed.gate_up_inputs,
        down_inputs=packed.down_inputs,
        activations=packed.activations,
    )


@dataclass(frozen=True, slots=True)
class Form:
    """What a graph has of packed experts besides tensors: alike for layers that are alike.

    Attributes:
        layouts, shapes: of gate and up, and of down.
        roundings: of the inputs' stored scales, or None, in the same order.
        present: names of the tensors that there are.
    """

    config: ExpertsConfig
    layouts: tuple[Layout, Layout]
    shapes: tuple[tuple[int, int, int], tuple[int, int, int]]
    roundings: tuple[ActivationScheme | None, ActivationScheme | None]
    present: tuple[str, ...]


_READ = ("codes", "scales", "zeros", "factors")
"""Tensors of a matrix that kernels read."""


def read_tensors(packed: PackedWeights) -> dict[str, Tensor]:
    """The tensors that kernels read, by name."""
    inputs = (packed.gate_up_inputs, packed.down_inputs)
    named: dict[str, Tensor | None] = {
        **{f"gate_up.{name}": getattr(packed.gate_up, name) for name in _READ},
        **{f"down.{name}": getattr(packed.down, name) for name in _READ},
        "gate_up_bias": packed.gate_up_bias,
        "down_bias": packed.down_bias,
        "post_norm": packed.post_norm,
        **{
            name: None if one is None else one.scales
            for name, one in zip(("gate_up_inputs", "down_inputs"), inputs, strict=True)
        },
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def form_of(packed: PackedWeights) -> Form:
    """What is left when the tensors are taken away."""
    inputs = (packed.gate_up_inputs, packed.down_inputs)
    return Form(
        packed.config,
        (packed.gate_up.layout, packed.down.layout),
        (packed.gate_up.shape, packed.down.shape),
        (
            None if inputs[0] is None else inputs[0].scheme,
            None if inputs[1] is None else inputs[1].scheme,
        ),
        tuple(read_tensors(packed)),
    )


def put_together(form: Form, tensors: list[Tensor]) -> PackedWeights:
    """What `form_of` and `read_tensors` were given, to be run."""
    named = dict(zip(form.present, tensors, strict=True))

    def matrix(role: str, index: int) -> PackedMatrix:
        codes, scales, zeros, factors = (named.get(f"{role}.{name}") for name in _READ)
        assert codes is not None
        return PackedMatrix(form.layouts[index], form.shapes[index], codes, scales, zeros, factors)

    def inputs(name: str, index: int) -> StaticInputs | None:
        scheme = form.roundings[index]
        return None if scheme is None else StaticInputs(scheme, named[name])

    return PackedWeights(
        form.config,
        matrix("gate_up", 0),
        matrix("down", 1),
        named.get("gate_up_bias"),
        named.get("down_bias"),
        named.get("post_norm"),
        inputs("gate_up_inputs", 0),
        inputs("down_inputs", 1),
    )


def _own(vector: Tensor | None) -> Tensor | None:
    """A copy: what it is packed from may be freed."""
    return None if vector is None else vector.detach().clone()


def _own_inputs(inputs: StaticInputs | None) -> StaticInputs | None:
    """The same of stored scales."""
    return None if inputs is None else inputs.mapped(torch.clone)
