"""`mixtura tune`: what it prints and keeps, with measurements that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model
from packed_files import write_packed
from tuning_fakes import CASE, GPU, FakeMeasure, timed
from typer.testing import CliRunner, Result

import mixtura
from mixtura.cli import app, doctor, explain, tuning_report
from mixtura.cli import tune as command
from mixtura.cli.tuning_report import in_words
from mixtura.experts.packed import PackedExperts
from mixtura.hf import explain as hf_explain
from mixtura.hf.layer_shapes import layer_shapes
from mixtura.kernels.triton import TritonKernel, child, device
from mixtura.kernels.triton.candidates import Case, candidates, cases_of
from mixtura.kernels.triton.packed.experts import quantization_of
from mixtura.kernels.triton.packed.quantization import Quantization
from mixtura.kernels.triton.table import Blocks, Product
from mixtura.kernels.triton.trials import Failed, Trial
from mixtura.kernels.triton.tuned import (
    DTYPES,
    forget_tuned,
    read_tuned,
    tuned_path,
    write_tuned,
)
from mixtura.quant.formats import WeightFormat

SIZES = {
    "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget_tuned()
    yield
    forget_tuned()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of which only the configuration is there."""
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **SIZES}
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def error_of(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


Answer = Callable[[Case, Blocks, bool], Trial]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """The test GPU, with a function that measures on it."""

    def choose(measure: Answer) -> None:
        monkeypatch.setattr(command, "gpu", lambda is_dry_run: GPU)
        monkeypatch.setattr(child, "ChildMeasuring", lambda create: Held(measure))

    return choose


class Held:
    """A process that is none."""

    def __init__(self, measure: Answer) -> None:
        self.measure = measure

    def __call__(self, case: Case, blocks: Blocks, is_final: bool) -> Trial:
        return self.measure(case, blocks, is_final)

    def close(self) -> None:
        """Nothing to end."""


def first_wins(case: Case, blocks: Blocks, is_final: bool) -> Trial:
    """Of the down projection the first candidate is fast; of gate and up none runs."""
    if case.product is Product.GATE_UP:
        return Failed("OutOfResources: shared memory")
    return timed(0.8 if blocks == candidates(case.key, GPU)[0] else 1.2)


def test_a_machine_without_a_gpu_is_told_so(model: Path) -> None:
    error = error_of(run("--model", model))
    assert error == (
        "the device (cuda) must be a GPU that the Triton kernels run on; got none: no GPU that "
        "torch can use. Run this where there is one, or give --dry-run to see what would be "
        "measured."
    )


def test_without_triton_the_package_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "missing", lambda: "Triton is not installed; install it")
    assert "got none: Triton is not installed; install it. Run" in error_of(run("--model", model))


def test_a_dry_run_needs_no_gpu(model: Path) -> None:
    result = run("--model", model, "--dry-run", "--rows", "1,16")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("on H100, H200\n")
    assert result.stdout.count("8 of 256 x 128") == 4
    data = json.loads(run("--model", model, "--dry-run", "--json").stdout)
    assert [case["tile_rows"] for case in data["cases"]] == [1, 1, 16, 16, 32, 32, 64, 64, 128, 128]
    assert {case["dtype"] for case in data["cases"]} == {"bfloat16"}
    assert all(case["candidates"] for case in data["cases"])


@pytest.mark.parametrize("rows, part", [("1,x", "got 'x'"), ("", "got ''"), ("0", "from 1 to")])
def test_rows_are_numbers(model: Path, rows: str, part: str) -> None:
    assert part in error_of(run("--model", model, "--dry-run", "--rows", rows))


def test_rows_are_complained_of_before_the_gpu(model: Path) -> None:
    assert "rows (0) must be from 1" in error_of(run("--model", model, "--rows", "0"))


def test_candidates_that_differ_read_differently(model: Path) -> None:
    for case in cases_of(layer_shapes(model)):
        found = candidates(case.key, device.HOPPER)
        assert len({in_words(blocks) for blocks in found}) == len(found)
    assert in_words(Blocks(128, 64, 8, 4, tail_rows=64)).endswith("4 stages, tails of 64")


def test_a_narrow_table_loses_no_letter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning_report, "WIDTH", 12)
    words = "descriptors, persistent, tails of 64"
    tuning_report.print_table(("blocks", "rows"), [(words, "1,048,576")])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert sorted(c for c in shown if c.isalnum()) == sorted(
        c for c in "blocksrows" + words + "1,048,576" if c.isalnum()
    )


