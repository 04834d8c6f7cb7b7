"""The benchmark of whole models: what a token reads, where time goes, which runs count."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import mixtura
from mixtura.bench import generation, machine, parts
from mixtura.bench.generation import Run, TimedRuns, active_bytes, time_runs
from mixtura.bench.parts import Part, PartClock
from mixtura.bench.peers.whole_models import load_llama_cpp, load_transformers
from mixtura.cli import app
from mixtura.errors import ConfigError, InputError, MissingDependency
from mixtura.hf.generate import prepare_experts
from mixtura.quant.formats import WeightFormat

ROOT = Path(__file__).parents[1]
HIDDEN, INNER, EXPERTS, TOP_K, VOCABULARY, LAYERS = 64, 1024, 64, 8, 50304, 2


def script(name: str) -> Any:
    """A module of `benchmarks/`."""
    spec = importlib.util.spec_from_file_location(
        f"benchmarks_{name}", ROOT / f"benchmarks/{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


make_model, generate_script = script("make_model"), script("generate")


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 2**22)
    monkeypatch.setattr(machine, "SLICE_BYTES", 2**20)
    monkeypatch.setattr(machine, "LIMITS_MODULE", "mixtura.no_such_module")
    monkeypatch.setattr(generation, "PROBE_SECONDS", 0.0)


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow model by the script."""
    directory: Path = tmp_path_factory.mktemp("models") / "olmoe"
    make_model.make_model(directory, LAYERS, HIDDEN)
    return directory


# ---------------------------------------------------------------------------------- the model made


def test_the_model_made_loads_and_says_something(olmoe: Path) -> None:
    model = mixtura.from_pretrained(olmoe)
    assert model.dtype is torch.bfloat16
    config = make_model.Sizes(json.loads((olmoe / "config.json").read_text()))
    assert config.num_weights == sum(parameter.numel() for parameter in model.parameters())
    experts = model.model.layers[0].mlp.experts.expert_weights.down_proj.values
    assert not torch.equal(experts[0], experts[1])
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(olmoe)
    assert tokenizer.decode(tokenizer("some text").input_ids) == "some text"


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_model.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(InputError, match=r"must have room for 14\.9 GB; got less"):
        make_model.make_model(tmp_path / "olmoe", 16)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_written_over(olmoe: Path) -> None:
    with pytest.raises(InputError, match="must hold no model yet"):
        make_model.make_model(olmoe, LAYERS, HIDDEN)


def test_a_twin_needs_a_model_and_the_package(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    with pytest.raises(InputError, match="must hold a model; got none"):
        make_model.make_twin(tmp_path, make_model.GgufFormat.BF16)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match="pip install gguf"):
        make_model.make_twin(olmoe, make_model.GgufFormat.BF16)


@pytest.mark.parametrize("format", ["bf16", "q8_0", "q4_0"])
def test_the_twin_holds_the_same_weights(olmoe: Path, format: str) -> None:
    gguf = pytest.importorskip("gguf")
    path = make_model.make_twin(olmoe, make_model.GgufFormat(format))
    read = make_model.reader(olmoe)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(stored) == 3 + 12 * LAYERS
    expert = stored["blk.1.ffn_up_exps.weight"]
    found = torch.from_numpy(gguf.quants.dequantize(expert.data, expert.tensor_type))
    want = read("model.layers.1.mlp.experts.5.up_proj.weight").float()
    bound = {"bf16": 0.0, "q8_0": 0.02, "q4_0": 0.2}[format]
    assert (found[5] - want).norm() <= bound * want.norm()
    path.unlink()


# --------------------------------------------------------------------------------- bytes per token


def other_bytes() -> int:
    """All but experts and embedding, in bf16."""
    norms, attention, gate = 4 * HIDDEN, 4 * HIDDEN**2, EXPERTS * HIDDEN
    return 2 * (LAYERS * (norms + attention + gate) + HIDDEN + VOCABULARY * HIDDEN)


