"""Runners drive schedules: all tokens at once, in chunks, or two batches in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.config import RunnerConfig, require_positive
from mixtura.runner.schedule import LayerOutput, LayerParts, one_batch, run_in_turn, run_to_end
from mixtura.types import Routing, StepContext, TokenInputs, even_bounds


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive tokens of a rank, and how many the ranks bring along with them.

    Attributes:
        hidden_states: (T,H). tokens: of the same tokens.
        num_rows: (R,) tokens of every rank in this part; None where nobody asks.
    """

    hidden_states: Tensor
    tokens: TokenInputs
    num_rows: tuple[int, ...] | None


class MoERunner(ABC):
    """Sends tokens through a layer."""

    @abstractmethod
    def run(self, layer: LayerParts, hidden_states: Tensor, tokens: TokenInputs) -> LayerOutput:
        """(T,H) -> (T,H); zero tokens are legal."""


class DefaultMoERunner(MoERunner):
    """All tokens in one pass."""

    def run(self, layer: LayerParts, hidden_states: Tensor, tokens: TokenInputs) -> LayerOutput:
        needs_counts = layer.dispatcher.needs_counts
        num_rows = layer.step(hidden_states.shape[0]).num_tokens if needs_counts else None
        return run_to_end(one_batch(layer, hidden_states, tokens, num_rows))


class ChunkingMoERunner(MoERunner):
    """At most `max_rows_per_pass` tokens at a time, which bounds the memory of what is in between.

    The chunks are as even as can be; ranks with fewer tokens than others have smaller ones, and as
    many. Bitwise equal to one pass where the layer is deterministic.
    """

    def __init__(self, max_rows_per_pass: int) -> None:
        require_positive("max_rows_per_pass", max_rows_per_pass)
        self.max_rows_per_pass = max_rows_per_pass

    def run(self, layer: LayerParts, hidden_states: Tensor, tokens: TokenInputs) -> LayerOutput:
        step = layer.step(hidden_states.shape[0]) if layer.dispatcher.is_remote else None
        most = max(step.num_tokens) if step is not None else hidden_states.shape[0]
        return joined(
            [
                run_to_end(one_batch(layer, part.hidden_states, part.tokens, part.num_rows))
                for part in in_parts(hidden_states, tokens, self.num_passes(most), step)
            ]
        )

    def num_passes(self, num_tokens: int) -> int:
        """Passes for so many tokens, at least one."""
        return max(1, -(-num_tokens // self.max_rows_per_pass))


class OverlappedMoERunner(MoERunner):
    """Two batches at a time, one's exchange beside the other's experts (dual-batch overlap).

    Ranks vote with every forward, and all or none of them overlap. Bitwise equal to the same
    batches one after the other.

    Args:
        max_rows_per_pass: a bound on each batch, as of `ChunkingMoERunner`; None: there is none.
    """

    def __init__(self, max_rows_per_pass: int | None = None) -> None:
        self.chunks = ChunkingMoERunner(max_rows_per_pass) if max_rows_per_pass else None

    def run(self, layer: LayerParts, hidden_states: Tensor, tokens: TokenInputs) -> LayerOutput:
        step = layer.step(hidden_states.shape[0])
        count = self.chunks.num_passes(max(step.num_tokens)) if self.chunks else 1
        if step.is_overlapped:
            count += count % 2
        schedules = [
            one_batch(layer, part.hidden_states, part.tokens, part.num_rows)
            for part in in_parts(hidden_states, tokens, count, step)
        ]
        if not step.is_overlapped:
            return joined([run_to_end(schedule) for schedule in schedules])
        pairs = zip(schedules[::2], schedules[1::2], strict=True)
        return joined([output for pair in pairs for output in run_in_turn(pair)])


def in_parts(
    hidden_states: Tensor, tokens: TokenInputs, count: int, step: StepContext | None
) -> list[Part]:
    """Cut a rank's tokens in `count` parts, as every other rank cuts its own."""
    bounds = even_bounds(hidden_states.shape[0], count)
    others = [even_bounds(size, count) for size in step.num_tokens] if step is not None else []
    return [
        Part(
            hidden_states[bounds[n] : bounds[n + 1]],
            tokens.slice(bounds[n], bounds[n + 1]),
            tuple(cut[n + 1] - cut[n] for cut in others) if step is not None else None,
        )
        for n in range(count)
    ]


def joined(outputs: Sequence[LayerOutput]) -> LayerOutput:
    """The outputs of consecutive parts as one."""
    if len(outputs) == 1:
        return outputs[0]
    shared = [part.shared for part in outputs if part.shared is not None]
    return LayerOutput(
        torch.cat([part.hidden_states for part in outputs]),
        Routing.concatenate([part.routing for part in outputs]),
        torch.cat(shared) if shared else None,
    )


def create_runner(config: RunnerConfig) -> MoERunner:
    """The runner that a configuration asks for."""
    if config.overlap_min_tokens is not None:
        return OverlappedMoERunner(config.max_rows_per_pass)
    if config.max_rows_per_pass is None:
        return DefaultMoERunner()
    return ChunkingMoERunner(config.max_rows_per_pass)
