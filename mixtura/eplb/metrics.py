"""How even ranks are, and what a change of placement moves.

Tools of the field call three different numbers balance; compare only numbers of one kind.

- `balancedness`: mean over max of the rank loads, for each layer. The routed part of a step takes
  `1 / balancedness` times as long as with even ranks. This is what mixtura plans and reports.
- `balancedness_of_sums`: the sum of means over the sum of maxima: heavy layers weigh more.
- `imbalance_ratio`: `(max - mean) / mean`, averaged over layers: 0 is even, there is no upper end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixtura.eplb.loads import AnyLoads, as_loads
from mixtura.eplb.policies import ModelQuota
from mixtura.eplb.policies.contract import require_same
from mixtura.parallel import ModelPlacement
from mixtura.parallel.placement import check_alike

Floats = NDArray[np.float64]


def rank_loads(
    loads: AnyLoads, placement: ModelPlacement, quota: ModelQuota | None = None
) -> Floats:
    """(layers, R) what each rank has to do, where replicas share as the quota says, or equally.

    Raises:
        InputError: the placement is of other layers or experts, or the quota of another placement.
    """
    array = as_loads(loads)
    topology = placement.topology
    require_same(placement, array, topology)
    ids = placement.physical_to_logical.numpy()
    if quota is None:
        shares = np.take_along_axis(array / placement.replica_count.numpy(), np.maximum(ids, 0), 1)
    else:
        quota.check(placement)
        table = placement.logical_to_physical.numpy()
        shares = np.zeros(ids.shape)
        layers, experts, replicas = np.nonzero(table >= 0)
        parts = array[layers, experts] * quota.fractions.numpy()[layers, experts, replicas]
        shares[layers, table[layers, experts, replicas]] = parts
    is_of_rank = topology.rank_of_slot.numpy()[:, None] == np.arange(topology.num_ranks)
    by_rank: Floats = np.where(ids >= 0, shares, 0.0) @ is_of_rank
    return by_rank


def mean_and_max(
    loads: AnyLoads, placement: ModelPlacement, quota: ModelQuota | None = None
) -> tuple[Floats, Floats]:
    """(layers,) each, of the rank loads; ranks without slots are not counted."""
    has_slots = np.array(placement.topology.slots_per_rank) > 0
    by_rank = rank_loads(loads, placement, quota)[:, has_slots]
    return by_rank.mean(1), by_rank.max(1)


def balancedness(
    loads: AnyLoads, placement: ModelPlacement, quota: ModelQuota | None = None
) -> Floats:
    """(layers,) mean over max of the rank loads; 1 is even, and a layer without load is even."""
    mean, largest = mean_and_max(loads, placement, quota)
    return np.divide(mean, largest, where=largest > 0, out=np.ones_like(mean))


def balancedness_of_sums(
    loads: AnyLoads, placement: ModelPlacement, quota: ModelQuota | None = None
) -> float:
    """The layers' mean rank loads summed, over their largest rank loads summed; 1 without load."""
    mean, largest = mean_and_max(loads, placement, quota)
    return float(mean.sum() / largest.sum()) if largest.sum() > 0 else 1.0


def imbalance_ratio(
    loads: AnyLoads, placement: ModelPlacement, quota: ModelQuota | None = None
) -> float:
    """`(max - mean) / mean` of the rank loads, averaged over layers; 0 for one without load."""
    mean, largest = mean_and_max(loads, placement, quota)
    ratio = np.divide(largest - mean, mean, where=mean > 0, out=np.zeros_like(mean))
    return float(ratio.mean())


def predicted_gain(
    loads: AnyLoads,
    old: ModelPlacement,
    new: ModelPlacement,
    quota: ModelQuota | None = None,
    old_quota: ModelQuota | None = None,
) -> float:
    """The fraction of the routed experts' time that the new placement saves; below 0: it loses.

    `1 - sum_l max_r new[l, r] / sum_l max_r old[l, r]`: each layer takes as long as its busiest
    rank. Replicas share as their quotas say, equally where there is none.
    """
    before = mean_and_max(loads, old, old_quota)[1].sum()
    after = mean_and_max(loads, new, quota)[1].sum()
    return float(1 - after / before) if before > 0 else 0.0


def moved_slots(old: ModelPlacement, new: ModelPlacement) -> NDArray[np.int64]:
    """(layers,) slots that must get another expert, from their own rank or another.

    Raises:
        InputError: the placements are of other layers, experts or slots.
    """
    check_alike(old, new)
    was, now = old.physical_to_logical.numpy(), new.physical_to_logical.numpy()
    moved: NDArray[np.int64] = ((was != now) & (now >= 0)).sum(1)
    return moved


def moved_bytes(old: ModelPlacement, new: ModelPlacement, bytes_per_slot: int) -> int:
    """Bytes that ranks receive: an expert that a rank has already is copied, not sent.

    Args:
        bytes_per_slot: of one expert's weights in one layer, as they lie in a slot.
    """
    check_alike(old, new)
    received = _experts_of_ranks(new) & ~_experts_of_ranks(old)
    return int(received.sum()) * bytes_per_slot


def _experts_of_ranks(placement: ModelPlacement) -> NDArray[np.bool_]:
    """(layers, R, E) who has what."""
    ids = placement.physical_to_logical.numpy()
    sizes = (placement.num_layers, placement.topology.num_ranks, placement.num_experts)
    holds = np.zeros(sizes, bool)
    layers, slots = np.nonzero(ids >= 0)
    holds[layers, placement.topology.rank_of_slot.numpy()[slots], ids[layers, slots]] = True
    return holds
