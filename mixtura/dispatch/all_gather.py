"""Every rank gets every rank's rows; results are summed and scattered back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from mixtura.config import WireFormat
from mixtura.dispatch.contract import Dispatched, Dispatcher, check_no_grad, sum_slots
from mixtura.dispatch.wire import Wire
from mixtura.parallel.tables import SlotTables
from mixtura.parallel.transport import Pending, Then, Transport
from mixtura.types import Full


class AllGatherDispatcher(Dispatcher):
    """One all-gather of rows with their ids and weights, one reduce-scatter of results.

    Args:
        transport: the ranks.
        slots: which rank holds which physical expert.
        wire: what rows travel as.
        wants_terms: as of `AllReduceDispatcher`.
    """

    name: ClassVar[str] = "all_gather"
    is_remote: ClassVar[bool] = True
    is_capturable: ClassVar[bool] = False
    needs_counts = True

    def __init__(
        self,
        transport: Transport,
        slots: SlotTables,
        *,
        wire: WireFormat = WireFormat.MODEL,
        wants_terms: bool = False,
    ) -> None:
        self.transport = transport
        self.slots = slots
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
        assert num_rows is not None and num_rows[self.transport.rank] == hidden_states.shape[0]
        wire = Wire(self.wire, hidden_states.dtype, hidden_states.shape[1], physical_ids.shape[1])
        records = wire.write(hidden_states, physical_ids, topk_weights, adapter_ids)
        pending = self.transport.all_gather(records, num_rows)

        def arrived(records: Tensor) -> Dispatched:
            batch = wire.read(records)
            local_ids, share = self.slots.local_ids(batch.local_ids), 1 / self.transport.size
            batch = replace(batch, local_ids=local_ids, expected_share=share)
            return Dispatched(batch, (tuple(num_rows), hidden_states.dtype))

        return Then(pending, arrived)

    def combine(self, rows: Tensor, handle: Any) -> Pending[Full]:
        num_rows, dtype = handle
        pending = self.transport.reduce_scatter(rows.contiguous(), num_rows)
        if self.wants_terms:
            return Then(pending, lambda terms: Full(sum_slots(terms, dtype)))
        return Then(pending, Full)
