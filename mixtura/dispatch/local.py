"""The dispatcher that does nothing: every expert is on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from mixtura.dispatch.contract import Dispatched, Dispatcher
from mixtura.parallel.transport import Pending, Ready
from mixtura.types import ExpertBatch, Full


class LocalDispatcher(Dispatcher):
    """Physical ids are local ids; rows stay."""

    name: ClassVar[str] = "local"
    is_remote: ClassVar[bool] = False
    is_capturable: ClassVar[bool] = True

    def dispatch(
        self,
        hidden_states: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        num_rows: Sequence[int] | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Pending[Dispatched]:
        batch = ExpertBatch(hidden_states, physical_ids, topk_weights, adapter_ids=adapter_ids)
        return Ready(Dispatched(batch, None))

    def combine(self, rows: Tensor, handle: Any) -> Pending[Full]:
        return Ready(Full(rows))
