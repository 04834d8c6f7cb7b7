"""Shared experts: what they compute, and when; each row exactly once whichever the order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from expert_cases import build_layer, moe_config, plain_activation, rows_of
from tolerances import RTOL, assert_close, relative_error
from torch import Tensor, nn

from mixtura.config import (
    SWIGLU_OAI,
    Activation,
    ActivationFunction,
    Renormalize,
    RunnerConfig,
    ScaleOn,
    ScoreFunction,
    SharedExpertsConfig,
    SharedExpertsOrder,
)
from mixtura.dispatch import Dispatched, Dispatcher
from mixtura.experts import SharedExperts, SharedTask, shared_experts_order
from mixtura.layer import FusedMoE
from mixtura.types import ExpertBatch, Full

PLAIN = SharedExpertsConfig(intermediate_size=10)
VARIANTS: dict[str, SharedExpertsConfig] = {
    "plain": PLAIN,
    "sigmoid gate": dataclasses.replace(PLAIN, has_sigmoid_gate=True),
    "ungated": dataclasses.replace(
        PLAIN, is_gated=False, activation=Activation(function=ActivationFunction.RELU_SQUARED)
    ),
    "bias": dataclasses.replace(PLAIN, has_bias=True),
    "swiglu-oai": dataclasses.replace(PLAIN, activation=SWIGLU_OAI, has_bias=True),
    "ungated bias gate": dataclasses.replace(
        PLAIN, is_gated=False, has_bias=True, has_sigmoid_gate=True
    ),
}
by_variant = pytest.mark.parametrize("shared", VARIANTS.values(), ids=VARIANTS.keys())


def shared_formula(layer: FusedMoE, rows: Tensor) -> Tensor:
    """`down(f(gate(x)) * up(x))`, times the sigmoid gate, from the parameters by name."""
    parameters = dict(layer.named_parameters())
    config = layer.moe_config.shared
    assert config is not None

    def linear(name: str, x: Tensor) -> Tensor:
        bias = parameters.get(f"shared_experts.{name}.bias", torch.zeros(()))
        return x @ parameters[f"shared_experts.{name}.weight"].T + bias

    up = linear("up_proj", rows)
    if config.is_gated:
        hidden = plain_activation(linear("gate_proj", rows), up, config.activation)
    else:
        hidden = plain_activation(up, None, config.activation)
    out = linear("down_proj", hidden)
    if config.has_sigmoid_gate:
        out = out / (1 + torch.exp(-(rows @ parameters["shared_expert_gate.weight"].T)))
    return out


def without_shared(layer: FusedMoE) -> FusedMoE:
    """The same layer without its shared experts."""
    config = dataclasses.replace(layer.moe_config, shared=None)
    other = FusedMoE(config)
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if "shared" not in k})
    return other


class RowCounter:
    """Counts how often each row goes through the shared experts."""

    def __init__(self, layer: FusedMoE) -> None:
        self.rows: list[list[float]] = []
        layer.shared_experts.register_forward_hook(self.count)

    def count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert output.shape == inputs[0].shape
        self.rows += inputs[0].tolist()


class Event:
    """A result under way that notes when it is waited for."""

    def __init__(self, name: str, value: Any, events: list[str]) -> None:
        self.name, self.value, self.events = name, value, events

    def wait(self) -> Any:
        self.events.append(f"{self.name} waited for")
        return self.value


class AsynchronousDispatcher(Dispatcher):
    """Does nothing, as if other ranks had to be waited for."""

    is_remote: ClassVar[bool] = True
    is_capturable: ClassVar[bool] = False
    name: ClassVar[str] = "asynchronous"

    def __init__(self) -> None:
        self.events: list[str] = []

    def dispatch(
        self,
        hidden_states: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        num_rows: Sequence[int] | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Event:
        self.events.append("dispatch")
        batch = ExpertBatch(hidden_states, physical_ids, topk_weights, adapter_ids=adapter_ids)
        return Event("dispatch", Dispatched(batch, "handle"), self.events)

    def combine(self, rows: Tensor, handle: Any) -> Event:
        assert handle == "handle"
        self.events.append("combine")
        return Event("combine", Full(rows), self.events)


def dispatched(layer: FusedMoE, dispatcher: Dispatcher | None) -> FusedMoE:
    """The layer with another dispatcher, if there is one."""
    if dispatcher is not None:
        layer.plan = dataclasses.replace(layer.plan, dispatcher=dispatcher)
    return layer


# ------------------------------------------------------------------------------------------ results


@by_variant
def test_shared_experts_are_added_to_the_routed_ones(shared):
    layer, rows = build_layer(moe_config(shared=shared)), rows_of(5)
    with torch.no_grad():
        expected = without_shared(layer)(rows) + shared_formula(layer, rows)
        assert_close(layer(rows), expected, torch.float32)


@by_variant
def test_external_shared_experts_come_apart(shared):
    config = moe_config(shared=dataclasses.replace(shared, is_external=True))
    layer, rows = build_layer(config), rows_of(6)
    with torch.no_grad():
        shared_out, routed = layer(rows.view(2, 3, 8))
        assert shared_out.shape == routed.shape == (2, 3, 8)
        assert_close(shared_out.view(6, 8), shared_formula(layer, rows), torch.float32)
        assert torch.equal(routed.view(6, 8), without_shared(layer)(rows))


@by_variant
def test_row_by_row_is_the_same_and_bitwise_independent_of_the_batch(shared):
    torch.manual_seed(0)
    module = SharedExperts(shared, 8, is_row_invariant=True)
    plain = SharedExperts(shared, 8)
    plain.load_state_dict(module.state_dict())
    rows = rows_of(7)
    gate = nn.Linear(8, 1, bias=False) if shared.has_sigmoid_gate else None
    with torch.no_grad():
        whole = module(rows, gate)
        assert_close(whole, plain(rows, gate), torch.float32)
        assert torch.equal(module(rows[2:5], gate), whole[2:5])
        assert module(rows[:0], gate).shape == (0, 8)
        rounded = module.bfloat16()(rows.bfloat16(), None if gate is None else gate.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded, whole) < 2 * RTOL[torch.bfloat16]


def test_row_by_row_has_gradients():
    torch.manual_seed(0)
    shared = VARIANTS["ungated bias gate"]
    gradients = []
    for is_row_invariant in (False, True):
        torch.manual_seed(0)
        module = SharedExperts(shared, 8, is_row_invariant=is_row_invariant)
        gate = nn.Linear(8, 1, bias=False)
        module(rows_of(3), gate).square().sum().backward()
        gradients.append([p.grad for p in (*module.parameters(), *gate.parameters())])
    for plain, by_row in zip(*gradients, strict=True):
        assert_close(by_row, plain, torch.float32)


def test_no_tokens():
    layer = build_layer(moe_config(shared=VARIANTS["sigmoid gate"]))
    assert layer(torch.zeros(0, 8)).shape == (0, 8)


# -------------------------------------------------------------------------------------------- order


def expected_order(
    shared: SharedExpertsConfig | None,
    device_type: str,
    num_tokens: int,
    is_remote: bool,
    is_summed: bool,
    is_tracing: bool,
    is_recorded: bool,
) -> SharedExpertsOrder:
    """The decision table, read from the top."""
    table = [
        (shared is None, SharedExpertsOrder.NONE),
        (shared is not None and shared.is_external, SharedExpertsOrder.EXTERNAL),
        (is_summed, SharedExpertsOrder.SUMMED),
        (is_remote, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED),
        (is_tracing or is_recorded, SharedExpertsOrder.NO_OVERLAP),
        (device_type != "cuda", SharedExpertsOrder.NO_OVERLAP),
        (shared is not None and not shared.uses_stream, SharedExpertsOrder.NO_OVERLAP),
        (num_tokens > 16, SharedExpertsOrder.NO_OVERLAP),
        (True, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED),
    ]
    return next(order for condition, order in table if condition)


def test_the_order_follows_the_decision_table():
    configs = [None] + [
        dataclasses.replace(
            PLAIN, is_external=is_external, uses_stream=uses_stream, stream_max_tokens=16
        )
        for is_external, uses_stream in itertools.product([False, True], repeat=2)
    ]
    booleans = [False, True]
    seen = set()
    for shared, device, num_tokens, *situation in itertools.product(
        configs, ["cpu", "cuda", "meta"], [0, 1, 16, 17, 1000], *[booleans] * 4
    ):
        is_remote, is_summed, is_tracing, is_recorded = situation
        order = shared_experts_order(
            shared,
            device_type=device,
            num_tokens=num_tokens,
            is_remote=is_remote,
            is_summed=is_summed,
            is_tracing=is_tracing,
            is_recorded=is_recorded,
        )
        expected = expected_order(shared, device, num_tokens, *situation)
        assert order is expected
        seen.add(order)
    assert seen == set(SharedExpertsOrder) - {SharedExpertsOrder.FUSED}


@pytest.mark.parametrize(
    "changes, num_tokens, expected",
    [
        ({}, 256, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED),
        ({}, 257, SharedExpertsOrder.NO_OVERLAP),
        ({"stream_max_tokens": 0}, 0, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED),
        ({"stream_max_tokens": 0}, 1, SharedExpertsOrder.NO_OVERLAP),
        ({"uses_stream": False}, 1, SharedExpertsOrder.NO_OVERLAP),
        ({"is_external": True}, 1, SharedExpertsOrder.EXTERNAL),
    ],
)
def test_order_on_a_gpu_by_its_default_threshold(changes, num_tokens, expected):
    order = shared_experts_order(
        dataclasses.replace(PLAIN, **changes),
        device_type="cuda",
        num_tokens=num_tokens,
        is_remote=False,
        is_summed=False,
        is_tracing=False,
        is_recorded=False,
    )
    assert order is expected


def test_the_order_is_asked_for_with_what_autograd_does(monkeypatch):
    asked: list[bool] = []

    def note(*args: Any, is_recorded: bool, **situation: Any) -> SharedExpertsOrder:
        asked.append(is_recorded)
        return SharedExpertsOrder.NO_OVERLAP

    monkeypatch.setattr("mixtura.runner.schedule.shared_experts_order", note)
    layer = build_layer(moe_config(shared=PLAIN))
    for is_on in (True, False):
        with torch.set_grad_enabled(is_on):
            layer(rows_of(2))
    assert asked == [True, False]


@pytest.mark.parametrize("max_rows_per_pass", [None, 1, 3, 100])
@pytest.mark.parametrize("order", ["external", "no overlap", "overlapped"])
def test_every_row_runs_exactly_once(order, max_rows_per_pass):
    shared = dataclasses.replace(VARIANTS["sigmoid gate"], is_external=order == "external")
    config = moe_config(shared=shared, runner=RunnerConfig(max_rows_per_pass=max_rows_per_pass))
    dispatcher = AsynchronousDispatcher() if order == "overlapped" else None
    layer, rows = dispatched(build_layer(config), dispatcher), rows_of(7)
    counter = RowCounter(layer)
    with torch.no_grad():
        output = layer(rows)
        expected = shared_formula(layer, rows)
        routed = without_shared(layer)(rows)
    assert counter.rows == rows.tolist()
    total = output[0] + output[1] if order == "external" else output
    assert_close(total, routed + expected, torch.float32)


def test_overlapped_shared_experts_start_before_the_combine_is_waited_for():
    dispatcher = AsynchronousDispatcher()
    layer = dispatched(build_layer(moe_config(shared=PLAIN)), dispatcher)
    layer.shared_experts.register_forward_hook(lambda *_: dispatcher.events.append("shared"))
    layer(rows_of(3))
    assert dispatcher.events == [
        "dispatch",
        "dispatch waited for",
        "combine",
        "shared",
        "combine waited for",
    ]


@pytest.mark.parametrize("shared", [None, dataclasses.replace(PLAIN, is_external=True)])
def test_a_remote_dispatcher_without_overlap(shared):
    dispatcher = AsynchronousDispatcher()
    layer = dispatched(build_layer(moe_config(shared=shared)), dispatcher)
    layer(rows_of(3))
    steps = ["dispatch", "dispatch waited for", "combine", "combine waited for"]
    assert dispatcher.events == steps


def test_a_task_without_a_stream_is_there_at_once():
    output = torch.ones(2, 3)
    assert SharedTask(output).result() is output
    module = SharedExperts(PLAIN, 8)
    for order in (SharedExpertsOrder.NO_OVERLAP, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED):
        task = module.start(rows_of(2), None, order)
        assert task.stream is None
        assert torch.equal(task.result(), module(rows_of(2)))


# -------------------------------------------------------------------------------------------- fused


def fused_and_apart(
    num_shared: int, routing: dict[str, Any], *, has_gate: bool = False
) -> tuple[FusedMoE, FusedMoE]:
    """A layer whose shared experts are extra experts, and one with the same weights in an MLP."""
    inner, count = 6, 5
    fused = build_layer(
        moe_config(
            count,
            routing=routing
            | {"num_fused_shared_experts": num_shared, "fused_shared_gate": has_gate},
        )
    )
    shared = SharedExpertsConfig(intermediate_size=num_shared * inner, has_sigmoid_gate=has_gate)
    apart = FusedMoE(moe_config(count, shared=shared, routing=routing))
    state = fused.state_dict()
    gate_up, down = state["experts.gate_up_proj"], state["experts.down_proj"]
    renamed = {
        "gate.weight": state["gate.weight"][:count],
        "experts.gate_up_proj": gate_up[:count],
        "experts.down_proj": down[:count],
        "shared_experts.gate_proj.weight": gate_up[count:, :inner].flatten(0, 1),
        "shared_experts.up_proj.weight": gate_up[count:, inner:].flatten(0, 1),
        "shared_experts.down_proj.weight": torch.cat(list(down[count:]), dim=1),
    }
    if has_gate:
        renamed["shared_expert_gate.weight"] = state["gate.weight"][count:]
    apart.load_state_dict(renamed)
    return fused, apart


@pytest.mark.parametrize("num_shared", [1, 2])
@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"score": ScoreFunction.SIGMOID, "renormalize": Renormalize.SUM, "scale": 2.5},
        {"scale": 2.5, "scale_on": ScaleOn.OUTPUT},
    ],
    ids=["softmax", "scale on weights", "scale on output"],
)
def test_fused_shared_experts_equal_those_apart(routing, num_shared):
    fused, apart = fused_and_apart(num_shared, routing)
    rows = rows_of(9)
    with torch.no_grad():
        assert_close(fused(rows), apart(rows), torch.float32)
        parts = apart.experts.expert_weights
    assert fused.experts.experts_config.num_experts == 5 + num_shared
    assert parts.config.num_experts == 5


def test_a_fused_shared_expert_with_a_sigmoid_gate_equals_one_apart():
    fused, apart = fused_and_apart(1, {}, has_gate=True)
    rows = rows_of(9)
    with torch.no_grad():
        assert_close(fused(rows), apart(rows), torch.float32)


def test_fused_shared_experts_are_the_last_slots_of_every_token():
    fused, _ = fused_and_apart(2, {"scale": 2.5, "scale_on": ScaleOn.OUTPUT})
    routing = fused.run(rows_of(4)).routing
    assert routing.topk_ids.shape == (4, 4)
    assert routing.topk_ids[:, 2:].tolist() == [[5, 6]] * 4
    assert routing.topk_weights[:, 2:].tolist() == [[pytest.approx(0.4)] * 2] * 4
