"""Following the forwards of a model: which tokens each runs, and what goes wrong in one."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mixtura.errors import CaptureUnsupported, InputError, MixturaError
from mixtura.hf.parallel import base_of, find_ranks
from mixtura.hf.sequences import Rows, SequenceFollower
from mixtura.observe.capture import is_in_backward, refuse_graphs


class ForwardWatch(ABC):
    """Is told of every forward of a model, and which tokens it runs.

    Args:
        model: converted.
        layers: paths of its MoE layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[str]) -> None:
        self.base = base_of(model, layers)
        self.follower = SequenceFollower()
        self.is_idle = False
        self._ranks = find_ranks(model)
        self._arguments = tuple(inspect.signature(self.base.forward).parameters)
        self._error: MixturaError | None = None
        self._num_forwards = 0
        self._num_begun: int | None = None

    @abstractmethod
    def opened(self, rows: Rows) -> None:
        """A forward of these rows begins."""

    @abstractmethod
    def closed(self) -> None:
        """The forward is done."""

    @abstractmethod
    def dropped(self) -> None:
        """The forward has failed, or its rows are nobody's tokens."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forwards of the block.

        Raises:
            MixturaError: what was wrong in a forward, also where Transformers has caught it; no
                forward was seen.
        """
        with ExitStack() as hooks:
            begin = self.base.register_forward_pre_hook(self._begin, with_kwargs=True)
            hooks.callback(begin.remove)
            end = self.base.register_forward_hook(self._end, always_call=True)
            hooks.callback(end.remove)
            yield
        self.check()
        self.finish()

    def finish(self) -> None:
        """The block is done.

        Raises:
            CaptureUnsupported: no forward was seen.
        """
        if not self._num_forwards:
            raise CaptureUnsupported(
                "the block must run the model, and call its hooks; got no forward. Graphs that "
                "were compiled or captured before the block run without them: make none."
            )

    def check(self) -> None:
        """Raise what was wrong in a forward.

        Raises:
            MixturaError: see `watching`.
        """
        if self._error is not None:
            raise self._error

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Keep an error: the loop of a continuous batch catches what its forwards raise."""
        try:
            yield
        except MixturaError as error:
            self._error = error
            raise

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self.noting_errors():
            inputs = kwargs if not args else dict(zip(self._arguments, args, strict=False)) | kwargs
            tokens = inputs.get("input_ids")
            refuse_graphs(inputs["inputs_embeds"] if tokens is None else tokens)
            if is_in_backward():
                return  # a forward that is computed again (gradient checkpointing)
            if self._num_begun is not None:
                raise InputError(
                    "a model must run one forward at a time while its routing is recorded or "
                    "replayed; got a second one. Use one thread."
                )
            self._num_begun = len(self.follower.requests)
            rows = self.follower.begin(inputs)
            self.is_idle = self._runs_along(rows.num_rows)
            if not self.is_idle:
                self.opened(rows)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        num_begun, self._num_begun = self._num_begun, None
        if num_begun is None:
            return
        is_idle, self.is_idle = self.is_idle, False
        if output is None or is_idle:
            self.follower.abort(num_begun)
            self.dropped()
            return
        with self.noting_errors():
            self.follower.end(output)
            self.closed()
        self._num_forwards += 1

    def _runs_along(self, num_rows: int) -> bool:
        """Whether a forward is for the other ranks, which still have requests."""
        if self._ranks is None or not self._ranks.clock.is_open:
            return False
        return self._ranks.clock.current(num_rows).is_done[self._ranks.transport.rank]
