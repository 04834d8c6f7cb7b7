"""What must travel to turn one placement of a layer into another."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from mixtura.parallel import Placement


class Transfer(NamedTuple):
    """A slot that gets another expert, and the slot that it is copied from."""

    slot: int
    expert: int
    source: int


def plan_transfers(old: Placement, new: Placement) -> tuple[Transfer, ...]:
    """Every slot that changes, by ascending slot, each with a source that holds the expert now.

    A slot of the same rank is taken where there is one, then of the same node; among equals the
    rank that sends least so far, then the lowest slot. The same on every rank.
    """
    topology = old.topology
    rank_of = topology.rank_of_slot.tolist()
    node_of = topology.node_of_rank
    holders = [[s for s in row if s >= 0] for row in old.logical_to_physical.tolist()]
    sent: Counter[int] = Counter()
    found = []
    for slot, expert in old.moves(new):
        rank = rank_of[slot]

        def cost(source: int, rank: int = rank) -> tuple[bool, bool, int, int]:
            there = rank_of[source]
            is_far = node_of[there] != node_of[rank]
            return there != rank, is_far, sent[there], source

        source = min(holders[expert], key=cost)
        if rank_of[source] != rank:
            sent[rank_of[source]] += 1
        found.append(Transfer(slot, expert, source))
    return tuple(found)
