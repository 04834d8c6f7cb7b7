"""The two greedy steps of expert balancing, for all layers at once.

Rows are layers, or layers times nodes. Both steps take the lowest index where values are equal.
"""

from __future__ import annotations

import numpy as np

from mixtura.eplb.loads import Loads
from mixtura.eplb.policies.contract import Ids


def replicate(loads: Loads, num_slots: int, max_replicas: int | None = None) -> tuple[Ids, Ids]:
    """Give each expert a slot and each further slot to the expert with most load per replica.

    Minimises the largest load of a replica, `max_e load[e] / count[e]`, exactly.

    Args:
        loads: (rows, E).
        num_slots: at least E.
        max_replicas: no expert gets more; `E * max_replicas` must reach `num_slots`.

    Returns:
        (rows, num_slots) experts, 0 .. E-1 and then the further ones in the order in which they
        were given; (rows, E) counts.
    """
    num_rows, num_experts = loads.shape
    experts = np.empty((num_rows, num_slots), np.int64)
    experts[:, :num_experts] = np.arange(num_experts)
    count = np.ones((num_rows, num_experts), np.int64)
    share = loads.copy()
    rows = np.arange(num_rows)
    for slot in range(num_experts, num_slots):
        hottest = share.argmax(1)
        experts[:, slot] = hottest
        count[rows, hottest] += 1
        share[rows, hottest] = loads[rows, hottest] / count[rows, hottest]
        if max_replicas is not None:
            share[rows, hottest] = np.where(
                count[rows, hottest] < max_replicas, share[rows, hottest], -np.inf
            )
    return experts, count


def pack(weights: Loads, num_packs: int) -> tuple[Ids, Ids]:
    """Items over packs of equal size: the heaviest item left to the lightest pack with room.

    Args:
        weights: (rows, items); `num_packs` must divide the items.

    Returns:
        (rows, items) pack of each item, and its place in the pack in the order of arrival. Packs
        of one item hold item i in pack i.
    """
    num_rows, num_items = weights.shape
    size = num_items // num_packs
    assert size * num_packs == num_items
    pack_of = np.broadcast_to(np.arange(num_items), weights.shape).copy()
    place = np.zeros_like(pack_of)
    if size == 1:
        return pack_of, place
    rows = np.arange(num_rows)
    total = np.zeros((num_rows, num_packs))
    filled = np.zeros((num_rows, num_packs), np.int64)
    open_total = total.copy()  # infinite where a pack is full
    for item in np.argsort(-weights, axis=1, kind="stable").T:
        lightest = open_total.argmin(1)
        pack_of[rows, item], place[rows, item] = lightest, filled[rows, lightest]
        total[rows, lightest] += weights[rows, item]
        filled[rows, lightest] += 1
        open_total[rows, lightest] = np.where(
            filled[rows, lightest] < size, total[rows, lightest], np.inf
        )
    return pack_of, place


def pack_distinct(shares: Loads, experts: Ids, slots_per_rank: Ids) -> Ids:
    """Replicas over ranks of any size, no two of an expert on one where it can be avoided.

    The heaviest replica left goes to the lightest rank with room that lacks its expert, or to the
    lightest with room where all of these have it.

    Args:
        shares: (rows, slots) load of each replica; those of one expert are equal.
        experts: (rows, slots) ascending in each row, as many as the ranks have slots.
        slots_per_rank: (R,).

    Returns:
        (rows, slots) experts, rank after rank.
    """
    num_rows, num_ranks = len(experts), len(slots_per_rank)
    rows = np.arange(num_rows)
    first = np.cumsum(slots_per_rank) - slots_per_rank
    total = np.zeros((num_rows, num_ranks))
    filled = np.zeros((num_rows, num_ranks), np.int64)
    holds = np.zeros((num_rows, experts.max() + 1, num_ranks), bool)
    placed = np.empty_like(experts)
    for slot in np.argsort(-shares, axis=1, kind="stable").T:
        expert = experts[rows, slot]
        has_room = filled < slots_per_rank
        is_open = has_room & ~holds[rows, expert]
        is_open = np.where(is_open.any(1, keepdims=True), is_open, has_room)
        lightest = np.where(is_open, total, np.inf).argmin(1)
        placed[rows, first[lightest] + filled[rows, lightest]] = expert
        total[rows, lightest] += shares[rows, slot]
        filled[rows, lightest] += 1
        holds[rows, expert, lightest] = True
    return placed
