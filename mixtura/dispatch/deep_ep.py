"""DeepEP's kernels as a dispatcher, where the package is installed: NVLink and RDMA by themselves.

Of its forms the one is used that returns rows with their ids, as `ExpertBatch` has them: one row
for each token and rank, its experts' ids local and -1 where they are elsewhere. What comes home is
summed by DeepEP in the rows' dtype. Source: the interface of `deep_ep.ElasticBuffer` (version 2).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import WireFormat
from mixtura.dispatch.contract import Dispatched, Dispatcher, check_no_grad
from mixtura.errors import InputError, MissingDependency
from mixtura.parallel.ranks import Spread
from mixtura.parallel.transport import Pending, Then, TorchTransport
from mixtura.types import ExpertBatch, Full

PACKAGE = "deep_ep"


def deep_ep_cannot(spread: Spread, *, deterministic: bool) -> str | None:
    """Why DeepEP cannot serve experts here, or None."""
    parallel, sizes = spread.ranks.config, spread.placement.topology.slots_per_rank
    if importlib.util.find_spec(PACKAGE) is None:
        return "the package deep_ep is not installed"
    if spread.ranks.transport.device != "cuda":
        return f"it is for CUDA, and the ranks are on {spread.ranks.transport.device}"
    if deterministic:
        return "it sums in the rows' dtype, and deterministic=True was asked for"
    if parallel.tp_size > 1:
        return f"it sends a row to one rank of an expert, and tp_size is {parallel.tp_size}"
    if len(set(sizes)) > 1:
        return f"it wants as many slots on every rank, and they have {sorted(set(sizes))}"
    if parallel.wire is not WireFormat.MODEL:
        return f"its rows travel in bf16 here, and wire={parallel.wire.value!r} was asked for"
    return None


class DeepEpDispatcher(Dispatcher):
    """Rows to their experts and sums back, by DeepEP.

    The buffer is made with the first rows, and again for more tokens than it was made for.

    Args:
        transport: the ranks, a process group on NCCL.
        num_physical_experts: P.

    Raises:
        MissingDependency: the package is not installed.
    """

    name: ClassVar[str] = "deep_ep"
    is_remote: ClassVar[bool] = True
    is_capturable: ClassVar[bool] = False
    needs_counts = True

    def __init__(self, transport: TorchTransport, num_physical_experts: int) -> None:
        try:
            self._library: Any = importlib.import_module(PACKAGE)
        except ImportError as error:
            raise MissingDependency(
                f"{PACKAGE} (not installed) must be there for this dispatcher; got: {error}. "
                f"Install it, or use all_to_all."
            ) from None
        self.transport = transport
        self.num_physical_experts = num_physical_experts
        self._buffer: Any = None
        self._max_tokens = 0

    def dispatch(
        self,
        hidden_states: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        num_rows: Sequence[int] | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Pending[Dispatched]:
        check_no_grad(hidden_states, topk_weights)
        if adapter_ids is not None:
            raise InputError(
                f"adapter_ids ({tuple(adapter_ids.shape)}) must be None with the dispatcher "
                f"{self.name}, whose rows bring none along; got some. Use all_to_all."
            )
        assert num_rows is not None
        buffer = self._buffer_for(max(num_rows), hidden_states.shape[1], physical_ids.shape[1])
        rows, local_ids, weights, handle, event = buffer.dispatch(
            hidden_states,
            topk_idx=physical_ids.to(torch.int64),
            topk_weights=topk_weights,
            num_experts=self.num_physical_experts,
            num_max_tokens_per_rank=self._max_tokens,
            async_with_compute_stream=True,
        )

        def arrived(_: None) -> Dispatched:
            batch = ExpertBatch(rows, local_ids.to(torch.int32), weights)
            return Dispatched(batch, handle)

        return Then(_Event(event), arrived)

    def combine(self, rows: Tensor, handle: Any) -> Pending[Full]:
        combined, _, event = self._buffer.combine(
            rows, handle=handle, async_with_compute_stream=True
        )
        return Then(_Event(event), lambda _: Full(combined))

    def _buffer_for(self, num_tokens: int, hidden_size: int, top_k: int) -> Any:
        """A buffer for so many tokens of every rank; sizes are powers of two, alike on all ranks.

        DeepEP compiles a kernel for each size, and to exceed one ends the process.
        """
        if num_tokens > self._max_tokens or self._buffer is None:
            self._max_tokens = 1 << max(num_tokens - 1, 0).bit_length()
            self._buffer = self._library.ElasticBuffer(
                self.transport.group,
                num_max_tokens_per_rank=self._max_tokens,
                hidden=hidden_size,
                num_topk=top_k,
            )
        return self._buffer


class _Event:
    """The end of an exchange on DeepEP's own stream, as something to wait for."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.current_stream_wait()
