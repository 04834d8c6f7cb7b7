"""`mixtura quantize`: the files it writes, how it goes on, what it refuses, and what it needs."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from test_cli import byte_tokenizer, error_of, run
from test_packed_load import CONFIGS
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    Qwen2MoeConfig,
)

import mixtura
from mixtura.errors import ConfigError, InputError, UnsupportedModel
from mixtura.experts import PackedExperts
from mixtura.hf import quantize_checkpoint as module
from mixtura.hf.activation_moments import STARVED, Calibration, Moments, collect_moments
from mixtura.hf.ledger import IDLE_RULE, Use
from mixtura.hf.linears import PackedLinear
from mixtura.hf.load import empty_model, load_config, load_stock
from mixtura.hf.packed_load import PackedLoad
from mixtura.hf.quantize_checkpoint import Method, QuantizeOptions, quantize_checkpoint
from mixtura.hf.quantize_plan import QuantizePlan
from mixtura.hf.quantize_report import LayerReport, Progress
from mixtura.hf.quantize_work import WorkDirectory, work_path
from mixtura.hf.stored import SafetensorsCheckpoint
from mixtura.hf.streamed import stream_checkpoint
from mixtura.quant.codecs.output_formats import OutputFormat
from mixtura.quant.codecs.registry import codec_for
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize

FORMATS = [format for format in WeightFormat if format.scheme.is_quantized]
IDS = torch.arange(1, 9).unsqueeze(0)
VOCABULARY = 257
SHARD = 60_000
"""Bytes of an output file, so that a tiny model has several."""

TEXT = "Bees would rather the hive were elsewhere. " * 40


def save_tiny(config: Any, directory: Path, *, is_fused: bool = False) -> Path:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    if is_fused:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(directory)
    return directory


def tiny_config(name: str, **values: Any) -> Any:
    config = CONFIGS[name].to_dict()
    return type(CONFIGS[name])(**{**config, "vocab_size": VOCABULARY, **values})


@pytest.fixture(scope="module", params=CONFIGS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's checkpoint."""
    directory = tmp_path_factory.mktemp("dense") / request.param
    return save_tiny(tiny_config(request.param, num_hidden_layers=1), directory)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_config("qwen3_moe"), tmp_path_factory.mktemp("qwen") / "tiny")


