"""Layers on a GPU, without one: a stand-in for the device shows all but CUDA's own calls."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import itertools
import json
import re
import runpy
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from mixtura.bench import choices, measure
from mixtura.bench import contenders as module_of_contenders
from mixtura.bench.cases import SHAPES, Case, LayerShape, find_shape
from mixtura.bench.contenders import Contender, KernelContender, Layer, RunBatch
from mixtura.bench.experts import true_output
from mixtura.bench.gpu import command, device, layer_case, rotation
from mixtura.bench.gpu.arithmetic import activation_dtype_of, product_dtype
from mixtura.bench.gpu.batches import BatchSource, Spread, Truth
from mixtura.bench.gpu.checks import ROUNDED, Truths, rounded_tolerance, tolerance
from mixtura.bench.gpu.command import GpuOptions, bench_gpu
from mixtura.bench.gpu.device import CannotCapture, CudaDevice, Device, DeviceFacts, Graph, Step
from mixtura.bench.gpu.journal import Journal
from mixtura.bench.gpu.layer_case import Bench, floor_of, run_case, sets_that_fit
from mixtura.bench.gpu.limits import (
    NOMINAL,
    Peak,
    find_peak,
    nominal_limits,
    probe_bandwidth,
    probe_peak,
)
from mixtura.bench.gpu.results import LayerResult, Place
from mixtura.bench.gpu.rotation import Measure, Mode, Rotation, num_steps
from mixtura.bench.gpu.table import chart_lines, notes, results_table
from mixtura.bench.measure import Timing, interleave
from mixtura.bench.peers import transformers_experts, transformers_fp8
from mixtura.bench.plain_router import PlainRouter
from mixtura.bench.weights import LayerWeights
from mixtura.cli import app
from mixtura.config import ActivationDtype
from mixtura.errors import ConfigError, InputError
from mixtura.experts import ExpertsOptions
from mixtura.kernels import get_kernel
from mixtura.kernels.triton.device import device_of
from mixtura.kernels.triton.tuned import tuned_path
from mixtura.quant.activations import ActivationGroup, ActivationScheme, round_activations
from mixtura.quant.formats import WeightFormat
from mixtura.quant.scheme import Code
from mixtura.routing import router_for
from mixtura.types import ExpertBatch, ExpertsProblem

ROOT = Path(__file__).parents[1]
TINY = find_shape("tiny")
PLACE = Place(
    device={"name": "a stand-in", "driver": "580.1"},
    versions={"torch": "2"},
    sources="abc",
    commit="def",
    tuned=None,
)


@pytest.fixture(autouse=True)
def short_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_case, "NUM_BATCHES", 3)
    monkeypatch.setattr(rotation, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(measure, "MIN_REPETITIONS", 2)


class StandIn(Device):
    """The CPU in the device's place; its graphs are calls that write one tensor."""

    type = "cpu"
    probe_bytes = 2**16
    matrix_size = 32

    def __init__(self, free: int = 2**30) -> None:
        self.free = free
        self.is_lost = False

    def facts(self) -> DeviceFacts:
        return DeviceFacts("a stand-in", "", None, cache_bytes=2**16, memory_bytes=2**31)

    def free_bytes(self) -> int:
        return self.free

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def capture(self, step: Step) -> Graph:
        output = step().clone()
        return Graph(lambda: output.copy_(step()), output)

    def release(self) -> None:
        pass

    def finish(self) -> None:
        if self.is_lost:
            raise RuntimeError("an illegal memory access was encountered")

    def state(self) -> dict[str, float] | None:
        return {"sm_MHz": 1980.0}


