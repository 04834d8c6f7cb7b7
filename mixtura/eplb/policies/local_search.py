"""Policy `local_search`: few slots of the placement in force change, and ranks get even.

Two kinds of change are weighed, both at the rank with most load: two slots of different ranks
swap, or a slot that its expert can do without takes a copy of another expert. The change that
lowers the sum of squared rank loads most for each slot moved is made, unless the largest rank load
would rise; until the budget is spent, the target is reached, or nothing helps.

The sum of squares serves better than the largest load: it sees what a change does to all ranks, so
that fewer moves reach the same balancedness (`docs/eplb.md`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtura.eplb.loads import Loads
from mixtura.eplb.policies.contract import (
    Budget,
    Ids,
    Policy,
    next_placement,
    require_same,
    require_slots,
)
from mixtura.eplb.policies.distinct import plan_global
from mixtura.parallel import ModelPlacement, Topology

SMALLEST_GAIN = 1e-9
"""Of the squared mean rank load; what is below is rounding."""

Floats = NDArray[np.float64]


def plan_local_search(
    loads: Loads, old: ModelPlacement | None, topology: Topology, budget: Budget
) -> ModelPlacement:
    """Improve the placement in force within the budget, layer by layer.

    A layer's balancedness never falls. Without a placement in force there is nothing to move: the
    search starts at the plan of policy `global` and the budget's moves are not asked.

    Raises:
        InputError: the placement in force is of other slots or another number of experts.
    """
    num_layers, num_experts = loads.shape
    require_slots(num_experts, topology)
    start = plan_global(loads, None, topology, budget) if old is None else old
    require_same(start, loads, topology)
    max_moves = None if old is None else budget.max_moves_per_layer
    ids = start.physical_to_logical.numpy().astype(np.int64)
    if max_moves is None:
        max_moves = topology.num_physical_experts
    rank_of_slot = topology.rank_of_slot.numpy().astype(np.int64)
    planned = np.empty_like(ids)
    for layer in range(num_layers):
        search = _Search(loads[layer], ids[layer], rank_of_slot)
        search.run(max_moves, budget.target_balancedness)
        planned[layer] = search.placed
    return next_placement(planned, num_experts, topology, old)


class _Change(NamedTuple):
    """What to do, and by how much a moved slot lowers the sum of squared rank loads."""

    gain: float
    slots: tuple[int, ...]
    experts: tuple[int, ...]


NO_CHANGE = _Change(0.0, (), ())


class _Search:
    """One layer's placement while it changes; an empty slot holds expert E, which has no load."""

    def __init__(self, loads: Floats, ids: Ids, rank_of_slot: Ids) -> None:
        num_experts = len(loads)
        self.loads = np.append(loads, 0.0)
        self.start = np.where(ids < 0, num_experts, ids)
        self.ids = self.start.copy()
        self.rank_of_slot = rank_of_slot
        self.empty = num_experts
        self.copies = np.zeros((num_experts + 1, int(rank_of_slot.max()) + 1))  # (E+1, R)
        held = self.ids != self.empty
        np.add.at(self.copies, (self.ids[held], rank_of_slot[held]), 1)
        self.mean = loads.sum() / len(np.unique(rank_of_slot))
        self._refresh()

    def _refresh(self) -> None:
        """What follows from the copies: counts, loads of a replica, rank loads."""
        self.count = self.copies.sum(1)
        self.count[self.empty] = 2  # an empty slot can be done without
        self.share = self.loads / self.count
        self.rank_loads = self.share @ self.copies
        self.met_load = self.copies @ self.rank_loads  # what the ranks of an expert have to do
        self.squares = (self.copies**2).sum(1)

    @property
    def placed(self) -> Ids:
        """(P,) the experts, -1 for an empty slot."""
        return np.where(self.ids == self.empty, -1, self.ids)

    @property
    def num_moved(self) -> int:
        """Slots that must get another expert."""
        return int(((self.ids != self.start) & (self.ids != self.empty)).sum())

    def run(self, max_moves: int, target: float) -> None:
        """Change slots until the budget is spent, the target reached, or nothing helps."""
        while self.rank_loads.max() * target > self.mean:
            left = max_moves - self.num_moved
            hot = int(self.rank_loads.argmax())
            change = self._best_copy(hot) if left >= 1 else NO_CHANGE
            if left >= 2:
                change = max(self._best_swap(hot), change, key=lambda found: found.gain)
            if change.gain <= SMALLEST_GAIN * self.mean**2:
                return
            for slot, expert in zip(change.slots, change.experts, strict=True):
                self._set(slot, expert)
            self._refresh()

    def _set(self, slot: int, expert: int) -> None:
        rank = self.rank_of_slot[slot]
        if self.ids[slot] != self.empty:
            self.copies[self.ids[slot], rank] -= 1
        if expert != self.empty:
            self.copies[expert, rank] += 1
        self.ids[slot] = expert

    def _best_swap(self, hot: int) -> _Change:
        """A slot of the hot rank against one elsewhere that has less load, or none.

        `d` less on the hot rank and more on the other lowers the sum of squares by
        `2 d (hot - other - d)`; where that is above 0, the other stays below what hot was.
        """
        mine = np.flatnonzero((self.rank_of_slot == hot) & (self.ids != self.empty))
        others = np.flatnonzero(self.rank_of_slot != hot)
        if not len(others):
            return NO_CHANGE
        a, b = self.ids[mine][:, None], self.ids[others]
        ranks = self.rank_of_slot[others]
        less = self.share[a] - self.share[b]
        gain = less * (self.rank_loads[hot] - self.rank_loads[ranks] - less)  # for each of 2 slots
        is_legal = (less > 0) & (self.copies[a, ranks] == 0) & (self.copies[b, hot] == 0)
        best = int(np.where(is_legal, gain, 0.0).argmax())
        row, column = divmod(best, len(others))
        if not is_legal[row, column]:
            return NO_CHANGE
        slots = (int(mine[row]), int(others[column]))
        experts = (int(self.ids[slots[1]]), int(self.ids[slots[0]]))
        return _Change(float(gain[row, column]), slots, experts)

    def _best_copy(self, hot: int) -> _Change:
        """A copy of the hot rank's experts elsewhere, or of any expert on the hot rank."""
        can_spare = self.count[self.ids] > 1
        is_hot = self.rank_of_slot == hot
        mine = np.unique(self.ids[is_hot & (self.ids != self.empty)])
        pairs = (
            (np.flatnonzero(can_spare & ~is_hot), mine),
            (np.flatnonzero(can_spare & is_hot), np.arange(self.empty)),
        )
        gains = [self._copy_gains(slots, experts) for slots, experts in pairs]
        flat = np.concatenate([gain.reshape(-1) for gain in gains])
        while len(flat) and flat[best := int(flat.argmax())] > 0:
            which = int(best >= gains[0].size)
            slots, experts = pairs[which]
            row, column = divmod(best - which * gains[0].size, len(experts))
            slot, expert = int(slots[row]), int(experts[column])
            if self._largest_after_copy(slot, expert) <= self.rank_loads.max():
                return _Change(float(flat[best]), (slot,), (expert,))
            flat[best] = 0
        return NO_CHANGE

    def _copy_gains(self, slots: Ids, experts: Ids) -> Floats:
        """(slots, experts) fall of the sum of squares where the slot takes the expert; 0: illegal.

        The rank loads change by `taken * copies[new] + given * copies[old] + own * [slot's rank]`:
        the new expert's replicas get less each, the old one's more.
        """
        new, old = experts, self.ids[slots][:, None]
        rank = self.rank_of_slot[slots][:, None]
        new_share = self.loads[new] / (self.count[new] + 1)
        old_share = self.loads[old] / (self.count[old] - 1)
        taken, given = new_share - self.share[new], old_share - self.share[old]
        own = new_share - old_share
        both = self.copies[self.ids[slots]] @ self.copies[new].T
        linear = (
            taken * self.met_load[new] + given * self.met_load[old] + own * self.rank_loads[rank]
        )
        square = taken**2 * self.squares[new] + given**2 * self.squares[old] + own**2
        square += 2 * given * (taken * both + own * self.copies[old, rank])
        is_legal = self.copies[new, rank] == 0
        return np.where(is_legal, -2 * linear - square, 0.0)

    def _largest_after_copy(self, slot: int, expert: int) -> float:
        old, rank = self.ids[slot], self.rank_of_slot[slot]
        new_share = self.loads[expert] / (self.count[expert] + 1)
        old_share = self.loads[old] / (self.count[old] - 1)
        changed = self.rank_loads + self.copies[expert] * (new_share - self.share[expert])
        changed += self.copies[old] * (old_share - self.share[old])
        changed[rank] += new_share - old_share
        return float(changed.max())


LOCAL_SEARCH = Policy("local_search", plan_local_search, is_incremental=True)