@pytest.mark.parametrize("weights", [None, "int4-g32", "bf16"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_reads_its_experts_and_all_of_the_rest(
    olmoe: Path, weights: str | None, packed: bool
) -> None:
    model = mixtura.from_pretrained(olmoe, **({"weights": weights} if weights else {}))
    if packed:
        prepare_experts(model)
    bits = 4 + 16 / 32 if weights == "int4-g32" else 16
    expert = 3 * HIDDEN * INNER * bits / 8
    assert active_bytes(model) == LAYERS * TOP_K * expert + other_bytes()


def test_packed_linear_layers_count_as_stored(olmoe: Path) -> None:
    model = mixtura.from_pretrained(olmoe, linears="int8-g32")
    dense = 2 * (LAYERS * 4 * HIDDEN**2 + VOCABULARY * HIDDEN)
    packed = dense / 2 * (1 + 2 / 32)
    expert = 3 * HIDDEN * INNER * 2
    assert active_bytes(model) == LAYERS * TOP_K * expert + other_bytes() - dense + packed


def test_a_tied_head_is_read(tmp_path: Path) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 32,
             "num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 4,
             "num_experts_per_tok": 2}  # fmt: skip
    found = {}
    for is_tied in (False, True):
        model = OlmoeForCausalLM(OlmoeConfig(**sizes, tie_word_embeddings=is_tied))
        found[is_tied] = active_bytes(mixtura.convert(model))
    assert found[True] == found[False]


# ----------------------------------------------------------------------------------- where it goes


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


def test_a_part_counts_without_the_parts_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    outer = Outer()
    found = {outer: Part.MOE, outer.inner: Part.EXPERTS}
    monkeypatch.setattr(parts, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(parts, "_find_parts", lambda model: found)
    anything: Any = outer
    clock = PartClock(anything)
    with clock.running():
        clock.restart()
        outer(torch.ones(1))
        seconds = clock.stop()
    assert {part: time for part, time in seconds.items() if time} == {
        Part.REST: 2.0,
        Part.MOE: 2.0,
        Part.EXPERTS: 1.0,
    }
    assert not outer._forward_pre_hooks and not outer.inner._forward_hooks


@pytest.mark.parametrize("is_ours", [True, False])
def test_the_parts_of_a_model_are_found(olmoe: Path, is_ours: bool) -> None:
    from mixtura.hf.load import load_stock

    model = mixtura.from_pretrained(olmoe) if is_ours else load_stock(olmoe)
    found = parts._find_parts(model)
    names = {name: found[module] for name, module in model.named_modules() if module in found}
    layer = "model.layers.1"
    assert names[f"{layer}.mlp.experts"] is Part.EXPERTS
    assert names[f"{layer}.mlp.gate"] is Part.ROUTER
    assert names[f"{layer}.mlp"] is Part.MOE
    assert names[f"{layer}.self_attn"] is Part.ATTENTION
    assert names[f"{layer}.self_attn.q_norm"] is names["model.norm"] is Part.NORMS
    assert names["lm_head"] is Part.HEAD


# --------------------------------------------------------------------------------- runs that count


def runs_with(faults: list[int], repetitions: int) -> TimedRuns:
    """Timed runs of which each has the next number of major page faults."""
    left = iter([0, *faults])  # the first is the warm-up

    def generate(prompt: torch.Tensor, num_new_tokens: int) -> Run:
        return Run(prompt_seconds=2.0, decode_seconds=1.0, major_faults=next(left))

    return time_runs(generate, torch.zeros(1, 10, dtype=torch.int64), 5, repetitions)


def test_runs_that_were_paged_are_run_again() -> None:
    timed = runs_with([3, 0, 0], repetitions=2)
    assert timed.is_valid and len(timed.runs) == 2
    assert (timed.prompt_rate, timed.decode_rate) == (5.0, 4.0)


def test_a_machine_that_goes_on_paging_is_told() -> None:
    timed = runs_with([3, 2, 1], repetitions=1)
    assert not timed.is_valid
    assert timed.runs[0].major_faults == 1
    assert timed.record()["is_valid"] is False


# ----------------------------------------------------------------------------------- command line


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "generate", *arguments])


