"""The benchmark: contenders are checked, take turns, refuse with a reason; keys are documented."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner, Result

from mixtura import SWIGLU_OAI, ExpertsConfig, RoutingConfig
from mixtura.bench import choices, contenders, experts, machine, measure
from mixtura.bench import weights as weight_sets
from mixtura.bench.cases import Case, LayerShape, find_cases, find_shape
from mixtura.bench.chart import save_chart
from mixtura.bench.choices import find_contenders
from mixtura.bench.contenders import Contender, KernelContender, Layer, refusals
from mixtura.bench.experts import run_case
from mixtura.bench.machine import Arithmetic, Machine
from mixtura.bench.measure import Timing, interleave
from mixtura.bench.peers import onnxruntime_moe, transformers_experts
from mixtura.bench.peers.transformers_experts import COMPILED, IMPLEMENTATIONS
from mixtura.bench.report import refusal_notes, results_table
from mixtura.bench.results import CaseResult, ContenderResult, Floor
from mixtura.bench.weights import LayerWeights, num_weight_sets, random_batches
from mixtura.cli import app
from mixtura.config import GateUp
from mixtura.errors import ConfigError, InputError
from mixtura.kernels import get_kernel
from mixtura.kernels.cpu.extension import missing
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dequantize
from mixtura.types import ExpertBatch

ROOT = Path(__file__).parents[1]
MACHINE = Machine(
    cpu="some CPU",
    num_cores=2,
    num_threads=2,
    python="3",
    torch="2",
    transformers="5",
    mixtura="0",
    bandwidth=1e10,
    bandwidth_one_thread=1e10,
    peak={"fp32": 1e11, "bf16": 2e11, "int8": 4e11},
    probes="torch",
)
GPT_OSS = LayerShape(
    name="small-gpt-oss",
    routing=RoutingConfig(num_experts=4, top_k=2),
    experts=ExpertsConfig(
        num_experts=4,
        hidden_size=64,
        intermediate_size=32,
        activation=SWIGLU_OAI,
        gate_up=GateUp.INTERLEAVED,
        is_transposed=True,
        has_bias=True,
    ),
)
TINY = find_shape("tiny")


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 2**22)
    monkeypatch.setattr(machine, "SLICE_BYTES", 2**20)
    monkeypatch.setattr(machine, "MATRIX_SIZE", 64)
    monkeypatch.setattr(machine, "LIMITS_MODULE", "mixtura.no_such_module")
    monkeypatch.setattr(experts, "PROBE_SECONDS", 0.0)


class Wrong(Contender):
    """The torch kernel, and then a fifth too much."""

    name = "wrong"
    is_ours = True

    def refusal(self, case: Case) -> str | None:
        return None

    def bind(self, layer: Layer) -> Callable[[ExpertBatch], Tensor]:
        right = KernelContender("torch").bind(layer)
        return lambda batch: right(batch) * 1.2


def tiny(num_tokens: int = 3, weights: str = "fp32", shape: LayerShape = TINY) -> Case:
    return Case(shape=shape, num_tokens=num_tokens, weights=WeightFormat.parse(weights))


def run(case: Case, *names: str) -> CaseResult:
    return run_case(case, find_contenders(list(names)), MACHINE, seconds=0.0)


# ------------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4", "mxfp4", "fp8-block", "nvfp4"])
@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=lambda shape: shape.name)
def test_all_contenders_compute_the_same_layer(shape: LayerShape, weights: str) -> None:
    result = run(tiny(3, weights, shape), "mixtura", "torch", "reference", *IMPLEMENTATIONS)
    names = [c.name for c in result.contenders]
    assert names == ["mixtura", "torch", "reference", *IMPLEMENTATIONS]
    assert all(c.is_correct for c in result.contenders), result.contenders
    assert [c.is_ours for c in result.contenders] == [True, True, True, False, False, False]


def test_a_compiled_implementation_is_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(module: Any, *, dynamic: bool) -> Any:
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    result = run(tiny(1, "bf16"), COMPILED)
    assert result.contenders[0].is_correct
    assert [module.config._experts_implementation for module in compiled] == ["batched_mm"] * 8
    many = run(tiny(17, "bf16"), COMPILED)
    assert "at most 16 tokens" in str(many.contenders[0].refusal)


def test_a_name_that_a_peer_has_too_is_the_peers() -> None:
    found = find_contenders(["grouped_mm", "mixtura:grouped_mm", "torch"])
    assert [contender.is_ours for contender in found] == [False, True, True]
    case = find_cases(["tiny"], "bf16", "4")[0]
    assert found[1].kernel(case) == "grouped_mm"


def test_a_wrong_contender_is_caught() -> None:
    for weights in ("bf16", "int4"):
        competing = [*find_contenders(["torch"]), Wrong()]
        result = run_case(tiny(weights=weights), competing, MACHINE, seconds=0.0)
        right, wrong = result.contenders
        assert right.is_correct and wrong.is_correct is False
        assert not result.is_correct
        assert wrong.relative_error == pytest.approx(0.2, rel=0.2)
        page = io.StringIO()
        Console(width=300, file=page).print(results_table([result]))
        assert "WRONG by 0.2" in page.getvalue()


def test_not_a_number_is_wrong() -> None:
    truth = torch.ones(2, 2)
    assert measure.relative_error(torch.full((2, 2), float("nan")), truth) == float("inf")


def test_a_peer_that_would_copy_too_much_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_experts, "free_bytes", lambda device: 2**10)
    result = run(tiny(), "torch", "batched_mm")
    ours, theirs = result.contenders
    assert ours.timing is not None
    assert theirs.timing is None and "copies" in str(theirs.refusal)
    assert "batched_mm was not run on tiny, fp32, T=3: copies" in refusal_notes([result])


def test_experts_that_transformers_has_no_module_for_are_refused() -> None:
    config = replace(GPT_OSS.experts, gate_up=GateUp.STACKED)
    ours, theirs = run(tiny(2, shape=replace(GPT_OSS, experts=config)), "torch", "eager").contenders
    assert ours.is_correct
    assert "no module" in str(theirs.refusal)


def test_a_kernel_that_packs_lets_go_of_what_it_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_kernel("torch")), "shares_memory", lambda *given: False)
    case = tiny(weights="int4")
    layer = Layer(case, LayerWeights(TINY, case.weights), 0)
    call = KernelContender("torch").bind(layer)
    held: Any = call
    given = held.__self__.given
    assert all(tensor.untyped_storage().nbytes() <= 4 for tensor in given.tensors())
    assert held.__self__.state.held is not None


@pytest.mark.parametrize("find", [find_shape, lambda name: find_contenders([name])])
def test_unknown_names_list_the_choices(find: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match=r"\(.nonsense.\) must be one of"):
        find("nonsense")


# ----------------------------------------------------------------------------------------- memory


def test_peers_that_do_not_fit_are_left_out_and_ours_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = tiny(weights="int4")
    competing = find_contenders(["eager", "torch"])  # ours has the first call all the same
    ours = 8 * 32 * case.expert_bytes
    theirs = 8 * 32 * TINY.expert_bytes(WeightFormat.BF16.scheme)
    monkeypatch.setattr(contenders, "available_memory", lambda: ours + theirs)
    assert refusals(case, competing) == {}
    monkeypatch.setattr(contenders, "available_memory", lambda: ours + theirs - 1)
    assert "do not fit beside the others" in refusals(case, competing)["eager"]
    monkeypatch.setattr(contenders, "available_memory", lambda: ours - 1)
    with pytest.raises(InputError, match=r"the weights of tiny, int4-g128, T=3 \(.* GB\) must fit"):
        refusals(case, competing)


def test_memory_is_asked_for_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [tiny(), tiny(shape=find_shape("olmoe"))]
    monkeypatch.setattr(contenders, "MEMORY_LIMIT", 8 * 32 * cases[0].expert_bytes)
    results = experts.run_cases(cases, find_contenders(["torch"]), MACHINE, seconds=0.0)
    with pytest.raises(InputError, match="the weights of olmoe"):
        next(results)


def test_peers_that_read_the_same_tensors_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(weights="bf16")
    monkeypatch.setattr(contenders, "available_memory", lambda: 8 * 32 * case.expert_bytes)
    assert refusals(case, find_contenders(["torch", "eager", "grouped_mm"])) == {}


# ---------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("weights", [format.value for format in WeightFormat])
@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=lambda shape: shape.name)
def test_experts_are_the_drawn_one_reordered(shape: LayerShape, weights: str) -> None:
    source = LayerWeights(shape, WeightFormat(weights))
    stacks = source.stacks(1)
    dense = source.dense_stacks(1, torch.float32)
    for role in shape.matrices:
        for expert in range(shape.experts.num_experts):
            stored = getattr(stacks, role).expert(expert)
            true = source.true_weight(role, 1, expert)
            assert torch.equal(dequantize(stored), true)
            assert torch.equal(getattr(dense, role).values[expert], true)
        assert weights == "fp8-block" or not torch.equal(true, source.true_weight(role, 1, 0))
    stored_bytes = sum(matrix.num_bytes for matrix in stacks.projections())
    expected = shape.experts.num_experts * shape.expert_bytes(WeightFormat(weights).scheme)
    assert stored_bytes == expected


def test_blocks_of_rows_stay_together() -> None:
    shape = replace(TINY, experts=replace(TINY.experts, num_experts=3, hidden_size=320))
    source = LayerWeights(shape, WeightFormat.FP8_BLOCK)
    first, second = (source.true_weight("down_proj", 0, expert) for expert in (0, 1))
    assert torch.equal(second[:128], first[128:256])  # 7 blocks further, of the 2 whole ones
    assert torch.equal(second[128:256], first[:128])
    assert torch.equal(second[256:], first[256:])  # the rest of 64 rows stays
    assert torch.equal(dequantize(source.stacks(0).down_proj.expert(1)), second)


def test_large_layers_come_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sets, "last_level_bytes", lambda: 0)
    olmoe = find_shape("olmoe")
    for format in (WeightFormat.BF16, WeightFormat.INT4_G128):
        one_token = Case(shape=olmoe, num_tokens=1, weights=format)
        num_sets = num_weight_sets(one_token, one_token.expert_bytes)
        assert num_sets * one_token.num_slots * one_token.expert_bytes >= 2**27
    many_tokens = replace(one_token, num_tokens=256)
    assert num_weight_sets(many_tokens, one_token.expert_bytes) == 1
    monkeypatch.setattr(weight_sets, "last_level_bytes", lambda: 300 * 2**20)
    assert num_weight_sets(many_tokens, one_token.expert_bytes) == 4


def test_every_layer_runs_before_any_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Noting(Wrong):
        def bind(self, layer: Layer) -> Callable[[ExpertBatch], Tensor]:
            right = KernelContender("torch").bind(layer)

            def call(batch: ExpertBatch) -> Tensor:
                seen.append(layer.number)
                return right(batch)

            return call

    def no_timing(calls: object, *, seconds: float) -> dict[str, Timing]:
        return {"wrong": Timing((1.0,))}

    monkeypatch.setattr(experts, "interleave", no_timing)
    run_case(tiny(), [Noting()], MACHINE, seconds=0.0)
    assert seen[:8] == list(range(8))


# ----------------------------------------------------------------------------------------- timing


def test_contenders_take_turns() -> None:
    order: list[str] = []
    numbers: list[int] = []

    def call(name: str) -> Callable[[int], None]:
        def note(number: int) -> None:
            order.append(name)
            numbers.append(number)

        return note

    timings = interleave({name: call(name) for name in "abc"}, seconds=0.0)
    assert numbers == list(range(len(numbers)))
    rounds = [set(order[i : i + 3]) for i in range(0, 3 * measure.MIN_REPETITIONS, 3)]
    assert all(members == {"a", "b", "c"} for members in rounds)
    for timing in timings.values():
        assert timing.minimum <= timing.median <= timing.maximum
        assert timing.repetitions >= measure.MIN_REPETITIONS


def test_disturbed_samples_are_left_out_where_enough_others_are_there() -> None:
    enough = measure._Samples(quiet=[1.0] * measure.MIN_REPETITIONS, disturbed=[9.0, 9.0])
    assert enough.timing() == Timing((1.0,) * measure.MIN_REPETITIONS, disturbed=2)
    too_few = measure._Samples(quiet=[1.0], disturbed=[9.0, 9.0])
    found = too_few.timing()
    assert (found.median, found.minimum, found.maximum, found.repetitions) == (9.0, 1.0, 9.0, 3)
    assert found.disturbed == 0


# -------------------------------------------------------------------------------------- the floor


def test_the_floor_is_the_longer_of_reading_and_multiplying() -> None:
    reading = Floor(
        weight_bytes=600, flops=10, bandwidth_before=100.0, bandwidth_after=200.0, peak=10.0
    )
    assert (reading.bandwidth, reading.seconds, reading.limited_by) == (150.0, 4.0, "memory")
    multiplying = replace(reading, flops=50)
    assert (multiplying.seconds, multiplying.limited_by) == (5.0, "compute")


def test_a_case_counts_stored_bytes_and_operations() -> None:
    case = tiny(num_tokens=3, weights="int4-g32")
    elements = 3 * 64 * 32
    assert case.flops == 2 * 3 * 4 * elements
    assert case.expert_bytes == elements // 2 + 2 * elements // 32  # codes, bf16 scales
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3]], dtype=torch.int32)
    batch = ExpertBatch(torch.zeros(3, 64), ids, torch.ones(3, 4))
    assert case.bytes_touched(batch) == 5 * case.expert_bytes


@pytest.mark.parametrize(
    "weights, arithmetic",
    [("bf16", "bf16"), ("fp8", "bf16"), ("fp16", "fp32"), ("fp32", "fp32"), ("int8", "int8"),
     ("int4", "int8"), ("mxfp4", "int8"), ("nvfp4", "int8")],
)  # fmt: skip
def test_the_peak_is_that_of_the_fastest_arithmetic(weights: str, arithmetic: str) -> None:
    assert tiny(weights=weights).arithmetic is Arithmetic(arithmetic)
    result = run(tiny(weights=weights), "torch")
    assert result.floor.peak == MACHINE.peak[arithmetic]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A stand-in for the extension's probes, and what it is asked."""
    asked: list[tuple[Any, ...]] = []

    def read_bandwidth(seconds: float, num_threads: int) -> float:
        asked.append(("read", num_threads))
        return 5e10

    def peak_rate(arithmetic: str, seconds: float, num_threads: int) -> float | None:
        asked.append((arithmetic, num_threads))
        return None if arithmetic == "int8" else 1e12

    module = ModuleType("mixtura.stand_in")
    module.__dict__.update(read_bandwidth=read_bandwidth, peak_rate=peak_rate)
    monkeypatch.setitem(sys.modules, "mixtura.stand_in", module)
    monkeypatch.setattr(machine, "LIMITS_MODULE", "mixtura.stand_in")
    yield asked