class Odd(Contender):
    """The torch kernel, and something done to what it returns."""

    is_ours = True

    def __init__(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.change = change

    def refusal(self, case: Case) -> str | None:
        return None

    def bind(self, layer: Layer) -> RunBatch:
        run = KernelContender("torch").bind(layer)
        return lambda batch: self.change(run(batch))


def tiny(num_tokens: int = 3, weights: str = "fp32", shape: LayerShape = TINY) -> Case:
    return Case(shape=shape, num_tokens=num_tokens, weights=WeightFormat.parse(weights))


def bench(**changes: Any) -> Bench:
    given: dict[str, Any] = {
        "device": StandIn(),
        "place": PLACE,
        "peak": {torch.float32: Peak(1e11), torch.bfloat16: Peak(1e11)},
        "spread": Spread.UNIFORM,
        "seconds": 0.0,
    }
    return Bench(**{**given, **changes})


def small(name: str) -> LayerShape:
    """A shape of the table: its rule, on few and small experts."""
    shape = find_shape(name)
    rule = shape.routing
    changes: dict[str, Any] = {"num_experts": 16, "top_k": min(rule.top_k, 6)}
    if rule.groups is not None:
        changes["groups"] = replace(rule.groups, num_expert_groups=4, topk_groups=2)
    if rule.no_compute is not None:
        changes["no_compute"] = replace(rule.no_compute, count=8)
    experts = replace(shape.experts, num_experts=16, hidden_size=64, intermediate_size=32)
    return replace(shape, routing=replace(rule, **changes), experts=experts)


def options(**changes: Any) -> GpuOptions:
    given: dict[str, Any] = {
        "shapes": ["tiny"],
        "weights": "fp32",
        "tokens": "1,3",
        "contenders": ["torch"],
        "seconds": 0.0,
    }
    return GpuOptions(**{**given, **changes})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------- the whole run


def test_a_run_measures_everybody_in_all_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, png = tmp_path / "results.jsonl", tmp_path / "chart.png"
    names = ["torch", "grouped_mm", "batched_mm", "eager", "sonicmoe"]
    asked = options(contenders=names, weights="bf16", out=out, png=png)
    assert bench_gpu(asked, StandIn) == 0
    found = lines_of(out)
    ways = list(itertools.product(names, [m.value for m in Measure], [m.value for m in Mode]))
    assert [(r["contender"], r["measure"], r["mode"]) for r in found] == ways * 2
    for record in found:
        if record["contender"] == "sonicmoe":
            assert record["refusal"] == "is for GPUs" and record["us"] is None
            continue
        assert record["is_correct"] and record["refusal"] is None
        assert record["us_p10"] <= record["us"] <= record["us_p90"]
        assert record["share_of_floor"] == pytest.approx(record["floor_us"] / record["us"])
        assert record["gbytes_per_s"] == pytest.approx(record["weight_bytes"] / record["us"] / 1e3)
        assert record["tflops"] == pytest.approx(record["flops"] / record["us"] / 1e6)
        assert record["state"] == {"sm_MHz": 1980.0}
        assert record["nominal_us"] is None  # of a device that nobody knows
    assert found[0]["place"]["device"]["name"] == "a stand-in"
    assert found[0]["place"]["versions"]["torch"] == torch.__version__
    told = capsys.readouterr()
    assert "2/2  tiny, bf16, uniform, T=3: torch " in told.err
    assert "sonicmoe: is for GPUs (2 cases)" in told.out
    assert told.out.count("grouped_mm") == 2
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_every_key_is_documented() -> None:
    documentation = (ROOT / "docs/benchmarks/gpu.md").read_text()
    for key in (*LayerResult.__annotations__, *Place.__annotations__, *DeviceFacts.__annotations__):
        assert f"`{key}`" in documentation, key


def test_json_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    bench_gpu(options(tokens="2", as_json=True), StandIn)
    told = capsys.readouterr()
    assert [json.loads(line)["T"] for line in told.out.splitlines()] == [2] * 4
    assert "layer graph" in told.err


RULES = ("olmoe", "qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v3", "longcat-flash")


@pytest.mark.parametrize("name", RULES)
def test_contenders_agree_on_every_rule(name: str) -> None:
    """Experts and layers, bf16 and fp32, with choices that need no arithmetic."""
    spread = Spread.ZIPF if name == "longcat-flash" else Spread.UNIFORM
    contenders = choices.find_contenders(["torch", "grouped_mm", "batched_mm", "eager"])
    for weights in ("fp32", "bf16"):
        case = tiny(13, weights, small(name))
        results = run_case(case, contenders, bench(spread=spread))
        assert all(result.is_correct for result in results), [
            (r.contender, r.measure, r.relative_error, r.refusal) for r in results
        ]


def test_quantized_experts_are_measured_beside_dense_ones() -> None:
    contenders = choices.find_contenders(["torch", "grouped_mm"])
    results = run_case(tiny(weights="int4-g32"), contenders, bench())
    assert all(result.is_correct for result in results)
    assert {result.dtype for result in results} == {"bfloat16"}


# ------------------------------------------------------------------------------ what is checked


@pytest.mark.parametrize(
    "change, relative_error",
    [
        (lambda out: out * 1.2, 0.2),
        (lambda out: torch.where(torch.arange(len(out))[:, None] == 1, torch.nan, out), None),
    ],
)
def test_a_wrong_contender_is_caught(
    change: Callable[[Tensor], Tensor],
    relative_error: float | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = [*choices.find_contenders(["torch"]), Odd("wrong", change)]
    monkeypatch.setattr(command, "find_contenders", lambda _: both)
    assert bench_gpu(options(tokens="3", as_json=True), StandIn) == 1
    right, wrong = (
        [record for record in records if record["mode"] == "graph"]
        for _, records in itertools.groupby(
            map(json.loads, capsys.readouterr().out.splitlines()), lambda r: r["contender"]
        )
    )
    assert [record["is_correct"] for record in right + wrong] == [True, True, False, False]
    for record in wrong:
        expected = float("inf") if relative_error is None else relative_error
        assert record["relative_error"] == pytest.approx(expected, rel=0.01)
        assert record["us"] is not None  # timed all the same


def test_a_batch_that_leaves_experts_alone_is_checked() -> None:
    """A contender that is right only where the second half of the batch's rows is not like this."""

    def wrong_on_few(batch: ExpertBatch) -> bool:
        return int(torch.unique(batch.local_ids).numel()) <= 16

    class OnFew(Odd):
        def bind(self, layer: Layer) -> RunBatch:
            run = KernelContender("torch").bind(layer)
            return lambda batch: run(batch) * (2.0 if wrong_on_few(batch) else 1.0)

    (result, *_) = run_case(tiny(64), [OnFew("few", lambda out: out)], bench())
    assert result.is_correct is False and result.relative_error == pytest.approx(1.0, rel=0.01)


def test_a_graph_that_forgets_to_write_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: Device, step: Step) -> Graph:
        return Graph(lambda: None, step().clone())

    monkeypatch.setattr(StandIn, "capture", capture)
    results = run_case(tiny(), choices.find_contenders(["torch"]), bench())
    assert not any(result.is_correct for result in results)


def test_ours_must_be_nearer_to_the_truth_than_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(weights="bf16")
    ours, fallback, peer = choices.find_contenders(["reference", "torch", "eager"])
    monkeypatch.setattr(type(get_kernel("reference")), "devices", ("cpu",))
    bounds = [tolerance(case, contender) for contender in (ours, fallback, peer)]
    assert bounds == [5e-3, 1e-2, 1e-2]
    assert tolerance(tiny(), peer) == 1e-5


def test_rows_that_are_checked_spread_over_the_batch() -> None:
    case = tiny(1000)
    source = BatchSource(case, Spread.UNIFORM)
    truth = Truth.of(LayerWeights(TINY, case.weights), source.draw())
    assert truth.rows[0] == 0 and truth.rows[-1] == 999
    assert truth.rows.unique().numel() == 64 and truth.experts.shape == (64, 64)


# ------------------------------------------------------------------------- who cannot is left out


def failing(text: str) -> Callable[[Tensor], Tensor]:
    def change(out: Tensor) -> Tensor:
        raise RuntimeError(f"{text}\nand a page of more")

    return change


def test_a_contender_that_cannot_even_say_is_a_refusal() -> None:
    class Unimportable(Odd):
        def refusal(self, case: Case) -> str | None:
            raise ImportError("libcuda.so.1: cannot open shared object file")

    results = run_case(tiny(), [Unimportable("peer", lambda out: out)], bench())
    assert {r.refusal for r in results} == {
        "ImportError: libcuda.so.1: cannot open shared object file"
    }


def test_a_contender_that_fails_is_a_refusal() -> None:
    contenders = [Odd("broken", failing("out of memory")), *choices.find_contenders(["torch"])]
    results = run_case(tiny(), contenders, bench())
    broken, right = results[:4], results[4:]
    assert {result.refusal for result in broken} == {"RuntimeError: out of memory"}
    assert all(result.us is None and result.is_correct is None for result in broken)
    assert all(result.us is not None for result in right)


def test_weights_that_do_not_fit_after_all_are_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(layer_case, "LayerWeights", full)
    results = run_case(tiny(), choices.find_contenders(["torch"]), bench())
    assert {result.refusal for result in results} == {"OutOfMemoryError: tried to allocate 9 GiB"}


def test_one_that_fails_while_it_is_timed_is_left_out() -> None:
    calls = itertools.count()

    def after_a_while(out: Tensor) -> Tensor:
        return failing("gone")(out) if next(calls) > 60 else out

    contenders = [Odd("breaks", after_a_while), *choices.find_contenders(["torch"])]
    results = run_case(tiny(), contenders, bench(seconds=0.3))
    assert {result.refusal for result in results[:4]} == {"RuntimeError: gone"}
    assert all(result.us is not None for result in results[4:])


def test_what_cannot_be_captured_is_eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: Device, step: Step) -> Graph:
        raise CannotCapture("called a synchronizing operation")

    monkeypatch.setattr(StandIn, "capture", capture)
    results = run_case(tiny(), choices.find_contenders(["torch"]), bench())
    for result in results:
        is_eager = result.mode == Mode.EAGER
        assert (result.us is not None) == is_eager and result.is_correct
        assert result.refusal == (
            None if is_eager else "cannot be captured: called a synchronizing operation"
        )
    assert "torch: cannot be captured: called a synchronizing operation" in notes(results)


def test_a_peer_that_is_too_slow_for_its_share_of_the_time_is_left_out() -> None:
    def slow(out: Tensor) -> Tensor:
        time.sleep(1e-3)
        return out

    peer, ours = Odd("slow", slow), Odd("ours", slow)
    peer.is_ours = False
    results = run_case(tiny(), [peer, ours], bench(seconds=0.01))
    for result in results[:4]:
        assert "ms a layer, too long to be timed" in str(result.refusal)
        assert result.is_correct and result.us is None
    assert all(result.us is not None for result in results[4:])


def test_a_lost_device_ends_the_run_and_the_culprit_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in, out = StandIn(), tmp_path / "results.jsonl"

    def lose(out: Tensor) -> Tensor:
        stand_in.is_lost = True
        return failing("an illegal memory access")(out)

    both = [*choices.find_contenders(["torch"]), Odd("culprit", lose)]
    monkeypatch.setattr(command, "find_contenders", lambda _: both)
    assert bench_gpu(options(out=out), lambda: stand_in) == 1
    assert {record["contender"] for record in lines_of(out)} == {"culprit"}
    assert "the device was lost: culprit: RuntimeError: an illegal" in capsys.readouterr().err
    stand_in.is_lost = False
    monkeypatch.setattr(command, "find_contenders", lambda _: both)
    bench_gpu(options(out=out, tokens="1"), lambda: stand_in)  # the culprit is not run again
    assert [record["contender"] for record in lines_of(out)] == ["culprit"] * 4 + ["torch"] * 4