@pytest.fixture(scope="module")
def whole(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is written where nothing interrupts it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    made(qwen, out)
    return contents(out)


def options(format: str = "int4-g32", **values: Any) -> QuantizeOptions:
    return QuantizeOptions(format=WeightFormat.parse(format), **{"shard_bytes": SHARD, **values})


def made(model: Path, out: Path, format: str = "int4-g32", **values: Any) -> list[LayerReport]:
    return quantize_checkpoint(model, out, options(format, **values))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def stored(directory: Path) -> SafetensorsCheckpoint:
    config = json.loads((directory / "config.json").read_text())
    return SafetensorsCheckpoint(directory, config)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def dense_logits(directory: Path, place: Path) -> Tensor:
    """Of the stock model whose weights are what the quantized ones mean."""
    checkpoint = stored(directory)
    means = {name: checkpoint.tensor(name).clone() for name in checkpoint.headers}
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    config.save_pretrained(place)
    save_file(means, place / "model.safetensors", metadata={"format": "pt"})
    return logits_of(AutoModelForCausalLM.from_pretrained(place))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def is_expert(name: str) -> bool:
    return ".experts." in name


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, in any dtype."""
    return torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))


# ----------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.value)
def test_files_are_read_back_as_what_was_made(
    format: WeightFormat, dense: Path, tmp_path: Path
) -> None:
    made(dense, tmp_path / "out", format.value)
    expected = dense_logits(tmp_path / "out", tmp_path / "means")
    model = mixtura.from_pretrained(tmp_path / "out", kernel="torch")
    experts = [found for found in model.modules() if isinstance(found, PackedExperts)]
    assert experts
    assert all(found.given is not None and found.given.down_proj.is_quantized for found in experts)
    assert relative(logits_of(model), expected) < 1e-5
    check_configuration(tmp_path / "out", dense)
    source, checkpoint = load_file(dense / "model.safetensors"), stored(tmp_path / "out")
    scheme = OutputFormat.of(format).scheme
    for name, weight in source.items():
        assert (name in checkpoint.packed) is is_expert(name)
        if not is_expert(name):
            assert torch.equal(checkpoint.tensor(name), weight)
        elif format is not WeightFormat.NVFP4:  # of which gate and up share a scale
            assert torch.equal(checkpoint.tensor(name), dequantize(quantize(weight, scheme)))
        else:
            assert relative(checkpoint.tensor(name), weight) < 0.11


def check_configuration(directory: Path, dense: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    codec, checkpoint = codec_for(config), stored(directory)
    for name, header in checkpoint.headers.items():
        if len(header.shape) > 1:
            assert codec.expects(name) is (name in checkpoint.packed), name
    del config["quantization_config"]
    assert config == json.loads((dense / "config.json").read_text())


def test_what_lies_beside_the_weights(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(qwen, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == found
    assert len(set(found.values())) > 2
    sizes = {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
    assert all(size < SHARD + 20_000 for size in sizes.values())
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (qwen / name).read_bytes()


def test_stored_experts_that_compute_nothing_stay_behind(tmp_path: Path) -> None:
    case = tiny_model("longcat_flash")
    case.model.save_pretrained(tmp_path / "dense")
    experts: Any = case.model.get_submodule(case.experts_modules[0])
    num_routed, num_stored = experts.num_routed_experts, experts.total_experts
    made(tmp_path / "dense", tmp_path / "out", "int8-channel")
    packed = PackedLoad(empty_model(load_config(tmp_path / "dense")), stored(tmp_path / "out"))
    idle = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(len(case.experts_modules))
        for expert in range(num_routed, num_stored)
        for part in ("gate", "up")
    }
    excluded = {entry.tensor: entry.rule for entry in packed.ledger.of(Use.EXCLUDED)}
    assert excluded == dict.fromkeys(idle, IDLE_RULE)
    assert idle.isdisjoint(packed.state_dict())
    for layer in packed.ledger.layers:
        assert layer.packed_share == 1
        assert not any(projection.is_mixed for projection in layer.projections)
    assert packed.ledger.warnings() == []
    model = mixtura.from_pretrained(tmp_path / "out", kernel="torch")
    expected = dense_logits(tmp_path / "out", tmp_path / "means")
    assert relative(logits_of(model), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "format"), [("qwen3_moe", "nvfp4"), ("mixtral", "int8-channel"), ("mixtral", "nvfp4")]
)
def test_experts_in_one_stack_become_the_same_files(name: str, format: str, tmp_path: Path) -> None:
    config = tiny_config(name, num_hidden_layers=1)
    apart = save_tiny(config, tmp_path / "apart")
    fused = save_tiny(config, tmp_path / "fused", is_fused=True)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(fused / "model.safetensors")
    made(apart, tmp_path / "from-apart", format)
    made(fused, tmp_path / "from-fused", format)
    first, second = tensors_of(tmp_path / "from-apart"), tensors_of(tmp_path / "from-fused")
    assert {name for name in first if is_expert(name)} == {n for n in second if is_expert(n)}
    for tensor in filter(is_expert, first):
        assert are_equal(first[tensor], second[tensor]), tensor
    mixtura.from_pretrained(tmp_path / "from-fused")


def test_attention_projections_are_quantized_when_asked_for(qwen: Path, tmp_path: Path) -> None:
    reports = made(qwen, tmp_path / "out", "nvfp4", packs_linears=True)
    assert [report.module for report in reports] == [
        f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("mlp.experts", "self_attn")
    ]
    checkpoint = stored(tmp_path / "out")
    packed = {name for name in checkpoint.packed if not is_expert(name)}
    assert packed == {
        f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "qkvo"
    }
    tensors = tensors_of(tmp_path / "out")
    for names in (
        [f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv"],
        [f"model.layers.1.mlp.experts.3.{kind}_proj" for kind in ("gate", "up")],
    ):
        scales = {tensors[f"{name}.weight_global_scale"].item() for name in names}
        assert len(scales) == 1
    model = mixtura.from_pretrained(tmp_path / "out")
    assert sum(isinstance(found, PackedLinear) for found in model.modules()) == 8
    assert relative(logits_of(model), dense_logits(tmp_path / "out", tmp_path / "means")) < 3e-2


def test_every_tensor_falls_under_a_rule(tmp_path: Path) -> None:
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=32,
        shared_expert_intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0],
        tie_word_embeddings=True,
    )  # fmt: skip
    plans: list[QuantizePlan] = []
    directory = save_tiny(config, tmp_path / "tiny")
    progress = Progress(planned=lambda plan, files, kept: plans.append(plan))
    quantize_checkpoint(directory, tmp_path / "out", options(), progress)
    counts = {rule.value: count for rule, count in plans[0].num_tensors.items()}
    assert counts == {
        "routed-experts": 12,
        "attention-projections": 8,
        "router": 1,
        "shared-experts": 4,
        "embedding": 1,
        "norms-and-biases": 11,
        "other-layers": 3,
    }
    assert "lm_head" in plans[0].ignored  # tied, and in no file
    assert "model.layers.1.mlp.shared_expert.up_proj" in plans[0].ignored


# ------------------------------------------------------------------- interruptions, and going on


class Stopped(Exception):
    """Ends a run in a test."""


def stop_after(count: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end in the middle of a file, after so many matrices."""
    measure, done = LayerReport.measure, 0

    def counted(*arguments: Any) -> None:
        nonlocal done
        done += 1
        if done > count:
            act()
        measure(*arguments)

    monkeypatch.setattr(LayerReport, "measure", counted)


def interrupt(error: type[BaseException]) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("count", [3, 29])
def test_a_killed_run_goes_on_to_the_same_files(
    count: int,
    qwen: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = os.fork()
    if child == 0:
        stop_after(count, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
        made(qwen, tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not list(work_path(tmp_path / "out").rglob("config.json"))
    kept: list[int] = []
    progress = Progress(planned=lambda plan, files, found: kept.append(found))
    reports = quantize_checkpoint(qwen, tmp_path / "out", options(), progress)
    assert kept[0] > 0
    assert contents(tmp_path / "out") == whole
    assert all(report.num_done == report.num_matrices == 15 for report in reports)
    assert not work_path(tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(
    qwen: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("quantize", "--model", str(qwen), "--scheme", "int4-g32", "--out", str(out),
               "--shard-gb", str(SHARD / 1e9))  # fmt: skip
    with monkeypatch.context() as patched:
        stop_after(20, interrupt(KeyboardInterrupt), patched)
        result = run(*command)
    assert result.exit_code == 130
    assert f"kept in {out}.partial. Run the same command again to go on." in result.stderr
    assert not out.exists()
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert "kept from an earlier run" in result.stdout
    assert contents(out) == whole


def unfinished(qwen: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patched:
        stop_after(20, interrupt(Stopped), patched)
        with pytest.raises(Stopped):
            made(qwen, out)
    return work_path(out)


def test_a_kept_file_that_has_changed_is_made_again(
    qwen: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = unfinished(qwen, tmp_path / "out", monkeypatch)
    first = min((work / "files").glob("*.safetensors"))
    harmed = bytearray(first.read_bytes())
    harmed[-1] ^= 1
    first.write_bytes(harmed)
    with (work / "journal.jsonl").open("a") as journal:
        journal.write('{"file": "model-0')  # what a kill leaves
    made(qwen, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_an_unfinished_run_is_not_mixed_with_another(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(qwen, tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=r"got one with another method\. Remove it"):
        made(qwen, tmp_path / "out", method=Method.SEARCH)
    with pytest.raises(InputError, match="got one with another scheme"):
        made(qwen, tmp_path / "out", "mxfp4")
    made(qwen, tmp_path / "out")


def test_a_run_that_has_finished_no_file_is_forgotten(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_after(0, interrupt(Stopped), patched)
        with pytest.raises(Stopped):
            made(qwen, tmp_path / "out", "mxfp4", shard_bytes=10**9)
    made(qwen, tmp_path / "out")


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out", {"scheme": "int4"})
    with pytest.raises(InputError, match="must belong to one run at a time"):
        WorkDirectory(tmp_path / "out", {"scheme": "int4"})
    work.close()


# ---------------------------------------------------------------------------------------- memory

MEMORY_LIMIT = 12_000_000


def bytes_of_data() -> int:
    """What counts against RLIMIT_DATA now, without memory that has been freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return next(
        1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")
    )


def quantize_under_a_limit(model: Path, out: Path) -> None:
    """In a process of its own: not one large file fits, and yet the model is quantized."""
    limit = bytes_of_data() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    largest = max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    try:
        largest.read_bytes()
    except MemoryError:
        fits = False
    else:
        fits = True
    assert not fits
    made(model, out, "int4-g128", shard_bytes=2 * MEMORY_LIMIT)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_memory_does_not_grow_with_the_model(qwen: Path, tmp_path: Path) -> None:
    config = tiny_config(
        "qwen3_moe", hidden_size=512, moe_intermediate_size=256, num_local_experts=16,
        num_hidden_layers=3, dtype="bfloat16",
    )  # fmt: skip
    large = tmp_path / "large"
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(large, max_shard_size="20MB")
    assert sum(file.stat().st_size for file in large.glob("*.safetensors")) > 3 * MEMORY_LIMIT
    del model
    # A process that has freed much would have room that no limit counts.
    code = (
        "import pathlib, sys, test_quantize_command as tests\n"
        "small, large, out = map(pathlib.Path, sys.argv[1:])\n"
        "tests.made(small, out / 'small')\n"  # so that everything is imported
        "tests.quantize_under_a_limit(large, out / 'large')\n"
    )
    out = tmp_path / "made"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(qwen), str(large), str(out)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(stored(out / "large").packed) == 3 * 16 * 3


# ----------------------------------------------------------------------------------- calibration


def naive_moments(directory: Path, ids: Tensor) -> dict[str, list[Tensor]]:
    """Sums of squares by a loop over tokens and experts, in the stock model."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")
    found: dict[str, list[Tensor]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(experts: Any, args: tuple[Tensor, ...]) -> None:
            rows, chosen = args[0], args[1]
            count, hidden, width = experts.down_proj.shape
            sums = [torch.zeros(count), torch.zeros(count, hidden), torch.zeros(count, width)]
            for row, experts_of_row in zip(rows, chosen, strict=True):
                for expert in experts_of_row.tolist():
                    gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
                    middle = torch.nn.functional.silu(gate) * up
                    sums[0][expert] += 1
                    sums[1][expert] += row**2
                    sums[2][expert] += middle**2
            found[name] = sums

        return hook

    for name, experts in model.named_modules():
        if name.endswith(".experts"):
            experts.register_forward_pre_hook(look(name))
    with torch.no_grad():
        model(ids.unsqueeze(0))
    return found


def test_moments_are_those_of_a_loop(dense: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 256, (40,))
    linear = "model.layers.0.self_attn.q_proj"
    found = collect_moments(stream_checkpoint(dense), ids, [linear])
    for name, (num_tokens, up, down) in naive_moments(dense, ids).items():
        assert torch.equal(found.experts[name].num_tokens, num_tokens.long())
        torch.testing.assert_close(found.experts[name].gate_up, up, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.experts[name].down, down, rtol=1e-3, atol=1e-9)
    assert found.linears[linear].shape == (64,)
    found.save(tmp_path / "moments")
    again = Moments.load(tmp_path / "moments")
    assert torch.equal(again.linears[linear], found.linears[linear])
    assert torch.equal(again.experts[name].down, found.experts[name].down)


@dataclass
class InMemory:
    """Runs calls of a model that is in memory as a whole, one after the other."""

    model: Any

    def run(self, calls: list[Callable[[], None]], on_module: Callable[[str], None]) -> None:
        with torch.no_grad():
            for call in calls:
                call()


def test_moments_are_those_of_the_model_in_memory(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixtura.hf.activation_moments.window_size", lambda model: 16)
    ids = torch.randint(0, 256, (40,))
    linears = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
    done: list[str] = []
    found = collect_moments(stream_checkpoint(qwen), ids, linears, done.append)
    in_memory: Any = InMemory(mixtura.convert(load_stock(qwen), kernel="torch"))
    expected = collect_moments(in_memory, ids, linears)
    assert done == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    assert found.experts.keys() == expected.experts.keys()
    for name, moments in expected.experts.items():
        assert int(moments.num_tokens.sum()) == 2 * len(ids)
        assert torch.equal(found.experts[name].num_tokens, moments.num_tokens)
        torch.testing.assert_close(found.experts[name].gate_up, moments.gate_up)
        torch.testing.assert_close(found.experts[name].down, moments.down)
    for name in linears:
        torch.testing.assert_close(found.linears[name], expected.linears[name])


CALIBRATION_LIMIT = 56_000_000
"""A layer of experts below has 9.4 MB, its largest conversion 19 MB besides; the heap has gaps."""


def calibrate_under_a_limit(model: Path, warm: Path) -> None:
    """In a process of its own: the model has three times the memory that there is."""
    ids = torch.randint(0, 256, (48,))
    collect_moments(stream_checkpoint(warm), ids, [])
    limit = bytes_of_data() + CALIBRATION_LIMIT
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        bytearray(CALIBRATION_LIMIT + 1_000_000)
    except MemoryError:
        fits = False
    else:
        fits = True
    assert not fits
    found = collect_moments(stream_checkpoint(model), ids, [])
    assert all(int(moments.num_tokens.sum()) == 2 * 48 for moments in found.experts.values())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_calibration_needs_no_memory_for_the_model(qwen: Path, tmp_path: Path) -> None:
    config = tiny_config(
        "qwen3_moe", hidden_size=256, moe_intermediate_size=192, num_local_experts=16,
        num_hidden_layers=19,
    )  # fmt: skip
    large = tmp_path / "large"
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(large, max_shard_size="20MB")
    del model
    assert sum(file.stat().st_size for file in large.glob("*.safetensors")) > 3 * CALIBRATION_LIMIT
    code = (
        "import pathlib, sys, test_quantize_command as tests\n"
        "tests.calibrate_under_a_limit(*map(pathlib.Path, sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(large), str(qwen)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_calibration_weighs_errors_and_names_starved_experts(qwen: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT[:90])
    result = run("quantize", "--model", str(qwen), "--scheme", "int4-g32", "--method", "search",
                 "--calibration", str(text), "--linears",
                 "--out", str(tmp_path / "out"))  # fmt: skip
    assert result.exit_code == 0, result.stderr
    line = next(
        line for line in result.stdout.splitlines() if line.startswith("model.layers.0.mlp")
    )
    assert "tokens per expert" in line
    assert f"fewer than {STARVED} tokens, searched with all columns alike: " in line
    starved = set(line.rpartition(": ")[2].split(", "))
    assert starved
    assert starved < set("01234")
    made(qwen, tmp_path / "alike", method=Method.SEARCH, packs_linears=True)
    weighted, alike = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "alike")
    for expert in "01234":
        name = f"model.layers.0.mlp.experts.{expert}.down_proj.weight_packed"
        assert torch.equal(weighted[name], alike[name]) is (expert in starved)
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    assert not torch.equal(weighted[name], alike[name])


def test_calibration_is_not_repeated(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"method": Method.SEARCH, "calibration": Calibration(TEXT[:300])}
    with monkeypatch.context() as patched:
        stop_after(20, interrupt(Stopped), patched)
        with pytest.raises(Stopped):
            made(qwen, tmp_path / "out", **values)
    made(qwen, tmp_path / "whole", **values)
    monkeypatch.setattr(module, "find_moments", interrupt(Stopped))
    reports = made(qwen, tmp_path / "out", **values)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all(sum(report.tokens_per_expert or ()) == 2 * 300 for report in reports)


def test_the_model_in_the_box_is_measured_before_and_after(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("def read_json(path):\n    return json.loads(path.read_text())\n")
    result = run("quantize", "--scheme", "int4", "--out", str(tmp_path / "out"),
                 "--eval", str(text))  # fmt: skip
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum("mlp.experts" in line for line in lines) == 6
    assert any(line.startswith("routed-experts") and "int4-g128" in line for line in lines)
    assert any(line.startswith("router") and "as it is" in line for line in lines)
    before, after = (float(line.split()[1]) for line in lines[-2:])
    assert lines[-2].startswith("before")
    assert lines[-1].startswith("after")
    assert 0 < abs(after - before) < 0.3


# ------------------------------------------------------------------------------------ wrong input


@pytest.fixture
def copied(qwen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen, tmp_path / "copied"))


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def quantized_already(directory: Path) -> None:
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})


def without_experts(directory: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    save_tiny(LlamaConfig(**sizes, num_attention_heads=2), directory)


def not_finite(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"][3, 5] = torch.inf
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def an_expert_missing(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.4.down_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[Callable[[Path], None], str] = {
    quantized_already: "must be dense to be quantized; got one that is quantized already",
    without_experts: "must have an MoE layer; got none",
    not_finite: "experts.2.down_proj.weight (row 3, column 5) must be finite; got inf",
    no_config: "must hold config.json",
    truncated: "must be a whole safetensors file",
    an_expert_missing: "model.layers.1.mlp.experts.",
}


@pytest.mark.parametrize("harm", BROKEN, ids=lambda harm: harm.__name__)
def test_a_checkpoint_that_cannot_be_quantized_is_told(
    harm: Callable[[Path], None], copied: Path, tmp_path: Path
) -> None:
    harm(copied)
    with pytest.raises(mixtura.errors.MixturaError) as caught:
        made(copied, tmp_path / "out")
    assert BROKEN[harm] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"--scheme": "nonsense"}, "must be one of"),
        ({"--scheme": "bf16"}, "to quantize a checkpoint; got a dense one"),
        ({"--model": "/nonexistent/model"}, "must be a directory"),
        ({"--model": "model.gguf"}, "got a GGUF file"),
        ({"--out": "{full}"}, "must be new or empty; got something in it"),
        ({"--out": "{file}"}, "must be new or empty; got a file"),
        ({"--out": "{file}/below"}, "must be one that can be written"),
        ({"--calibration": "{file}"}, "must come with --method search"),
        ({"--calibration": "/nonexistent/text", "--method": "search"}, "must be a readable UTF-8"),
        ({"--eval": "{bytes}"}, "got bytes that are no UTF-8"),
        ({"--eval": "{empty}"}, "must hold words"),
        ({"--shard-gb": "0"}, "must be a positive number"),
    ],
    ids=lambda value: "=".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_told_in_one_line(
    qwen: Path, tmp_path: Path, changed: dict[str, str], told: str
) -> None:
    places = {name: str(tmp_path / name) for name in ("full", "file", "bytes", "empty")}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "file").write_text("words")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text(" \n")
    given = {"--model": str(qwen), "--scheme": "int4", "--out": str(tmp_path / "out"), **changed}
    line = [word for name, value in given.items() for word in (name, value.format(**places))]
    assert told in error_of(run("quantize", *line))


def test_missing_options_are_told() -> None:
    assert "--scheme" in error_of(run("quantize", "--out", "x"), 2)
    assert "--out" in error_of(run("quantize", "--scheme", "int4"), 2)


def test_a_full_disk_is_told_before_the_start(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(InputError, match=r"must have 0\.00 GB free for the files; got 0\.00 GB"):
        made(qwen, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_columns_that_fill_no_bytes_are_told(tmp_path: Path) -> None:
    directory = save_tiny(tiny_config("qwen3_moe", moe_intermediate_size=33), tmp_path / "odd")
    with pytest.raises(ConfigError, match=r"down_proj.weight \(64, 33\) must have columns that"):
        made(directory, tmp_path / "out", "mxfp4")
    made(directory, tmp_path / "out", "int4-g32")
    mixtura.from_pretrained(tmp_path / "out")


def test_experts_without_names_of_their_own_are_told(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    directory = save_tiny(config, tmp_path / "stacks")
    with pytest.raises(UnsupportedModel, match="got a family that has stacks alone"):
        made(directory, tmp_path / "out")


def test_attention_that_is_no_plain_linear_layer_is_told(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixtura.hf.quantize_rules.find_linears", lambda model, names: {})
    with pytest.raises(UnsupportedModel, match="for --linears; got none"):
        made(qwen, tmp_path / "out", packs_linears=True)
