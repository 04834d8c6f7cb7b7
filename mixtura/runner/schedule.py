"""The order of things for one batch of tokens: a generator.

It yields where another batch may run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mixtura.config import MoEConfig, SharedExpertsOrder
from mixtura.dispatch import Dispatcher
from mixtura.experts import SharedTask, shared_experts_order
from mixtura.kernels.bypass import add_bypass
from mixtura.types import ExpertBatch, Partial, Routing, StepContext, TokenInputs


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """What a layer gives back.

    Attributes:
        hidden_states: (T,H).
        routing: the choice of experts it was made with.
        shared: (T,H) of the shared experts, apart only when EXTERNAL.
    """

    hidden_states: Tensor
    routing: Routing
    shared: Tensor | None = None


class LayerParts(Protocol):
    """What a schedule needs of a layer: the *what*; the schedule is the *when*."""

    @property
    def moe_config(self) -> MoEConfig: ...

    @property
    def dispatcher(self) -> Dispatcher: ...

    @property
    def sums_shared(self) -> bool: ...

    def step(self, num_tokens: int) -> StepContext: ...

    def route(self, hidden_states: Tensor, tokens: TokenInputs) -> Routing: ...

    def place(self, topk_ids: Tensor) -> Tensor: ...

    def start_shared(self, hidden_states: Tensor, order: SharedExpertsOrder) -> SharedTask: ...

    def enter_experts(self, hidden_states: Tensor) -> Tensor: ...

    def run_experts(self, batch: ExpertBatch, *, reduce: bool = True) -> Tensor: ...

    def leave_experts(self, routed: Tensor) -> Tensor: ...


Schedule = Iterator[LayerOutput | None]
"""Yields None where another batch may run, and the output at its end."""


BEFORE_ROUTING = (
    SharedExpertsOrder.EXTERNAL,
    SharedExpertsOrder.NO_OVERLAP,
    SharedExpertsOrder.MULTI_STREAM_OVERLAPPED,
)
"""Orders in which nothing is there that shared experts could wait for."""


def one_batch(
    layer: LayerParts,
    hidden_states: Tensor,
    tokens: TokenInputs,
    num_rows: Sequence[int] | None = None,
) -> Schedule:
    """Send one batch (T,H) through a layer; other batches may run at the yields.

    Sum: `scale * leave(combine(experts(dispatch(enter(x)))) + bypass) + shared`, each term once.
    `num_rows` are the tokens of every rank in this batch, where the dispatcher needs them.
    """
    order = shared_experts_order(
        layer.moe_config.shared,
        device_type=hidden_states.device.type,
        num_tokens=hidden_states.shape[0],
        is_remote=layer.dispatcher.is_remote,
        is_summed=layer.sums_shared,
        is_tracing=torch.compiler.is_compiling(),
        is_recorded=torch.is_grad_enabled(),
    )
    shared: SharedTask | None = None
    if order in BEFORE_ROUTING:
        shared = layer.start_shared(hidden_states, order)
    routing = layer.route(hidden_states, tokens)
    expert_input = layer.enter_experts(hidden_states)
    physical_ids = layer.place(routing.topk_ids)
    dispatched = layer.dispatcher.dispatch(
        expert_input, physical_ids, routing.topk_weights, num_rows, tokens.adapter_ids
    )
    yield None
    arrived = dispatched.wait()
    # The order is of the router's ids; the kernel looks whether these are they.
    batch = arrived.batch if routing.order is None else replace(arrived.batch, order=routing.order)
    rows = layer.run_experts(batch, reduce=not layer.dispatcher.wants_terms)
    if order is SharedExpertsOrder.SUMMED:
        ranks = layer.dispatcher
        part = Partial(layer.start_shared(hidden_states, order).result(), ranks)
        rows = (Partial(rows, ranks) + part).tensor
    combined = layer.dispatcher.combine(rows, arrived.handle)
    if order is SharedExpertsOrder.MK_INTERNAL_OVERLAPPED:
        shared = layer.start_shared(hidden_states, order)
    yield None
    out = combined.wait().tensor
    if routing.bypass is not None:
        out = add_bypass(routing.bypass, out, expert_input)
    out = layer.leave_experts(out)
    if shared is None:
        yield LayerOutput(out, routing)
    elif order is SharedExpertsOrder.EXTERNAL:
        yield LayerOutput(out, routing, shared.result())
    else:
        yield LayerOutput(out + shared.result(), routing)


def run_in_turn(schedules: Sequence[Schedule]) -> list[LayerOutput]:
    """Run schedules a stretch at a time each, so that one waits while another computes."""
    outputs = [output for stretch in zip(*schedules, strict=True) for output in stretch]
    return [output for output in outputs if output is not None]


def run_to_end(schedule: Schedule) -> LayerOutput:
    """Run one schedule with nothing in between."""
    *_, output = schedule
    assert output is not None
    return output
