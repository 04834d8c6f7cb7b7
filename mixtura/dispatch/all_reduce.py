"""All ranks hold the same tokens: each runs its own experts on them, and the results are summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from mixtura.dispatch.contract import Dispatched, Dispatcher, check_no_grad, sum_slots
from mixtura.parallel.tables import SlotTables
from mixtura.parallel.transport import Pending, Ready, Then, Transport
from mixtura.types import ExpertBatch, Full


class AllReduceDispatcher(Dispatcher):
    """`out = sum over ranks of experts(x)`, where a rank's foreign ids are -1.

    No row is sent and no size is read on the host. Every rank must choose the same replica of an
    expert for a token, or two of them would run it.

    Args:
        transport: the ranks.
        slots: which rank holds which physical expert.
        wants_terms: sum every slot's term by itself, so that a row is bitwise the same with any
            number of ranks; K times as much is sent, in fp32.
    """

    name: ClassVar[str] = "all_reduce"
    is_remote: ClassVar[bool] = True
    is_capturable: ClassVar[bool] = True
    needs_same_replicas: ClassVar[bool] = True

    def __init__(
        self, transport: Transport, slots: SlotTables, *, wants_terms: bool = False
    ) -> None:
        self.transport = transport
        self.slots = slots
        self.wants_terms = wants_terms
        self.part = None if wants_terms else (transport.rank, transport.size)

    def dispatch(
        self,
        hidden_states: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        num_rows: Sequence[int] | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Pending[Dispatched]:
        check_no_grad(hidden_states, topk_weights)
        local_ids = self.slots.local_ids(physical_ids)
        share = 1 / self.transport.size
        batch = ExpertBatch(
            hidden_states,
            local_ids,
            topk_weights,
            expected_share=share,
            adapter_ids=adapter_ids,
        )
        return Ready(Dispatched(batch, hidden_states.dtype))

    def combine(self, rows: Tensor, handle: Any) -> Pending[Full]:
        pending = self.transport.all_reduce(rows.contiguous())
        if self.wants_terms:
            return Then(pending, lambda terms: Full(sum_slots(terms, handle)))
        return Then(pending, Full)
