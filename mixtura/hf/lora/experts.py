"""Factors of an adapter become `LoraWeights`: whose they are, and which axis is which, is proven.

What was trained on a stack of experts is stored without the stack's name, and two ways around: its
A reads the input of the map, or its output where PEFT took the stack for a transposed one. The
sizes of the experts leave one reading, or the adapter's settings do, or it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import ExpertsConfig
from mixtura.errors import CheckpointError
from mixtura.hf.lora.config import AdapterConfig
from mixtura.hf.lora.file import Factors
from mixtura.hf.lora.places import MatrixPlace, Part, Stack
from mixtura.lora import LoraWeights, LowRank

Version = tuple[int, ...]
ALWAYS_AS_STORED: Version = (0, 19)
"""Before this version PEFT's A always read the first axis of an expert's matrix, as stored."""
BY_ATTRIBUTE: Version = (0, 20)
"""From this version on it reads the second one, or the first where the module has `is_transposed`
set; in between it was the other way around."""


@dataclass(frozen=True, slots=True)
class Level:
    """Factors that were trained on a stack.

    Attributes:
        factors: as stored. stack: which one they are of.
        reads_output: A is of the outputs of the map, so that the factors change places.
    """

    factors: Factors
    stack: Stack
    reads_output: bool


def check_rank(factors: Factors, rank: int, num_experts: int = 1) -> None:
    """Raise `CheckpointError` unless factors have the rank that the settings give them."""
    rows, columns = factors.a.shape[0], factors.b.shape[1]
    for name, found in ((factors.a_name, rows), (factors.b_name, columns)):
        if found != rank * num_experts:
            of = f" for each of {num_experts} experts" if num_experts != 1 else ""
            shape = tuple((factors.a if name == factors.a_name else factors.b).shape)
            raise CheckpointError(
                f"{name} {shape} must have the rank of its settings, {rank}{of}; got {found} "
                f"where {rank * num_experts} is needed. Fetch both files again, of one adapter."
            )


def scaled(factors: Factors, scaling: float) -> Tensor:
    """B with the scaling inside.

    Raises:
        CheckpointError: it is no longer finite.
    """
    b = factors.b * scaling
    if not bool(torch.isfinite(b).all()):
        raise CheckpointError(
            f"{factors.b_name} must be finite when it is scaled by {scaling}; got infinity. "
            f"Correct lora_alpha."
        )
    return b


def stacked(
    matrices: Sequence[tuple[MatrixPlace, Factors]], config: ExpertsConfig, adapter: AdapterConfig
) -> LoraWeights:
    """Factors of single experts, put together; experts without any get zeros.

    Args:
        matrices: all of one layer. config: of its experts, of all ranks.

    Raises:
        CheckpointError: a factor has another rank or shape than its expert, or two are of one.
    """
    by_part: dict[Part, dict[int, Factors]] = {}
    found: dict[Part, LowRank] = {}
    for place, factors in matrices:
        part = by_part.setdefault(place.part, {})
        if place.expert is None:
            if part or place.part in found:
                raise _twice(factors, "other factors")
            found[place.part] = _of_stack(factors, place.part, config, adapter)
            continue
        if place.part in found or place.expert in part:
            raise _twice(factors, str(part.get(place.expert, "those of all experts")))
        part[place.expert] = factors
    for name, of_part in by_part.items():
        if of_part:
            found[name] = _of_experts(of_part, name, config, adapter)
    return LoraWeights(found.get(Part.GATE), found.get(Part.UP), found.get(Part.DOWN))


def _twice(factors: Factors, other: str) -> CheckpointError:
    return CheckpointError(
        f"{factors.a_name} must be the only factor of its place; got {other} too. Fetch the "
        f"adapter again."
    )


def _sizes(part: Part, config: ExpertsConfig) -> tuple[int, int]:
    """(in, out) of a map of one expert."""
    sizes = config.hidden_size, config.intermediate_size
    return sizes[::-1] if part is Part.DOWN else sizes


def check_shape(factors: Factors, num_in: int, num_out: int) -> None:
    """Raise `CheckpointError` unless A reads `num_in` features and B writes `num_out`."""
    for name, tensor, axis, wanted, what in (
        (factors.a_name, factors.a, 1, num_in, "columns"),
        (factors.b_name, factors.b, 0, num_out, "rows"),
    ):
        if tensor.shape[axis] != wanted:
            raise CheckpointError(
                f"{name} {tuple(tensor.shape)} must have {wanted} {what}, as the model's map has; "
                f"got {tensor.shape[axis]}. Use an adapter of this model."
            )


def _of_experts(
    part: Mapping[int, Factors], name: Part, config: ExpertsConfig, adapter: AdapterConfig
) -> LowRank:
    num_in, num_out = _sizes(name, config)
    most = max(adapter.rank_of(factors.path) for factors in part.values())
    a = torch.zeros(config.num_experts, most, num_in)
    b = torch.zeros(config.num_experts, num_out, most)
    for expert, factors in part.items():
        rank = adapter.rank_of(factors.path)
        check_rank(factors, rank)
        check_shape(factors, num_in, num_out)
        a[expert, :rank] = factors.a
        b[expert, :, :rank] = scaled(factors, adapter.scaling_of(factors.path))
    return LowRank(a, b)


def _of_stack(
    factors: Factors, part: Part, config: ExpertsConfig, adapter: AdapterConfig
) -> LowRank:
    """Factors of one map of all experts, under a name that says which."""
    path = f"{factors.path}.weight"
    num_in, num_out = _sizes(part, config)
    count, rank = config.num_experts, adapter.rank_of(path)
    check_rank(factors, rank, count)
    is_swapped = (factors.a.shape[1], factors.b.shape[0]) == (num_out, num_in)
    if is_swapped and num_in == num_out:
        raise _ambiguous(factors, "A may read inputs or outputs, as both are as many")
    if not is_swapped:
        check_shape(factors, num_in, num_out)
    a, b = _by_expert(factors, scaled(factors, adapter.scaling_of(path)), count, is_swapped)
    return LowRank(a, b)


def _by_expert(
    factors: Factors, b: Tensor, count: int, reads_output: bool
) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) of what PEFT stores as (E * r, in) and (out, r * E).

    Source: PEFT, `ParamWrapper.get_delta_weight`: rows of A are experts first, columns of B ranks
    first.
    """
    a = factors.a.view(count, -1, factors.a.shape[1])
    b = b.view(b.shape[0], -1, count).permute(2, 0, 1)
    return (b.mT, a.mT) if reads_output else (a, b)


