"""The dispatcher that does nothing: every expert is on this rank."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mixtura.dispatch.contract import Dispatched, Dispatcher, Pending, Ready
from mixtura.types import ExpertBatch, Full, Partial, Routing


class LocalDispatcher(Dispatcher):
    """Logical ids are local ids; rows stay."""

    is_remote: ClassVar[bool] = False
    is_capturable: ClassVar[bool] = True

    def dispatch(self, hidden_states: Tensor, routing: Routing) -> Pending[Dispatched]:
        batch = ExpertBatch(hidden_states, routing.topk_ids, routing.topk_weights)
        return Ready(Dispatched(batch, None))

    def combine(self, rows: Tensor, handle: Any) -> Pending[Full | Partial]:
        return Ready(Full(rows))
