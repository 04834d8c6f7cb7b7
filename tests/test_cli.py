"""The command line: what it promises, what it prints, and how it fails."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_interface import GOLDEN, describe_cli
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner, Result

import mixtura
from mixtura.cli import VERBS, app, doctor, loading, main
from mixtura.errors import CheckpointError, ConfigError, InputError, MissingDependency
from mixtura.hf import load
from mixtura.hf.convert import UnconvertedLayerWarning
from mixtura.hf.generate import GenerateOptions, TextMeter, generate_text
from mixtura.kernels.optional import OptionalPackage
from mixtura.observe import RoutingTrace

ROOT = Path(__file__).parent.parent
extension = importlib.import_module("mixtura.kernels.cpu.extension")
POSITIONS = 4096
"""Of the tiny model: enough that a generation can be interrupted."""


def run(*arguments: str, stdin: str | bytes | None = None, **environment: str) -> Result:
    """Run a command line in this process."""
    return CliRunner().invoke(app, list(arguments), input=stdin, env=environment)


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Run a command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mixtura", *arguments],
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


def error_of(result: Result, code: int = 1) -> str:
    """The one line that a failed command has printed."""
    assert result.exit_code == code, (result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert lines[0].endswith(".")
    return lines[0].removeprefix("error: ")


# ---------------------------------------------------------------------------------------- models


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MoE model whose text never ends, with a tokenizer of bytes."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        **SIZES, head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2
    )
    model = Qwen3MoeForCausalLM(config)
    model.lm_head.weight.data[256] = 0
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break; its weights are a link where nothing breaks them."""
    directory = tmp_path / "copied"
    directory.mkdir()
    for file in tiny.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def edit_config(directory: Path, **values: Any) -> None:
    """Change values of a model's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ------------------------------------------------------------------------------------- interface


def test_interface_is_frozen() -> None:
    frozen = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(describe_cli()))
    assert found == frozen, (
        "the command line has changed: if that is meant, run `python tests/cli_interface.py`"
    )


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"mixtura {mixtura.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_verb(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    for name, verb in VERBS.items():
        assert name in result.stdout
        assert verb.help in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_fits_a_narrow_terminal(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    with pytest.raises(SystemExit):  # without CliRunner, which prints as wide as it likes
        app([verb, "--help"])
    shown = capsys.readouterr().out
    assert "--debug" in shown
    assert max(len(line) for line in shown.splitlines()) <= 50


def test_help_and_usage_errors_load_neither_torch_nor_transformers() -> None:
    program = f"""
import sys
from mixtura.cli import app
for line in ["--help", "--version", "nonsense", "generate", "generate x --top-p 2"] + [
    verb + " --help" for verb in {list(VERBS)}
]:
    try:
        app(line.split())
    except SystemExit:
        pass
assert not {{"torch", "transformers"}} & set(sys.modules), "loaded"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)


# -------------------------------------------------------------------------------------- generate