def test_a_line_of_json_has_the_documented_keys(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = bench("--model", str(olmoe), "--weights", "int4-g32", "--prompt-tokens", "6",
                   "--new-tokens", "3", "--json")  # fmt: skip
    assert result.exit_code == 0, (result.stderr, result.exception)
    record = json.loads(result.stdout)
    documentation = (ROOT / "docs/benchmarks/cpu.md").read_text()
    for key in {*record, *record["runs"][0]}:
        assert f"`{key}`" in documentation, key
    assert record["weights"] == WeightFormat.INT4_G32.value
    assert sum(record["kernels"].values()) == LAYERS
    assert (record["num_prompt_tokens"], record["num_new_tokens"]) == (6, 3)
    assert len(record["runs"]) == generation.REPETITIONS
    bandwidth = (record["bandwidth_before"] + record["bandwidth_after"]) / 2
    read = record["decode_tokens_per_s"] * record["active_bytes"] / bandwidth
    assert record["fraction_of_bandwidth"] == pytest.approx(read)
    for phase in ("prompt_parts", "decode_parts"):
        assert set(record[phase]) == {part.value for part in Part}
        assert record[phase]["experts"] > 0 and record[phase]["attention"] > 0
    assert "Where the time goes" in result.stderr


def test_a_paged_run_is_rejected(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = count(step=7)
    monkeypatch.setattr(generation, "major_faults", lambda: next(faults))
    result = bench("--model", str(olmoe), "--prompt-tokens", "2", "--new-tokens", "2")
    assert result.exit_code == 1
    assert "REJECTED: up to 7 pages a run came from the disk" in result.stdout


def test_more_tokens_than_positions_are_an_error(olmoe: Path) -> None:
    result = bench("--model", str(olmoe), "--prompt-tokens", "4096", "--new-tokens", "2")
    assert result.exit_code == 1
    assert "prompt_tokens and new_tokens (4096 + 2) must fit" in result.stderr


def test_an_unknown_format_is_told_before_the_model_is_read() -> None:
    result = bench("--model", "/nowhere", "--weights", "int5")
    assert result.exit_code == 1
    assert "weight format (int5) must be one of" in result.stderr


# ------------------------------------------------------------------------------------------- peers


class FakeLlama:
    """As much of llama-cpp-python as is used; the likeliest token is the number of tokens seen."""

    def __init__(self, path: str, **options: Any) -> None:
        self.options = options
        self.seen: list[list[int]] = []
        self.ctx = self

    def n_vocab(self) -> int:
        return 100

    def reset(self) -> None:
        self.seen.clear()

    def eval(self, tokens: list[int]) -> None:
        self.seen.append(tokens)


def test_llama_cpp_decodes_greedily_from_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    buffers = []

    def get_logits(model: FakeLlama) -> Any:
        logits = (ctypes.c_float * 100)()
        logits[sum(map(len, model.seen))] = 1.0
        buffers.append(logits)
        return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))

    library = ModuleType("llama_cpp")
    library.__dict__.update(Llama=FakeLlama, llama_get_logits=get_logits)
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    path = tmp_path / "model.gguf"
    path.touch()
    generate, vocab_size = load_llama_cpp(str(path), num_tokens=8)
    assert vocab_size == 100
    run = generate(torch.tensor([[5, 6, 7]]), 3)
    model: FakeLlama = generate.args[1]  # type: ignore[attr-defined]
    assert model.seen == [[5, 6, 7], [3], [4]]
    assert model.options["use_mmap"] is False and model.options["n_ctx"] >= 8
    assert model.options["n_threads"] == torch.get_num_threads()
    assert run.prompt_seconds > 0 and run.decode_seconds > 0
    with pytest.raises(InputError, match="must exist; got none"):
        load_llama_cpp(str(tmp_path / "other.gguf"), num_tokens=8)


def test_llama_cpp_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingDependency, match="pip install llama-cpp-python"):
        load_llama_cpp("model.gguf", num_tokens=8)


def test_transformers_runs_the_implementation_asked_for(olmoe: Path) -> None:
    generate, vocab_size = load_transformers(str(olmoe), "grouped_mm")
    model = generate.args[0]  # type: ignore[attr-defined]
    assert vocab_size == VOCABULARY
    assert model.config._experts_implementation == "grouped_mm"
    run = generate(torch.tensor([[1, 2]]), 2)
    assert run.prompt_seconds > 0
    with pytest.raises(ConfigError, match=r"\('fast'\) must be one of eager, "):
        load_transformers(str(olmoe), "fast")


def test_one_contender_alone_prints_its_rates(
    olmoe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for contender in ("mixtura:int4-g32", "transformers:eager"):
        generate_script.main(str(olmoe), [contender], 4, 3, 1, None, True)
        record = json.loads(capsys.readouterr().out)
        assert record["contender"] == contender
        assert record["prompt_tokens_per_s"] > 0 and record["decode_tokens_per_s"] > 0
        assert (record["active_bytes"] is None) == contender.startswith("transformers")


def test_contenders_take_turns_in_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def apart(model: str, contender: str, options: list[str]) -> dict[str, Any]:
        order.append(contender)
        if contender == "llama.cpp:x":
            return {"contender": contender, "failure": "error: no such file"}
        return {
            "contender": contender, "is_valid": len(order) != 1, "prompt_tokens_per_s": 10.0,
            "decode_tokens_per_s": float(len(order)), "bandwidth_before": 1e9,
            "bandwidth_after": 3e9, "fraction_of_bandwidth": 0.5,
        }  # fmt: skip

    monkeypatch.setattr(generate_script, "run_apart", apart)
    generate_script.main("m", ["mixtura", "llama.cpp:x"], 4, 3, 2, None, False)
    assert order == ["mixtura", "llama.cpp:x"] * 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 4
    assert "3.0 (3.0-3.0)" in captured.err  # the paged process does not count
    assert "1 paged" in captured.err and "no such file" in captured.err


@pytest.mark.parametrize("name", ["vllm", "llama.cpp", "transformers:"])
def test_contenders_of_no_known_kind_are_refused(name: str) -> None:
    with pytest.raises(SystemExit, match=r"must be mixtura\[:WEIGHTS"):
        generate_script.main("m", [name], 4, 3, 1, None, False)