def test_limits_come_from_the_extension_where_it_can_say(
    extension: list[tuple[Any, ...]],
) -> None:
    found = machine.probe_machine((Arithmetic.BF16, Arithmetic.INT8), seconds=0.0)
    assert (found.bandwidth, found.peak["bf16"], found.probes) == (5e10, 1e12, "extension")
    assert 0 < found.peak["int8"] < 1e12  # torch's, as this CPU has no such instruction
    assert extension[:2] == [("read", torch.get_num_threads()), ("read", 1)]


def test_limits_come_from_torch_without_the_extension() -> None:
    found = machine.probe_machine(tuple(Arithmetic), seconds=0.0)
    assert found.probes == "torch" and found.bandwidth > 0
    assert set(found.peak) == {"int8", "bf16", "fp32"} and min(found.peak.values()) > 0


# ------------------------------------------------------------------------------------ ONNX Runtime


def test_onnx_runtime_is_left_out_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnxruntime_moe, "_optional", lambda name: None)
    (result,) = run(tiny(weights="int4"), "onnxruntime").contenders
    assert result.refusal == "onnxruntime and onnx not installed"


def test_onnx_runtime_says_what_its_operators_cannot_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnxruntime_moe, "_optional", lambda name: SimpleNamespace())
    peer = onnxruntime_moe.OnnxContender()
    assert "no mxfp4" in str(peer.refusal(tiny(weights="mxfp4")))
    assert "groups of 128" in str(peer.refusal(tiny(weights="int4-g128")))
    assert peer.refusal(tiny(weights="int4-g32")) is None
    gelu = replace(TINY.experts, activation=replace(SWIGLU_OAI, gate_softcap=3.0))
    assert "activation" in str(peer.refusal(tiny(shape=replace(TINY, experts=gelu))))


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8-channel", "int8-g32", "int4-g32"])
@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=lambda shape: shape.name)
def test_onnx_runtime_computes_the_same_layer(shape: LayerShape, weights: str) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    (result,) = run(tiny(5, weights, shape), "onnxruntime").contenders
    assert result.is_correct, result


