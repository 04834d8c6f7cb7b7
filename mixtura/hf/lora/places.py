"""Where the factors of an adapter go in a model: experts by name, stacks of them, linear maps.

A model as Transformers builds it has no matrix for a single expert; its checkpoints have, and so
have adapters that were trained on them. Transformers' own conversion is run backwards for the
names, and then forwards on tracers that number rows: where a row comes out says which expert's
gate, up or down a name is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mixtura.config import ExpertsConfig, GatePrecision, GateUp, RunnerConfig
from mixtura.errors import CheckpointError
from mixtura.experts import ExpertsOptions, StoredTensor
from mixtura.hf.blocks import BlockOptions
from mixtura.hf.convert import plan_layers
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.headers import Places, expert_number
from mixtura.hf.lora.file import Factors
from mixtura.hf.slots import MATRICES

_SHIFT = 32
"""A tracer's number is that of the stored tensor, shifted so far, plus the row."""


class Part(Enum):
    """One linear map of an expert."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class MatrixPlace:
    """A map of one expert; of every expert where `expert` is None.

    Attributes:
        experts: path of the experts module. part: which map.
    """

    experts: str
    part: Part
    expert: int | None


@dataclass(frozen=True, slots=True)
class StackPlace:
    """Parameters that hold experts in stacks, all in one module; which one, shapes say.

    Attributes:
        experts: path of the experts module. owner: of the module that holds the parameters.
    """

    experts: str
    owner: str


@dataclass(frozen=True, slots=True)
class LinearPlace:
    """A linear map: `path` is of its module, `shape` (out, in)."""

    path: str
    shape: tuple[int, int]


Place = MatrixPlace | StackPlace | LinearPlace


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """A parameter that holds a projection of all experts.

    Attributes:
        experts: path of the experts module. plan: of that. role, stored: which, and how.
        shape: as stored.
    """

    experts: str
    plan: ExpertsPlan
    role: str
    stored: StoredTensor
    shape: tuple[int, ...]

    @property
    def parts(self) -> dict[Part, slice]:
        """The rows (outputs) of each map in it, as kernels see it."""
        if self.role == "down_proj":
            return {Part.DOWN: slice(None)}
        return parts_of(self.plan.config)[self.role]


def parts_of(config: ExpertsConfig) -> dict[str, dict[Part, slice]]:
    """Which rows of the projections before the activation are gate and which are up, by role."""
    width = config.intermediate_size
    layouts: dict[GateUp, dict[str, dict[Part, slice]]] = {
        GateUp.STACKED: {
            "gate_up_proj": {Part.GATE: slice(0, width), Part.UP: slice(width, 2 * width)}
        },
        GateUp.INTERLEAVED: {
            "gate_up_proj": {Part.GATE: slice(0, None, 2), Part.UP: slice(1, None, 2)}
        },
        GateUp.SEPARATE: {
            "gate_up_proj": {Part.GATE: slice(None)},
            "up_proj": {Part.UP: slice(None)},
        },
        GateUp.UNGATED: {"gate_up_proj": {Part.UP: slice(None)}},
    }
    return layouts[config.gate_up]


class AdapterPlaces:
    """Finds the place of factors in a model.

    Args:
        model: in any state; it is asked for its class and configuration alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.empty = _empty_like(model)
        self.places = Places(self.empty)
        options = BlockOptions(
            experts=ExpertsOptions(), runner=RunnerConfig(), gate=GatePrecision.FP32
        )
        blocks, alone, _ = plan_layers(self.empty, options)
        self.blocks = blocks
        self.plans: dict[str, ExpertsPlan] = dict(alone)
        for name, block in blocks.items():
            inner = block.spec.experts
            self.plans[name if inner is None else f"{name}.{inner}"] = block.experts
        self._parts: dict[str, dict[tuple[str, int | None], MatrixPlace]] = {}

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """The parameters that hold experts, by path."""
        found = {}
        for path, plan in self.plans.items():
            for role, stored in plan.storage.items():
                if role in MATRICES:
                    target = f"{path}.{stored.path}"
                    shape = tuple(self.places.state[target].shape)
                    found[target] = Stack(path, plan, role, stored, shape)
        return found

    @cached_property
    def owners(self) -> dict[str, list[str]]:
        """The stacks of every module that holds some, in the order of its parameters."""
        found: dict[str, list[str]] = {}
        for path in {target.rpartition(".")[0] for target in self.stacks}:
            names = [name for name, _ in self.module(path).named_parameters(recurse=False)]
            found[path] = [f"{path}.{n}" for n in names if f"{path}.{n}" in self.stacks]
        return found

    def module(self, path: str) -> nn.Module:
        """A module of the empty model."""
        found: nn.Module = self.empty.get_submodule(path)
        return found

    def find(self, factors: Factors) -> Place:
        """Where factors belong.

        Raises:
            CheckpointError: nowhere in this model; the tensor is named.
        """
        path, state = factors.path, self.places.state
        weight = f"{path}.weight"
        target, pattern = (weight, None) if weight in state else self.places.find(weight)
        if pattern is not None and target in self.stacks:
            found = self._matrices(target).get((pattern, expert_number(weight)))
            if found is not None:
                return found
        if pattern is None and target in self.stacks:
            return StackPlace(self.stacks[target].experts, target.rpartition(".")[0])
        if pattern is None and target in state and state[target].ndim == 2:
            num_out, num_in = state[target].shape
            return LinearPlace(target.rpartition(".")[0], (num_out, num_in))
        owner = self._owner(path)
        if owner is not None:
            return StackPlace(self.stacks[self.owners[owner][0]].experts, owner)
        raise self._unknown(path, factors.a_name)

    def linear(self, path: str, name: str) -> str:
        """The module that a trained path of a linear map means; `name` is of a tensor of it.

        Raises:
            CheckpointError: none in this model.
        """
        weight = f"{path}.weight"
        target = weight if weight in self.places.state else self.places.find(weight)[0]
        if target not in self.places.state:
            raise self._unknown(path, name)
        return target.rpartition(".")[0]

    def _unknown(self, path: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{name} must be of a linear map of the model ({type(self.empty).__name__}); got "
            f"{path}, which it does not have. Use an adapter of this model."
        )

    def _owner(self, path: str) -> str | None:
        """The module with stacks that a path means; None where it means none."""
        if path in self.owners:
            return path
        for leaf in {target.rpartition(".")[2] for target in self.stacks}:
            target, pattern = self.places.find(f"{path}.{leaf}")
            if pattern is None and target in self.stacks:
                return target.rpartition(".")[0]
        return None

    def _matrices(self, target: str) -> dict[tuple[str, int | None], MatrixPlace]:
        """What single tensors a stack is merged from, by their conversion's pattern and number."""
        if target not in self._parts:
            self._parts[target] = _trace(self.places, target, self.stacks[target])
        return self._parts[target]