def test_what_wins_is_kept_and_shown(model: Path, on_gpu: Callable[[Answer], None]) -> None:
    on_gpu(first_wins)
    result = run("--model", model, "--rows", "1,16")
    assert result.exit_code == 0, result.stderr
    entries = read_tuned(tuned_path(GPU), GPU).entries
    assert {(key.product, key.tile_rows) for key in entries} == {
        (Product.DOWN, 1),
        (Product.DOWN, 16),
    }
    assert all(blocks == candidates(key, GPU)[0] for key, blocks in entries.items())
    assert f"2 of 4 kept in {tuned_path(GPU)}" in result.stdout
    assert "20.0, 40.0   16.0, 32.0   0.800   kept" in result.stdout
    told = result.stderr.splitlines()
    assert len(told) == 4 + 2
    assert told[1].startswith("2/4  down, unsorted: ")
    assert told[1].endswith("kept, best 0.800 of the table's time")
    assert told[4].startswith("gate_up, unsorted: ")
    assert told[4].endswith(" passed over: OutOfResources: shared memory")


def test_json_is_for_a_program(model: Path, on_gpu: Callable[[Answer], None]) -> None:
    on_gpu(first_wins)
    found = json.loads(run("--model", model, "--rows", "16", "--json", "--dtype", "fp16").stdout)
    assert (found["device"], found["file"]) == (GPU.name, str(tuned_path(GPU)))
    gate_up, down = found["outcomes"]
    assert (gate_up["dtype"], gate_up["rows"], gate_up["top_k"]) == ("float16", [16], 2)
    assert gate_up["verdict"] == "not kept" and gate_up["blocks"] is None
    assert len(gate_up["failures"]) == gate_up["num_candidates"]
    assert down["verdict"] == "kept" and down["ratio"] == pytest.approx(0.8)
    assert down["best_us"] == pytest.approx([16, 32])


def test_an_interrupted_run_goes_on(model: Path, on_gpu: Callable[[Answer], None]) -> None:
    fake = FakeMeasure(lambda blocks: timed(1.0))
    num_allowed = 20

    def interrupted(case: Case, blocks: Blocks, is_final: bool) -> Trial:
        if len(fake.asked) == num_allowed:
            raise KeyboardInterrupt
        return fake(case, blocks, is_final)

    on_gpu(interrupted)
    result = run("--model", model, "--rows", "16")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted: run the same command again to go on"
    num_allowed = 10_000
    assert run("--model", model, "--rows", "16").exit_code == 0
    asked = [(case.key, blocks) for case, blocks, _ in fake.asked]
    assert len(asked) == len(set(asked))  # nothing was measured twice
    once = len(asked)
    assert run("--model", model, "--rows", "16").exit_code == 0
    assert len(fake.asked) == once
    assert run("--model", model, "--rows", "16", "--fresh").exit_code == 0
    assert len(fake.asked) == 2 * once


def test_no_time_measures_nothing(model: Path, on_gpu: Callable[[Answer], None]) -> None:
    fake = FakeMeasure(lambda blocks: timed(0.5))
    on_gpu(fake)
    result = run("--model", model, "--minutes", "0")
    assert result.exit_code == 0 and not fake.asked
    assert "not reached" in result.stdout and "nothing new is kept" in result.stdout


def test_a_table_that_cannot_run_is_an_exit_code(
    model: Path, on_gpu: Callable[[Answer], None]
) -> None:
    on_gpu(lambda case, blocks, is_final: Failed("out of memory", ends_case=True))
    result = run("--model", model, "--rows", "16")
    assert result.exit_code == 1
    assert "1/2  gate_up, tiles of 16: 0 of " in result.stderr
    assert "failed: out of memory" in result.stderr


def test_entries_of_other_models_stay(model: Path, on_gpu: Callable[[Answer], None]) -> None:
    (shape,) = layer_shapes(model)
    fp16 = layer_shapes(model, torch.float16)[0].key(Product.DOWN, 16)
    ours = shape.key(Product.DOWN, 16)
    write_tuned(tuned_path(GPU), GPU, {fp16: Blocks(64, 64, 4, 3), ours: Blocks(64, 64, 4, 3)})
    on_gpu(lambda case, blocks, is_final: timed(1.0))
    assert run("--model", model, "--rows", "16").exit_code == 0
    assert list(read_tuned(tuned_path(GPU), GPU).entries) == [fp16]


