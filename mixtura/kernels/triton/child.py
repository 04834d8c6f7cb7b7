"""Measures in a process of its own, so that a crash of the compiler or a kernel loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from mixtura.kernels.triton.candidates import Case
from mixtura.kernels.triton.table import Blocks
from mixtura.kernels.triton.trials import Failed, MeasuringLost, Trial, told
from mixtura.kernels.triton.tune import Measure

PATIENCE_SECONDS = 180.0
"""For a candidate to be compiled and measured; the first of a process fills the weights, too."""

MAX_LOST = 8
"""Processes lost in a row after which the GPU is given up: a few candidates may crash alike."""


class ChildMeasuring:
    """Measures as `create()` does, in a process that is started anew when it is lost.

    Args:
        create: makes what measures, there; a function at the top of a module.
        patience: seconds that an answer may take.
    """

    def __init__(self, create: Callable[[], Measure], patience: float = PATIENCE_SECONDS) -> None:
        self._create = create
        self._patience = patience
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._num_lost = 0

    def __call__(self, case: Case, blocks: Blocks, is_final: bool) -> Trial:
        """See `tune.Measure`."""
        trial = self._answer(case, blocks, is_final)
        if not isinstance(trial, Failed) or not trial.has_broken_device:
            self._num_lost = 0
            return trial
        self.close()
        self._num_lost += 1
        if self._num_lost == MAX_LOST:
            raise MeasuringLost(
                f"{MAX_LOST} measuring processes in a row were lost; the last: {trial.reason}"
            )
        return trial

    def _answer(self, case: Case, blocks: Blocks, is_final: bool) -> Trial:
        connection = self._connection or self._start()
        try:
            connection.send((case, blocks, is_final))
            if not connection.poll(self._patience):
                reason = f"took longer than {self._patience:g} s"
                return Failed(reason, has_broken_device=True)
            answer: Trial = connection.recv()
        except (EOFError, OSError):
            return Failed(f"its process ended{self._how()}", has_broken_device=True)
        return answer

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        connection, other = context.Pipe()
        self._process = context.Process(
            target=answer_in_child, args=(other, self._create), name="mixtura tune", daemon=True
        )
        self._process.start()
        other.close()
        self._connection = connection
        return connection

    def _how(self) -> str:
        """How the process ended, where that is known."""
        if self._process is None:
            return ""
        self._process.join(1)
        code = self._process.exitcode
        if code is None:
            return ""
        return f" with code {code}" if code >= 0 else f" by signal {signal.Signals(-code).name}"

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None


def answer_in_child(connection: Connection, create: Callable[[], Measure]) -> None:
    """What the process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    os.dup2(2, 1)  # what a compiler prints is no part of the parent's output
    serve(connection, create)


def serve(connection: Connection, create: Callable[[], Measure]) -> None:
    """Answer one question after the other, until the other side has gone or the GPU is lost."""
    measure: Measure | None = None
    while True:
        try:
            case, blocks, is_final = connection.recv()
        except EOFError:
            return
        try:
            measure = measure or create()
            answer = measure(case, blocks, is_final)
        except Exception as error:
            answer = Failed(told(error), has_broken_device=True)
        connection.send(answer)
        if isinstance(answer, Failed) and answer.has_broken_device:
            return
