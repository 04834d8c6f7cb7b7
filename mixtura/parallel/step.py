"""One exchange per forward of a model tells every rank what the others bring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mixtura.config import TokensHeld
from mixtura.cuda import cannot_capture, is_capturing
from mixtura.errors import ParallelError
from mixtura.parallel.transport import Transport
from mixtura.types import StepContext


class StepClock:
    """Makes the `StepContext` of every forward; one for all layers of a model.

    Args:
        transport: the ranks.
        tokens: which tokens a rank brings; where all ranks hold one batch nothing is exchanged.
        overlap_min_tokens: the vote for two batches; see `RunnerConfig`.
    """

    def __init__(
        self, transport: Transport, tokens: TokensHeld, overlap_min_tokens: int | None = None
    ) -> None:
        self.transport = transport
        self.tokens = tokens
        self.overlap_min_tokens = overlap_min_tokens
        self._number = 0
        self._open: StepContext | None = None

    @contextmanager
    def step(self, num_tokens: int, *, is_done: bool = False) -> Iterator[StepContext]:
        """A forward of the whole model: its layers read the context that is made here.

        Args:
            num_tokens: tokens that this rank sends through every layer.
            is_done: this rank has no requests left.
        """
        self._open = self._make(num_tokens, is_done)
        try:
            yield self._open
        finally:
            self._open = None

    @property
    def is_open(self) -> bool:
        """Whether a forward is under way."""
        return self._open is not None

    def current(self, num_tokens: int) -> StepContext:
        """The context of the forward that is under way; of this layer alone where there is none.

        Raises:
            ParallelError: this layer has another number of tokens than the forward was told.
        """
        if self._open is None:
            return self._make(num_tokens, is_done=False)
        told = self._open.num_tokens[self.transport.rank]
        if told != num_tokens:
            raise ParallelError(
                f"the layer's tokens ({num_tokens}) must be as many as the forward was told; got "
                f"{told} there. Begin a step with the tokens that the layers will see."
            )
        return self._open

    def _make(self, num_tokens: int, is_done: bool) -> StepContext:
        number, self._number = self._number, self._number + 1
        least = self.overlap_min_tokens
        wants = least is not None and num_tokens >= least
        if self.tokens is TokensHeld.SHARED:
            size = self.transport.size
            return StepContext(number, (num_tokens,) * size, (wants,) * size, (is_done,) * size)
        if is_capturing(torch.device(self.transport.device)):
            raise cannot_capture(
                "the forward's step", "an exchange of the ranks' tokens", "Use tokens='shared'"
            )
        told = self.transport.exchange((number, num_tokens, wants, is_done))
        numbers, counts, votes, done = zip(*told, strict=True)
        if any(other != number for other in numbers):
            raise ParallelError(
                f"every rank must be in forward {number}; got {list(numbers)} by rank. All ranks "
                f"must run the same forwards in the same order."
            )
        return StepContext(number, counts, tuple(map(bool, votes)), tuple(map(bool, done)))
