"""Which stored matrices become which experts, proven on small tensors before a weight is read.

The conversions that take a family's checkpoint to its modules (merge a list of experts, put gates
before ups, transpose) are Transformers' own. They are run on tracers: two columns for every matrix,
which number its rows. Where a numbered row comes out is where the matrix's row goes, so that every
slot (expert, projection, row) is seen to be filled once, whatever the family calls its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.experts.storage import StoredTensor
from mixtura.hf.checkpoint import TensorHeader
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.headers import Places

MATRICES = ("gate_up_proj", "up_proj", "down_proj")
"""Roles of the experts' tensors that are matrices."""

_SOURCE_SHIFT = 32
"""A tracer's number is that of the matrix, shifted so far, plus the row."""


@dataclass(frozen=True, slots=True)
class Slots:
    """What one projection of all experts is made of.

    Attributes:
        names: by expert, the dense names of the matrices that lie below each other in it: one, or a
            gate and an up. A single entry of one name where it is stored as a stack.
        is_stack: see `names`.
        order: the row of those matrices, below each other, that each row of the projection is; None
            for all, in order.
    """

    names: tuple[tuple[str, ...], ...]
    is_stack: bool = False
    order: Tensor | None = None

    def all_names(self) -> list[str]:
        """Every matrix, each once."""
        return list(dict.fromkeys(name for names in self.names for name in names))


def find_slots(
    plan: ExpertsPlan,
    path: str,
    sources: Mapping[str, Mapping[str | None, list[str]]],
    headers: Mapping[str, TensorHeader],
    places: Places,
) -> dict[str, Slots]:
    """The matrices of an experts module by role.

    Args:
        plan: of the module. path: of the module in the model.
        sources: what each of the model's tensors is made of, as `match_headers` finds it.
        headers: of the checkpoint, by dense name.
        places: the conversions.

    Raises:
        CheckpointError: a projection's rows are not rows of whole matrices.
    """
    found = {}
    for role, stored in plan.storage.items():
        if role not in MATRICES:
            continue
        target = f"{path}.{stored.path}"
        merged = sources[target]
        if None in merged:
            found[role] = Slots(((merged[None][0],),), is_stack=True)
            continue
        numbered = _trace(target, stored, merged, headers, places)
        found[role] = _read_trace(target, numbered, _names_of(merged), headers)
    return found


def _names_of(merged: Mapping[str | None, list[str]]) -> list[str]:
    return [name for names in merged.values() for name in names]


def _trace(
    target: str,
    stored: StoredTensor,
    merged: Mapping[str | None, list[str]],
    headers: Mapping[str, TensorHeader],
    places: Places,
) -> Tensor:
    """The number of the stored row that every row of a projection is. -> (L, N) int64."""
    tracers = {}
    for number, name in enumerate(_names_of(merged)):
        rows = (number << _SOURCE_SHIFT) + torch.arange(headers[name].shape[-2])
        tracers[name] = torch.stack([2 * rows, 2 * rows + 1], -1)
    made = places.convert(target, merged, tracers)
    traced = stored.logical(made[target])
    is_whole = traced.dim() == 3 and traced.shape[2] == 2
    if not is_whole or not torch.equal(traced[..., 0] + 1, traced[..., 1]):
        raise CheckpointError(
            f"{target} must be made of whole rows of stored matrices to stay packed; got a "
            f"conversion that changes them. Use an unquantized checkpoint."
        )
    return traced[..., 0] // 2


def _read_trace(
    target: str, numbered: Tensor, names: Sequence[str], headers: Mapping[str, TensorHeader]
) -> Slots:
    """What the numbers say: the matrices of every expert, and the order of their rows."""
    matrices, rows = numbered >> _SOURCE_SHIFT, numbered & ((1 << _SOURCE_SHIFT) - 1)
    order, firsts, start = rows[0].clone(), [], 0
    for number in dict.fromkeys(matrices[0].tolist()):
        belongs = matrices[0] == number
        order[belongs] += start
        start += headers[names[number]].shape[-2]
        firsts.append(int(belongs.nonzero()[0]))
        # Of every expert the same rows, of a matrix of its own.
        odd = (matrices[:, belongs] != matrices[:, firsts[-1:]]).any(1)
        odd |= (rows[:, belongs] != rows[0, belongs]).any(1)
        _check_whole(target, names, matrices[:, firsts[-1]], odd)
    is_filled = torch.equal(order.sort().values, torch.arange(start))
    _check_whole(target, names, matrices[:, firsts[0]], torch.full((len(rows),), not is_filled))
    used = matrices[:, firsts]
    is_shared = len(set(used.flatten().tolist())) < used.numel()
    _check_whole(target, names, used[:, 0], torch.full((len(rows),), is_shared))
    is_in_order = torch.equal(order, torch.arange(len(order)))
    experts = tuple(tuple(names[number] for number in row) for row in used.tolist())
    return Slots(experts, order=None if is_in_order else order)


def _check_whole(target: str, names: Sequence[str], used: Tensor, odd: Tensor) -> None:
    if odd.any():
        expert = int(odd.nonzero()[0])
        raise CheckpointError(
            f"expert {expert} of {target} must be made of all rows of matrices of its own, as the "
            f"others are; got other rows of {names[int(used[expert])]}. Fetch the weights again."
        )
