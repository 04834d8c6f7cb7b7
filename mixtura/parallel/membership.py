"""The ranks that are left after a loss form a group of their own.

They meet at a store that lives in none of them. Every survivor registers under the number of the
next generation; when the time is over, one of them writes down who has come, and what is written
first holds for all. A rank that comes later finds itself left out, and says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from mixtura.errors import ExpertsLost, ParallelError, RankLost
from mixtura.parallel.placement import ModelPlacement, Placement
from mixtura.parallel.topology import Topology
from mixtura.parallel.transport import TorchTransport, Transport, first_line, join

PlacementT = TypeVar("PlacementT", Placement, ModelPlacement)

POLL_SECONDS = 0.02
"""Between looks at the store: small beside what a loss has cost already."""

FORMED, FAILED = "formed", "failed"


@dataclass(frozen=True, slots=True)
class Regrouped:
    """What the survivors go on with.

    Attributes:
        transport: their group, of a new generation.
        survivors: their ranks in the group that was, ascending: the new rank is the place here.
        tp_size: consecutive ranks that hold cuts of the same experts.
    """

    transport: Transport
    survivors: tuple[int, ...]
    tp_size: int

    def placement_of(self, placement: PlacementT) -> PlacementT:
        """The placement without the slots of lost ranks; the other slots keep their experts.

        Args:
            placement: over the group that was, the same on every survivor.

        Raises:
            ExpertsLost: nobody has a copy of some experts; the message names them.
        """
        left = tuple(dict.fromkeys(rank // self.tp_size for rank in self.survivors))
        return without_lost(placement, left, self.transport.generation)


def regroup(store: Store, old: Transport, *, timeout_seconds: float, tp_size: int = 1) -> Regrouped:
    """Form a group of the ranks that are left.

    Called by every survivor after `RankLost`. The old group is left, and with it every process
    group of torch.distributed in this process, as all of them are over lost ranks. Where a rank is
    lost meanwhile, the others try again under the next number.

    Args:
        store: reached by all ranks, and living in none of them.
        old: the group that was; its rank, size and generation count, and it is closed.
        timeout_seconds: how long to wait for survivors, which notice the loss one after the other,
            each within the old group's timeout; then how long an exchange of the new group waits.
        tp_size: consecutive ranks that hold cuts of the same experts; where one of them is lost,
            the others are of no use.

    Raises:
        RankLost: this rank came too late, or lost the other cuts of its experts.
        ParallelError: the store does not answer.
    """
    old.close()
    members = tuple(range(old.size))
    try:
        for generation in range(old.generation + 1, old.generation + 1 + old.size):
            names = PrefixStore(f"mixtura/membership/{generation}", store)
            members = _agree(names, old, members, timeout_seconds)
            survivors = in_whole_groups(members, tp_size)
            if old.rank not in survivors:
                raise RankLost(
                    f"the cuts of the experts of rank {old.rank} must all be there; got ranks "
                    f"{list(members)} of {old.size}, with tp_size {tp_size}. End this rank, or "
                    f"restart from the checkpoint: the others go on without it."
                )
            place = (survivors.index(old.rank), len(survivors))
            transport = _form(names, store, place, generation, timeout_seconds)
            if transport is not None:
                return Regrouped(transport, survivors, tp_size)
    except RuntimeError as error:
        raise ParallelError(
            f"the store (for rank {old.rank} of {old.size}) must answer; got: "
            f"{first_line(error)}. Keep it in a process that outlives the ranks."
        ) from error
    raise RankLost(
        f"a group of the survivors (rank {old.rank} of {old.size}) must be formed in {old.size} "
        f"tries; got another loss in each. Restart from the checkpoint."
    )


def in_whole_groups(ranks: Collection[int], tp_size: int) -> tuple[int, ...]:
    """The ranks, ascending, whose `tp_size` consecutive ranks are all among them.

    >>> in_whole_groups([0, 1, 2, 5, 4], tp_size=2)
    (0, 1, 4, 5)
    """
    present = set(ranks)

    def is_whole(rank: int) -> bool:
        first = rank - rank % tp_size
        return present.issuperset(range(first, first + tp_size))

    return tuple(rank for rank in sorted(present) if is_whole(rank))


def without_lost(placement: PlacementT, survivors: Collection[int], generation: int) -> PlacementT:
    """The placement without the slots of ranks that are lost; the other slots keep their experts.

    Args:
        placement: of all ranks.
        survivors: the ranks of its topology that are left, ascending.
        generation: of the group that they form.

    Raises:
        ExpertsLost: nobody has a copy of some experts; the message names them.
    """
    topology = placement.topology
    lost = sorted(set(range(topology.num_ranks)) - set(survivors))
    _check_nothing_is_missing(placement, lost)
    is_left = torch.isin(topology.rank_of_slot, torch.tensor(sorted(survivors)))
    return replace(
        placement,
        physical_to_logical=placement.physical_to_logical[..., is_left],
        topology=Topology(
            tuple(topology.slots_per_rank[rank] for rank in survivors),
            tuple(topology.node_of_rank[rank] for rank in survivors),
            generation,
        ),
        version=placement.version + 1,
    )


def _check_nothing_is_missing(
    placement: Placement | ModelPlacement, lost_ranks: Collection[int]
) -> None:
    """Raise `ExpertsLost`, with names, where the ranks that are left do not hold all experts."""
    if isinstance(placement, Placement):
        layers = {"": placement}
    else:
        layers = {f" of layer {n}": placement.layer(n) for n in range(placement.num_layers)}
    missing = {where: layer.missing_experts(lost_ranks) for where, layer in layers.items()}
    named = [
        f"{', '.join(map(str, experts))}{where}" for where, experts in missing.items() if experts
    ]
    if named:
        raise ExpertsLost(
            f"every expert must be held by a rank that is left; got none for expert "
            f"{'; '.join(named)} without the ranks {list(lost_ranks)}. Restart from the "
            f"checkpoint, or place redundant experts so that any rank may be lost."
        )


def _agree(
    names: Store, old: Transport, expected: Collection[int], seconds: float
) -> tuple[int, ...]:
    """Register -> the old ranks that form the next group, the same for all of them."""
    names.set(f"rank{old.rank}", "here")
    deadline = time.monotonic() + seconds
    while not names.check(["members"]):
        came = [rank for rank in expected if names.check([f"rank{rank}"])]
        if len(came) == len(expected) or time.monotonic() > deadline:
            names.compare_set("members", "", json.dumps(came))
        else:
            time.sleep(POLL_SECONDS)
    members: list[int] = json.loads(names.get("members"))
    if old.rank not in members:
        raise RankLost(
            f"rank {old.rank} (of {old.size}) must register within {seconds} s of the first that "
            f"noticed the loss; got a group of ranks {members}, which go on without it. End this "
            f"rank, or restart from the checkpoint."
        )
    return tuple(members)


def _form(
    names: Store, store: Store, place: tuple[int, int], generation: int, seconds: float
) -> TorchTransport | None:
    """The group; None on every rank where one of them could not join it.

    That all have joined, or not, is written down once as well: no rank goes on while another
    tries again.
    """
    rank, size = place
    try:
        transport = join(store, rank, size, generation=generation, timeout_seconds=seconds)
    except RankLost:
        names.compare_set("outcome", "", FAILED)
        return None
    names.set(f"joined{rank}", "here")
    deadline = time.monotonic() + seconds
    everybody = [f"joined{other}" for other in range(size)]
    while not names.check(["outcome"]):
        if names.check(everybody):
            names.compare_set("outcome", "", FORMED)
        elif time.monotonic() > deadline:
            names.compare_set("outcome", "", FAILED)
        else:
            time.sleep(POLL_SECONDS)
    if names.get("outcome").decode() == FORMED:
        return transport
    transport.close()
    return None
