"""Calls that run in step: all of them go through one module before any of them goes further.

Each call runs in a thread of its own, so that it may be any code, and stops where it calls one of
the modules; the module then runs for one call after the other, in the thread that asked for the
calls. Never do two threads run at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")

STACK_BYTES = 2**21
"""Of a call's thread: modules run in another, so it needs little, and there is one per call."""

THREAD_NAME = "mixtura call"

_CURRENT = threading.local()
"""`call`: the one that runs in this thread, if any."""


@dataclass(frozen=True, slots=True)
class _Stop:
    """Where a call has stopped: the module, by path, and what it wants of it."""

    path: str
    forward: Callable[[], Any]


class _Abandoned(BaseException):
    """Unwinds a call that will not go on."""


@dataclass(eq=False)
class _Call(Generic[Result]):
    """One call.

    Attributes:
        function: what is called.
        stop: where it has stopped; None once it has ended.
        result: what it has returned, then.
    """

    function: Callable[[], Result]
    stop: _Stop | None = None
    result: Result | None = None
    _answer: Any = None
    _error: BaseException | None = None
    _is_abandoned: bool = False
    _goes_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _has_stopped: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self) -> None:
        """Run up to the first stop."""
        usual = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=self._run, name=THREAD_NAME, daemon=True).start()
        finally:
            threading.stack_size(usual)
        self._wait()

    def go_on(self, answer: Any) -> None:
        """Run up to the next stop, given what the module has returned."""
        self.stop, self._answer = None, answer
        self._goes_on.release()
        self._wait()

    def abandon(self) -> None:
        """End a call that has stopped."""
        if self.stop is not None:
            self.stop, self._is_abandoned = None, True
            self._goes_on.release()
            self._has_stopped.acquire()

    def ask(self, stop: _Stop) -> Any:
        """In the call's own thread: stop, and return what the module returns."""
        self.stop = stop
        self._has_stopped.release()
        self._goes_on.acquire()
        if self._is_abandoned:
            raise _Abandoned
        answer, self._answer = self._answer, None
        return answer

    def _wait(self) -> None:
        self._has_stopped.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        _CURRENT.call = self
        try:
            with torch.inference_mode():
                self.result = self.function()
        except _Abandoned:
            pass
        except BaseException as error:  # it is raised where the call was started
            self._error = error
        finally:
            self._has_stopped.release()


def run_in_step(
    calls: Sequence[Callable[[], Result]],
    modules: Mapping[str, nn.Module],
    around: Callable[[str], AbstractContextManager[object]],
) -> list[Result]:
    """Run calls in inference mode, all of them through one module before any goes further.

    Args:
        calls: functions that call modules of a model.
        modules: the modules, by path; none is inside another.
        around: makes the context, given a path, in which that module runs for all calls.

    Returns:
        What the calls return.
    """
    running = [_Call(call) for call in calls]
    with ExitStack() as undo:
        for path, module in modules.items():
            undo.callback(_ask_before(module, path))
        for call in running:
            undo.callback(call.abandon)
            call.start()
        while (first := next((call.stop for call in running if call.stop), None)) is not None:
            with around(first.path), torch.inference_mode():
                for call in running:
                    if call.stop is not None and call.stop.path == first.path:
                        call.go_on(call.stop.forward())
    return [call.result for call in running]  # type: ignore[misc]


def _ask_before(module: Any, path: str) -> Callable[[], None]:
    """Let calls stop before a module's forward; return how to undo that."""
    forward = module.forward
    had_own = "forward" in module.__dict__

    def stop(*args: Any, **kwargs: Any) -> Any:
        call: _Call[Any] = _CURRENT.call
        return call.ask(_Stop(path, lambda: forward(*args, **kwargs)))

    def undo() -> None:
        if had_own:
            module.forward = forward
        else:
            del module.forward

    module.forward = stop
    return undo