def fused(levels: Sequence[Level], adapter: AdapterConfig) -> LoraWeights:
    """Factors of stacks of experts, taken apart; gate and up share A where a stack has both.

    Raises:
        CheckpointError: factors have another rank than their settings give.
    """
    found: dict[Part, LowRank] = {}
    for level in levels:
        stack, factors = level.stack, level.factors
        path = f"{factors.path}.{stack.stored.path.rpartition('.')[2]}"
        count = stack.shape[0]
        check_rank(factors, adapter.rank_of(path), count)
        scaling = adapter.scaling_of(path)
        a, b = _by_expert(factors, scaled(factors, scaling), count, level.reads_output)
        num_experts = stack.plan.config.num_experts  # rows behind them are no experts
        a, b = a[:num_experts], b[:num_experts]
        for part, rows in stack.parts.items():
            found[part] = LowRank(a, b[:, rows])
    return LoraWeights(found.get(Part.GATE), found.get(Part.UP), found.get(Part.DOWN))


def read_levels(
    nested: Sequence[Factors], stacks: Sequence[Stack], module: nn.Module, adapter: AdapterConfig
) -> list[Level]:
    """Which stacks nested wrappers around one module are of, and which way around.

    Args:
        nested: factors of one module. stacks: that the module holds, in the order of its
            parameters. module: the module itself, as Transformers builds it.

    Raises:
        CheckpointError: a wrapper is missing, or no reading fits the sizes, or several do and the
            settings do not say which.
    """
    nested = sorted(nested, key=lambda factors: -factors.depth)
    depths = [factors.depth for factors in nested]
    if depths != list(range(len(nested)))[::-1]:
        raise CheckpointError(
            f"{nested[0].a_name} must have all wrappers around it in the file; got those of depth "
            f"{', '.join(map(str, depths))}. Fetch the adapter again."
        )
    flat = next((stack for stack in stacks if len(stack.shape) != 3), None)
    if flat is not None:
        raise CheckpointError(
            f"{nested[0].a_name} must be of a stack (experts, ., .); got {flat.shape} there, whose "
            f"experts lie below each other. Train adapters of single experts."
        )
    trained = _trained(nested[0].path, stacks, adapter)
    if adapter.target_parameters and len(trained) != len(nested):
        names = ", ".join(stack.stored.path for stack in trained) or "none"
        raise CheckpointError(
            f"{nested[0].a_name} must come with factors for each of target_parameters, here "
            f"{names}; got {len(nested)} pairs. Fetch both files again, of one adapter."
        )
    readings = list(_readings(nested, trained))
    if not readings:
        raise CheckpointError(
            f"{' and '.join(map(str, nested))} must fit the experts of the model; got "
            f"{', '.join(f'{s.stored.path} {s.shape}' for s in stacks)} there. Use an adapter of "
            f"this model."
        )
    if len(readings) == 1:
        return readings[0]
    expected = _as_settings_say(nested, trained, module, adapter)
    if expected is None or expected not in readings:
        raise _ambiguous(nested[0], f"{len(readings)} readings fit its shape")
    return expected