def test_fewer_sets_are_taken_where_memory_is_short() -> None:
    case, ours = tiny(), choices.find_contenders(["torch"])
    one_set = 32 * case.expert_bytes
    assert sets_that_fit(case, ours, StandIn()) == (3, 3)
    assert sets_that_fit(case, ours, StandIn(free=3 * one_set)) == (2, 3)
    short = run_case(case, ours, bench(device=StandIn(free=3 * one_set)))
    assert {(result.weight_sets, result.note) for result in short} == {
        (2, "memory for 2 of 3 sets")
    }
    assert all(result.is_correct for result in short)
    none = run_case(case, ours, bench(device=StandIn(free=one_set // 2)))
    assert all("does not fit in the device's memory" in str(result.refusal) for result in none)


def test_small_layers_rotate_through_more_weights_than_the_cache_holds() -> None:
    class Cached(StandIn):
        def facts(self) -> DeviceFacts:
            return replace(super().facts(), cache_bytes=2**20)

    case = tiny(1, "bf16")
    num_sets, _ = sets_that_fit(case, choices.find_contenders(["torch"]), Cached())
    assert num_sets == 8  # the most
    case = tiny(64, "bf16")
    num_sets, _ = sets_that_fit(case, choices.find_contenders(["torch"]), Cached())
    assert num_sets * 32 * case.expert_bytes >= 2 * 2**20


# ------------------------------------------------------------------------------------ the rotation


def test_a_rotation_ends_on_the_first_layer_and_batch() -> None:
    seen: list[tuple[int, int]] = []

    def layer(number: int) -> Callable[[int], Tensor]:
        def run(batch: int) -> Tensor:
            seen.append((number, batch))
            return torch.tensor([number, batch])

        return run

    turns = Rotation([layer(number) for number in range(3)], range(17), -1, 51)
    assert turns.run().tolist() == [0, 0]
    assert len(set(seen)) == 51 and all(a[0] != b[0] for a, b in itertools.pairwise(seen))
    assert turns.run_half().tolist() == [0, -1]


def test_a_rotation_takes_a_millisecond_at_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "LEAST_SECONDS", 1e-3)
    assert num_steps(3, 17, floor_seconds=17.56e-6) == 57
    assert num_steps(3, 17, floor_seconds=1e-3) == 17
    assert num_steps(8, 5, floor_seconds=1e-3) == 8
    assert num_steps(3, 17, floor_seconds=1e-9) == 128


def test_contenders_take_turns_by_the_device_s_clock() -> None:
    order: list[str] = []
    times = {"a": iter(itertools.count(1)), "b": itertools.repeat(2)}

    def call(name: str) -> Callable[[int], str]:
        return lambda number: (order.append(name), name)[1]

    def clock(run: Callable[[], object]) -> tuple[float, bool]:
        return float(next(times[str(run())])), False

    found = interleave({name: call(name) for name in "ab"}, seconds=60.0, clock=clock, warm_up=5.0)
    warm_up = ["a", "b"] * 2  # 1 + 2 + 2 + 2 seconds
    assert order[:4] == warm_up
    turns = order[4 : 4 + 2 * measure.MIN_REPETITIONS]
    assert all({*turns[i : i + 2]} == {"a", "b"} for i in range(0, len(turns), 2))
    assert found["a"].samples[:3] == (3.0, 4.0, 5.0)
    assert sum(found["b"].samples) == pytest.approx(30.0)
    assert found["b"].repetitions == 15


def test_times_are_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def a_second(self: Device, call: Callable[[], object]) -> float:
        call()
        return 1.0

    monkeypatch.setattr(StandIn, "seconds", a_second)
    for result in run_case(tiny(), choices.find_contenders(["torch"]), bench()):
        assert result.layers == 3 and result.us == pytest.approx(1e6 / 3)


def test_percentiles_are_samples() -> None:
    timing = Timing(tuple(float(value) for value in range(10, 0, -1)))
    assert (timing.percentile(10), timing.percentile(90), timing.median) == (1.0, 9.0, 5.5)
    assert timing.per(2).percentile(90) == 4.5
    assert Timing((7.0,)).percentile(10) == Timing((7.0,)).percentile(90) == 7.0


# ------------------------------------------------------------------------------ routing and floors


def case_of(name: str, num_tokens: int) -> Case:
    return Case(shape=find_shape(name), num_tokens=num_tokens, weights=WeightFormat.BF16)


class IdsOnly(BatchSource):
    """Batches whose hidden states take no memory."""

    def __init__(self, case: Case, spread: Spread) -> None:
        thin = replace(case.shape.experts, hidden_size=1)
        super().__init__(replace(case, shape=replace(case.shape, experts=thin)), spread)


@pytest.mark.parametrize(
    "name, num_tokens, microseconds, limited_by, batches",
    [
        ("qwen3-30b-a3b", 1, 17.56, "memory", 3),
        ("qwen3-30b-a3b", 8, 113.3, "memory", 17),
        ("qwen3-30b-a3b", 512, 281.9, "memory", 1),
        ("qwen3-30b-a3b", 8192, 782.9, "compute", 1),
        ("deepseek-v3", 128, 5155, "memory", 5),
        ("gpt-oss-120b", 512, 1483, "memory", 1),
        ("mixtral", 2048, 1827, "compute", 1),
        ("longcat-flash", 128, 7793, "memory", 5),
    ],
)
def test_floors_are_those_of_the_published_model(
    name: str, num_tokens: int, microseconds: float, limited_by: str, batches: int
) -> None:
    """Of an H200: 4.3 TB/s, 790 TFLOP/s; experts hit as counted agree with those expected."""
    case = case_of(name, num_tokens)
    source, limits = IdsOnly(case, Spread.UNIFORM), NOMINAL["H200"]
    drawn = [source.draw() for _ in range(batches)]
    floor = floor_of(case, drawn, limits.bandwidth, limits.peak)
    is_certain = num_tokens in (1, 512, 2048, 8192)  # which experts are hit
    tolerance = 5e-4 if is_certain else 0.02
    assert floor.seconds * 1e6 == pytest.approx(microseconds, rel=tolerance)
    assert floor.limited_by == limited_by


def test_a_third_of_longcat_s_choices_needs_no_arithmetic() -> None:
    case = case_of("longcat-flash", 256)
    batch = IdsOnly(case, Spread.UNIFORM).draw()
    assert batch.num_experts == len({*batch.routing.topk_ids.flatten().tolist()} - {-1})
    assert batch.num_slots == pytest.approx(256 * 8, rel=0.03)
    bypass = batch.routing.bypass
    assert bypass is not None and bypass.identity_weight is not None
    assert bypass.identity_weight.min() >= 0 and bypass.identity_weight.max() > 0


def test_skewed_choices_hit_fewer_experts() -> None:
    case = case_of("qwen3-30b-a3b", 64)
    even, skewed = (IdsOnly(case, spread).draw() for spread in Spread)
    assert skewed.num_experts < even.num_experts
    counts = torch.bincount(skewed.routing.topk_ids.flatten().long(), minlength=128)
    assert counts.max() > 2 * 64 * 8 / 128


@pytest.mark.parametrize("name", list(SHAPES))
def test_peers_are_routed_by_the_same_rule(name: str) -> None:
    case = case_of(name, 65)
    source = IdsOnly(case, Spread.UNIFORM)
    batch = source.draw()
    theirs = PlainRouter(case.shape.routing, source.tensors).route(batch.router_logits)
    ours = router_for(case.shape.routing, source.tensors).route(batch.router_logits)

    def by_expert(ids: Tensor, weights: Tensor) -> Tensor:
        dense = torch.zeros(65, case.shape.experts.num_experts + 1)
        return dense.scatter_add_(1, ids.long() % dense.shape[1], weights)[:, :-1]

    assert torch.allclose(
        by_expert(theirs.topk_ids, theirs.topk_weights),
        by_expert(ours.topk_ids, ours.topk_weights),
        atol=1e-6,
    )
    if ours.bypass is not None:
        assert theirs.bypass is not None
        assert torch.allclose(theirs.bypass.identity_weight, ours.bypass.identity_weight)


def test_weights_keep_rows_at_their_size() -> None:
    for name in ("gpt-oss-120b", "mixtral"):
        shape = small(name)
        stacks = LayerWeights(shape, WeightFormat.FP32).stacks(1)
        for matrix in stacks.projections():
            spread = matrix.values.std() * matrix.shape[-1] ** 0.5
            assert float(spread) == pytest.approx(1.0, rel=0.05)


def test_half_of_the_experts_get_nothing() -> None:
    for name in RULES:
        batch = IdsOnly(case_of(name, 64), Spread.UNIFORM).draw_half()
        ids = batch.routing.topk_ids
        assert (ids[ids >= 0] % 2 == 0).all(), name


def test_limits_are_measured_and_named() -> None:
    bandwidth = probe_bandwidth(StandIn())
    assert bandwidth.best == max(bandwidth.copy, bandwidth.read) > 0
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        peak = find_peak(StandIn(), dtype)
        assert peak.rate > 0 and peak.note is None
    assert nominal_limits("NVIDIA H200") == NOMINAL["H200"]
    assert nominal_limits("NVIDIA A100") is None


def test_probes_leave_the_default_generator_alone() -> None:
    """On a GPU a capture that broke leaves it unusable."""
    before = torch.get_rng_state()
    probe_bandwidth(StandIn())
    probe_peak(StandIn(), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_nominal_floor_is_beside_the_measured_one() -> None:
    place = replace(PLACE, device={"name": "NVIDIA H200"})
    ours = choices.find_contenders(["torch"])
    assert run_case(tiny(), ours, bench(place=place))[0].nominal_us is None  # of bf16 alone
    (result, *_) = run_case(tiny(weights="bf16"), ours, bench(place=place))
    nominal = (result.weight_bytes + result.row_bytes) / 4.3e12 * 1e6
    assert result.nominal_us == pytest.approx(nominal)
    assert result.share_of_nominal == pytest.approx(nominal / result.us)


# ------------------------------------------------------------------------------ quantized weights


class Hopper(StandIn):
    """A device that multiplies e4m3 codes."""

    def facts(self) -> DeviceFacts:
        return replace(super().facts(), capability="9.0")


class Rounding(Odd):
    """The layer in fp32 on rows that are rounded, as a kernel of that arithmetic does."""

    def __init__(self, round_rows: Callable[[Tensor], Tensor], factor: float = 1.0) -> None:
        self.name = "rounding"
        self.round_rows = round_rows
        self.factor = factor

    def rounds_to(self, case: Case) -> ActivationDtype | None:
        return case.rounds_to

    def rounds_once(self, case: Case) -> bool:
        return True

    def bind(self, layer: Layer) -> RunBatch:
        def run(batch: ExpertBatch) -> Tensor:
            out = true_output(layer.source, batch, layer.number, self.round_rows)
            return (self.factor * out).to(layer.case.dtype)

        return run


INT8, FP8, BF16 = ActivationDtype.INT8, ActivationDtype.FP8, ActivationDtype.BF16


def quantized(name: str, asked: ActivationDtype, shape: LayerShape = TINY) -> Case:
    return replace(tiny(weights=name, shape=shape), activation_dtype=asked)


def rounded_to(code: Code, *group: int) -> Callable[[Tensor], Tensor]:
    per = ActivationGroup.GROUP if group else ActivationGroup.TOKEN
    scheme = ActivationScheme(code, 8, per, *group)
    return lambda rows: round_activations(rows, scheme)


WIDE = replace(
    TINY,
    name="wide",
    experts=replace(TINY.experts, num_experts=6, hidden_size=512, intermediate_size=256),
    routing=replace(TINY.routing, num_experts=6, top_k=2),
)
"""Rows of several groups of 128 columns."""

ALL_PEAKS = {
    torch.bfloat16: Peak(1e11),
    torch.int8: Peak(2e11),
    torch.float8_e4m3fn: Peak(3e11, "a note"),
}


@pytest.mark.parametrize("sizes", [(64, 32), (200, 136)])
@pytest.mark.parametrize("format", WeightFormat)
def test_the_floor_counts_what_is_stored(format: WeightFormat, sizes: tuple[int, int]) -> None:
    """Packed codes and scales, groups that are not full included."""
    experts = replace(TINY.experts, hidden_size=sizes[0], intermediate_size=sizes[1])
    case = tiny(weights=format.value, shape=replace(TINY, experts=experts))
    stacks = LayerWeights(case.shape, format).stacks(0)
    stored = sum(matrix.num_bytes for matrix in stacks.projections())
    assert case.expert_bytes * experts.num_experts == stored
    batch = BatchSource(case, Spread.UNIFORM).draw()
    floor = floor_of(case, [batch], 1.0, 1.0)
    assert floor.weight_bytes == batch.num_experts * stored // experts.num_experts
    assert floor.row_bytes == 2 * 3 * sizes[0] * case.dtype.itemsize


QWEN_WEIGHTS = 3 * 2048 * 768
"""Of an expert; its rows are 1536 of gate and up, and 2048."""


@pytest.mark.parametrize(
    "name, num_bytes",
    [
        ("bf16", 2 * QWEN_WEIGHTS),
        ("fp8", QWEN_WEIGHTS + 4 * (1536 + 2048)),
        ("fp8-block", QWEN_WEIGHTS + 4 * (12 * 16 + 16 * 6)),
        ("int8-channel", QWEN_WEIGHTS + 4 * (1536 + 2048)),
        ("int8-g64", QWEN_WEIGHTS + 2 * QWEN_WEIGHTS // 64),
        ("int4-g32", QWEN_WEIGHTS // 2 + 2 * QWEN_WEIGHTS // 32),
        ("int4-g64", QWEN_WEIGHTS // 2 + 2 * QWEN_WEIGHTS // 64),
        ("int4-g128", QWEN_WEIGHTS // 2 + 2 * QWEN_WEIGHTS // 128),
        ("mxfp4", QWEN_WEIGHTS // 2 + QWEN_WEIGHTS // 32),
        ("nvfp4", QWEN_WEIGHTS // 2 + QWEN_WEIGHTS // 16 + 2 * 4),
    ],
)
def test_bytes_of_an_expert(name: str, num_bytes: int) -> None:
    assert tiny(weights=name, shape=find_shape("qwen3-30b-a3b")).expert_bytes == num_bytes


@pytest.mark.parametrize(
    "name, weights, num_tokens, microseconds, limited_by",
    [
        ("qwen3-30b-a3b", "fp8-block", 1, 8.783, "memory"),
        ("qwen3-30b-a3b", "fp8-block", 512, 141.5, "memory"),
        ("qwen3-30b-a3b", "fp8-block", 8192, 412.3, "compute"),
        ("qwen3-30b-a3b", "mxfp4", 8192, 782.9, "compute"),
        ("gpt-oss-120b", "mxfp4", 1, 12.3, "memory"),
        ("gpt-oss-120b", "mxfp4", 512, 394.9, "memory"),
        ("deepseek-v3", "fp8-block", 1, 81.96, "memory"),
    ],
)
def test_floors_of_quantized_weights_are_those_of_the_published_model(
    name: str, weights: str, num_tokens: int, microseconds: float, limited_by: str
) -> None:
    """Of an H200: 1500 TFLOP/s where rows are rounded to fp8, 790 where weights alone are codes."""
    format, limits = WeightFormat.parse(weights), NOMINAL["H200"]
    arithmetic = activation_dtype_of(format, None, "9.0")
    case = replace(case_of(name, num_tokens), weights=format, activation_dtype=arithmetic)
    peak = limits.peak_of(product_dtype(case))
    assert peak is not None
    drawn = [IdsOnly(case, Spread.UNIFORM).draw()]
    floor = floor_of(case, drawn, limits.bandwidth, peak)
    assert floor.seconds * 1e6 == pytest.approx(microseconds, rel=1e-3)
    assert floor.limited_by == limited_by


@pytest.mark.parametrize(
    "weights, asked, capability, dtype",
    [
        ("bf16", None, "9.0", torch.bfloat16),
        ("bf16", FP8, "9.0", torch.bfloat16),  # beside quantized ones
        ("fp32", None, "9.0", torch.float32),
        ("fp8", None, "8.9", torch.float8_e4m3fn),
        ("fp8", None, "8.6", torch.bfloat16),
        ("fp8-block", None, "12.0", torch.float8_e4m3fn),
        ("fp8-block", None, "", torch.bfloat16),
        ("fp8-block", BF16, "9.0", torch.bfloat16),
        ("int8", None, "9.0", torch.bfloat16),
        ("int8", INT8, "8.0", torch.int8),
        ("int4", None, "9.0", torch.bfloat16),
        ("int4", FP8, "9.0", torch.float8_e4m3fn),
        ("mxfp4", None, "10.0", torch.bfloat16),
        ("nvfp4", None, "10.0", torch.bfloat16),
    ],
)
def test_the_peak_is_that_of_what_is_multiplied(
    weights: str, asked: ActivationDtype | None, capability: str, dtype: torch.dtype
) -> None:
    format = WeightFormat.parse(weights)
    arithmetic = activation_dtype_of(format, asked, capability)
    case = replace(tiny(weights=weights), activation_dtype=arithmetic)
    assert product_dtype(case) is dtype
    assert (arithmetic is None) == (not format.scheme.is_quantized)


def documented_targets() -> Iterator[tuple[str, str, int, float, float, float]]:
    """Of docs/benchmarks/gpu.md: shape, weights, tokens, floor, share of it, microseconds."""
    text = (ROOT / "docs/benchmarks/gpu.md").read_text()
    shape, weights = "qwen3-30b-a3b", "bf16"
    for line in text.partition("## Targets")[2].partition("## Predictions")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if named := re.match(r"(\S+), `(\S+)`", cells[0] if cells else ""):
            shape, weights = named[1].lower(), named[2]
        if cells and cells[-1] == "not yet measured":
            tokens, floor, share, microseconds = cells[-5:-1]
            last = float(share.split()[-1])
            yield shape, weights, int(tokens), float(floor), last, float(microseconds)


def test_targets_are_shares_of_the_nominal_floor() -> None:
    limits, seen = NOMINAL["H200"], []
    for shape, weights, num_tokens, floor, share, microseconds in documented_targets():
        format = WeightFormat.parse(weights)
        arithmetic = activation_dtype_of(format, None, "9.0")
        case = replace(case_of(shape, num_tokens), weights=format, activation_dtype=arithmetic)
        source = IdsOnly(case, Spread.UNIFORM)
        drawn = [source.draw() for _ in range(17 if num_tokens <= 64 else 1)]
        peak = limits.peak_of(product_dtype(case))
        assert peak is not None
        found = floor_of(case, drawn, limits.bandwidth, peak).seconds * 1e6
        assert found == pytest.approx(floor, rel=0.015), (shape, weights, num_tokens)
        assert floor / share == pytest.approx(microseconds, rel=0.05 if floor < 20 else 0.015)
        seen.append((shape, weights))
    assert {kind: seen.count(kind) for kind in seen} == {
        ("qwen3-30b-a3b", "bf16"): 10,
        ("qwen3-30b-a3b", "fp8-block"): 6,
        ("gpt-oss-120b", "int4-g128"): 8,
        ("gpt-oss-120b", "mxfp4"): 8,
    }


def test_nominal_peaks_go_by_what_is_multiplied() -> None:
    limits = NOMINAL["H200"]
    assert limits.peak_of(torch.bfloat16) == limits.peak_of(torch.float16) == 790e12
    assert limits.peak_of(torch.float8_e4m3fn) == 1500e12
    assert NOMINAL["H100 80GB HBM3"].peak_of(torch.float8_e4m3fn) == 1350e12
    assert limits.peak_of(torch.int8) is None and limits.peak_of(torch.float32) is None


@pytest.mark.parametrize("asked, rate", [(BF16, 1e11), (INT8, 2e11), (FP8, 3e11)])
def test_a_result_has_the_floor_of_its_arithmetic(asked: ActivationDtype, rate: float) -> None:
    place = replace(PLACE, device={"name": "NVIDIA H200"})
    case, ours = quantized("fp8-block", asked), choices.find_contenders(["torch"])
    (result, *_) = run_case(case, ours, bench(peak=ALL_PEAKS, place=place))
    assert (result.activations, result.peak_tflops) == (asked.value, rate / 1e12)
    assert result.note == ("a note" if asked is FP8 else None)
    assert (result.nominal_us is None) == (asked is INT8)  # nobody has published one


def test_a_device_without_such_products_has_the_peak_of_bf16_and_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("torch._scaled_mm is only supported on newer devices\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    peak = find_peak(StandIn(), torch.float8_e4m3fn)
    assert peak.rate > 0 and peak.note == (
        "no dense product of fp8 runs here (RuntimeError: torch._scaled_mm is only supported on "
        "newer devices): the floor has the peak of bf16"
    )
    bench_gpu(options(weights="fp8-block", activation_dtype="fp8", tokens="1"), StandIn)
    told = capsys.readouterr()
    assert peak.note in told.out
    assert re.search(r"dense products, TFLOP/s: fp8 \d+ \(of bf16\)", told.err)


@pytest.mark.parametrize(
    "weights, asked, round_rows",
    [
        ("fp8-block", FP8, rounded_to(Code.E4M3, 128)),
        ("fp8", FP8, rounded_to(Code.E4M3)),
        ("int8-channel", INT8, rounded_to(Code.INT)),
        ("int4-g128", INT8, rounded_to(Code.INT)),
        ("int4-g32", FP8, rounded_to(Code.E4M3)),
    ],
)
def test_who_rounds_rows_as_the_format_means_is_right(
    weights: str, asked: ActivationDtype, round_rows: Callable[[Tensor], Tensor]
) -> None:
    case = replace(quantized(weights, asked, WIDE), num_tokens=64)
    for result in run_case(case, [Rounding(round_rows)], bench(peak=ALL_PEAKS)):
        assert result.is_correct
        assert result.relative_error is not None and result.rounded_error is not None
        assert result.rounded_error < 2e-3 < result.relative_error < ROUNDED[asked]


@pytest.mark.parametrize(
    "round_rows, factor, is_near",
    [
        (lambda rows: rows, 1.0, True),  # 16 bits in place of fp8: near to the truth, and not fp8
        (rounded_to(Code.E4M3), 1.0, True),  # one scale for a row in place of one for 128 columns
        (rounded_to(Code.E4M3, 128), 1.01, True),
        (rounded_to(Code.E4M3, 128), 1.1, False),
    ],
)
def test_who_rounds_rows_otherwise_is_wrong(
    round_rows: Callable[[Tensor], Tensor], factor: float, is_near: bool
) -> None:
    case = replace(quantized("fp8-block", FP8, WIDE), num_tokens=64)
    for result in run_case(case, [Rounding(round_rows, factor)], bench(peak=ALL_PEAKS)):
        assert result.is_correct is False
        assert result.relative_error is not None and result.rounded_error is not None
        assert (result.relative_error <= ROUNDED[FP8]) == is_near
        assert result.rounded_error > 5e-3


def test_codes_of_weights_alone_have_the_bounds_of_bf16() -> None:
    """A kernel that rounds rows where nobody asked for it is wrong."""
    case = quantized("int4-g128", BF16, WIDE)
    right, wrong = Rounding(lambda rows: rows), Rounding(rounded_to(Code.INT))
    for contender, is_right in ((right, True), (wrong, False)):
        for result in run_case(case, [contender], bench()):
            assert result.is_correct is is_right and result.rounded_error is None


def test_our_kernels_are_asked_for_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they run, and when they are bound."""
    asked: list[ActivationDtype | None] = []

    class Bound:
        def __init__(self, *_: Any, options: ExpertsOptions, **__: Any) -> None:
            asked.append(options.activation_dtype)
            raise RuntimeError("as far as this goes")

    kernel = SimpleNamespace(unsupported=lambda problem: asked.append(problem.activation_dtype))
    monkeypatch.setattr(module_of_contenders, "get_kernel", lambda name: kernel)
    monkeypatch.setattr(module_of_contenders, "RoutedExperts", Bound)
    case = quantized("fp8-block", FP8)
    contender = KernelContender("torch")
    contender.refusal(case)
    with pytest.raises(RuntimeError, match="as far"):
        contender.bind(Layer(case, LayerWeights(TINY, case.weights), 0))
    assert asked == [FP8, FP8]


def test_bounds_go_by_what_a_contender_rounds_to(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, fallback, peer = choices.find_contenders(["reference", "torch", "eager"])
    monkeypatch.setattr(type(get_kernel("reference")), "devices", ("cpu",))
    for asked, bounds in ((FP8, [7e-2, 7e-2, 1e-2]), (INT8, [9e-2, 9e-2, 1e-2])):
        case = replace(quantized("fp8-block", asked), num_tokens=16)
        assert [tolerance(case, contender) for contender in (ours, fallback, peer)] == bounds
        assert [rounded_tolerance(case, c) for c in (ours, fallback)] == [5e-3, 2e-2]
        assert rounded_tolerance(replace(case, num_tokens=15), ours) == pytest.approx(1.5e-2)
    case = quantized("fp8-block", BF16)
    assert [tolerance(case, contender) for contender in (ours, fallback)] == [5e-3, 1e-2]


@pytest.mark.parametrize("weights, asked", [("fp8", FP8), ("fp8-block", FP8), ("int8", INT8)])
def test_bounds_of_rounding_are_what_rounding_shows(weights: str, asked: ActivationDtype) -> None:
    """At Qwen3-30B-A3B's widths: neither too tight for an exact kernel nor slack."""
    qwen = find_shape("qwen3-30b-a3b")
    experts = replace(qwen.experts, num_experts=2)
    shape = replace(qwen, experts=experts, routing=replace(qwen.routing, num_experts=2, top_k=2))
    case = replace(quantized(weights, asked, shape), num_tokens=8)
    source = LayerWeights(shape, case.weights)
    truths = Truths.of(case, source, BatchSource(case, Spread.UNIFORM).draw())
    assert truths.rounded is not None
    shown = truths.errors(truths.rounded.layer, Measure.LAYER)
    assert shown.rounded == 0
    assert ROUNDED[asked] / 5 < shown.exact < ROUNDED[asked] / 1.2


def test_results_are_kept_by_arithmetic(tmp_path: Path, measured: list[tuple[int, Any]]) -> None:
    out = tmp_path / "results.jsonl"
    for asked in (None, "fp8", "bf16", "bf16"):  # fp8 is what the format means there
        given = options(out=out, weights="fp8-block", tokens="1", activation_dtype=asked)
        bench_gpu(given, Hopper)
    assert len(measured) == 2
    found = lines_of(out)
    assert [record["activations"] for record in found] == ["fp8"] * 4 + ["bf16"] * 4
    keys = {result.key for line in found if (result := LayerResult.from_json(json.dumps(line)))}
    assert len(keys) == 8


def test_one_run_measures_several_formats_each_with_its_arithmetic(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"bf16": "bf16", "fp8-block": "fp8", "int4-g32": "bf16"}
    bench_gpu(options(weights=",".join(names), tokens="1", as_json=True), Hopper)
    told = capsys.readouterr()
    records = [json.loads(line) for line in told.out.splitlines()]
    assert {record["weights"]: record["activations"] for record in records} == names
    assert "tiny, fp8-block x fp8, uniform, T=1: torch" in told.err
    assert "1/3" in told.err and "3/3" in told.err


@pytest.mark.parametrize(
    "name, weights, shape, asked, reason",
    [
        ("sonicmoe", "fp8-block", "qwen3-30b-a3b", FP8, "runs dense experts alone"),
        ("grouped_mm", "int4", "mixtral", BF16, "reads no int4-g128 experts here; --weights bf16"),
        ("eager", "mxfp4", "gpt-oss-120b", BF16, "reads no mxfp4 experts here; --weights bf16"),
        ("grouped_mm", "fp8-block", "gpt-oss-120b", FP8, "fp8 experts are plain ones"),
        ("deepgemm", "fp8-block", "mixtral", BF16, "rounds rows to fp8, which was not asked"),
        ("grouped_mm", "fp8-block", "mixtral", FP8, "the package kernels, which has its fp8"),
    ],
)
def test_peers_that_do_not_run_quantized_experts_say_why(
    name: str,
    weights: str,
    shape: str,
    asked: ActivationDtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    case = replace(quantized(weights, asked, find_shape(shape)), device="cuda")
    (contender,) = choices.find_contenders([name])
    assert reason in str(contender.refusal(case))


def grouped_product(
    x: Tensor, codes: Tensor, scales: Tensor, *, offsets: Tensor, block_size: Any, **_: Any
) -> Tensor:
    """What the kernel of the hub computes: rows rounded in groups of 128, an expert at a time."""
    rows = rounded_to(Code.E4M3, block_size[1])(x.float())
    spread = scales.repeat_interleave(block_size[0], 1).repeat_interleave(block_size[1], 2)
    weights = codes.float() * spread[:, : codes.shape[1], : codes.shape[2]]
    out, start = [], 0
    for expert, end in enumerate(offsets.tolist()):
        out.append(rows[start:end] @ weights[expert].T)
        start = end
    return torch.cat(out).to(x.dtype)


def test_fp8_experts_of_transformers_read_our_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = importlib.import_module(transformers_fp8.MODULE)
    products = SimpleNamespace(grouped_matmul=grouped_product)
    monkeypatch.setattr(fp8, "load_finegrained_fp8_kernel", lambda: products)
    monkeypatch.setattr(transformers_experts, "_reads_codes", lambda case: True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "kernels" or find_spec(name, *rest)
    )
    case = quantized("fp8-block", FP8, WIDE)
    (contender,) = choices.find_contenders(["grouped_mm"])
    assert contender.refusal(case) is None
    assert contender.weights(case) == "fp8-block"
    assert contender.expert_bytes(case) == case.expert_bytes
    for result in run_case(case, [contender], bench(peak=ALL_PEAKS)):
        assert result.is_correct and result.rounded_error is not None, result


def test_dense_copies_are_counted_by_their_own_bytes() -> None:
    case = quantized("int4-g32", BF16)
    both = choices.find_contenders(["torch", "grouped_mm"])
    one_set = 32 * (case.expert_bytes + 2 * case.shape.weights_per_expert)
    free = int(2.5 * one_set / layer_case.MEMORY_SHARE) + 2**16
    assert sets_that_fit(case, both, StandIn(free=free))[0] == 2


# -------------------------------------------------------------------------------------- the journal


def result_of(**changes: Any) -> LayerResult:
    (result, *_) = run_case(tiny(1), choices.find_contenders(["torch"]), bench())
    return replace(result, **changes)


def test_a_line_says_everything() -> None:
    result = result_of()
    assert LayerResult.from_json(result.to_json()) == result
    assert LayerResult.from_json(result.to_json()[:-9]) is None
    assert LayerResult.from_json("{}") is None and LayerResult.from_json("3") is None


def test_what_was_measured_elsewhere_does_not_count(tmp_path: Path) -> None:
    path, result = tmp_path / "results.jsonl", result_of()
    Journal(path, PLACE).add([result])
    assert Journal(path, PLACE).results == [result]
    for other in (
        replace(PLACE, sources="another"),
        replace(PLACE, tuned="0123"),
        replace(PLACE, versions={"torch": "3"}),
        replace(PLACE, device={"name": "another", "driver": "580.1"}),
        replace(PLACE, device={"name": "another", "driver": None}),
        replace(PLACE, device={**PLACE.device, "driver": "590.2"}),
    ):
        assert Journal(path, other).results == []


def test_what_says_nothing_of_the_measurement_does_not_part_places(tmp_path: Path) -> None:
    path, result = tmp_path / "results.jsonl", result_of()
    untold = replace(PLACE, device={**PLACE.device, "driver": None})
    Journal(path, PLACE).add([result])
    for other in (replace(PLACE, commit="another"), replace(PLACE, commit=None), untold):
        assert Journal(path, other).results == [result]
    Journal(path, untold).add([replace(result, T=2, place=untold)])
    assert [r.T for r in Journal(path, PLACE).results] == [1, 2]


def test_a_place_tells_the_tuned_blocks_and_the_optional_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(metadata, "version", lambda name: f"of {name}")
    before = command.find_place(StandIn())
    assert before.tuned is None
    path = tuned_path(device_of(torch.device("cpu")))
    path.parent.mkdir(parents=True)
    digests = []
    for text in ("{}", "{ }"):
        path.write_text(text)
        digests.append(command.find_place(StandIn()).tuned)
    assert None not in digests and len(set(digests)) == 2
    assert before.versions["flashinfer"] == "of flashinfer-python"
    assert before.versions["deep_gemm"] == "of deep_gemm"


def test_the_newest_result_counts(tmp_path: Path) -> None:
    path, result = tmp_path / "results.jsonl", result_of(us=1.0)
    journal = Journal(path, PLACE)
    journal.add([result])
    journal.add([replace(result, us=2.0)])
    assert [r.us for r in journal.results] == [r.us for r in Journal(path, PLACE).results] == [2.0]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path, result = tmp_path / "results.jsonl", result_of()
    Journal(path, PLACE).add([result])
    whole = path.read_text()
    path.write_text(whole + whole[:100])
    journal = Journal(path, PLACE)
    assert journal.results == [result] and journal.num_passed_over == 1
    journal.add([replace(result, T=2)])
    again = Journal(path, PLACE)
    assert [r.T for r in again.results] == [1, 2] and again.num_passed_over == 1


def test_without_a_file_nothing_is_kept_and_with_a_wrong_one_it_is_told(tmp_path: Path) -> None:
    Journal(None, PLACE).add([result_of()])
    with pytest.raises(InputError, match=r"the file of results \(.*\) must be readable"):
        Journal(tmp_path / "none" / "results.jsonl", PLACE)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, list[str]]]]:
    """What is really run: tokens, and contenders."""
    seen: list[tuple[int, list[str]]] = []

    def noting(case: Case, contenders: list[Contender], bench: Bench) -> list[LayerResult]:
        seen.append((case.num_tokens, [contender.name for contender in contenders]))
        return run_case(case, contenders, bench)

    monkeypatch.setattr(command, "run_case", noting)
    yield seen


def test_a_run_goes_on_where_the_one_before_it_stopped(
    tmp_path: Path,
    measured: list[tuple[int, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "results.jsonl"
    bench_gpu(options(tokens="1", out=out), StandIn)
    bench_gpu(options(tokens="1,2", out=out), StandIn)
    bench_gpu(options(tokens="1,2", out=out, contenders=["torch", "eager"]), StandIn)
    assert measured == [(1, ["torch"]), (2, ["torch"]), (1, ["eager"]), (2, ["eager"])]
    assert len(lines_of(out)) == 16
    capsys.readouterr()
    bench_gpu(options(tokens="1,2", out=out), StandIn)
    assert len(measured) == 4 and "T" in capsys.readouterr().out  # shown from the file
    bench_gpu(options(tokens="1", out=out, routing="zipf"), StandIn)
    monkeypatch.setattr(command, "find_sources", lambda: "changed")
    bench_gpu(options(tokens="1", out=out), StandIn)
    assert measured[4:] == [(1, ["torch"]), (1, ["torch"])]


def test_the_time_limit_stops_between_cases(
    measured: list[tuple[int, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = itertools.count(0.0, 20.0)  # begun at 0; a case takes 20 seconds, 40 with its check
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert bench_gpu(options(tokens="1,2,3", minutes=1.0), StandIn) == 0
    assert [tokens for tokens, _ in measured] == [1]
    told = capsys.readouterr()
    assert "stopped by the time limit: 1 of 3 cases are done." in told.err
    assert "tiny" in told.out


def test_an_interruption_shows_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(case: Case, *rest: Any) -> list[LayerResult]:
        if case.num_tokens == 2:
            raise KeyboardInterrupt
        return run_case(case, *rest)

    monkeypatch.setattr(command, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu(options(tokens="1,2", out=tmp_path / "results.jsonl"), StandIn)
    assert capsys.readouterr().out.count("tiny") == 1
    assert len(lines_of(tmp_path / "results.jsonl")) == 4


# ----------------------------------------------------------------------------- tables and pictures


def test_the_table_has_a_line_for_each_contender_and_marks_what_is_wrong() -> None:
    one = result_of(us=10.0, us_p10=9.0, us_p90=12.0, share_of_floor=0.5, floor_us=5.0)
    ways = [replace(one, measure=m.value, mode=mode.value) for m in Measure for mode in Mode]
    ways[3] = replace(ways[3], is_correct=False, relative_error=0.2)
    head, row = results_table([*ways[:2], ways[3]]).splitlines()
    assert head.split("  ")[0] == "shape" and "experts eager" in head
    assert row.count("10.0 (9.0-12.0) 0.50") == 3
    assert "WRONG by 0.2: 10.0" in row and " - " in row
    rounded = replace(ways[3], weights="fp8-block", activations="fp8", rounded_error=0.03)
    _, row = results_table([rounded, replace(rounded, activations="bf16")]).splitlines()[:2]
    assert "fp8-block x fp8" in row
    assert "WRONG by 0.2 (0.03 with rows rounded alike): 10.0" in row


def test_the_chart_shows_layers_in_graphs_that_are_right() -> None:
    one = replace(result_of(), share_of_floor=0.5, is_correct=True, mode="graph", measure="layer")
    results = [
        replace(one, T=8, share_of_floor=0.9),
        one,
        replace(one, mode="eager"),
        replace(one, measure="experts"),
        replace(one, contender="wrong", is_correct=False),
    ]
    assert chart_lines(results) == {("tiny", "torch"): [(1, 0.5, None), (8, 0.9, None)]}
    kinds = [one, replace(one, weights="fp8", activations="fp8"), replace(one, weights="fp8")]
    assert [panel for panel, _ in chart_lines(kinds)] == [
        "tiny, fp32, uniform", "tiny, fp8 x fp8, uniform", "tiny, fp8, uniform",
    ]  # fmt: skip
    both = [one, replace(one, routing="zipf")]
    assert set(chart_lines(both)) == {
        ("tiny, fp32, uniform", "torch"),
        ("tiny, fp32, zipf", "torch"),
    }


# -------------------------------------------------------------------------------- command line


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def error_of(result: Result, code: int) -> str:
    assert result.exit_code == code, (result.output, result.exception)
    return result.stderr.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_line_says_so() -> None:
    result = cli("--device", "cuda")
    assert "device (cuda) must be there to be measured; got none" in error_of(result, 1)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ("--shape qwen", "shape ('qwen') must be one of"),
        ("--tokens 0", "tokens (0) must be whole numbers"),
        ("--weights int3", "weight format (int3) must be one of"),
        ("--routing even", "routing (even) must be one of"),
        ("--contender vllm", "contender ('vllm') must be one of"),
        ("--weights fp8 --activation-dtype fp4", "activation dtype (fp4) must be one of int8, fp8"),
        ("--activation-dtype fp8", "activation dtype (fp8) must go with quantized weights; got bf"),
    ],
)
def test_a_wrong_word_is_told_before_a_missing_device(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = error_of(cli("--device", "cuda", *words.split()), 1)
    assert message in told and "device (cuda)" not in told


def test_help_tells_the_defaults_on_a_gpu() -> None:
    told = " ".join(cli("--help").output.replace("│", " ").split())
    assert f"cuda: {command.DEFAULT_SECONDS:g}." in told
    assert f"cuda: {command.DEFAULT_SHAPE}." in told
    assert "cuda: every kernel for GPUs, and Transformers'." in told


@pytest.mark.parametrize(
    "arguments, place",
    [
        (("--routing", "zipf"), "--device cuda"),
        (("--out", "x"), "--device cuda"),
        (("--activation-dtype", "fp8"), "--device cuda"),
        (("--device", "cpu", "--minutes", "1"), "--device cuda"),
        (("--device", "cuda", "--threads", "1"), "--device cpu"),
        (("--device", "cuda", "--path", "amx"), "--device cpu"),
        (("generate", "--device", "cuda"), "mixtura bench experts"),
    ],
)
def test_options_that_do_not_go_together_are_a_usage_error(
    arguments: tuple[str, ...], place: str
) -> None:
    assert f"goes with '{place}'" in error_of(cli(*arguments), 2)


def test_the_command_line_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GpuOptions] = []

    def note(options: GpuOptions) -> int:
        asked.append(options)
        return 1

    monkeypatch.setattr(command, "bench_gpu", note)
    assert cli("--device", "cuda").exit_code == 1
    words = "--device cuda --shape mixtral --weights fp8 --tokens 4 --routing zipf --contender a"
    more = "--seconds 2 --minutes 3 --out o.jsonl --png c.png --json --activation-dtype int8"
    more += " --weights int4,mxfp4"
    cli(*words.split(), *more.split())
    assert asked == [
        GpuOptions(),
        GpuOptions(
            shapes=["mixtral"], weights="fp8,int4,mxfp4", tokens="4", activation_dtype="int8",
            routing="zipf", contenders=["a"],
            seconds=2.0, minutes=3.0, out=Path("o.jsonl"), png=Path("c.png"), as_json=True,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"routing": "even"}, r"routing \(even\) must be one of uniform, zipf"),
        ({"contenders": ["vllm"]}, r"contender \('vllm'\) must be one of"),
        ({"shapes": ["qwen"]}, r"shape \('qwen'\) must be one of tiny"),
        ({"png": Path("/nowhere/chart.png")}, r"the chart \(/nowhere/chart.png\) must be writable"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the device was probed")

    monkeypatch.setattr(command, "find_peak", never)
    with pytest.raises((ConfigError, InputError), match=message):
        bench_gpu(options(**changes), StandIn)


def test_kernels_written_for_gpus_run_where_nobody_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that is chosen joins them where they refuse a case, each with its reason."""
    peers = ["grouped_mm", "batched_mm", "eager", "sonicmoe", "deepgemm"]
    devices = {"cpu": ("cpu",), "torch": None}

    def kernel(name: str) -> SimpleNamespace:
        def unsupported(problem: ExpertsProblem) -> str | None:
            return None if problem.is_dense else "reads dense weights"

        return SimpleNamespace(devices=devices[name], unsupported=unsupported)

    monkeypatch.setattr(choices, "kernel_names", lambda: tuple(devices))
    monkeypatch.setattr(choices, "get_kernel", kernel)
    monkeypatch.setattr(module_of_contenders, "get_kernel", kernel)
    assert choices.default_on_gpu(tiny()) == ["mixtura", *peers]
    devices["ours"] = ("cuda",)
    assert choices.default_on_gpu(tiny()) == ["ours", *peers]
    assert choices.default_on_gpu(tiny(weights="int4")) == ["ours", "mixtura", *peers]


def test_the_script_reads_several_formats_and_the_arithmetic() -> None:
    read = runpy.run_path(str(ROOT / "benchmarks/gpu.py"))["read_arguments"]
    words = "--weights bf16 --weights fp8-block,int4 --activation-dtype int8"
    asked = read(words.split())
    assert (asked.weights, asked.activation_dtype) == ("bf16,fp8-block,int4", "int8")
    assert (read([]).weights, read([]).activation_dtype) == (command.DEFAULT_WEIGHTS, None)


WITHOUT = """
import runpy, sys
for name in ("transformers", "typer", "rich", "click", "matplotlib", "onnxruntime"):
    sys.modules[name] = None
sys.argv = ["gpu.py", "--shape", "tiny", "--tokens", "2", "--weights", "fp32", "--seconds", "0"]
sys.argv += ["--contender", "torch", "--contender", "eager", "--json"]
sys.path = [entry for entry in sys.path if entry != {root!r}]
found = runpy.run_path({script!r})
sys.path.append({tests!r})
from mixtura.bench.gpu import command
import mixtura, stand_in
assert mixtura.__file__.startswith({root!r})
options = found["read_arguments"](sys.argv[1:])
sys.exit(command.bench_gpu(options, stand_in.StandIn))
"""


def test_the_script_needs_no_package_but_torch(tmp_path: Path) -> None:
    """Peers that need more are left out with that reason."""
    source = Path(__file__).read_text().partition("class StandIn")[2].partition("\n\n\n")[0]
    (tmp_path / "stand_in.py").write_text(
        "import time\nfrom mixtura.bench.gpu.device import *\n"
        "from collections.abc import Callable\nclass StandIn" + source
    )
    code = WITHOUT.format(
        root=str(ROOT), script=str(ROOT / "benchmarks/gpu.py"), tests=str(tmp_path)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["is_correct"] for r in records] == [True] * 4 + [None] * 4
    assert all("Transformers cannot be imported" in r["refusal"] for r in records[4:])


# ------------------------------------------------------------------------------ CUDA's own calls


class Cuda:
    """What `CudaDevice` uses of torch.cuda, and the order in which it does."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.mode = "default"
        self.failure: Exception | None = None
        cuda = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                cuda.calls.append("record")

            def synchronize(self) -> None:
                cuda.calls.append("synchronize event")

            def elapsed_time(self, other: Event) -> float:
                return 1.5  # milliseconds

        class CUDAGraph:
            def replay(self) -> None:
                cuda.calls.append("replay")

            def pool(self) -> tuple[int, int]:
                return (0, 1)

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(
            name="NVIDIA H200", major=9, minor=0, L2_cache_size=60, total_memory=140, uuid="12"
        )

    def mem_get_info(self) -> tuple[int, int]:
        return (100, 140)

    def memory_reserved(self) -> int:
        return 30

    def memory_allocated(self) -> int:
        return 10

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode

    @contextmanager
    def graph(self, graph: object, pool: tuple[int, int] | None = None) -> Iterator[None]:
        self.calls.append(f"capture in {pool}")
        try:
            yield
        finally:
            if pool is not None and self.failure is not None:
                raise self.failure  # as the end of a broken capture does


def cuda_device(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> CudaDevice:
    class OnHost(CudaDevice):
        """Its small tensor is on the host."""

    monkeypatch.setattr(OnHost, "type", "cpu")
    monkeypatch.setattr(device.torch, "cuda", cuda)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    return OnHost()


def test_a_device_times_with_events_and_graphs_share_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda()
    found = cuda_device(monkeypatch, cuda)
    assert found.seconds(lambda: cuda.calls.append("call")) == 1.5e-3
    assert cuda.calls == ["record", "call", "record", "synchronize event"]
    assert found.free_bytes() == 100 + 30 - 10
    cuda.calls.clear()
    modes: list[str] = []

    def step() -> Tensor:
        modes.append(cuda.mode)
        return torch.ones(1)

    graph = found.capture(step)
    assert modes == ["error", "default"]
    found.capture(step)
    graph.replay()
    assert cuda.calls == ["capture in None", *["capture in (0, 1)"] * 2, "replay"]
    found.release()
    found.capture(step)
    found.finish()
    assert cuda.calls[4:] == [
        "empty_cache", "capture in None", "capture in (0, 1)", "synchronize",
    ]  # fmt: skip


def test_a_capture_that_breaks_says_what_broke_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    found = cuda_device(monkeypatch, cuda)
    cuda.failure = RuntimeError("capture was invalidated")

    def breaks() -> Tensor:
        if cuda.mode == "default":
            raise RuntimeError("operation not permitted")
        return torch.ones(1)

    with pytest.raises(CannotCapture, match="operation not permitted"):
        found.capture(breaks)


def test_a_capture_that_breaks_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    found = cuda_device(monkeypatch, cuda)
    found.capture(lambda: torch.ones(1))
    cuda.failure = RuntimeError("capture was invalidated")
    with pytest.raises(CannotCapture, match="invalidated"):
        found.capture(lambda: torch.ones(1))
    cuda.failure = None
    cuda.calls.clear()
    found.capture(lambda: torch.ones(1))
    assert cuda.calls == ["capture in None", "capture in (0, 1)"]  # memory of its own


def test_shared_memory_that_cannot_be_made_is_a_refusal_and_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda()
    found = cuda_device(monkeypatch, cuda)
    zeros = torch.zeros

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(CannotCapture, match="out of memory"):
        found.capture(lambda: torch.ones(1))
    monkeypatch.setattr(torch, "zeros", zeros)
    cuda.calls.clear()
    found.capture(lambda: torch.ones(1))
    assert cuda.calls == ["capture in None", "capture in (0, 1)"]


def test_what_was_there_at_a_release_can_be_freed_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ring:
        def __init__(self) -> None:
            self.ring = self

    freeze = gc.freeze
    found = cuda_device(monkeypatch, Cuda())
    monkeypatch.setattr(gc, "freeze", freeze)
    ring = Ring()
    gone = weakref.ref(ring)
    try:
        found.release()
        del ring
        found.release()
        assert gone() is None
    finally:
        gc.unfreeze()


def test_work_that_waits_for_the_host_is_found_without_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda()
    found = cuda_device(monkeypatch, cuda)

    def waits() -> Tensor:
        assert cuda.mode == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(CannotCapture, match="RuntimeError: called a synchronizing CUDA operation"):
        found.capture(waits)
    assert cuda.mode == "default" and cuda.calls == []  # not even tried


@pytest.mark.parametrize(
    "answer, state, driver",
    [
        ("580.1, 1980, 2619, 312.5, 44\n", {"sm_MHz": 1980.0, "memory_MHz": 2619.0,
         "power_W": 312.5, "temperature_C": 44.0}, "580.1"),
        ("580.1, 1980, [N/A], [N/A], 44\n", {"sm_MHz": 1980.0, "temperature_C": 44.0}, "580.1"),
        (None, None, None),
    ],
)  # fmt: skip
def test_clocks_and_power_are_told_where_they_can_be_had(
    answer: str | None,
    state: dict[str, float] | None,
    driver: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[:2] == ["nvidia-smi", "--id=GPU-12"]
        if answer is None:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(device.subprocess, "run", run)
    found = cuda_device(monkeypatch, Cuda())
    assert found.state() == state
    assert found.facts() == DeviceFacts("NVIDIA H200", "9.0", driver, 60, 140)
