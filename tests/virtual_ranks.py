"""Ranks as threads of one process: the same transport contract, and a record of every call.

`run(size, work)` calls `work(transport)` on every rank and returns what each gave back. It fails
unless all ranks made the same calls in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixtura.errors import RankLost
from mixtura.parallel import Pending, Transport

T = TypeVar("T")
TIMEOUT_SECONDS = 60.0


class Killed(BaseException):
    """A rank that dies here, without a word to the others."""


@dataclass
class World:
    """What the ranks of a group share.

    Attributes:
        calls: by rank, every call in order: its name.
        kill_at: (rank, number of the call) at which a rank dies.
    """

    size: int
    kill_at: tuple[int, int] | None = None
    calls: list[list[str]] = field(default_factory=list)
    mail: dict[int, dict[int, Any]] = field(default_factory=dict)
    swaps: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.calls = [[] for _ in range(self.size)]


@dataclass(frozen=True)
class Meeting:
    """A call under way; its result is known when all ranks have come."""

    world: World
    what: str
    number: int
    finish: Callable[[list[Any]], Any]

    def wait(self) -> Any:
        world = self.world

        def is_over() -> bool:
            return len(world.mail[self.number]) == world.size or bool(world.dead)

        with world.changed:
            if not world.changed.wait_for(is_over, TIMEOUT_SECONDS):
                raise RankLost(f"{self.what} must end; got ranks {sorted(world.mail[self.number])}")
            came = world.mail[self.number]
            if len(came) != world.size:
                raise RankLost(f"{self.what} must reach every rank; got {world.dead} dead")
        return self.finish([came[rank] for rank in range(world.size)])


class ThreadTransport(Transport):
    """One rank of a `World`."""

    def __init__(self, world: World, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.size = world.size
        self._swaps: dict[tuple[int, int], int] = {}

    def _meet(self, what: str, payload: Any, finish: Callable[[list[Any]], Any]) -> Meeting:
        calls = self.world.calls[self.rank]
        number = len(calls)
        if self.world.kill_at == (self.rank, number):
            raise Killed
        calls.append(what)
        with self.world.changed:
            self.world.mail.setdefault(number, {})[self.rank] = payload
            self.world.changed.notify_all()
        return Meeting(self.world, what, number, finish)

    def all_reduce(self, rows: Tensor) -> Pending[Tensor]:
        return self._meet("all_reduce", rows.clone(), lambda came: torch.stack(came).sum(0))

    def all_gather(self, rows: Tensor, num_rows: Sequence[int]) -> Pending[Tensor]:
        assert rows.shape[0] == num_rows[self.rank]

        def finish(came: list[Any]) -> Tensor:
            assert [part.shape[0] for part, _ in came] == list(num_rows)
            assert len({told for _, told in came}) == 1
            return torch.cat([part for part, _ in came])

        return self._meet("all_gather", (rows.clone(), tuple(num_rows)), finish)

    def reduce_scatter(self, rows: Tensor, num_rows: Sequence[int]) -> Pending[Tensor]:
        assert rows.shape[0] == sum(num_rows)

        def finish(came: list[Any]) -> Tensor:
            parts = [torch.split(part, list(num_rows))[self.rank] for part in came]
            return torch.stack(parts).sum(0)

        return self._meet("reduce_scatter", rows.clone(), finish)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> Pending[Tensor]:
        assert rows.shape[0] == sum(send)

        def finish(came: list[Any]) -> Tensor:
            parts = [part[self.rank] for part in came]
            assert [part.shape[0] for part in parts] == list(receive)
            return torch.cat(parts)

        return self._meet("all_to_all", torch.split(rows.clone(), list(send)), finish)

    def swap(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending[None]:
        world = self.world
        number = len(world.calls[self.rank])
        with world.changed:
            for nth, (rank, tensor) in enumerate(sends):
                world.swaps[(number * 1000 + nth, self.rank, rank)] = tensor.clone()

        def finish(came: list[Any]) -> None:
            for rank, target in receives:
                keys = sorted(
                    key
                    for key in world.swaps
                    if key[1:] == (rank, self.rank) and key[0] // 1000 == number
                )
                assert keys, f"rank {rank} sends nothing to rank {self.rank}"
                with world.changed:
                    target.copy_(world.swaps.pop(keys[0]))

        return self._meet("swap", None, finish)

    def close(self) -> None:
        with self.world.changed:
            self.world.dead.add(self.rank)
            self.world.changed.notify_all()


def run(
    size: int, work: Callable[[ThreadTransport], T], *, kill_at: tuple[int, int] | None = None
) -> list[T]:
    """Every rank's result; the first rank's error where one fails. A killed rank gives None."""
    world = World(size, kill_at)
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def one(rank: int) -> None:
        transport = ThreadTransport(world, rank)
        try:
            with torch.no_grad():
                results[rank] = work(transport)
        except Killed:
            transport.close()
        except BaseException as error:
            errors[rank] = error
            transport.close()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_SECONDS)
        last = [(len(calls), calls[-5:]) for calls in world.calls]
        assert not thread.is_alive(), f"a rank hangs; number of calls, and the last: {last}"
    own = [error for error in errors if error is not None and not isinstance(error, RankLost)]
    for error in [*own, *errors]:
        if error is not None:
            raise error
    if kill_at is None:
        assert all(calls == world.calls[0] for calls in world.calls), [c[-9:] for c in world.calls]
    return results