def _trained(path: str, stacks: Sequence[Stack], adapter: AdapterConfig) -> list[Stack]:
    """The stacks that the settings name; all where they name none."""
    wanted = adapter.target_parameters
    if not wanted:
        return list(stacks)
    found = []
    for stack in stacks:
        key = f"{path}.{stack.stored.path.rpartition('.')[2]}"
        if any(key == name or key.endswith(f".{name}") for name in wanted):
            found.append(stack)
    return found


def _readings(nested: Sequence[Factors], stacks: Sequence[Stack]) -> Iterator[list[Level]]:
    """Every way to give wrappers their stacks, all the same way around, that the sizes allow."""
    for reads_output in (False, True):
        for chosen in permutations(stacks, len(nested)):
            pairs = zip(nested, chosen, strict=True)
            levels = [Level(factors, stack, reads_output) for factors, stack in pairs]
            if all(map(_fits, levels)):
                yield levels


def _fits(level: Level) -> bool:
    stack, factors = level.stack, level.factors
    count, *sizes = stack.shape
    num_out, num_in = sizes[::-1] if stack.stored.is_transposed else sizes
    found = factors.a.shape[1], factors.b.shape[0]
    wanted = (num_out, num_in) if level.reads_output else (num_in, num_out)
    return found == wanted and factors.a.shape[0] % count == 0


def _as_settings_say(
    nested: Sequence[Factors],
    trained: Sequence[Stack],
    module: nn.Module,
    adapter: AdapterConfig,
) -> list[Level] | None:
    """What PEFT of the version that has written the adapter does; None where it is not known.

    It wraps the parameters that it is told of in their order, the first one innermost.
    """
    version = _version(adapter.peft_version)
    if not adapter.target_parameters or version is None:
        return None
    has_attribute: Any = getattr(module, "is_transposed", False)
    if version < ALWAYS_AS_STORED:
        reads_second = False
    elif version < BY_ATTRIBUTE:
        reads_second = bool(has_attribute)
    else:
        reads_second = not has_attribute
    levels = []
    for factors, stack in zip(nested, trained, strict=True):
        # Stored (E, out, in), or (E, in, out) where it is transposed.
        reads_output = reads_second == stack.stored.is_transposed
        levels.append(Level(factors, stack, reads_output))
    return levels


def _version(text: str) -> Version | None:
    parts = text.split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(p.isdecimal() for p in parts) else None


def _ambiguous(factors: Factors, why: str) -> CheckpointError:
    return CheckpointError(
        f"{factors.a_name} {tuple(factors.a.shape)} must say by its shape or by the settings what "
        f"it is of; got an ambiguous one: {why}. Write target_parameters and peft_version in "
        f"adapter_config.json, as PEFT does."
    )