def _empty_like(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the meta device, as its configuration builds it."""
    with torch.device("meta"):
        empty: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config))
    return empty


def _trace(places: Places, target: str, stack: Stack) -> dict[tuple[str, int | None], MatrixPlace]:
    """Follow the rows of a stack back to the tensors that checkpoints have in its stead."""
    try:
        apart: Mapping[str, Tensor] = revert_weight_conversion(
            places.model, {target: places.state[target]}
        )
    except Exception:  # whatever a family's operation stumbles over
        return {}
    names = list(apart)
    merged: dict[str | None, list[str]] = {}
    for name in names:
        found, pattern = places.find(name)
        if found != target or pattern is None or not name.endswith(".weight"):
            return {}
        merged.setdefault(pattern, []).append(name)
    tracers = {}
    for number, name in enumerate(names):
        shape = apart[name].shape[:-1]
        numbers = ((number << _SHIFT) + torch.arange(shape.numel())).view(shape)
        tracers[name] = torch.stack([2 * numbers, 2 * numbers + 1], -1)
    made = stack.stored.logical(places.convert(target, merged, tracers)[target])
    if made.ndim != 3 or made.shape[2] != 2:
        return {}
    numbered = made[..., 0] // 2
    found_places: dict[tuple[str, int | None], MatrixPlace] = {}
    patterns = {name: str(pattern) for pattern, group in merged.items() for name in group}
    for part, rows in stack.parts.items():
        for expert, sources in enumerate(numbered[:, rows]):
            number, first = int(sources[0]) >> _SHIFT, int(sources[0]) & ((1 << _SHIFT) - 1)
            name, width = names[number], len(sources)
            is_whole = torch.equal(sources, sources[0] + torch.arange(width))
            if not is_whole or apart[name].shape[-2] != width:
                return {}
            is_stack = apart[name].ndim == 3
            if first != (expert * width if is_stack else 0):
                return {}
            key = patterns[name], expert_number(name)
            place = MatrixPlace(stack.experts, part, None if is_stack else expert)
            if found_places.setdefault(key, place) != place:
                return {}
    return found_places
