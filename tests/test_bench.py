"""The benchmark: contenders are checked, take turns, refuse with a reason; keys are documented."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor

from mixtura import SWIGLU_OAI, ExpertsConfig
from mixtura.bench import contenders, experts, machine, measure
from mixtura.bench.cases import (
    Case,
    LayerShape,
    WeightSet,
    find_shape,
    num_weight_sets,
    random_batches,
    random_weights,
)
from mixtura.bench.contenders import TRANSFORMERS, Contender, find_contenders
from mixtura.bench.experts import machine_json, run_case
from mixtura.bench.machine import Machine, probe_machine
from mixtura.bench.measure import interleave
from mixtura.bench.report import results_table
from mixtura.config import GateUp
from mixtura.errors import ConfigError
from mixtura.kernels import get_kernel
from mixtura.types import ExpertBatch

ROOT = Path(__file__).parents[1]
MACHINE = Machine(
    cpu="some CPU",
    num_cores=2,
    num_threads=2,
    python="3",
    torch="2",
    transformers="5",
    bandwidth=1e10,
    bandwidth_one_thread=1e10,
    peak_flops={"float32": 1e11, "bfloat16": 2e11},
)
GPT_OSS = LayerShape(
    name="small-gpt-oss",
    top_k=2,
    experts=ExpertsConfig(
        num_experts=4,
        hidden_size=16,
        intermediate_size=8,
        activation=SWIGLU_OAI,
        gate_up=GateUp.INTERLEAVED,
        is_transposed=True,
        has_bias=True,
    ),
)


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 2**22)
    monkeypatch.setattr(machine, "SLICE_BYTES", 2**20)
    monkeypatch.setattr(machine, "MATRIX_SIZE", 64)
    monkeypatch.setattr(experts, "PROBE_SECONDS", 0.0)


class Wrong(Contender):
    """The torch kernel, and then a twentieth too much."""

    name = "wrong"
    is_ours = True

    def refusal(self, case: Case) -> str | None:
        return None

    def bind(self, config: ExpertsConfig, weights: WeightSet) -> Callable[[ExpertBatch], Tensor]:
        right = find_contenders(["torch"])[0].bind(config, weights)
        return lambda batch: right(batch) * 1.05


def tiny(num_tokens: int = 3, dtype: torch.dtype = torch.float32) -> Case:
    return Case(shape=find_shape("tiny"), num_tokens=num_tokens, dtype=dtype)


def run(case: Case, *names: str) -> list[experts.Result]:
    return run_case(case, find_contenders(list(names)), MACHINE, seconds=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [find_shape("tiny"), GPT_OSS], ids=lambda shape: shape.name)
def test_all_contenders_compute_the_same_layer(shape: LayerShape, dtype: torch.dtype) -> None:
    case = Case(shape=shape, num_tokens=3, dtype=dtype)
    results = run(case, "torch", "reference", *TRANSFORMERS)
    assert [r.contender for r in results] == ["torch", "reference", *TRANSFORMERS]
    assert all(r.is_correct for r in results), [r.relative_error for r in results]
    assert [r.is_ours for r in results] == [True, True, False, False, False]


def test_a_wrong_contender_is_caught() -> None:
    right, wrong = run_case(
        tiny(dtype=torch.bfloat16), [*find_contenders(["torch"]), Wrong()], MACHINE, seconds=0.0
    )
    assert right.is_correct and wrong.is_correct is False
    assert wrong.relative_error == pytest.approx(0.05, rel=0.2)
    page = io.StringIO()
    Console(width=200, file=page).print(results_table([right, wrong]))
    assert "WRONG by 0.05" in page.getvalue()


def test_not_a_number_is_wrong() -> None:
    truth = torch.ones(2, 2)
    assert measure.relative_error(torch.full((2, 2), float("nan")), truth) == float("inf")


def test_a_contender_that_would_not_fit_refuses_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contenders, "free_memory", lambda: 2**10)
    ours, theirs = run(tiny(), "torch", "batched_mm")
    assert ours.timing is not None
    assert theirs.timing is None and "copies" in str(theirs.refusal)
    assert json.loads(theirs.to_json())["median_seconds"] is None


def test_experts_that_transformers_has_no_module_for_are_refused() -> None:
    config = replace(GPT_OSS.experts, gate_up=GateUp.STACKED)
    case = Case(shape=replace(GPT_OSS, experts=config), num_tokens=2, dtype=torch.float32)
    ours, theirs = run(case, "torch", "eager")
    assert ours.is_correct
    assert "no module" in str(theirs.refusal)


def test_a_kernel_that_frees_what_it_packs_gets_weights_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(get_kernel("torch")), "shares_memory", False)
    config = find_shape("tiny").experts
    weights = random_weights(config, torch.float32, seed=0)
    find_contenders(["torch"])[0].bind(config, weights)(random_batches(tiny(), 1, seed=0)[0])
    assert all(tensor.numel() for tensor in weights.values())


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
    assert enough.timing() == measure.Timing(1.0, 1.0, 1.0, measure.MIN_REPETITIONS, 2)
    too_few = measure._Samples(quiet=[1.0], disturbed=[9.0, 9.0])
    assert too_few.timing() == measure.Timing(9.0, 1.0, 9.0, 3, 0)


def test_the_limit_is_the_longer_of_reading_and_multiplying() -> None:
    result = run(tiny(), "torch")[0]
    reading = result.bytes_touched / result.bandwidth
    multiplying = result.flops / MACHINE.peak_flops["float32"]
    assert result.limit_seconds == max(reading, multiplying)
    assert result.limited_by == ("memory" if reading >= multiplying else "compute")
    assert result.flops == 2 * 3 * 4 * 3 * 64 * 32
    assert result.bytes_touched <= 3 * 4 * 3 * 64 * 32 * 4


def test_large_layers_come_from_memory() -> None:
    olmoe = find_shape("olmoe")
    one_token = Case(shape=olmoe, num_tokens=1, dtype=torch.bfloat16)
    assert num_weight_sets(one_token) * one_token.num_slots * one_token.expert_bytes >= 2**27
    assert num_weight_sets(replace(one_token, num_tokens=256)) == 1


@pytest.mark.parametrize("find", [find_shape, lambda name: find_contenders([name])])
def test_unknown_names_list_the_choices(find: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match=r"\(.nonsense.\) must be one of"):
        find("nonsense")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("experts", ROOT / "benchmarks/experts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(module: ModuleType, path: Path, contender: str) -> list[dict[str, object]]:
    module.main(["tiny"], "1,2", ["float32"], [contender, "eager"], None, 0.0, path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_script_writes_the_documented_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    monkeypatch.setattr(module, "probe_machine", lambda dtypes: probe_machine(dtypes, seconds=0.0))
    first, *others = run_script(module, tmp_path / "results.jsonl", "torch")
    assert first["record"] == "machine"
    assert {other["record"] for other in others} == {"experts"}
    assert len(others) == 4
    documentation = (ROOT / "docs/benchmarks/cpu.md").read_text()
    for key in {*first, *others[0]}:
        assert f"`{key}`" in documentation, key


def test_the_script_fails_where_a_result_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    monkeypatch.setattr(module, "probe_machine", lambda _: MACHINE)
    monkeypatch.setattr(module, "find_contenders", lambda _: [Wrong()])
    with pytest.raises(typer.Exit) as exit_:
        run_script(module, tmp_path / "results.jsonl", "torch")
    assert exit_.value.exit_code == 1
    assert json.loads(machine_json(MACHINE))["cpu"] == "some CPU"
