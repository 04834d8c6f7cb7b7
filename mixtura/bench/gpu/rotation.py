"""What is timed: steps through layers and batches, each on other weights than the one before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from mixtura.bench.cases import Case
from mixtura.bench.contenders import Contender, Layer, Route, RunBatch
from mixtura.bench.gpu.batches import LayerBatch, Truth
from mixtura.bench.measure import relative_error
from mixtura.routing import RouterTensors
from mixtura.types import ExpertBatch

LEAST_SECONDS = 1e-3
"""A rotation at the floor: so long that launching it (about 10 us) does not count."""

MOST_STEPS = 128
"""More steps than this only make captures slow."""


class Measure(StrEnum):
    """From hidden states and router logits to the combined output, or from chosen ids on."""

    LAYER = "layer"
    EXPERTS = "experts"


class Mode(StrEnum):
    """How the work is started: by replaying a CUDA graph, or call by call."""

    GRAPH = "graph"
    EAGER = "eager"


@dataclass(frozen=True)
class Rotation:
    """Steps of one contender in one measure.

    Attributes:
        functions: one for each set of weights. inputs: one for each batch.
        half: the batch that leaves half of the experts alone.
    """

    functions: Sequence[Callable[[Any], Tensor]]
    inputs: Sequence[Any]
    half: Any
    num_steps: int

    def run(self) -> Tensor:
        """All steps, from the last to the first: the output is that of layer 0 on batch 0."""
        assert self.num_steps > 0
        for number in reversed(range(self.num_steps)):
            layer, batch = number % len(self.functions), number % len(self.inputs)
            out = self.functions[layer](self.inputs[batch])
        return out

    def run_half(self) -> Tensor:
        """Layer 0 on the batch that leaves half of the experts alone."""
        return self.functions[0](self.half)


def num_steps(num_sets: int, num_batches: int, floor_seconds: float) -> int:
    """Steps of a rotation: every set and every batch, for a millisecond at least."""
    enough = math.ceil(LEAST_SECONDS / floor_seconds)
    return max(num_sets, num_batches, min(enough, MOST_STEPS))


@dataclass(frozen=True)
class Given:
    """What every contender of a case is given."""

    case: Case
    layers: Sequence[Layer]
    batches: Sequence[LayerBatch]
    half: LayerBatch
    tensors: RouterTensors
    num_steps: int


def bind(contender: Contender, given: Given) -> dict[Measure, Rotation]:
    """A contender's steps, by measure; its weights are packed now."""
    case, batches = given.case, given.batches
    runs = [contender.bind(layer) for layer in given.layers]
    route = contender.route(case, given.tensors)
    prepared = [contender.prepare(case, batch.experts) for batch in batches]
    half = contender.prepare(case, given.half.experts)
    layers = [_layer(contender, case, route, run) for run in runs]
    return {
        Measure.LAYER: Rotation(layers, batches, given.half, given.num_steps),
        Measure.EXPERTS: Rotation(runs, prepared, half, given.num_steps),
    }


def _layer(
    contender: Contender, case: Case, route: Route, run: RunBatch
) -> Callable[[LayerBatch], Tensor]:
    """Route, run the experts, add what needs none."""

    def layer(batch: LayerBatch) -> Tensor:
        hidden, routing = batch.hidden_states, route(batch.router_logits)
        chosen = ExpertBatch(hidden, routing.topk_ids, routing.topk_weights, routing.order)
        out = run(contender.prepare(case, chosen))
        return out if routing.bypass is None else routing.bypass.apply(out, hidden)

    return layer


def poison(case: Case) -> None:
    """Leave NaN in the memory that outputs and intermediate rows will be put in.

    What a kernel forgets to write shows then, wherever the allocator hands that memory out again.
    """
    experts = case.shape.experts
    sizes = (
        (case.num_tokens, experts.hidden_size),
        (case.num_slots, experts.hidden_size),
        (case.num_slots, experts.intermediate_size),
        (case.num_slots, experts.up_size),
    )
    for dtype in {case.dtype, torch.float32}:
        held = [torch.full(size, torch.nan, dtype=dtype, device=case.device) for size in sizes]
        held.clear()


def error_of(found: Tensor, truth: Truth, measure: Measure) -> float:
    """Relative Frobenius error of the rows that are compared; inf where one is not finite."""
    wanted = truth.layer if measure is Measure.LAYER else truth.experts
    return relative_error(found[truth.rows], wanted)