def test_a_broken_file_is_told_and_written_anew(
    model: Path, on_gpu: Callable[[Answer], None]
) -> None:
    path = tuned_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    on_gpu(first_wins)
    result = run("--model", model, "--rows", "16")
    assert f"{path} cannot be read (JSONDecodeError); it will be written anew" in result.stderr
    assert len(read_tuned(path, GPU).entries) == 1


def test_a_file_of_ones_own(model: Path, tmp_path: Path, on_gpu: Callable[[Answer], None]) -> None:
    on_gpu(first_wins)
    out = tmp_path / "mine.json"
    assert run("--model", model, "--rows", "16", "--out", out).exit_code == 0
    assert len(read_tuned(out, GPU).entries) == 1 and not tuned_path(GPU).exists()
    missing = tmp_path / "nowhere" / "mine.json"
    assert "must be a file in a directory" in error_of(run("--model", model, "--out", missing))


def test_a_cache_that_cannot_be_written_is_told(
    model: Path, tmp_path: Path, on_gpu: Callable[[Answer], None]
) -> None:
    (tmp_path / "cache").write_text("no directory")
    on_gpu(first_wins)
    assert "the journal (" in error_of(run("--model", model, "--rows", "16"))


def test_a_file_that_cannot_be_written_is_told(
    model: Path, on_gpu: Callable[[Answer], None]
) -> None:
    on_gpu(first_wins)
    tuned_path(GPU).mkdir(parents=True)
    result = run("--model", model, "--rows", "16")
    assert result.exit_code == 1
    assert f"the file of tuned blocks ({tuned_path(GPU)}) must be writable" in result.stderr


def test_a_quantized_model_is_told_to_be_here(model: Path) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    error = error_of(run("--model", model, "--dry-run"))
    assert error.startswith(f"the weights of the model ({model}) must be here to be tuned for")
    assert "got a quantized checkpoint's configuration alone" in error


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its weights."""
    directory = tmp_path_factory.mktemp("dense")
    tiny_model("qwen3_moe", dtype=torch.bfloat16).model.save_pretrained(directory)
    return directory


def packed(dense: Path, out: Path, format: str) -> Path:
    """The same with experts in the format of a golden file."""
    write_packed(dense, out, format, lambda name: ".experts." in name)
    return out


@pytest.mark.parametrize(
    "format, words, rounding",
    [
        ("ct_pack_int4_g32_sym", "int4, group 1x32", None),
        ("ct_fp8_channel", "e4m3, group 1xall", "e4m3 per token"),
        ("ct_int8_channel_w8a8", "int8, group 1xall", "int8 per token"),
        ("gptq_v1_w4_g32_asym", "zero point integer", None),
    ],
)
def test_headers_say_what_experts_are_stored_in(
    dense: Path, tmp_path: Path, format: str, words: str, rounding: str | None
) -> None:
    directory = packed(dense, tmp_path / "packed", format)
    (shape,) = layer_shapes(directory)
    found = shape.quantization
    assert found is not None and words in str(found)
    assert rounding is None or str(found).endswith(f"; {rounding}")
    assert (found.gate_up_rounding is None) == (rounding is None)
    model = mixtura.from_pretrained(directory, kernel="torch")
    weights = next(one.given for one in model.modules() if isinstance(one, PackedExperts))
    assert weights is not None and weights.config == shape.config
    meant = TritonKernel().activations(None, weights.activations, weights.schemes)
    assert quantization_of(weights, meant) == found


def test_a_dry_run_lists_the_cases_of_quantized_experts(dense: Path, tmp_path: Path) -> None:
    directory = packed(dense, tmp_path / "packed", "ct_pack_int4_g32_sym")
    data = json.loads(run("--model", directory, "--dry-run", "--json").stdout)
    packings = [case["packing"] for case in data["cases"]]
    assert {(one["bits"], one["depth"]) for one in packings} == {(4, 128)}
    assert all(case["candidates"] for case in data["cases"])
    shown = run("--model", directory, "--dry-run").stdout
    assert "int4, group 1x32, scale" in " ".join(shown.split())
    assert "must be left out for a quantized" in error_of(
        run("--model", directory, "--dry-run", "--weights", "int4")
    )


def test_dense_experts_can_be_tuned_in_a_format(model: Path) -> None:
    (shape,) = layer_shapes(model, weights="fp8-block")
    assert shape.quantization == Quantization.of(
        WeightFormat.FP8_BLOCK.scheme, WeightFormat.FP8_BLOCK.activations
    )
    data = json.loads(run("--model", model, "--dry-run", "--json", "--weights", "int4").stdout)
    assert {case["packing"]["bits"] for case in data["cases"]} == {4}
    assert "must be a quantized format to be tuned for" in error_of(
        run("--model", model, "--dry-run", "--weights", "bf16")
    )
    assert "must be one of" in error_of(run("--model", model, "--weights", "int5"))


def test_what_wins_for_quantized_experts_is_theirs(
    model: Path, on_gpu: Callable[[Answer], None]
) -> None:
    on_gpu(first_wins)
    assert run("--model", model, "--rows", "16", "--weights", "int4").exit_code == 0
    (key,) = read_tuned(tuned_path(GPU), GPU).entries
    assert key.packing is not None and key.packing.bits == 4
    assert run("--model", model, "--rows", "16", "--weights", "mxfp4").exit_code == 0
    assert run("--model", model, "--rows", "16").exit_code == 0
    assert len(read_tuned(tuned_path(GPU), GPU).entries) == 3


def test_a_model_without_experts_is_refused(model: Path) -> None:
    config = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    assert "got no MoE layer" in error_of(run("--model", model, "--dry-run"))


def test_shapes_come_from_the_configuration(model: Path) -> None:
    (shape,) = layer_shapes(model)
    config = shape.config
    assert (config.num_experts, config.hidden_size, config.intermediate_size) == (8, 256, 128)
    assert (shape.top_k, shape.dtype) == (2, torch.bfloat16)
    assert layer_shapes(model, torch.float16)[0].dtype is torch.float16
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch_dtype": "float16"}))
    assert layer_shapes(model)[0].dtype is torch.float16
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch_dtype": "float32"}))
    assert layer_shapes(model)[0].dtype in DTYPES.values()


# -------------------------------------------------------------------------------- the other verbs


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch sees the test GPU."""

    class Properties:
        name, total_memory, major, minor = GPU.name, 2**30, 9, 0
        multi_processor_count = GPU.num_processors
        shared_memory_per_block = shared_memory_per_block_optin = GPU.shared_bytes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    device.device_of.cache_clear()
    yield
    device.device_of.cache_clear()


