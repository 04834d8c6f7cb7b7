"""Ranks as processes: a gloo group over a store in this process, and named functions run on it.

`with RankProcesses(3) as ranks: ranks.run("test_x:work", number=1)` calls `work(seat, number=1)` of
module `test_x` on every rank and returns what each gave back. One group runs as many functions as
are asked for. What travels is plain values and tensors, read without unpickling objects; an error
travels as its names, message and traceback. Nothing waits for ever: after the deadline every
process is killed, and the error shows the stacks of all.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from mixtura.parallel import Pending, TorchTransport, Transport, join

PRELOADED = ["torch.distributed", "pytest", "mixtura.layer", "mixtura.quant.quantize"]
"""What the server imports once; a rank is a fork of it, ready in milliseconds."""

START_SECONDS = 60.0
"""Until a rank has joined, on a machine that does other things too."""


@dataclass
class Seat:
    """What a function on a rank works with.

    Attributes:
        transport: the group; a function may put another in its place for those after it.
        store: lives in the parent.
    """

    transport: TorchTransport
    store: Store

    def meet(self, name: str) -> None:
        """Wait until every rank has come here, on whatever errand; names are used once."""
        self.store.set(f"{name}{self.transport.rank}", "here")
        self.store.wait([f"{name}{rank}" for rank in range(self.transport.size)])


@dataclass(frozen=True)
class Outcome:
    """What became of a function on one rank.

    Attributes:
        value: what it returned. error: class names of what it raised, the nearest first.
        text: the error's message and traceback. exit_code: of a rank that died. seconds: it took.
    """

    value: Any = None
    error: tuple[str, ...] = ()
    text: str = ""
    exit_code: int | None = None
    seconds: float = 0.0

    @property
    def is_value(self) -> bool:
        """Whether the function returned."""
        return not self.error and self.exit_code is None


class RankProcesses:
    """Processes that are the ranks of a group.

    Args:
        size: how many.
        exchange_seconds: how long an exchange waits for a rank that says nothing.
        method: "spawn" for processes that end as a program does, interpreter and all; the forks
            of "forkserver" start quicker and end at once.
    """

    def __init__(
        self, size: int, *, exchange_seconds: float = 60.0, method: str = "forkserver"
    ) -> None:
        self.size = size
        self.directory = tempfile.TemporaryDirectory(prefix="ranks")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(PRELOADED)  # type: ignore[attr-defined]
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, self.store.port, theirs, str(self.log(rank)), exchange_seconds)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.results(START_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            codes = self.close()
            if kind is None:
                assert set(codes) <= {0, -signal.SIGKILL}, self.report(f"ranks ended with {codes}")
        finally:
            self.directory.cleanup()

    def log(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return Path(self.directory.name) / f"rank{rank}.txt"

    def run(self, function: str, *, seconds: float = 60.0, **arguments: Any) -> list[Any]:
        """Call `module:function` on every rank -> what each returned.

        Raises:
            AssertionError: a rank raised, died, or was not done in time.
        """
        self.start(function, **arguments)
        outcomes = self.results(seconds)
        failed = [rank for rank, outcome in enumerate(outcomes) if not outcome.is_value]
        failed.sort(key=lambda rank: "RankLost" in outcomes[rank].error)  # what came of the others
        if failed:
            first = outcomes[failed[0]]
            what = first.text or f"ended with {first.exit_code}"
            raise AssertionError(self.report(f"ranks {failed} failed; rank {failed[0]}:\n{what}"))
        return [outcome.value for outcome in outcomes]

    def start(self, function: str, *, ranks: Collection[int] | None = None, **named: Any) -> None:
        """Begin `module:function` on ranks, all of them unless given."""
        message = _to_bytes([function, named])
        for rank in range(self.size) if ranks is None else ranks:
            self.pipes[rank].send_bytes(message)

    def results(self, seconds: float, *, ranks: Collection[int] | None = None) -> list[Outcome]:
        """What became of ranks, all of them unless given.

        Raises:
            AssertionError: one was not done in time; all are killed.
        """
        wanted = list(range(self.size) if ranks is None else ranks)
        found: dict[int, Outcome] = {}
        deadline = time.monotonic() + seconds
        while len(found) < len(wanted):
            waiting = [self.pipes[rank] for rank in wanted if rank not in found]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                hanging = [rank for rank in wanted if rank not in found]
                text = self.report(f"ranks {hanging} are not done after {seconds} s")
                self.kill_all()
                raise AssertionError(text)
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                found[rank] = self._receive(rank)
        return [found[rank] for rank in wanted]

    def _receive(self, rank: int) -> Outcome:
        try:
            return Outcome(**_from_bytes(self.pipes[rank].recv_bytes()))
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(5)
            return Outcome(exit_code=self.processes[rank].exitcode)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a rank a signal."""
        os.kill(self.processes[rank].pid, number)

    def wait_until_stopped(self, rank: int, seconds: float = 30.0) -> None:
        """Wait until a rank has been stopped by a signal."""
        status = Path(f"/proc/{self.processes[rank].pid}/stat")
        deadline = time.monotonic() + seconds
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, self.report(f"rank {rank} does not stop")
            time.sleep(0.01)

    def report(self, what: str) -> str:
        """`what`, with the stacks of all ranks that live and what they wrote."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        logs = [f"--- rank {r}\n{self.log(r).read_text()}" for r in range(self.size)]
        return "\n".join([what, *logs])

    def close(self) -> list[int]:
        """Let every rank end -> exit codes; one that does not is killed."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(20)
        is_late = any(process.is_alive() for process in self.processes)
        text = self.report("ranks do not end") if is_late else ""
        self.kill_all()
        assert not is_late, text
        return [process.exitcode for process in self.processes]

    def kill_all(self) -> None:
        """End every process now, stopped ones too."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


class Deadly(Transport):
    """A transport on which this process meets its end at one point.

    Points are counted over all calls and all awaits, in their order: point `n` is either a call,
    which is then not made, or the await of one that was.

    Args:
        inner: what carries the calls.
        kill_at: the point; None: nowhere.
        number: the signal that the process sends itself.
        points: those of another transport, whose calls count along.
    """

    def __init__(
        self,
        inner: Transport,
        kill_at: int | None = None,
        number: int = signal.SIGKILL,
        points: list[str] | None = None,
    ) -> None:
        self.inner = inner
        self.rank, self.size = inner.rank, inner.size
        self.generation, self.device = inner.generation, inner.device
        self.kill_at = kill_at
        self.number = number
        self.points: list[str] = [] if points is None else points

    def reach(self, what: str) -> None:
        """Count one point, and end there if it is the one."""
        self.points.append(what)
        if len(self.points) - 1 == self.kill_at:
            os.kill(os.getpid(), self.number)

    def _call(self, what: str, *arguments: Any) -> Pending[Any]:
        self.reach(what)
        return _Awaited(self, what, getattr(self.inner, what)(*arguments))

    def all_reduce(self, *arguments: Any) -> Pending[Tensor]:
        return self._call("all_reduce", *arguments)

    def all_gather(self, *arguments: Any) -> Pending[Tensor]:
        return self._call("all_gather", *arguments)

    def reduce_scatter(self, *arguments: Any) -> Pending[Tensor]:
        return self._call("reduce_scatter", *arguments)

    def all_to_all(self, *arguments: Any) -> Pending[Tensor]:
        return self._call("all_to_all", *arguments)

    def swap(self, *arguments: Any) -> Pending[None]:
        return self._call("swap", *arguments)

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class _Awaited:
    """A call under way whose await is a point."""

    owner: Deadly
    what: str
    pending: Pending[Any]

    def wait(self) -> Any:
        self.owner.reach(f"await {self.what}")
        return self.pending.wait()


def _serve(
    rank: int, size: int, port: int, pipe: Connection, log: str, exchange_seconds: float
) -> None:
    """Join, then run what is asked for until the parent has had enough."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1, file=output, all_threads=True)
    torch.set_num_threads(1)
    seat: Seat | None = None

    def begin() -> None:
        nonlocal seat
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        seat = Seat(join(store, rank, size, timeout_seconds=exchange_seconds), store)

    pipe.send_bytes(_to_bytes(_outcome(begin)))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            break
        pipe.send_bytes(_to_bytes(_outcome(functools.partial(_perform, message, seat))))
    if seat is not None:
        seat.transport.close()


def _perform(message: bytes, seat: Seat | None) -> Any:
    function, named = _from_bytes(message)
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(seat, **named)


def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        with torch.no_grad():
            return {"value": work(), "seconds": time.monotonic() - started}
    except Exception as error:
        names = tuple(kind.__name__ for kind in type(error).__mro__)
        text = "".join(traceback.format_exception(error))
        return {"error": names, "text": text, "seconds": time.monotonic() - started}


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)
