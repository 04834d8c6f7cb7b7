"""A row goes once to every rank that has experts of its, and one sum comes back from each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import WireFormat
from mixtura.dispatch.contract import Dispatched, Dispatcher, check_no_grad
from mixtura.dispatch.wire import Wire
from mixtura.errors import ParallelError
from mixtura.parallel.tables import SlotTables
from mixtura.parallel.transport import Pending, Then, Transport
from mixtura.types import Full


@dataclass(frozen=True, slots=True)
class Journey:
    """Where the rows of one dispatch went.

    Attributes:
        send, receive: rows to and from every rank.
        places: (n,) int64 the rows that were sent, token after token, a token's in the order in
            which their results are added.
        first_places: (T,) int64 where in `places` a token's rows begin.
        dtype: of the layer's rows.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    places: Tensor
    first_places: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Leaving:
    """Rows in the order in which they are sent: those for the first rank first.

    Attributes:
        tokens: (n,) int64 the token that each row is.
        local_ids: (n, k) int32 places on the rank that gets it, -1 for none; k is K, or 1 where
            every slot is a row.
        topk_weights: (n, k) fp32.
        adding_order: (n,) int64; rows of a token are added by this, then as they are sent.
        send: rows to every group of ranks, or, once there are some for each cut, to every rank.
    """

    tokens: Tensor
    local_ids: Tensor
    topk_weights: Tensor
    adding_order: Tensor
    send: tuple[int, ...]


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

    def dispatch(
        self,
        hidden_states: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        num_rows: Sequence[int] | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Pending[Dispatched]:
        check_no_grad(hidden_states, topk_weights)
        split = self._by_slot if self.wants_terms else self._by_rank
        leaving = split(physical_ids.long(), topk_weights)
        if self.tp_size > 1:
            leaving = self._to_all_cuts(leaving)
        receive = self._exchange_counts(leaving.send)
        wire = Wire(
            self.wire, hidden_states.dtype, hidden_states.shape[1], leaving.local_ids.shape[1]
        )
        adapters = None if adapter_ids is None else adapter_ids[leaving.tokens]
        records = wire.write(
            hidden_states, leaving.local_ids, leaving.topk_weights, adapters, leaving.tokens
        )
        pending = self.transport.all_to_all(records, leaving.send, receive)
        places = leaving.adding_order.argsort(stable=True)
        per_token = leaving.tokens.bincount(minlength=hidden_states.shape[0])
        first_places = per_token.cumsum(0) - per_token
        journey = Journey(leaving.send, tuple(receive), places, first_places, hidden_states.dtype)
        share = self._expected_share(leaving.local_ids.shape[1])

        def arrived(records: Tensor) -> Dispatched:
            return Dispatched(replace(wire.read(records), expected_share=share), journey)

        return Then(pending, arrived)

    def _expected_share(self, top_k: int) -> float:
        """Of the slots of a row that came here: it has one at least, the others here and there."""
        elsewhere = 1 - 1 / self.slots.num_ranks
        return (1 - elsewhere) / (1 - elsewhere**top_k)

    def _by_rank(self, ids: Tensor, topk_weights: Tensor) -> Leaving:
        """One row for each token and group of ranks that has experts of its."""
        num_groups, num_tokens = self.slots.num_ranks, ids.shape[0]
        owner = self.slots.owner[ids]  # (T,K); num_groups where there is no expert
        goes = torch.zeros((num_tokens, num_groups + 1), dtype=torch.bool, device=ids.device)
        goes = goes.scatter_(1, owner, True)[:, :num_groups]
        group, token = goes.T.nonzero(as_tuple=True)  # by group, then by token
        is_there = owner[token] == group.unsqueeze(1)
        local_ids = torch.where(is_there, self.slots.local[ids[token]], -1)
        send = tuple(goes.sum(0).tolist())
        return Leaving(token, local_ids, topk_weights[token], token, send)

    def _by_slot(self, ids: Tensor, topk_weights: Tensor) -> Leaving:
        """One row for each token and slot that has an expert."""
        num_groups = self.slots.num_ranks
        owner = self.slots.owner[ids].flatten()
        send = tuple(owner.bincount(minlength=num_groups + 1)[:num_groups].tolist())
        order = owner.argsort(stable=True)[: sum(send)]
        return Leaving(
            order // ids.shape[1],
            self.slots.local[ids.flatten()[order]].unsqueeze(1),
            topk_weights.flatten()[order].unsqueeze(1),
            order,
            send,
        )

    def _to_all_cuts(self, leaving: Leaving) -> Leaving:
        """Every group's rows again for each of its ranks."""
        parts = torch.arange(leaving.tokens.shape[0], device=leaving.tokens.device)
        of_groups = torch.split(parts, list(leaving.send))
        rows = torch.cat([part for part in of_groups for _ in range(self.tp_size)])
        return Leaving(
            leaving.tokens[rows],
            leaving.local_ids[rows],
            leaving.topk_weights[rows],
            leaving.adding_order[rows],
            tuple(count for count in leaving.send for _ in range(self.tp_size)),
        )

    def _exchange_counts(self, send: Sequence[int]) -> list[int]:
        """Tell every rank how many rows it gets -> how many come from each."""
        mine = self.transport.next_number()
        told = torch.tensor([[count, mine] for count in send], device=self.transport.device)
        one_each = [1] * self.transport.size
        heard = self.transport.all_to_all(told, one_each, one_each).wait().tolist()
        for rank, (count, number) in enumerate(heard):
            if number != mine or count < 0:
                raise ParallelError(
                    f"rank {rank} must be in the same dispatch as rank {self.transport.rank} "
                    f"(number {mine}); got number {number} and {count} rows from it. All "
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
    """Results of the rows that were sent -> (T,H): the sum of each token's, in order.

    A bag of bf16 rows is summed in fp32 too, but its ties are rounded away from zero, so that what
    layers add to a hidden state would grow.
    """
    if journey.first_places.shape[0] == 0:
        return rows.to(journey.dtype)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = F.embedding_bag(journey.places, wide, journey.first_places, mode="sum")
    return total.to(journey.dtype)
