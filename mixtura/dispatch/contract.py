"""A pair of steps around the experts: rows go out, results come home."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from mixtura.types import ExpertBatch, Full, Partial, Routing

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """Something under way; `wait` ends it."""

    def wait(self) -> T_co:
        """Return the result, waiting for it if needed."""
        ...


@dataclass(frozen=True, slots=True)
class Ready(Generic[T_co]):
    """A result that was there at once."""

    value: T_co

    def wait(self) -> T_co:
        """The result."""
        return self.value


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows for this rank's experts, and what `combine` needs to bring the results home."""

    batch: ExpertBatch
    handle: Any


class Dispatcher(ABC):
    """Sends rows to the ranks that hold their experts, and brings the results home.

    Attributes:
        is_remote: there are other ranks to wait for, so that work can be done meanwhile.
        is_capturable: it can run inside a CUDA graph.
    """

    is_remote: ClassVar[bool]
    is_capturable: ClassVar[bool]

    @abstractmethod
    def dispatch(self, hidden_states: Tensor, routing: Routing) -> Pending[Dispatched]:
        """Send (T,H) rows with their ids and weights; what arrives is this rank's `ExpertBatch`."""

    @abstractmethod
    def combine(self, rows: Tensor, handle: Any) -> Pending[Full | Partial]:
        """Send the experts' results (M,H) home; what arrives is (T,H)."""
