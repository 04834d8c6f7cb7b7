"""A pair of steps around the experts: rows go out, results come home."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.cuda import cannot_capture, is_capturing
from mixtura.errors import GradientUnsupported
from mixtura.parallel.transport import Pending
from mixtura.types import ExpertBatch, Full


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows for this rank's experts, and what `combine` needs to bring the results home."""

    batch: ExpertBatch
    handle: Any


class Dispatcher(ABC):
    """Sends rows to the ranks that hold their experts, and brings the results home.

    Attributes:
        name: what the configuration calls it.
        is_remote: there are other ranks to wait for, so that work can be done meanwhile.
        is_capturable: it can run inside a CUDA graph; `check_capture` refuses one that cannot.
        needs_same_replicas: every rank must choose the same replica of an expert for a token.
        part: (rank, ranks) where `combine` sums the rows of ranks that hold the same tokens: what
            each adds to its rows is in the sum.
        needs_counts: `dispatch` must be told how many rows every rank brings.
        wants_terms: `combine` takes every slot's term (M,K,H) in fp32 instead of their sums, and
            adds them itself in the order of the slots.
    """

    name: ClassVar[str]
    is_remote: ClassVar[bool]
    is_capturable: ClassVar[bool]
    needs_same_replicas: ClassVar[bool] = False
    part: tuple[int, int] | None = None
    needs_counts: bool = False
    wants_terms: bool = False

    def check_capture(self, device: torch.device) -> None:
        """Raise `CaptureUnsupported` in a CUDA graph that cannot hold it, before any exchange."""
        if is_capturing(device) and not self.is_capturable:
            raise cannot_capture(
                f"dispatcher ({self.name})",
                "one that exchanges sizes which the host reads",
                "Let all ranks hold the same tokens (tokens='shared', dispatcher all_reduce)",
            )

    @abstractmethod
    def dispatch(
        self,
        hidden_states: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        num_rows: Sequence[int] | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Pending[Dispatched]:
        """Send rows; what arrives is this rank's `ExpertBatch`.

        Args:
            hidden_states: (T,H).
            physical_ids: (T,K) int32; -1 is a slot without an expert.
            topk_weights: (T,K) fp32.
            num_rows: how many rows each rank brings, where `needs_counts`.
            adapter_ids: (T,) int32 LoRA adapters of the rows; None: none of them has one.
        """

    @abstractmethod
    def combine(self, rows: Tensor, handle: Any) -> Pending[Full]:
        """Send the experts' results (M,H), or terms (M,K,H), home; what arrives is (T,H)."""


def check_no_grad(*tensors: Tensor) -> None:
    """Raise `GradientUnsupported` where gradients would have to cross ranks."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise GradientUnsupported(
            "rows that cross ranks must not need gradients; got some that do. Use torch.no_grad(), "
            "or train without expert parallelism."
        )


def sum_slots(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """(T,K,H) terms added slot by slot, in their order -> (T,H) of a dtype."""
    total = torch.zeros_like(terms[:, 0])
    for term in terms.unbind(1):
        total = total + term
    return total.to(dtype)