def test_onnx_runtime_is_given_rows_of_gate_and_up_in_turn() -> None:
    case = tiny(weights="int8-g32")
    stacks = LayerWeights(TINY, case.weights).stacks(0)
    arrays = onnxruntime_moe._arrays(stacks)
    gate, up = stacks.gate_up_proj.values.chunk(2, dim=1)
    weights, scales = torch.from_numpy(arrays["fc1_weights"]), arrays["fc1_scales"]
    assert torch.equal(weights[:, 0::2], gate) and torch.equal(weights[:, 1::2], up)
    assert scales.shape == (32, 64, 2) and scales.dtype == "float32"
    batch = random_batches(case, 1, seed=0)[0]
    logits = torch.from_numpy(choices.PEERS["onnxruntime"].prepare(case, batch)["logits"])
    chosen = logits.softmax(-1).gather(1, batch.local_ids.long())
    assert torch.allclose(chosen, batch.topk_weights, atol=5e-3)


# ------------------------------------------------------------------------------------ command line


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def error_of(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, (result.output, result.exception)
    return result.stderr.splitlines()[-1]


SMALL = ("--shape", "tiny", "--seconds", "0", "--contender", "torch")


def test_json_has_a_line_for_each_case_with_documented_keys() -> None:
    result = bench(*SMALL, "--tokens", "1,2", "--weights", "bf16,int4", "--contender", "eager",
                   "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["kernel"], r["weights"], r["shape"], r["T"]) for r in lines] == [
        ("torch", weights, "tiny", tokens) for weights in ("bf16", "int4-g128") for tokens in (1, 2)
    ]
    documentation = (ROOT / "docs/benchmarks/cpu.md").read_text()
    for key in {*lines[0], *lines[0]["machine"], *lines[0]["peers"]["eager"]}:
        assert f"`{key}`" in documentation, key
    for record in lines:
        assert record["is_correct"]
        assert record["fraction_of_floor"] == pytest.approx(record["floor_ms"] / record["ms"])
        assert record["GBps"] == pytest.approx(record["weight_bytes"] / record["ms"] / 1e6)
        assert record["GFLOPs"] == pytest.approx(record["flops"] / record["ms"] / 1e6)
        peer = record["peers"]["eager"]["ms"]
        assert record["ratio_to_best_peer"] == pytest.approx(record["ms"] / peer)
    assert "Experts of one layer" in result.stderr


def test_without_json_the_table_is_the_output() -> None:
    result = bench(*SMALL, "--tokens", "2", "--weights", "bf16", "--contender", "onnxruntime")
    assert result.exit_code == 0
    assert "tiny" in result.stdout and "of floor" in result.stdout
    assert "1/1  tiny, bf16, T=2: torch" in result.stderr


def test_peers_alone_are_what_the_lines_are_about() -> None:
    result = bench("--shape", "tiny", "--seconds", "0", "--tokens", "1", "--weights", "bf16",
                   "--contender", "eager", "--contender", "grouped_mm", "--json")  # fmt: skip
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["kernel"] for line in lines] == ["eager", "grouped_mm"]
    assert list(lines[0]["peers"]) == ["grouped_mm"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--shape", "olmo"), "shape ('olmo') must be one of tiny, olmoe"),
        (("--weights", "bf16,int5"), "weight format (int5) must be one of"),
        (("--contender", "vllm"), "contender ('vllm') must be one of mixtura, "),
        (("--tokens", "1,0"), "tokens (1,0) must be whole numbers above 0"),
        (("--tokens", "-3"), "tokens (-3) must be whole numbers above 0"),
        (("--tokens", "one"), "tokens (one) must be whole numbers above 0"),
        (("--png", "/nowhere/chart.png"), "the chart (/nowhere/chart.png) must be writable"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the machine was probed")

    monkeypatch.setattr(machine, "probe_machine", never)
    assert message in error_of(bench(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [("--threads", "0"), ("generate", "--shape", "tiny"), ("--model", "x"), ("generate", "--png",
     "a.png"), ("perplexity",)],
)  # fmt: skip
def test_a_wrong_command_line_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    assert "--help'." in error_of(bench(*arguments), code=2)


def test_an_interruption_shows_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(cases: list[Case], *arguments: Any, **options: Any) -> Iterator[CaseResult]:
        yield run_case(cases[0], *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(experts, "run_cases", interrupted)
    chart = tmp_path / "chart.png"
    result = bench(*SMALL, "--tokens", "1,2", "--weights", "bf16", "--png", str(chart))
    assert result.exit_code == 130
    assert result.stdout.count("tiny") == 1
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_result_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "find_contenders", lambda _: [Wrong()])
    result = bench("--shape", "tiny", "--tokens", "1", "--weights", "bf16", "--seconds", "0")
    assert result.exit_code == 1
    assert "WRONG by" in result.stdout


def test_threads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench(*SMALL, "--tokens", "1", "--weights", "bf16", "--threads", "2", "--json")
    assert json.loads(result.stdout)["machine"]["num_threads"] == 2


# ------------------------------------------------------------------------------------- the picture


def result_of(tokens: int, *fractions: tuple[str, bool, float]) -> CaseResult:
    floor = Floor(weight_bytes=1, flops=1, bandwidth_before=1.0, bandwidth_after=1.0, peak=1.0)

    def contender(name: str, is_ours: bool, fraction: float) -> ContenderResult:
        seconds = 1.0 / fraction
        timing = Timing((seconds,) * 5)
        return ContenderResult(
            name=name, kernel=name, weights="bf16", is_ours=is_ours, timing=timing, is_correct=True
        )

    found = tuple(contender(*fraction) for fraction in fractions)
    return CaseResult(case=tiny(tokens, "bf16"), machine=MACHINE, floor=floor, contenders=found)


def test_the_chart_shows_fractions_and_the_best_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = matplotlib.Figure.savefig
    monkeypatch.setattr(
        matplotlib.Figure,
        "savefig",
        lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1],
    )
    results = [
        result_of(16, ("cpu", True, 0.8), ("eager", False, 0.3), ("grouped_mm", False, 0.4)),
        result_of(1, ("cpu", True, 0.9), ("eager", False, 0.5)),
    ]
    save_chart(results, tmp_path / "chart.png")
    (axes,) = drawn[0].axes
    assert axes.get_title() == "tiny"
    ours, best, *_ = axes.get_lines()
    for line, fractions in ((ours, [0.9, 0.8]), (best, [0.5, 0.4])):
        assert list(line.get_xdata()) == [1, 16]
        assert list(line.get_ydata()) == pytest.approx(fractions)
    assert ours.get_label() == "bf16"


def test_a_chart_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must have a case to show"):
        save_chart([], tmp_path / "chart.png")


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_another_instruction_set_can_be_measured() -> None:
    options = "--shape tiny --weights int8 --tokens 1 --seconds 0.1 --contender cpu --json"
    found = bench(*options.split(), "--path", "portable")
    assert found.exit_code == 0
    assert json.loads(found.stdout)["slow_calls"] == 0
    assert "path ('sse') must be one that this processor runs" in error_of(bench("--path", "sse"))
