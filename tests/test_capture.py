"""What a CUDA graph can hold: it says so where it would wait; streams and devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
import virtual_ranks
from expert_cases import build_layer, moe_config, random_batch, rows_of
from graph_kernels import graph_kernels
from no_data import EchoTransport
from spread_layers import WAYS, rank_layer
from test_layer import CASES, SHARED, by_case, layer_of, tokens_for
from tolerances import assert_close
from torch import Tensor, nn

import mixtura.experts.shared
from mixtura import cuda
from mixtura.config import (
    DispatcherName,
    EplbConfig,
    ParallelConfig,
    SharedExpertsConfig,
    SharedExpertsOrder,
    Simulation,
    SimulationConfig,
    TokensHeld,
)
from mixtura.cuda import is_capturing, on_device
from mixtura.dispatch import AllToAllDispatcher
from mixtura.eplb import ExpertBalancer
from mixtura.errors import CaptureUnsupported
from mixtura.experts import SharedExperts
from mixtura.hf import balance
from mixtura.hf.ep_implementation import MixturaEP
from mixtura.hf.experts import FamilyExperts
from mixtura.hf.gate import SortedGate
from mixtura.hf.parallel import BALANCER
from mixtura.observe import capture_layers
from mixtura.parallel import (
    ExpertParallel,
    ModelPlacement,
    SlotTables,
    StepClock,
    Topology,
)
from mixtura.parallel.ranks import Spread
from mixtura.routing.gate import Choice

CUDA = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with graph_kernels():
        yield


@pytest.fixture
def captures(monkeypatch) -> Iterator[None]:
    """As if a graph were captured on every device."""
    monkeypatch.setattr(cuda, "_captures", lambda device: True)
    return


# ------------------------------------------------------------------------------ while one is captur


def test_a_graph_is_captured_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(cuda, "_HAS_GRAPHS", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_capturing(CUDA)
    assert not is_capturing(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not is_capturing(CUDA)


def test_a_graph_that_is_traced_is_not_captured(captures):
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def function(x: Tensor) -> Tensor:
        seen.append(is_capturing(x.device))
        return x + 1

    torch._dynamo.reset()
    function(torch.ones(2))
    assert seen == [False]


def test_a_layer_runs_where_its_kernel_can_be_captured(captures):
    layer, rows = build_layer(moe_config(shared=SHARED), kernel="gathering"), rows_of(5)
    with torch.no_grad():
        assert layer(rows).shape == (5, 8)


@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_a_kernel_that_waits_is_refused(kernel, captures):
    layer = build_layer(moe_config(), kernel=kernel)
    expected = (
        rf"kernel \({kernel}\) must not wait for the host inside a CUDA graph; got one that reads "
        r"ids there\. Choose another kernel, or run the layer outside of the graph\."
    )
    with torch.no_grad(), pytest.raises(CaptureUnsupported, match=expected):
        layer(rows_of(3))
    with torch.no_grad(), pytest.raises(CaptureUnsupported, match=expected):
        layer.experts(random_batch(layer.moe_config.experts, 3))


def test_nothing_is_started_in_a_graph_that_is_refused(captures, monkeypatch):
    """A stream that has been forked in a graph must be joined, or its end is an error too."""
    layer = build_layer(moe_config(shared=SHARED), kernel="torch")
    monkeypatch.setattr(layer, "start_shared", lambda *_: pytest.fail("it has been started"))
    with torch.no_grad(), pytest.raises(CaptureUnsupported, match="kernel"):
        layer(rows_of(3))


def test_weights_are_packed_before_the_capture(monkeypatch):
    layer, rows = build_layer(moe_config(), kernel="packing"), rows_of(3)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "_captures", lambda device: True)
            with pytest.raises(CaptureUnsupported, match="got weights that it has not packed yet"):
                layer(rows)
        expected = layer(rows)
        monkeypatch.setattr(cuda, "_captures", lambda device: True)
        assert torch.equal(layer(rows), expected)


@pytest.mark.parametrize("dispatcher, held", WAYS)
def test_a_dispatcher_that_waits_is_refused_before_any_exchange(dispatcher, held, captures):
    whole = build_layer(moe_config())
    parallel = ParallelConfig(ep_size=2, tokens=held, dispatcher=dispatcher)

    def work(transport: virtual_ranks.ThreadTransport) -> None:
        layer = rank_layer(whole, parallel, transport, kernel="gathering")
        if dispatcher is DispatcherName.ALL_REDUCE:
            layer(rows_of(3))
            assert transport.world.calls[transport.rank] == ["all_reduce"]
            return
        expected = (
            rf"dispatcher \({dispatcher.value}\) must not wait for the host inside a CUDA graph; "
            r"got one that exchanges sizes which the host reads\. Let all ranks hold the same "
            r"tokens \(tokens='shared', dispatcher all_reduce\), or run the layer outside of the "
            r"graph\."
        )
        with pytest.raises(CaptureUnsupported, match=expected):
            layer(rows_of(3))
        assert transport.world.calls[transport.rank] == []

    virtual_ranks.run(2, work)


def test_the_exchange_of_a_step_is_refused(captures):
    clock = StepClock(EchoTransport(), TokensHeld.OWN)
    with pytest.raises(CaptureUnsupported, match="the forward's step must not wait"), clock.step(3):
        pass
    assert StepClock(EchoTransport(), TokensHeld.SHARED).current(3).num_tokens == (3, 3)


def test_experts_over_ranks_without_a_layer_of_ours_are_refused(captures):
    slots = SlotTables.of(Topology.even(4, 2), 0)
    dispatcher = AllToAllDispatcher(EchoTransport(), slots)
    of_transformers = object.__new__(MixturaEP)
    of_transformers.dispatcher = dispatcher
    with torch.no_grad(), pytest.raises(CaptureUnsupported, match="all_to_all"):
        of_transformers(rows_of(2), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
    experts = FamilyExperts()
    experts.dispatcher = dispatcher
    spread = Spread.of(moe_config(4), ExpertParallel.over(ParallelConfig()))
    with torch.no_grad(), pytest.raises(CaptureUnsupported, match="all_to_all"):
        experts.run_spread(spread, random_batch(moe_config(4).experts, 2))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"debug": True}, r"debug \(True\) must not wait"),
        (
            {"routing": {"simulation": SimulationConfig(kind=Simulation.ZIPF)}},
            r"simulation \(zipf\) must not wait .* Use replay",
        ),
    ],
)
def test_a_layer_that_waits_is_refused(options, expected, captures):
    layer = build_layer(moe_config(**options), kernel="gathering")
    with torch.no_grad(), pytest.raises(CaptureUnsupported, match=expected):
        layer(rows_of(3))


def test_a_recording_of_choices_is_refused(captures):
    layer = build_layer(moe_config(), kernel="gathering")
    with (
        torch.no_grad(),
        capture_layers({"mlp": layer}),
        pytest.raises(
            CaptureUnsupported, match=r"must be recorded and replayed without torch\.compile and"
        ),
    ):
        layer(rows_of(3))


def test_a_family_whose_router_returns_a_list_is_refused(captures):
    gate = object.__new__(SortedGate)
    ids = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(CaptureUnsupported, match="the gate of JetMoE"):
        SortedGate.to_family(gate, Choice(torch.ones(2, 4), torch.ones(2, 2), ids))


def test_no_plan_is_made_in_a_graph(monkeypatch):
    spread = Spread.of(moe_config(), ExpertParallel.over(ParallelConfig()))
    layer = build_layer(moe_config(), kernel="torch")
    placement = ModelPlacement.stack([spread.placement])
    balancer = ExpertBalancer(EplbConfig(), spread.ranks, [layer], placement)
    module = nn.Module()
    setattr(module, BALANCER, balancer)
    balance._after_forward(module, (), None)
    assert balancer.report().num_steps == 1
    monkeypatch.setattr(cuda, "_captures", lambda device: True)
    balance._after_forward(module, (), None)
    assert balancer.report().num_steps == 1


# ----------------------------------------------------------------------------- streams and devices


class Streams:
    """Stands for torch.cuda's streams: what waited for what, and what memory was recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.current = Stream(self, 7)
        self.count = 0
        monkeypatch.setattr(mixtura.experts.shared, "_STREAMS", {})
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", self.create)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.record(stream))

    def create(self, device: torch.device) -> Stream:
        self.count += 1
        assert device == CUDA
        return Stream(self, 100 + self.count)

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        self.events.append(f"on {stream.cuda_stream}")
        yield
        self.events.append(f"off {stream.cuda_stream}")

    def record(self, stream: Stream) -> None:
        self.events.append(f"kept for {stream.cuda_stream}")


