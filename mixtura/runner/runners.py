"""Runners drive schedules: all tokens at once, or in chunks of bounded size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor

from mixtura.config import RunnerConfig, require_positive
from mixtura.runner.schedule import LayerOutput, LayerParts, one_batch, run_to_end
from mixtura.types import Routing, TokenInputs


class MoERunner(ABC):
    """Sends tokens through a layer."""

    @abstractmethod
    def run(self, layer: LayerParts, hidden_states: Tensor, tokens: TokenInputs) -> LayerOutput:
        """(T,H) -> (T,H); zero tokens are legal."""


class DefaultMoERunner(MoERunner):
    """All tokens in one pass."""

    def run(self, layer: LayerParts, hidden_states: Tensor, tokens: TokenInputs) -> LayerOutput:
        return run_to_end(one_batch(layer, hidden_states, tokens))


class ChunkingMoERunner(MoERunner):
    """At most `max_rows_per_pass` tokens at a time, which bounds the memory of what is in between.

    The chunks are as even as can be. Bitwise equal to one pass where the layer is deterministic.
    """

    def __init__(self, max_rows_per_pass: int) -> None:
        require_positive("max_rows_per_pass", max_rows_per_pass)
        self.max_rows_per_pass = max_rows_per_pass

    def run(self, layer: LayerParts, hidden_states: Tensor, tokens: TokenInputs) -> LayerOutput:
        outputs = [
            run_to_end(one_batch(layer, hidden_states[start:stop], tokens.slice(start, stop)))
            for start, stop in self.chunks(hidden_states.shape[0])
        ]
        if len(outputs) == 1:
            return outputs[0]
        shared = [part.shared for part in outputs if part.shared is not None]
        return LayerOutput(
            torch.cat([part.hidden_states for part in outputs]),
            Routing.concatenate([part.routing for part in outputs]),
            torch.cat(shared) if shared else None,
        )

    def chunks(self, num_tokens: int) -> list[tuple[int, int]]:
        """(start, stop) of every chunk; one empty chunk for zero tokens."""
        count = max(1, -(-num_tokens // self.max_rows_per_pass))
        bounds = [num_tokens * i // count for i in range(count + 1)]
        return list(pairwise(bounds))


def create_runner(config: RunnerConfig) -> MoERunner:
    """The runner that a configuration asks for."""
    if config.max_rows_per_pass is None:
        return DefaultMoERunner()
    return ChunkingMoERunner(config.max_rows_per_pass)
