"""A row goes once to every rank that has experts of its, and one sum comes back from each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import WireFormat
from mixtura.dispatch.contract import Dispatched, Dispatcher, check_no_grad
from mixtura.dispatch.wire import Wire
from mixtura.errors import ParallelError
from mixtura.parallel.tables import SlotTables
from mixtura.parallel.transport import Pending, Then, Transport
from mixtura.types import ExpertBatch, Full


@dataclass(frozen=True, slots=True)
class Journey:
    """Where the rows of one dispatch went.

    Attributes:
        send, receive: rows to and from every rank.
        places: (T, D) int64 where among the rows that were sent a token's are, in the order in
            which their results are added; the number of rows stands for none.
        dtype: of the layer's rows.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    places: Tensor
    dtype: torch.dtype


class AllToAllDispatcher(Dispatcher):
    """Rows to their experts, sums back, added at home in fp32 in ascending rank.

    How many rows go where is exchanged first, with a number that tells one exchange from the next:
    ranks that are not in the same place of the same forward end in an error instead of in wrong
    rows. Where `wants_terms`, every (token, slot) is a row of its own, whose result comes back in
    fp32, and slots are added in their order: bitwise the same with any number of ranks.

    Args:
        transport: the ranks; `tp_size` consecutive ones hold cuts of the same experts.
        slots: which group of ranks holds which physical expert.
        tp_size: ranks to a group.
        wire: what rows travel as on the way out.
        wants_terms: see above.
    """

    name: ClassVar[str] = "all_to_all"
    is_remote: ClassVar[bool] = True
    is_capturable: ClassVar[bool] = False

    def __init__(
        self,
        transport: Transport,
        slots: SlotTables,
        *,
        tp_size: int = 1,
        wire: WireFormat = WireFormat.MODEL,
        wants_terms: bool = False,
    ) -> None:
        self.transport = transport
        self.slots = slots
        self.tp_size = tp_size
        self.wire = wire
        self.wants_terms = wants_terms
        self._number = 0

    def dispatch(
        self,
        hidden_states: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        num_rows: Sequence[int] | None = None,
    ) -> Pending[Dispatched]:
        check_no_grad(hidden_states, topk_weights)
        ids = physical_ids.long()
        if self.wants_terms:
            batch, per_group, places = self._by_slot(hidden_states, ids, topk_weights)
        else:
            batch, per_group, places = self._by_rank(hidden_states, ids, topk_weights)
        send = [count for count in per_group.tolist() for _ in range(self.tp_size)]
        if self.tp_size > 1:
            batch, places = self._to_all_cuts(batch, per_group.tolist(), places)
        receive = self._exchange_counts(send)
        wire = Wire(
            self.wire, hidden_states.dtype, hidden_states.shape[1], batch.local_ids.shape[1]
        )
        pending = self.transport.all_to_all(wire.write(batch), send, receive)
        journey = Journey(tuple(send), tuple(receive), places, hidden_states.dtype)
        return Then(pending, lambda records: Dispatched(wire.read(records), journey))

    def _by_rank(
        self, hidden_states: Tensor, ids: Tensor, topk_weights: Tensor
    ) -> tuple[ExpertBatch, Tensor, Tensor]:
        """One row for each token and group of ranks that has experts of its."""
        num_groups, (num_tokens, top_k) = self.slots.num_ranks, ids.shape
        owner = self.slots.owner[ids]  # (T,K); num_groups where there is no expert
        goes = torch.zeros((num_tokens, num_groups + 1), dtype=torch.bool, device=ids.device)
        goes = goes.scatter_(1, owner, True)[:, :num_groups]
        group, token = goes.T.nonzero(as_tuple=True)  # by group, then by token
        is_there = owner[token] == group.unsqueeze(1)
        local_ids = torch.where(is_there, self.slots.local[ids[token]], -1)
        batch = ExpertBatch(hidden_states[token], local_ids, topk_weights[token])
        depth = min(top_k, num_groups)
        places = torch.full((num_tokens, depth), token.shape[0], device=ids.device)
        nth = goes.cumsum(1)[token, group] - 1
        places[token, nth] = torch.arange(token.shape[0], device=ids.device)
        return batch, goes.sum(0), places

    def _by_slot(
        self, hidden_states: Tensor, ids: Tensor, topk_weights: Tensor
    ) -> tuple[ExpertBatch, Tensor, Tensor]:
        """One row for each token and slot that has an expert."""
        num_groups, (num_tokens, top_k) = self.slots.num_ranks, ids.shape
        owner = self.slots.owner[ids].flatten()
        order = owner.argsort(stable=True)
        per_group = torch.bincount(owner, minlength=num_groups + 1)[:num_groups]
        order = order[: int(per_group.sum())]
        batch = ExpertBatch(
            hidden_states[order // top_k],
            self.slots.local[ids.flatten()[order]].unsqueeze(1),
            topk_weights.flatten()[order].unsqueeze(1),
        )
        places = torch.full((num_tokens * top_k,), order.shape[0], device=ids.device)
        places[order] = torch.arange(order.shape[0], device=ids.device)
        return batch, per_group, places.view(num_tokens, top_k)

    def _to_all_cuts(
        self, batch: ExpertBatch, per_group: list[int], places: Tensor
    ) -> tuple[ExpertBatch, Tensor]:
        """Every group's rows again for each of its ranks."""
        device = places.device
        starts = torch.tensor([0, *per_group], device=device).cumsum(0)
        again = [
            torch.arange(int(starts[group]), int(starts[group + 1]), device=device)
            for group in range(len(per_group))
            for _ in range(self.tp_size)
        ]
        rows = torch.cat(again)
        # Row f of group g is at tp * start(g) + cut * count(g) + (f - start(g)).
        group = torch.repeat_interleave(torch.arange(len(per_group), device=device), starts.diff())
        count = starts.diff()[group]
        first = torch.arange(group.shape[0], device=device) + (self.tp_size - 1) * starts[group]
        cuts = torch.arange(self.tp_size, device=device)
        found = first.unsqueeze(1) + cuts * count.unsqueeze(1)  # (n, tp)
        none = found.new_full((1, self.tp_size), rows.shape[0])
        places = torch.cat([found, none])[places].flatten(1)
        return (
            ExpertBatch(batch.hidden_states[rows], batch.local_ids[rows], batch.topk_weights[rows]),
            places,
        )

    def _exchange_counts(self, send: list[int]) -> list[int]:
        """Tell every rank how many rows it gets -> how many come from each."""
        self._number += 1
        told = torch.tensor([[count, self._number] for count in send], device=self.transport.device)
        one_each = [1] * self.transport.size
        heard = self.transport.all_to_all(told, one_each, one_each).wait().tolist()
        for rank, (count, number) in enumerate(heard):
            if number != self._number or count < 0:
                raise ParallelError(
                    f"rank {rank} must be in the same dispatch as rank {self.transport.rank} "
                    f"(number {self._number}); got number {number} and {count} rows from it. All "
                    f"ranks must run the same layers in the same order."
                )
        return [count for count, _ in heard]

    def combine(self, rows: Tensor, handle: Any) -> Pending[Full]:
        journey: Journey = handle
        if self.wants_terms:
            rows = rows[:, 0]  # a row has one slot
        pending = self.transport.all_to_all(rows, journey.receive, journey.send)
        return Then(pending, lambda rows: Full(_add(rows, journey)))


def _add(rows: Tensor, journey: Journey) -> Tensor:
    """Results of the rows that were sent -> (T,H), a token's added in the order of `places`."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows = torch.cat([rows, rows.new_zeros((1, rows.shape[1]))])
    total = rows.new_zeros((journey.places.shape[0], rows.shape[1]), dtype=dtype)
    for places in journey.places.unbind(1):
        total += rows[places]
    return total.to(journey.dtype)
