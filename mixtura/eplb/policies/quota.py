"""Quotas: which fraction of an expert's load each replica gets, the placement as it is.

Splitting by quota moves nothing. The least largest rank load that any split reaches is found by
filling: expert by expert, its load is poured over the ranks that hold it as water over ground,
which lowers the sum of squared rank loads. The split where no expert can lower it further has the
least sum of squares, and with it the least largest load (the reachable rank loads are the base of
a polymatroid). Layers are computed at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtura.eplb.loads import AnyLoads, Loads, as_loads
from mixtura.eplb.policies.contract import Ids, require_same
from mixtura.errors import InputError
from mixtura.parallel import ModelPlacement

MAX_SWEEPS = 200
CONVERGED = 1e-5
"""Of the mean rank load: what the largest pouring of the last sweep changed."""


@dataclass(frozen=True, eq=False)
class ReplicaQuota:
    """One layer's split.

    Attributes:
        fractions: (E, max_replicas) fp32, of each expert's load by replica, in the order of
            `logical_to_physical`; rows sum to 1, padding is 0.
    """

    fractions: Tensor


@dataclass(frozen=True, eq=False)
class ModelQuota:
    """The split of every layer.

    Attributes:
        fractions: (layers, E, max_replicas) fp32, as `ModelPlacement.logical_to_physical`.
        placement_digest: of the placement that it was made for.
    """

    fractions: Tensor
    placement_digest: str

    def layer(self, index: int) -> ReplicaQuota:
        """One layer's split; its columns are the model's, of which the last may be padding."""
        return ReplicaQuota(self.fractions[index])

    def check(self, placement: ModelPlacement) -> None:
        """Raise `InputError` where the quota was made for another placement."""
        if self.placement_digest != placement.digest:
            raise InputError(
                f"a quota must be of the placement it is used with, {placement.digest}; got one "
                f"of {self.placement_digest}. Plan quotas again after each move."
            )


def plan_quota(loads: AnyLoads, placement: ModelPlacement) -> ModelQuota:
    """The split over replicas that makes the largest rank load of each layer least.

    Where a rank holds an expert twice, the later slot gets nothing.

    Args:
        loads: (layers, E).
        placement: of the same layers and experts.

    Raises:
        InputError: loads and placement differ in layers or experts.
    """
    filling = _Filling(as_loads(loads), placement)
    for _ in range(MAX_SWEEPS):
        if filling.sweep() <= CONVERGED:
            break
    return ModelQuota(torch.from_numpy(filling.fractions()), placement.digest)


def equal_quota(placement: ModelPlacement) -> ModelQuota:
    """Each replica as much as the others: what a rule without quotas comes to."""
    is_replica = placement.logical_to_physical >= 0
    fractions = is_replica.float() / placement.replica_count.unsqueeze(2)
    return ModelQuota(fractions, placement.digest)


class _Filling:
    """Loads of replicas and ranks while they are poured."""

    def __init__(self, loads: Loads, placement: ModelPlacement) -> None:
        require_same(placement, loads, placement.topology)
        self.loads = loads
        table = placement.logical_to_physical.numpy()
        no_rank = placement.topology.num_ranks  # a rank of its own for what is not used
        rank_of_slot = np.append(placement.topology.rank_of_slot.numpy(), no_rank)
        self.ranks: Ids = rank_of_slot[table].astype(np.int64)  # (layers, E, max_replicas)
        same = self.ranks[..., :, None] == self.ranks[..., None, :]
        is_repeated = np.tril(same, -1).any(-1)
        self.ranks[is_repeated] = no_rank
        self.is_used = self.ranks != no_rank
        self.num_used = self.is_used.sum(2)
        self.poured = np.where(self.is_used, (loads / self.num_used)[..., None], 0.0)
        self.rows = np.arange(len(loads))
        self.rank_loads = np.zeros((len(loads), no_rank + 1))
        np.add.at(self.rank_loads, (self.rows[:, None, None], self.ranks), self.poured)
        self.mean = np.maximum(loads.sum(1) / no_rank, np.finfo(np.float64).tiny)
        can_split = np.where(self.num_used > 1, loads, 0.0)
        self.order = np.argsort(-can_split, axis=1, kind="stable")
        self.order = self.order[:, : int((can_split > 0).sum(1).max())]

    def sweep(self) -> float:
        """Pour each expert that can be split once; the largest change, of the mean rank load."""
        changed = 0.0
        for expert in self.order.T:
            before = self.poured[self.rows, expert]  # (layers, max_replicas)
            ranks = self.ranks[self.rows, expert]
            is_used = self.is_used[self.rows, expert]
            ground = self.rank_loads[self.rows[:, None], ranks] - before
            after = pour(self.loads[self.rows, expert], np.where(is_used, ground, np.inf))
            self.poured[self.rows, expert] = after
            np.add.at(self.rank_loads, (self.rows[:, None], ranks), after - before)
            changed = max(changed, float((np.abs(after - before) / self.mean[:, None]).max()))
        return changed

    def fractions(self) -> NDArray[np.float32]:
        """(layers, E, max_replicas) of each expert's load; equal where it has none."""
        total = self.poured.sum(2, keepdims=True)  # 0 too where a load is lost beside the ground
        equal = self.is_used / self.num_used[..., None]
        split: Loads = np.divide(self.poured, total, where=total > 0, out=equal)
        return split.astype(np.float32)


def pour(amounts: Loads, ground: Loads) -> Loads:
    """How much of each amount stands over each piece of ground when its surface is level.

    `max(0, level - ground)`, where the level is such that a row sums to its amount.

    Args:
        amounts: (rows,).
        ground: (rows, pieces), infinite where nothing may be poured; one piece at least is not.

    Example:
        >>> pour(np.array([3.0]), np.array([[1.0, 2.0, 9.0]])).tolist()
        [[2.0, 1.0, 0.0]]
    """
    ordered = np.sort(ground, axis=1)
    levels = (amounts[:, None] + np.cumsum(ordered, 1)) / np.arange(1, ground.shape[1] + 1)
    under = (levels > ordered).sum(1)  # a run from the left
    level = levels[np.arange(len(levels)), np.maximum(under - 1, 0)]
    poured: Loads = np.maximum(level[:, None] - ground, 0.0)
    return poured