def expected_text(directory: Path, prompt: str, num_tokens: int) -> str:
    """What Transformers alone generates."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=num_tokens, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_greedy_text_is_that_of_transformers(tiny: Path) -> None:
    result = run("generate", "Once upon", "--model", str(tiny), "--max-new-tokens", "24")
    assert result.exit_code == 0
    assert result.stdout == expected_text(tiny, "Once upon", 24) + "\n"
    for fact in ("9 tokens", "24 tokens", "tokens/s", "MiB", "cpu on cpu", "2 of 2 taken over"):
        assert fact in result.stderr


def test_standard_input_is_the_prompt_without_its_line_break(tiny: Path) -> None:
    options = ("--model", str(tiny), "--max-new-tokens", "8")
    given = run("generate", "Once\nupon", *options)
    piped = run("generate", "-", *options, stdin="Once\nupon\n")
    assert given.exit_code == piped.exit_code == 0
    assert given.stdout == piped.stdout


def test_routing_is_kept_and_forced(tiny: Path, tmp_path: Path) -> None:
    options = ("generate", "Once", "--model", str(tiny), "--max-new-tokens", "6")
    first, second = tmp_path / "first", tmp_path / "second"
    result = run(*options, "--save-routing", str(first))
    assert result.exit_code == 0, result.stderr
    again = run(*options, "--replay-routing", str(first), "--save-routing", str(second))
    assert again.stdout == result.stdout
    traces = [RoutingTrace.load(path) for path in (first, second)]
    for trace in traces:
        assert trace.tokens is not None
        assert trace.tokens.position.tolist() == list(range(4 + 6 - 1))
    for one, other in zip(*(trace.layers.values() for trace in traces), strict=True):
        assert one.ids.equal(other.ids)
    longer = run("generate", "Once upon", *options[2:], "--replay-routing", str(first))
    assert "at position 9 of sequence 0 must have been recorded" in error_of(longer)
    assert "must exist" in error_of(run(*options, "--replay-routing", str(tmp_path / "none")))
    wrong = str(tmp_path / "none" / "file")
    assert "must be a file in a directory" in error_of(run(*options, "--save-routing", wrong))


def test_a_seed_draws_the_same_text_again(tiny: Path) -> None:
    options = ("--model", str(tiny), "--max-new-tokens", "16", "--temperature", "1.5")
    first, again, other = (
        run("generate", "Once", *options, "--top-p", "0.95", "--seed", seed).stdout
        for seed in ("7", "7", "8")
    )
    assert first == again != other
    assert first != run("generate", "Once", "--model", str(tiny), "--max-new-tokens", "16").stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--kernel", "reference", "--strict"),
        ("--deterministic", "--gate", "native"),
        ("--dtype", "bf16", "--device", "cpu", "--debug"),
    ],
)
def test_options_reach_the_model(tiny: Path, options: tuple[str, ...]) -> None:
    result = run("generate", "x", "--model", str(tiny), "--max-new-tokens", "2", *options)
    assert result.exit_code == 0, result.stderr
    if "reference" in options:
        assert "reference on cpu" in result.stderr


class Loaded:
    """The tiny model and its tokenizer in this process."""

    def __init__(self, directory: Path) -> None:
        self.model = mixtura.from_pretrained(directory)
        self.tokenizer = load.load_tokenizer(directory)


@pytest.fixture(scope="session")
def loaded(tiny: Path) -> Loaded:
    return Loaded(tiny)


def test_generate_text_hands_out_pieces_and_figures(loaded: Loaded) -> None:
    pieces: list[str] = []
    options = GenerateOptions(max_new_tokens=12, temperature=1.0, seed=3)
    state = torch.get_rng_state()
    result = generate_text(loaded.model, loaded.tokenizer, "Once", options, on_text=pieces.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert "".join(pieces) == result.text
    assert (result.num_prompt_tokens, result.num_new_tokens) == (4, 12)
    assert result.first_token_seconds > 0
    assert result.decode_rate is not None
    assert result.peak_bytes > 2**20


def test_one_new_token_has_no_decode_rate(loaded: Loaded) -> None:
    options = GenerateOptions(max_new_tokens=1)
    assert generate_text(loaded.model, loaded.tokenizer, "x", options).decode_rate is None


def test_a_chat_template_wraps_the_prompt(loaded: Loaded) -> None:
    options = GenerateOptions(max_new_tokens=1, is_chat=True)
    loaded.tokenizer.chat_template = "<{% for m in messages %}{{ m.content }}{% endfor %}>"
    try:
        result = generate_text(loaded.model, loaded.tokenizer, "hello", options)
    finally:
        loaded.tokenizer.chat_template = None
    assert result.num_prompt_tokens == len("<hello>")


@pytest.mark.parametrize("text", ["plain words", "é漢字🎉 ok", "", "\n\n", "🎉" * 5])
def test_pieces_of_a_stream_never_split_a_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces: list[str] = []
    meter = TextMeter(tokenizer, pieces.append)
    meter.put(torch.tensor([tokenizer("a prompt 漢").input_ids]))
    for token in [*tokenizer(text).input_ids, 256]:
        meter.put(torch.tensor([token]))
    meter.end()
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_that_are_no_text_come_out_as_the_tokenizer_has_them() -> None:
    tokenizer = byte_tokenizer()
    ids = torch.randint(0, 256, (300,)).tolist()
    meter = TextMeter(tokenizer)
    meter.put(torch.tensor([tokenizer("prompt").input_ids]))
    for token in ids:
        meter.put(torch.tensor([token]))
    meter.end()
    assert meter.result().text == tokenizer.decode(ids)


# ------------------------------------------------------------------------------------ bad inputs


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "qwen3_moe", ')


def list_config(directory: Path) -> None:
    (directory / "config.json").write_text("[1, 2]")


def binary_config(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"\xff\xfe\x00")


def wrong_type_in_config(directory: Path) -> None:
    edit_config(directory, hidden_size="wide")


def impossible_size_in_config(directory: Path) -> None:
    edit_config(directory, hidden_size=-3)


def unknown_family(directory: Path) -> None:
    edit_config(directory, model_type="nonsense")


def quantized(directory: Path) -> None:
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 5})


def one_layer_too_many(directory: Path) -> None:
    edit_config(directory, num_hidden_layers=3)


def other_expert_count(directory: Path) -> None:
    edit_config(directory, num_experts=4, num_local_experts=4)


def dense(directory: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>")


def empty_file(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def missing_shard(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_out_of_directory(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()


def broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


BROKEN: dict[Callable[[Path], None], str] = {
    no_config: "must hold config.json",
    broken_config: "config.json must be readable JSON",
    list_config: "must hold a JSON object; got list",
    binary_config: "config.json must be readable JSON",
    wrong_type_in_config: "must hold values of the right types",
    impossible_size_in_config: "must describe a model that transformers can build",
    unknown_family: "must be of a type that transformers",
    quantized: "must be one of 2, 3, 4, 8",
    one_layer_too_many: "tensor that config.json gives; got none for model.layers.2.",
    other_expert_count: "must have the shape that config.json gives",
    dense: "must have an MoE layer; got none",
    truncated: "must be a whole safetensors file",
    no_safetensors: "must be a whole safetensors file",
    empty_file: "must be a whole safetensors file",
    no_weights: "must hold model.safetensors or model.safetensors.index.json",
    only_pickles: "from_pretrained(DIR).save_pretrained(NEW_DIR)",
    missing_shard: "got no model-00001-of-00002.safetensors",
    index_out_of_directory: "must map tensors to files of its directory",
    no_tokenizer: "must have a vocabulary",
    broken_tokenizer: "the tokenizer of",
}


@pytest.mark.parametrize("harm", BROKEN, ids=lambda harm: harm.__name__)
def test_a_broken_checkpoint_is_told_in_one_line(
    copied: Path, harm: Callable[[Path], None]
) -> None:
    harm(copied)
    result = run("generate", "x", "--model", str(copied), "--max-new-tokens", "1")
    assert BROKEN[harm] in error_of(result)


@pytest.mark.parametrize(
    "name", ["/nonexistent/path", "./nonexistent", "~/nonexistent", "no/such/repo", "no such", ""]
)
def test_a_model_that_is_not_there_is_told_in_one_line(name: str) -> None:
    error_of(run("generate", "x", "--model", name))


def test_a_file_is_no_model(tiny: Path) -> None:
    name = str(tiny / "model.safetensors")
    assert "must be a directory" in error_of(run("generate", "x", "--model", name))


@pytest.mark.parametrize(
    ("options", "told", "code"),
    [
        (("--kernel", "nonsense"), "must be one of cpu, triton, grouped_mm", 1),
        (("--device", "gpuu"), "must be cpu, cuda or cuda:N", 1),
        (("--device", "meta"), "must be cpu, cuda or cuda:N", 1),
        (("--device", "cuda:99"), "must be on this machine", 1),
        (("--dtype", "float31"), "'auto', 'bf16', 'fp16', 'fp32'", 2),
        (("--gate", "fp64"), "'fp32', 'native'", 2),
        (("--max-new-tokens", "0"), "--max-new-tokens", 2),
        (("--max-new-tokens", "many"), "--max-new-tokens", 2),
        (("--max-new-tokens", str(POSITIONS)), "must fit the model's positions", 1),
        (("--temperature", "-1"), "--temperature", 2),
        (("--temperature", "inf"), "must be a finite number", 1),
        (("--temperature", "1e-320"), "must be 0, or at least", 1),
        (("--top-p", "1.5"), "--top-p", 2),
        (("--top-p", "0"), "must be in (0, 1]", 1),
        (("--top-p", "0.5"), "must come with a temperature", 1),
        (("--seed", "-1"), "--seed", 2),
        (("--seed", str(2**63)), "must be in [0, 2**63)", 1),
        (("--chat",), "must have a chat template", 1),
        (("--nonsense",), "See 'mixtura generate --help'", 2),
        (("more",), "See 'mixtura generate --help'", 2),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_told_in_one_line(
    tiny: Path, options: tuple[str, ...], told: str, code: int
) -> None:
    assert told in error_of(run("generate", "x", "--model", str(tiny), *options), code)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "must have at least one token"),
        ("x" * (POSITIONS + 1), "must fit the model's positions"),
        ("\udcff", "must be valid UTF-8"),
    ],
    ids=["empty", "long", "bytes"],
)
def test_a_wrong_prompt_is_told_in_one_line(tiny: Path, prompt: str, told: str) -> None:
    assert told in error_of(run("generate", prompt, "--model", str(tiny)))


def test_standard_input_that_is_no_text_is_told_in_one_line(tiny: Path) -> None:
    result = run("generate", "-", "--model", str(tiny), stdin=b"\xff\xfe")
    assert "must be utf-8 text" in error_of(result)


def test_without_a_prompt_the_error_says_how_to_give_one() -> None:
    assert "mixtura generate 'Once upon a time'" in error_of(run("generate"), 2)


def test_a_misspelt_verb_is_corrected() -> None:
    assert "Did you mean 'generate'?" in error_of(run("generates"), 2)


def test_a_tokenizer_of_another_model_is_found_out(loaded: Loaded) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    with pytest.raises(InputError, match="vocabulary"):
        generate_text(loaded.model, tokenizer, "unheard-of")


def test_options_are_checked_at_construction() -> None:
    for wrong in ({"max_new_tokens": 0}, {"temperature": float("nan")}, {"top_p": 2.0}):
        with pytest.raises(ConfigError):
            GenerateOptions(**wrong)


def test_a_missing_model_in_the_box_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mixtura.cli.options.DEMO", tmp_path)
    assert "--model" in error_of(run("generate", "x"))


def test_transformers_out_of_the_window_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "transformers_version", lambda: "4.57.1")
    assert "pip install" in error_of(run("generate", "x"))
    with pytest.raises(MissingDependency), loading.quiet():
        pass


def test_an_unexpected_error_is_one_line_and_a_traceback_with_debug(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(options: loading.LoadOptions) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("mixtura.cli.generate.load", fail)
    told = error_of(run("generate", "x"))
    assert told == (
        "unexpected ZeroDivisionError: first line. Run again with --debug for the traceback."
    )
    shown = run("generate", "x", "--debug").stderr
    assert "Traceback" in shown
    assert "second line" in shown


def test_our_warnings_are_shown_and_others_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    with loading.quiet():
        warnings.warn("layer 3 stays", UnconvertedLayerWarning, stacklevel=1)
        warnings.warn("noise", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: layer 3 stays\n"


def test_an_error_within_quiet_keeps_its_class(tiny: Path) -> None:
    with pytest.raises(CheckpointError), loading.quiet():
        mixtura.from_pretrained(tiny / "nothing")


# ------------------------------------------------------------------------- signals and the pipe


def test_an_interruption_keeps_the_text_and_prints_the_figures(tiny: Path) -> None:
    process = start("generate", "x", "--model", str(tiny), "--max-new-tokens", "4000",
                    stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")
    assert b"generated" in told
    assert b"Traceback" not in told
    assert b"error" not in told


def test_a_reader_that_goes_away_ends_it_without_a_word(tiny: Path) -> None:
    process = start("generate", "x", "--model", str(tiny), "--max-new-tokens", "4000",
                    stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert told == b""


def test_closed_standard_output_does_no_harm(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["mixtura", "generate", "x", "--model", str(tiny), "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of a closed descriptor
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "2 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- doctor


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtura.bench.machine.read_bandwidth", lambda seconds: 12.3e9)


@pytest.mark.usefixtures("quick_probe")
def test_doctor_prints_json() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert list(found) == [
        "mixtura", "python", "cpu", "cpp_kernels", "memory", "gpus", "packages", "demo", "kernels",
        "plug_ins",
    ]  # fmt: skip
    assert list(found["cpu"]) == ["name", "num_cores", "num_threads", "features"]
    assert [f["name"] for f in found["cpu"]["features"]] == [
        "AVX2", "AVX-512", "VNNI", "BF16", "AMX",
    ]  # fmt: skip
    assert list(found["memory"]) == ["total", "free", "bandwidth"]
    assert [p["name"] for p in found["packages"]] == [
        "torch", "transformers", "triton", "DeepGEMM", "FlashInfer", "matplotlib",
    ]  # fmt: skip
    assert list(found["demo"]) == ["path", "num_parameters", "problem"]
    cpu = found["kernels"][0]
    assert list(cpu) == ["device", "dtypes", "kernel", "reasons"]
    assert cpu["device"] == "cpu"
    assert cpu["kernel"] is not None


@pytest.mark.usefixtures("quick_probe")
def test_doctor_fits_a_narrow_terminal_without_colour() -> None:
    result = run("doctor", COLUMNS="60")
    assert result.exit_code == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= 60
    assert "\x1b" not in result.stdout
    assert "12.3 GB/s" in result.stdout


def test_doctor_says_what_a_missing_package_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    monkeypatch.setattr(OptionalPackage, "version", None)
    monkeypatch.setattr(doctor, "transformers_version", lambda: None)
    monkeypatch.setitem(sys.modules, "mixtura.bench", None)  # as without Transformers
    shown = " ".join(run("doctor", COLUMNS="200").stdout.split())
    assert "matplotlib not installed inspect writes no PNG" in shown
    assert "triton not installed no Triton kernels" in shown
    assert "DeepGEMM not installed optional: kernel='deep_gemm' cannot run" in shown
    assert "FlashInfer not installed optional: kernel='flashinfer' cannot run" in shown
    assert "bandwidth not measured the probe needs Transformers" in shown
    assert "transformers not installed models cannot be loaded: it must be >=" in shown


@pytest.mark.usefixtures("quick_probe")
def test_doctor_shows_the_kernels_of_this_processor() -> None:
    if extension.missing() is not None:
        pytest.skip("no C++ kernels here")
    found = json.loads(run("doctor", "--json").stdout)["cpp_kernels"]
    assert found["problem"] is None
    assert found["path"] == extension.current_path() == found["paths"][0]
    assert found["paths"][-1] == "portable"
    assert found["flags"] == list(extension.cpu_flags())
    assert found["threads"] in ("openmp", "pool")
    with extension.forced_path("portable"):
        rows = {row[0]: row[1:] for row in doctor.rows_of(doctor.diagnose())}
    others = ", ".join(found["paths"][:-1]) or "no other"
    assert rows["C++ kernels"] == (f"portable (could run: {others})", "")
    shown = {"openmp": ("openmp", ""), "pool": ("pool", doctor.POOL_COST)}
    assert rows["C++ threads"] == shown[found["threads"]]


@pytest.mark.usefixtures("quick_probe")
def test_doctor_says_what_it_costs_to_have_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_cpu", None)
    assert json.loads(run("doctor", "--json").stdout)["cpp_kernels"]["path"] is None
    shown = " ".join(run("doctor", COLUMNS="250").stdout.split())
    assert "C++ kernels not built experts run through torch" in shown
    assert "install a C++17 compiler, then mixtura again" in shown
    assert "torch (bf16, fp16, fp32) cpu: its C++ extension is not built" in shown


def test_doctor_reads_the_flags_of_x86_and_knows_nothing_of_others(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f amx_tile\n")
    assert doctor.cpu_flags(path) == {"fpu", "avx2", "avx512f", "amx_tile"}
    path.write_text("processor : 0\nFeatures : fp asimd sve\n")
    assert doctor.cpu_flags(path) is None
    assert doctor.cpu_flags(tmp_path / "nothing") is None


def test_doctor_bounds_memory_by_the_container(tmp_path: Path) -> None:
    assert doctor.memory_sizes(tmp_path) == (None, None)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 6000 kB\n")
    assert doctor.memory_sizes(tmp_path) == (8000 * 1024, 6000 * 1024)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1024000\n")
    (group / "memory.max").write_text("max\n")
    assert doctor.memory_sizes(tmp_path) == (8000 * 1024, 6000 * 1024)
    (group / "memory.max").write_text("4096000\n")
    assert doctor.memory_sizes(tmp_path) == (4096000, 3072000)


def test_doctor_leaves_the_probe_out_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "memory_sizes", lambda: (2**30, 2**20))
    assert doctor.find_memory().bandwidth is None


def test_doctor_names_a_broken_model_in_the_box(tmp_path: Path) -> None:
    problem = doctor.find_demo(tmp_path).problem
    assert problem is not None
    assert "config.json" in problem


def test_help_ends_with_the_verb_that_was_meant() -> None:
    assert "See 'mixtura doctor --help'" in error_of(run("doctor", "--nonsense"), 2)
