"""Collectives of a group of ranks, started and awaited; all calls of torch.distributed are here.

A call may return before the exchange is over: what it returns is awaited with `wait`. All ranks of
a group make the same calls in the same order, whatever they hold.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from mixtura.errors import RankLost

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
class Then(Generic[T_co]):
    """What `finish` makes of a result that is under way."""

    pending: Pending[Any]
    finish: Callable[[Any], T_co]

    def wait(self) -> T_co:
        """Wait, and finish."""
        return self.finish(self.pending.wait())


class Transport(ABC):
    """A group of ranks that exchange tensors.

    Attributes:
        rank, size: this rank's place among how many.
        generation: counts the groups that took each other's place after a loss.
        device: type of device of the tensors that travel.
    """

    rank: int
    size: int
    generation: int = 0
    device: str = "cpu"
    _number: int = 0

    def next_number(self) -> int:
        """Counts up, over all that shares the transport: what tells one exchange from the next."""
        self._number += 1
        return self._number

    def __deepcopy__(self, memo: object) -> Self:
        return self  # a copied layer meets the same ranks

    @abstractmethod
    def all_reduce(self, rows: Tensor) -> Pending[Tensor]:
        """The sum of all ranks' tensors, which are alike in shape; `rows` may be overwritten."""

    @abstractmethod
    def all_gather(self, rows: Tensor, num_rows: Sequence[int]) -> Pending[Tensor]:
        """All ranks' rows one below the other: (num_rows[rank], W) -> (sum of num_rows, W)."""

    @abstractmethod
    def reduce_scatter(self, rows: Tensor, num_rows: Sequence[int]) -> Pending[Tensor]:
        """Sum all ranks' tensors and keep this rank's rows: (sum of num_rows, W) -> (own, W)."""

    @abstractmethod
    def all_to_all(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> Pending[Tensor]:
        """Send `send[r]` consecutive rows to rank r: (sum of send, W) -> (sum of receive, W)."""

    @abstractmethod
    def swap(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending[None]:
        """Send tensors to ranks, and receive into tensors from ranks, in the order of the lists."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group: the other ranks' calls end in errors instead of waiting for this one."""

    def exchange(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """Every rank's integers, as many from each, by rank. Waits."""
        mine = torch.tensor([list(values)], dtype=torch.int64, device=self.device)
        return [tuple(row) for row in self.all_gather(mine, [1] * self.size).wait().tolist()]

    def exchange_values(self, value: Any) -> list[Any]:
        """Every rank's value, of what JSON can hold, by rank. Waits."""
        data = json.dumps(value, sort_keys=True).encode()
        sizes = [size for (size,) in self.exchange([len(data)])]
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).unsqueeze(1).to(self.device)
        everything = self.all_gather(mine, sizes).wait()
        parts = torch.split(everything, sizes)
        return [json.loads(bytes(part.flatten().tolist())) for part in parts]


class TorchTransport(Transport):
    """Collectives of a process group of torch.distributed, on gloo or NCCL.

    Args:
        group: the process group; the default one unless given.
        generation: see `Transport`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, generation: int = 0) -> None:
        self.group = group if group is not None else dist.group.WORLD
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.generation = generation
        self.device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"

    def another(self, timeout_seconds: float) -> TorchTransport:
        """A second group of the same ranks, with a limit of its own; all ranks make it together."""
        ranks = dist.get_process_group_ranks(self.group)
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_seconds))
        return TorchTransport(group, self.generation)

    def all_reduce(self, rows: Tensor) -> Pending[Tensor]:
        return self._start(
            "all_reduce", rows, lambda: dist.all_reduce(rows, group=self.group, async_op=True)
        )

    def all_gather(self, rows: Tensor, num_rows: Sequence[int]) -> Pending[Tensor]:
        most = max(num_rows)
        padded = _padded(rows, most)
        whole = rows.new_empty((most * self.size, *rows.shape[1:]))
        pending = self._start(
            "all_gather", whole, lambda: _ALL_GATHER(whole, padded, group=self.group, async_op=True)
        )
        if all(count == most for count in num_rows):
            return pending
        return Then(
            pending,
            lambda whole: (
                torch.cat(
                    [
                        part[:count]
                        for part, count in zip(torch.split(whole, most), num_rows, strict=True)
                    ]
                )
                if most
                else whole
            ),
        )

    def reduce_scatter(self, rows: Tensor, num_rows: Sequence[int]) -> Pending[Tensor]:
        most = max(num_rows)
        if any(count != most for count in num_rows):
            rows = torch.cat([_padded(part, most) for part in torch.split(rows, list(num_rows))])
        rows = rows.contiguous()
        own = rows.new_empty((most, *rows.shape[1:]))
        pending = self._start(
            "reduce_scatter",
            own,
            lambda: _REDUCE_SCATTER(own, rows, group=self.group, async_op=True),
        )
        count = num_rows[self.rank]
        return Then(pending, lambda own: own[:count])

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> Pending[Tensor]:
        arrived = rows.new_empty((sum(receive), *rows.shape[1:]))
        return self._start(
            "all_to_all",
            arrived,
            lambda: dist.all_to_all_single(
                arrived,
                rows.contiguous(),
                list(receive),
                list(send),
                group=self.group,
                async_op=True,
            ),
        )

    def swap(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending[None]:
        operations = [
            dist.P2POp(call, tensor, group=self.group, group_peer=rank)
            for call, pairs in ((dist.isend, sends), (dist.irecv, receives))
            for rank, tensor in pairs
        ]
        if not operations:
            return Ready(None)
        works = self._call("swap", lambda: dist.batch_isend_irecv(operations))
        return _Exchange(self, "swap", tuple(works), None)

    def close(self) -> None:
        if self.group is None:
            return
        group, self.group = self.group, None
        # It may be broken, which is why it is left.
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            dist.destroy_process_group(group)

    def _start(self, what: str, result: Tensor, call: Callable[[], Any]) -> _Exchange[Tensor]:
        return _Exchange(self, what, (self._call(what, call),), result)

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        if self.group is None:
            raise RankLost(
                f"{what} (rank {self.rank} of {self.size}) must have its group; got one that was "
                f"left after a loss. Form a new group of the ranks that are there."
            )
        try:
            return call()
        except RuntimeError as error:
            raise self.lost(what, error) from error

    def lost(self, what: str, error: RuntimeError) -> RankLost:
        """The error for a failed exchange; leaves the group, so that no other rank waits for us."""
        self.close()
        return RankLost(
            f"{what} (rank {self.rank} of {self.size}) must reach every rank of generation "
            f"{self.generation}; got: {first_line(error)}. Look at the other ranks' output for the "
            f"first failure, and restart, or form a new group of the ranks that are there."
        )


@dataclass(frozen=True, slots=True)
class _Exchange(Generic[T_co]):
    """A collective under way."""

    transport: TorchTransport
    what: str
    works: tuple[Any, ...]
    result: T_co

    def wait(self) -> T_co:
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise self.transport.lost(self.what, error) from error
        return self.result


class LoneTransport(Transport):
    """A group of one rank, which needs no torch.distributed."""

    rank = 0
    size = 1

    def all_reduce(self, rows: Tensor) -> Pending[Tensor]:
        return Ready(rows)

    def all_gather(self, rows: Tensor, num_rows: Sequence[int]) -> Pending[Tensor]:
        return Ready(rows)

    def reduce_scatter(self, rows: Tensor, num_rows: Sequence[int]) -> Pending[Tensor]:
        return Ready(rows)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> Pending[Tensor]:
        return Ready(rows)

    def swap(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending[None]:
        for (_, source), (_, target) in zip(sends, receives, strict=True):
            target.copy_(source)
        return Ready(None)

    def close(self) -> None:
        """There is nobody to leave."""


def join(
    store: Store, rank: int, size: int, *, generation: int = 0, timeout_seconds: float = 300.0
) -> TorchTransport:
    """A gloo group over a store that all its ranks reach; it becomes the default group.

    Whatever groups torch.distributed had in this process end.

    Args:
        store: must not live in a rank that may die.
        rank, size: this rank's place.
        generation: the names in the store are this generation's own.
        timeout_seconds: how long to wait for the other ranks, and then how long an exchange waits
            for a rank that says nothing.

    Raises:
        RankLost: not all ranks came in time.
    """
    prefixed = PrefixStore(f"mixtura/{generation}", store)
    timeout = timedelta(seconds=timeout_seconds)
    if dist.is_initialized():
        dist.destroy_process_group()
    try:
        dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise RankLost(
            f"rank {rank} (of {size}) must meet every rank of generation {generation} within "
            f"{timeout_seconds} s; got: {first_line(error)}. Look at the other ranks' output for "
            f"the first failure."
        ) from error
    return TorchTransport(generation=generation)


def first_line(error: RuntimeError) -> str:
    """What torch says, without its stack."""
    return str(error).strip().partition("\n")[0]


def _padded(rows: Tensor, count: int) -> Tensor:
    """`count` rows, the missing ones zero."""
    if rows.shape[0] == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros((count - rows.shape[0], *rows.shape[1:]))])


def _first_of(*names: str) -> Callable[..., Any]:
    """The function of torch.distributed by the first name that it has."""
    found: Callable[..., Any] = next(getattr(dist, n) for n in names if hasattr(dist, n))
    return found


_ALL_GATHER = _first_of("all_gather_single", "all_gather_into_tensor")
_REDUCE_SCATTER = _first_of("reduce_scatter_single", "reduce_scatter_tensor")