@pytest.mark.usefixtures("one_gpu")
def test_doctor_says_what_is_tuned() -> None:
    (gpu,) = doctor.find_gpus()
    assert gpu.tuned == "none"
    write_tuned(tuned_path(GPU), GPU, {CASE.key: Blocks(64, 64, 4, 3)})
    (gpu,) = doctor.find_gpus()
    assert gpu.tuned == f"1 entries in {tuned_path(GPU)}"
    tuned_path(GPU).write_text("{")
    (gpu,) = doctor.find_gpus()
    assert gpu.tuned == f"none: {tuned_path(GPU)} cannot be read (JSONDecodeError)"


def test_explain_says_what_is_tuned(model: Path, request: pytest.FixtureRequest) -> None:
    found = hf_explain.explain(model, device="cuda", dtype=torch.bfloat16)
    assert found.layers[0].experts is not None and found.layers[0].experts.kernel == "triton"
    assert explain.tuned_of(found) is None  # there is no GPU
    request.getfixturevalue("one_gpu")
    (shape,) = layer_shapes(model)
    other = replace(shape, config=replace(shape.config, num_experts=4))
    keys = [one.key(Product.DOWN, 16) for one in (shape, other)]
    write_tuned(tuned_path(GPU), GPU, dict.fromkeys(keys, Blocks(64, 64, 4, 3)))
    words = f"1 entries for these experts; 2 entries in {tuned_path(GPU)}"
    assert explain.tuned_of(found) == words
    quantized = hf_explain.explain(model, device="cuda", dtype=torch.bfloat16, weights="int4")
    assert str(explain.tuned_of(quantized)).startswith("0 entries for these experts")
    (shape,) = layer_shapes(model, weights="int4")
    write_tuned(tuned_path(GPU), GPU, {shape.key(Product.DOWN, 16): Blocks(64, 128, 4, 3)})
    assert str(explain.tuned_of(quantized)).startswith("1 entries for these experts")
    assert str(explain.tuned_of(found)).startswith("0 entries for these experts")
    assert explain.tuned_of(hf_explain.explain(model, device="cpu")) is None
