"""A PEFT adapter as what it adds to a model's layers: every tensor of its file has one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.hf.lora.config import AdapterConfig
from mixtura.hf.lora.experts import (
    Level,
    check_rank,
    check_shape,
    fused,
    read_levels,
    scaled,
    stacked,
)
from mixtura.hf.lora.file import Factors, read_file
from mixtura.hf.lora.places import AdapterPlaces, LinearPlace, MatrixPlace, StackPlace
from mixtura.lora import LoraWeights


@dataclass(frozen=True, slots=True)
class LinearFactors:
    """What an adapter adds to a linear map: `B (A x)`, fp32, the scaling in B.

    Attributes:
        a: (r, in). b: (out, r). name: of the tensor that A was.
    """

    a: Tensor
    b: Tensor
    name: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter by the modules of a model, fp32 on the CPU.

    Attributes:
        experts: by path of the experts module, of all logical experts.
        linears: by path of the module that holds the weight.
        names: of a tensor of each experts module, for messages.
        copies: weights that the base model must have, by path of the module that holds them.
    """

    experts: Mapping[str, LoraWeights]
    linears: Mapping[str, LinearFactors]
    names: Mapping[str, str]
    copies: Mapping[str, Tensor]


def read_adapter(directory: Path, places: AdapterPlaces) -> Adapter:
    """Read an adapter and find the place of each of its tensors in a model.

    Raises:
        CheckpointError: a file is missing, broken or asks for what is not done here; or a tensor,
            which is named, has no place, or one that another has, or does not fit it.
    """
    config = AdapterConfig.read(directory)
    matrices: dict[str, list[tuple[MatrixPlace, Factors]]] = {}
    nested: dict[StackPlace, list[Factors]] = {}
    linears: dict[str, LinearFactors] = {}
    names: dict[str, str] = {}
    file = read_file(directory)
    for factors in file.factors:
        place = places.find(factors)
        if factors.depth and not isinstance(place, StackPlace):
            raise CheckpointError(
                f"{factors.a_name} must have no base_layer in its name, as one map is there to be "
                f"wrapped; got {factors.depth}. Fetch the adapter again."
            )
        if isinstance(place, LinearPlace):
            if place.path in linears:
                raise CheckpointError(
                    f"{factors.a_name} must be the only factor of {place.path}; got "
                    f"{linears[place.path].name} too. Fetch the adapter again."
                )
            linears[place.path] = _linear(factors, place, config)
            continue
        names.setdefault(place.experts, factors.a_name)
        if isinstance(place, MatrixPlace):
            matrices.setdefault(place.experts, []).append((place, factors))
        else:
            nested.setdefault(place, []).append(factors)
    experts: dict[str, LoraWeights] = {}
    for path, group in matrices.items():
        experts[path] = stacked(group, places.plans[path].config, config)
    for place, of_module in nested.items():
        added = fused(_levels(of_module, place, places, config), config)
        experts[place.experts] = _joined(experts.get(place.experts), added, of_module[0])
    copies = {places.linear(path, name): copy for path, (name, copy) in file.copies.items()}
    return Adapter(experts, linears, names, copies)


def _linear(factors: Factors, place: LinearPlace, config: AdapterConfig) -> LinearFactors:
    weight = f"{factors.path}.weight"
    is_parameter = any(
        weight == name or weight.endswith(f".{name}") for name in config.target_parameters
    )
    key = weight if is_parameter else factors.path
    num_out, num_in = place.shape
    check_rank(factors, config.rank_of(key))
    check_shape(factors, num_in, num_out)
    return LinearFactors(factors.a, scaled(factors, config.scaling_of(key)), factors.a_name)


def _levels(
    nested: list[Factors], place: StackPlace, places: AdapterPlaces, config: AdapterConfig
) -> list[Level]:
    depths = [factors.depth for factors in nested]
    if len(set(depths)) < len(depths):
        twice = next(one for one in nested if depths.count(one.depth) > 1)
        raise CheckpointError(
            f"{twice.a_name} must be the only factor of its wrapper around {place.owner}; got "
            f"others. Fetch the adapter again."
        )
    stacks = [places.stacks[target] for target in places.owners[place.owner]]
    return read_levels(nested, stacks, places.module(place.owner), config)


def _joined(first: LoraWeights | None, second: LoraWeights, factors: Factors) -> LoraWeights:
    """Two adapters of one module's experts, of different maps."""
    if first is None:
        return second
    for part in ("gate", "up", "down"):
        if getattr(first, part) is not None and getattr(second, part) is not None:
            raise CheckpointError(
                f"{factors.a_name} must be the only factor of its place; got another for the "
                f"{part} of the same experts. Fetch the adapter again."
            )
    return LoraWeights(first.gate or second.gate, first.up or second.up, first.down or second.down)
