"""Experts move between ranks while the model runs: prepare, transfer, verify, commit.

A layer is wholly old or wholly new on every rank. Its new experts are received beside the old ones
a few at a time, each time in the background of a forward; when all have arrived, each rank says
whether its own are whole, and only then every rank writes slots and tables, between two forwards.
What has been said is in the journal, from which survivors of a loss can tell whether to finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from mixtura.eplb.records import LayerSlots
from mixtura.eplb.transfers import Transfer, plan_transfers
from mixtura.errors import MigrationError, RankLost
from mixtura.parallel import ExpertParallel, ModelPlacement, Pending, Placement, Transport

OnCommit = Callable[[int, Placement], None]
"""Called with a layer and its new placement."""

LOSS = "a rank was lost"
"""Why a migration ends that its survivors have resolved."""


class Phase(StrEnum):
    """How far a layer has come."""

    PREPARED = "prepared"
    VERIFIED = "verified"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the journal: a layer, how far it has come, and the placement that it goes to."""

    layer: int
    phase: Phase
    digest: str


@dataclass(slots=True)
class Batch:
    """Transfers of one layer that are under way, and the seconds that it took to start them."""

    transfers: Sequence[Transfer]
    pending: Pending[None]
    seconds: float


class Migration:
    """The way from one placement of a model to another.

    Every rank makes the same calls of `step`, one between forwards, until `is_over`.

    Args:
        ranks: whose main transport carries what ranks agree on.
        background: a group of the same ranks for the weights alone.
        layers: this rank's slots of every layer.
        old, new: placements of all layers.
        seconds_per_step: how long the weights of a step may take to arrive.
        on_commit: called with a layer and its new placement, when every rank has its weights.
    """

    def __init__(
        self,
        ranks: ExpertParallel,
        background: Transport,
        layers: Sequence[LayerSlots],
        old: ModelPlacement,
        new: ModelPlacement,
        *,
        seconds_per_step: float,
        on_commit: OnCommit,
    ) -> None:
        self.ranks = ranks
        self.background = background
        self.layers = list(layers)
        self.placements = [old.layer(layer) for layer in range(old.num_layers)]
        self.goals = [new.layer(layer) for layer in range(new.num_layers)]
        self.seconds_per_step = seconds_per_step
        self.on_commit = on_commit
        self.journal: list[Entry] = []
        self.failure: str | None = None
        self.num_moved = 0
        self.num_bytes = 0
        self._queue = [
            (layer, transfers)
            for layer, (was, goal) in enumerate(zip(self.placements, self.goals, strict=True))
            if (transfers := plan_transfers(was, goal))
        ]
        self._first = old.topology.first_slot(ranks.ep_rank)
        self._staged: dict[int, Tensor] = {}
        self._next = 0
        self._batch: Batch | None = None
        self._slots_per_step = 1

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return not self._queue or self.failure is not None

    @property
    def layer(self) -> int:
        """The layer that is under way, or comes next."""
        return self._queue[0][0]

    def step(self) -> None:
        """Take in what has arrived, agree with the other ranks, and send what is next.

        Raises:
            RankLost: a rank did not take part in the agreement.
        """
        if self.is_over:
            return
        layer, transfers = self._queue[0]
        if self._batch is None:
            self._note(layer, Phase.PREPARED)
            self._send(layer, transfers)
            return
        problem, seconds = self._take_in(layer)
        is_last = self._next >= len(transfers)
        if is_last and problem is None:
            self._note(layer, Phase.VERIFIED)
        told = self.ranks.transport.exchange((layer, problem is not None, int(seconds * 1e6)))
        if any(failed for _, failed, _ in told):
            lost = [rank for rank, (_, failed, _) in enumerate(told) if failed]
            self._abort(layer, problem or f"ranks {lost} did not get their experts")
            return
        self._adapt(max(micros for _, _, micros in told) / 1e6)
        if is_last:
            self.commit_(layer)
        else:
            self._send(layer, transfers)

    def set_slots(self, slots: LayerSlots) -> None:
        """Where the layer that is under way lies now, on every rank at the same step.

        Where its experts have become others, as with adapters loaded in between, what was received
        is of no use any more, and the layer begins anew; nothing of it has been written.
        """
        if slots.layout != self.layers[self.layer].layout:
            if self._batch is not None:
                self._take_in(self.layer)
            self._staged, self._next = {}, 0
        self.layers[self.layer] = slots

    def _send(self, layer: int, transfers: Sequence[Transfer]) -> None:
        """Start the next few transfers of a layer."""
        batch = transfers[self._next : self._next + self._slots_per_step]
        self._next += len(batch)
        slots, mine = self.layers[layer], range(self._first, self._first + self._num_slots(layer))
        sends, receives = [], []
        started = time.perf_counter()
        for slot, expert, source in batch:
            if source in mine and slot in mine:
                self._staged[slot] = slots.record(source - self._first, expert)
            elif source in mine:
                record = slots.record(source - self._first, expert)
                sends.append((self._rank_of(layer, slot), record))
            elif slot in mine:
                empty = torch.empty(slots.num_words, dtype=torch.int64, device=slots.device)
                self._staged[slot] = empty
                receives.append((self._rank_of(layer, source), empty))
        pending: Pending[None]
        try:
            pending = self.background.swap(sends, receives)
        except RankLost as error:
            pending = _Failed(error)
        self._batch = Batch(batch, pending, time.perf_counter() - started)

    def _take_in(self, layer: int) -> tuple[str | None, float]:
        """Wait for the batch under way and check it -> what is wrong with it, and its seconds."""
        assert self._batch is not None
        batch, self._batch = self._batch, None
        started = time.perf_counter()
        problem = None
        try:
            batch.pending.wait()
            for slot, expert, _ in batch.transfers:
                if slot in self._staged:
                    self.layers[layer].check(self._staged[slot], expert)
        except (RankLost, MigrationError) as error:
            problem = f"layer {layer}: {error}"
        return problem, batch.seconds + time.perf_counter() - started

    def _adapt(self, seconds: float) -> None:
        """As many slots a step as the time allows; the same on all ranks, as is what they told."""
        if seconds > self.seconds_per_step:
            self._slots_per_step = max(1, self._slots_per_step // 2)
        elif seconds < self.seconds_per_step / 2:
            self._slots_per_step += 1

    def commit_(self, layer: int) -> None:
        """Write the slots and the tables of a layer whose experts have all arrived everywhere."""
        slots = self.layers[layer]
        for slot, record in self._staged.items():
            slots.restore_(slot - self._first, record)
        self.placements[layer] = self.goals[layer]
        self.on_commit(layer, self.goals[layer])
        self._note(layer, Phase.COMMITTED)
        self.num_moved += len(self._queue[0][1])
        self.num_bytes += slots.num_bytes * len(self._staged)
        self._forget()

    def _abort(self, layer: int, problem: str) -> None:
        """Leave a layer as it is, and the rest of the way ungone."""
        self._note(layer, Phase.ABORTED)
        self.failure = problem
        self._forget()

    def _forget(self) -> None:
        self._staged = {}
        self._batch = None
        self._next = 0
        del self._queue[0]

    def abandon(self) -> None:
        """Go no further, on every rank: take in what is under way, and leave its layer as it is."""
        if self.is_over:
            return
        if self._batch is not None:
            self._take_in(self.layer)
        self._abort(self.layer, "it was abandoned")

    def resolve(self, transport: Transport) -> None:
        """After a loss, among survivors: every layer that any of them has finished, all finish.

        Nothing more is moved, so that `placement` is the same on all of them. Where a further rank
        is lost in here, the next group of survivors resolves again.

        Args:
            transport: the survivors' new group.

        Raises:
            RankLost: a rank did not take part.
        """
        told = transport.exchange((self.num_done,))
        self.end(is_behind=self.num_done < max(done for (done,) in told))

    def end(self, *, is_behind: bool) -> None:
        """Finish the layer that another rank has finished, if this one is behind; no more."""
        # Nobody is ahead by two layers, nor commits one before all have verified it.
        if is_behind:
            self.commit_(self.layer)
        if not self.is_over:
            self._abort(self.layer, LOSS)

    @property
    def num_done(self) -> int:
        """Layers that are new."""
        return sum(entry.phase is Phase.COMMITTED for entry in self.journal)

    def placement(self) -> ModelPlacement:
        """Where the experts of every layer are now."""
        return ModelPlacement.stack(self.placements, max(p.version for p in self.placements))

    def _note(self, layer: int, phase: Phase) -> None:
        self.journal.append(Entry(layer, phase, self.goals[layer].digest))

    def _num_slots(self, layer: int) -> int:
        return self.layers[layer].num_slots

    def _rank_of(self, layer: int, slot: int) -> int:
        """The rank of the transport that holds this rank's cut of a slot."""
        group = int(self.placements[layer].topology.rank_of_slot[slot])
        return group * self.ranks.config.tp_size + self.ranks.tp_rank


@dataclass(frozen=True, slots=True)
class _Failed:
    """An exchange that could not be started."""

    error: RankLost

    def wait(self) -> None:
        raise self.error
