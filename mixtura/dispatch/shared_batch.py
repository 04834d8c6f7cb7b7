"""All ranks hold one batch, and each sends its own part of it: sequence parallelism of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from mixtura.dispatch.contract import Dispatched, Dispatcher
from mixtura.parallel.transport import Pending, Then, Transport
from mixtura.types import Full, even_bounds


class SharedBatchDispatcher(Dispatcher):
    """Around a dispatcher of ranks with tokens of their own: parts go out, all results come home.

    Args:
        transport: the ranks.
        inner: what each part travels by.
    """

    is_remote: ClassVar[bool] = True
    is_capturable: ClassVar[bool] = False

    def __init__(self, transport: Transport, inner: Dispatcher) -> None:
        self.transport = transport
        self.inner = inner
        self.wants_terms = inner.wants_terms

    @property
    def name(self) -> str:  # type: ignore[override]
        """The inner dispatcher's."""
        return self.inner.name

    def dispatch(
        self,
        hidden_states: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        num_rows: Sequence[int] | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Pending[Dispatched]:
        bounds = even_bounds(hidden_states.shape[0], self.transport.size)
        counts = tuple(stop - start for start, stop in pairwise(bounds))
        start, stop = bounds[self.transport.rank : self.transport.rank + 2]
        part = slice(start, stop)
        adapters = None if adapter_ids is None else adapter_ids[part]
        pending = self.inner.dispatch(
            hidden_states[part], physical_ids[part], topk_weights[part], counts, adapters
        )
        return Then(pending, lambda out: Dispatched(out.batch, (out.handle, counts)))

    def combine(self, rows: Tensor, handle: Any) -> Pending[Full]:
        inner, counts = handle
        pending = self.inner.combine(rows, inner)

        def gather(own: Full) -> Full:
            return Full(self.transport.all_gather(own.tensor, counts).wait())

        return Then(pending, gather)