class Stream:
    """One of them."""

    device = CUDA

    def __init__(self, streams: Streams, number: int) -> None:
        self.streams = streams
        self.cuda_stream = number

    def wait_stream(self, other: Stream) -> None:
        self.streams.events.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


@pytest.mark.parametrize("is_captured", [False, True])
def test_an_auxiliary_stream_forks_and_joins(is_captured, monkeypatch):
    streams = Streams(monkeypatch)
    monkeypatch.setattr(cuda, "_captures", lambda device: is_captured)
    module = SharedExperts(SharedExpertsConfig(intermediate_size=10), 8)
    rows = rows_of(3)
    with torch.no_grad():
        task = module.start(rows, None, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED)
        assert task.rows is rows, "what the stream reads must stay until it is waited for"
        assert streams.events == ["101 waits for 7", "on 101", "off 101"]
        streams.events.clear()
        assert torch.equal(task.result(), module(rows))
    # What is recorded in a graph is kept from being used again until the capture ends.
    kept = [] if is_captured else ["kept for 7"]
    assert streams.events == ["7 waits for 101", *kept]


def test_every_stream_has_an_auxiliary_one_of_its_own(monkeypatch):
    streams = Streams(monkeypatch)
    module = SharedExperts(SharedExpertsConfig(intermediate_size=10), 8)
    for number in (7, 8, 7):
        streams.current = Stream(streams, number)
        module.start(rows_of(3), None, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED)
    waits = [event for event in streams.events if "waits" in event]
    assert waits == ["101 waits for 7", "102 waits for 8", "101 waits for 7"]


def test_launches_go_to_the_device_of_the_rows(monkeypatch):
    entered: list[torch.device] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        with on_device(CUDA):
            pass
    with on_device(torch.device("cpu")):
        pass
    assert entered == [CUDA]


def test_a_kernel_runs_on_the_device_of_the_rows(monkeypatch):
    asked: list[torch.device] = []

    def note(device: torch.device) -> AbstractContextManager[object]:
        asked.append(device)
        return on_device(device)

    monkeypatch.setattr("mixtura.experts.packed.on_device", note)
    build_layer(moe_config())(rows_of(2))
    assert asked == [torch.device("cpu")]


# -------------------------------------------------------------------------- the kernel of this file


@by_case
def test_the_gathering_kernel_is_right(name):
    config, _ = CASES[name]
    rows, tokens = rows_of(7), tokens_for(config)
    with torch.no_grad():
        expected = layer_of(config, kernel="reference")(rows, tokens)
        assert_close(layer_of(config, kernel="gathering")(rows, tokens), expected, torch.float32)
