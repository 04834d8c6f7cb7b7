"""`mixtura inspect` and `mixtura explain`, and what is beneath them."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TinyCase, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner, Result

from mixtura import RoutingConfig, convert, from_pretrained
from mixtura.cli import app
from mixtura.cli import inspect as inspect_verb
from mixtura.cli.explain import size
from mixtura.config import (
    GroupLimit,
    NoComputeExperts,
    NoComputeKind,
    Renormalize,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
    WeightOn,
)
from mixtura.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    NoKernelFits,
    UnsupportedModel,
)
from mixtura.hf.capture import observed_layers
from mixtura.hf.explain import ModelExplanation, explain, numbered
from mixtura.hf.headers import local_headers
from mixtura.hf.trace import encode_text, trace_text
from mixtura.kernels import register_kernel, unregister_kernel
from mixtura.kernels.torch import TorchKernel
from mixtura.observe import ExpertUsage, RoutingTrace
from mixtura.routing.words import in_words
from mixtura.types import ExpertsProblem

TEXT = "def f(x):\n    return x  # ü, 東\n"


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    """Run a command line in this process."""
    return CliRunner().invoke(app, list(arguments), input=stdin)


def error_of(result: Result) -> str:
    assert result.exit_code == 1, (result.stderr, result.exception)
    assert result.stdout == ""
    return result.stderr


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Qwen3-MoE of 2 layers, 6 experts, top 2, and its byte tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=16,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def saved(case: TinyCase, directory: Path) -> Path:
    """A family's tiny model as a checkpoint."""
    case.model.config.architectures = [type(case.model).__name__]
    case.model.save_pretrained(directory)
    return directory


# ----------------------------------------------------------------------------------------- trace


def test_pieces_are_the_text() -> None:
    encoded = encode_text(byte_tokenizer(), TEXT)
    assert len(encoded.ids) == len(TEXT.encode())
    assert len(encoded.pieces) == len(encoded.ids)
    assert "".join(encoded.pieces) == TEXT
    assert encoded.num_left_out == 0
    first = encode_text(byte_tokenizer(), TEXT, max_tokens=5)
    assert (first.ids, first.pieces) == (encoded.ids[:5], encoded.pieces[:5])
    assert first.num_left_out == len(encoded.ids) - 5


def test_an_empty_text_and_an_empty_limit_are_refused() -> None:
    with pytest.raises(InputError, match="must have a token"):
        encode_text(byte_tokenizer(), "")
    with pytest.raises(ConfigError, match="max_tokens"):
        encode_text(byte_tokenizer(), "a", max_tokens=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "phimoe", "longcat_flash", "ernie4_5_vl_moe"])
def test_windows_do_not_lose_a_token(family: str) -> None:
    model = convert(tiny_model(family).model)
    done: list[int] = []
    trace = trace_text(model, range(3, 50), window=20, on_tokens=done.append)
    assert done == [20, 20, 7]
    text_layers = [n for n in trace.layers.values() if n.num_tokens]
    assert text_layers
    for layer in text_layers:
        assert layer.num_tokens == 47
        assert int(layer.counts.sum()) == 47 * layer.top_k
    assert all(module.observers == () for module in observed_layers(model).values())


def test_windows_start_anew_and_keep_to_the_models_limit() -> None:
    case = tiny_model("qwen3_moe")
    model = convert(case.model)
    ids = list(range(3, 33))
    whole = trace_text(model, ids[:10])
    parts = trace_text(model, ids[:10] * 2, window=10)
    for name, layer in whole.layers.items():
        assert torch.equal(parts.layers[name].topk_ids, layer.topk_ids.repeat(2, 1))
    model.config.max_position_embeddings = 12
    done: list[int] = []
    trace_text(model, ids, on_tokens=done.append)
    assert done == [12, 12, 6]


def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    model = convert(tiny_model("qwen3_moe").model)
    with pytest.raises(InputError, match=r"token ids must be in \[0, 96\)"):
        trace_text(model, [3, 96])
    with pytest.raises(InputError, match="must hold a token"):
        trace_text(model, [])


def test_a_model_that_has_not_been_converted_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="must have an MoE layer that is ours"):
        trace_text(tiny_model("qwen3_moe").model, [3])


def test_observers_go_when_the_model_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert(tiny_model("qwen3_moe").model)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace_text(model, [3, 4], on_tokens=stop)
    assert all(module.observers == () for module in observed_layers(model).values())


# --------------------------------------------------------------------------------------- inspect


def test_inspect_writes_everything(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "[red]text & <b>.txt"
    source.write_text(TEXT, encoding="utf-8")
    png, html, trace = tmp_path / "x.png", tmp_path / "x.html", tmp_path / "x.safetensors"
    result = run(
        *("inspect", "--model", str(tiny), "--text", str(source), "--device", "cpu"),
        *("--png", str(png), "--html", str(html), "--trace", str(trace)),
    )
    assert result.exit_code == 0, result.stderr
    num_tokens = len(TEXT.encode())
    assert f"{num_tokens} tokens x 2 experts x 2 layers = {num_tokens * 4} slots" in result.stdout
    assert "[red]text & <b>.txt" in result.stdout.replace("\n", "")
    for path in (png, html, trace):
        assert str(path) in result.stdout
    usage = ExpertUsage.from_trace(RoutingTrace.load(trace))
    assert usage.num_slots == num_tokens * 4
    assert usage.labels == ("0", "1")
    page = html.read_text(encoding="utf-8")
    assert "[red]text &amp; &lt;b&gt;.txt" in page
    assert "://" not in page
    assert "Run in windows of 16 tokens." in page
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert width >= 600 and height >= 250


def test_inspect_reads_standard_input_and_stops_where_told(tiny: Path) -> None:
    result = run(
        *("inspect", "--model", str(tiny), "--text", "-", "--max-tokens", "20", "--device", "cpu"),
        stdin=TEXT,
    )
    assert result.exit_code == 0, result.stderr
    assert "20 tokens x 2 experts x 2 layers = 80 slots" in result.stdout
    assert "the first 20 tokens" in result.stdout


def test_inspect_has_a_text_of_its_own(tiny: Path) -> None:
    result = run("inspect", "--model", str(tiny), "--max-tokens", "30", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "mixtura/layer.py" in result.stdout
    assert "30 tokens" in result.stdout


def test_inspect_with_an_experts_only_family(tmp_path: Path) -> None:
    directory = saved(tiny_model("phimoe"), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    assert config["vocab_size"] == 96
    alphabet = {chr(97 + i): i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    result = run(
        *("inspect", "--model", str(directory), "--text", "-", "--device", "cpu"), stdin="abcabc"
    )
    assert result.exit_code == 0, result.stderr
    assert "6 tokens x 2 experts x 3 layers = 36 slots" in result.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "must not be empty"), (b"\xff\xfe", "must be UTF-8"), (None, "must be a readable file")],
)
def test_inspect_refuses_a_text_before_it_loads_the_model(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    assert message in error_of(run("inspect", "--model", "/nowhere", "--text", str(path)))
    if content is not None:
        assert message in error_of(run("inspect", "--text", "-", stdin=content))


@pytest.mark.parametrize("option", ["--png", "--html", "--trace"])
def test_inspect_refuses_a_place_before_it_loads_the_model(tmp_path: Path, option: str) -> None:
    for target in (tmp_path, tmp_path / "none" / "x"):
        result = run("inspect", "--model", "/nowhere", option, str(target))
        assert "must be a file in a directory that exists" in error_of(result)


def test_inspect_misses_matplotlib_before_it_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", "--model", "/nowhere", "--png", str(tmp_path / "x.png"))
    assert "pip install 'mixtura[plot]'" in error_of(result)


def test_slots_of_layers_that_saw_other_tokens_are_told() -> None:
    model = convert(tiny_model("ernie4_5_vl_moe").model)
    trace = trace_text(model, range(3, 13))
    said = inspect_verb.sum_of_slots(ExpertUsage.from_trace(trace), 10)
    assert said == (
        "10 tokens, 60 slots in 4 layers; another number of tokens came to "
        "1.mlp.vision_moe.experts (0), 2.mlp.vision_moe.experts (0)"
    )


# --------------------------------------------------------------------------------------- explain


def bytes_of(module: nn.Module) -> int:
    """Bytes of a real model's stored tensors."""
    tensors = {id(t): t for t in module.state_dict(keep_vars=True).values()}
    return sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "longcat_flash", "phimoe", "jetmoe", "dbrx", "gpt_oss", "qwen2_moe"]
)
def test_byte_counts_are_those_of_the_real_model(family: str, tmp_path: Path) -> None:
    case = tiny_model(family)
    found = explain(saved(case, tmp_path))
    assert found.num_bytes == bytes_of(case.model)
    ours = [layer for layer in found.layers if layer.experts is not None]
    assert ours
    for layer in ours:
        part = layer.experts
        assert part is not None and part.top_k is not None and part.bytes_per_token is not None
        module = case.model.get_submodule(layer.name)
        whole = bytes_of(module)
        if layer.kind == "experts":
            assert part.num_bytes == whole
            assert part.bytes_per_token == whole * part.top_k // part.num_experts
        else:
            path = f"{layer.name}.experts"
            names = dict(case.model.named_modules())
            if path in names:
                assert part.num_bytes == bytes_of(names[path])
            beside = whole - part.num_bytes
            assert beside < part.bytes_per_token <= whole
    assert found.bytes_per_token is not None
    assert found.bytes_per_token < found.num_bytes


def test_weights_that_a_family_keeps_in_fp32_are_counted_so(tmp_path: Path) -> None:
    directory = saved(tiny_model("deepseek_v3", dtype=torch.bfloat16), tmp_path)
    loaded = from_pretrained(directory)
    dtypes = {t.dtype for t in loaded.state_dict(keep_vars=True).values()}
    assert dtypes == {torch.bfloat16, torch.float32}
    assert explain(directory).num_bytes == bytes_of(loaded)
    (directory / "model.safetensors").unlink()
    assert explain(directory).num_bytes == bytes_of(loaded)


def test_a_tokens_bytes_to_the_byte(tiny: Path) -> None:
    found = explain(tiny)
    part = found.layers[0].experts
    assert part is not None
    per_expert = (2 * 16 * 32 + 32 * 16) * 2
    gate = 6 * 32 * 2
    assert part.num_bytes == 6 * per_expert
    assert part.bytes_per_token == 2 * per_expert + gate
    embedding = 257 * 32 * 2
    assert found.bytes_per_token == found.num_bytes - 2 * 4 * per_expert - embedding


def test_layers_that_are_alike_are_one_group(tmp_path: Path) -> None:
    found = explain(saved(tiny_model("step3p5"), tmp_path / "a"))
    assert [group.label for group in found.groups] == ["layer 1", "layer 2"]  # limits differ
    assert found.dense == "layer 0"
    found = explain(saved(tiny_model("qwen3_moe"), tmp_path / "b"))
    assert [group.label for group in found.groups] == ["layers 1-2"]
    assert found.groups[0].names == ("model.layers.1.mlp", "model.layers.2.mlp")
    found = explain(saved(tiny_model("ernie4_5_vl_moe"), tmp_path / "c"))
    assert [group.label for group in found.groups] == [
        "layers 1-2 (layers.*.mlp.text_moe.experts)",
        "layers 1-2 (layers.*.mlp.vision_moe.experts)",
    ]


def test_numbers_become_ranges() -> None:
    assert numbered({7}) == "layer 7"
    assert numbered({3, 4, 5, 7, 9, 10}) == "layers 3-5, 7, 9-10"


def test_layers_that_stay_and_families_routers_are_told(tmp_path: Path) -> None:
    found = explain(saved(tiny_model("jetmoe"), tmp_path / "a"))
    assert {layer.kind for layer in found.layers} == {"block", "none"}
    left = next(layer for layer in found.layers if layer.kind == "none")
    assert left.experts is None
    assert left.reason is not None and "attention projections" in left.reason
    with pytest.raises(UnsupportedModel, match="strict"):
        explain(tmp_path / "a", strict=True)
    found = explain(saved(tiny_model("zaya"), tmp_path / "b"))
    part = found.layers[0].experts
    assert part is not None
    assert not part.is_router_ours
    assert "carries a state from layer to layer" in part.routing
    assert part.top_k == 1


def huge(config: Any, directory: Path) -> Path:
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    return directory


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_huge_model_takes_no_memory(tmp_path: Path) -> None:
    before = resident_bytes()
    found = explain(huge(DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]), tmp_path))
    assert resident_bytes() - before < 2**30
    assert found.num_bytes == 671_026_419_200 * 2 + 58 * 256 * 2  # the selection biases are fp32
    assert found.dense == "layers 0-2"
    assert [group.label for group in found.groups] == ["layers 3-60"]
    part = found.layers[0].experts
    assert part is not None
    assert (part.num_experts, part.top_k, part.shared_size) == (256, 8, 2048)
    assert part.num_bytes == 256 * 3 * 7168 * 2048 * 2
    assert found.num_stored == 0


class OnlyWide(TorchKernel):
    """A kernel of a test."""

    name = "only_wide"

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        if problem.device != "cuda":
            return "needs a GPU"
        return None


def test_kernels_are_judged_on_the_device_that_is_asked_for(tiny: Path) -> None:
    register_kernel("only_wide", OnlyWide)
    try:
        on_cpu, on_cuda = (explain(tiny, device=d).layers[0].experts for d in ("cpu", "cuda:1"))
        assert on_cpu is not None and on_cuda is not None
        assert (on_cpu.kernel, on_cpu.is_fallback) == ("cpu", True)
        first = on_cpu.rejections[0]
        assert (first.kernel, first.reason) == ("only_wide", "needs a GPU")
        assert (on_cuda.kernel, on_cuda.is_fallback) == ("only_wide", False)
        with pytest.raises(NoKernelFits, match="needs a GPU"):
            explain(tiny, kernel="only_wide")
        with pytest.raises(NoKernelFits, match="strict"):
            explain(tiny, strict=True)
    finally:
        unregister_kernel("only_wide")
    with pytest.raises(ConfigError, match="kernel"):
        explain(tiny, kernel="only_wide")
    with pytest.raises(ConfigError, match="device"):
        explain(tiny, device="tpu9x")


def test_dtypes_of_files_and_of_the_run(tiny: Path) -> None:
    found = explain(tiny, dtype=torch.float32)
    part = found.layers[0].experts
    assert part is not None
    assert (found.dtype, part.dtype, part.stored_dtype) == ("float32", "float32", "bfloat16")
    assert found.num_bytes == 2 * explain(tiny).num_bytes


# --------------------------------------------------------------------------------------- headers


def changed(tiny: Path, directory: Path, change: Any, **config: Any) -> Path:
    """A copy of the checkpoint with other tensors or another configuration."""
    directory.mkdir(exist_ok=True)
    tensors = load_file(tiny / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tiny / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(values))
    return directory


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
GATE = "model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop(EXPERT), {}, rf"{EXPERT} must be there beside"),
        (
            lambda t: t.update({EXPERT: torch.zeros(8, 32)}),
            {},
            rf"{EXPERT} \(\(8, 32\)\) must have the shape of the others",
        ),
        (
            lambda t: t.update({GATE: torch.zeros(7, 32)}),
            {},
            rf"{GATE} \(\(7, 32\)\) must have the shape that config.json gives; got \(6, 32\)",
        ),
        (lambda t: None, {"num_local_experts": 5}, r"got \(5, "),
        (lambda t: None, {"moe_intermediate_size": 24}, r"got \(6, "),
        (lambda t: None, {"num_hidden_layers": 3}, r"must hold every tensor .* model\.layers\.2"),
        (lambda t: t.pop(GATE), {}, rf"must hold every tensor .* {GATE}"),
        (
            lambda t: t.update({EXPERT: torch.zeros(16, 32, dtype=torch.float8_e4m3fn)}),
            {},
            rf"{EXPERT} \(F8_E4M3\) must be stored in one of",
        ),
        (
            lambda t: t.update({GATE: torch.zeros(6, 32, dtype=torch.uint8)}),
            {},
            rf"{GATE} \(U8\) must be stored in one of",
        ),
    ],
)
def test_files_that_contradict_the_configuration_name_the_tensor(
    tiny: Path, tmp_path: Path, change: Any, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        explain(changed(tiny, tmp_path, change, **config))


def test_tensors_without_a_place_are_told(tiny: Path, tmp_path: Path) -> None:
    found = explain(changed(tiny, tmp_path, lambda t: None, num_hidden_layers=1))
    assert found.unused and all(name.startswith("model.layers.1.") for name in found.unused)
    assert explain(tiny).unused == ()


def test_a_configuration_alone_is_enough_and_half_the_files_are_not(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    assert local_headers(tmp_path) == {}
    alone = explain(tmp_path)
    assert alone.num_stored == 0
    with_files = explain(tiny)
    assert with_files.num_stored > 0
    assert (alone.num_bytes, alone.bytes_per_token) == (
        with_files.num_bytes,
        with_files.bytes_per_token,
    )
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert explain(tmp_path).num_stored == 0
    (tmp_path / "model-1.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"got no model-2\.safetensors"):
        explain(tmp_path)


def test_a_truncated_file_is_told(tiny: Path, tmp_path: Path) -> None:
    directory = changed(tiny, tmp_path, lambda t: None)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        explain(directory)


def test_no_weight_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Headers:
        """A file whose tensors cannot be had."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.opened = safe_open(*args, **kwargs)

        def __enter__(self) -> Headers:
            self.opened.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.opened.__exit__(*args)

        def keys(self) -> Any:
            return self.opened.keys()

        def get_slice(self, name: str) -> Any:
            part = self.opened.get_slice(name)

            class Slice:
                get_dtype = staticmethod(part.get_dtype)
                get_shape = staticmethod(part.get_shape)

            return Slice

    monkeypatch.setattr("mixtura.hf.checkpoint.safe_open", Headers)
    assert explain(tiny).num_stored > 0


def test_a_hub_model_is_read_from_the_cache(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mixtura.hf.headers.try_to_load_from_cache", lambda *_: str(tiny / "config.json")
    )
    assert local_headers("someone/something") == local_headers(tiny)
    monkeypatch.setattr("mixtura.hf.headers.try_to_load_from_cache", lambda *_: None)
    assert local_headers("someone/something") == {}


def test_models_without_experts_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="must have an MoE layer"):
        explain(tmp_path)


# ------------------------------------------------------------------------------ the explain verb


def test_explain_prints_what_a_reader_wants(tiny: Path) -> None:
    result = run("explain", "--model", str(tiny), "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for part in (
        "qwen3_moe (Qwen3MoeForCausalLM)",
        "bfloat16 on cpu, router in fp32",
        "layers 0-1: MoE block, all of it ours",
        "softmax, top 2 of 6",
        "6, each 32 -> 16 -> 32",
        "silu(g) * u; gate and up stacked",
        "the weights fit",
        "not reference:",
    ):
        assert part in result.stdout
    assert "unused" not in result.stdout


def test_explain_prints_json(tiny: Path) -> None:
    result = run("explain", "--model", str(tiny), "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    found: ModelExplanation = explain(tiny)
    assert data["num_bytes"] == found.num_bytes
    assert data["expert_bytes"] == found.expert_bytes
    assert len(data["layers"]) == 2
    assert data["layers"][0]["experts"]["kernel"]
    assert data["groups"] == [{"label": "layers 0-1", "names": [x.name for x in found.layers]}]
    assert data["memory"]["total"] > 0


def test_explain_of_what_is_not_here(tiny: Path, tmp_path: Path) -> None:
    assert "must hold config.json" in error_of(run("explain", "--model", str(tmp_path)))
    result = run("explain", "--model", str(tiny), "--kernel", "none", "--device", "cpu")
    assert "kernel ('none') must be one of" in error_of(result)


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1 KiB"),
        (1023 * 1024, "0.999 MiB"),
        (1536 * 2**20, "1.5 GiB"),
        (300 * 2**30, "300 GiB"),
        (5000 * 2**40, "5,000 TiB"),
    ],
)
def test_sizes_have_three_digits(num_bytes: int, said: str) -> None:
    assert size(num_bytes) == said


# ----------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "softmax, top 2 of 8"),
        (
            {
                "score": ScoreFunction.SIGMOID,
                "selection_bias": SelectionBias.ON_SCORE,
                "groups": GroupLimit(num_expert_groups=4, topk_groups=2),
                "renormalize": Renormalize.SUM,
                "scale": 2.5,
            },
            "sigmoid, top 2 of 8 by score plus a learned bias, in the 2 best of 4 groups (by the "
            "two best of each), weights sum to 1, times 2.5",
        ),
        (
            {"score_order": ScoreOrder.AFTER_TOP_K, "weight_on": WeightOn.INPUT},
            "top 2 of 8, softmax of the chosen, weights on the experts' input",
        ),
        (
            {"no_compute": NoComputeExperts(kind=NoComputeKind.IDENTITY, count=4)},
            "softmax, top 2 of 12, 4 of them identity experts",
        ),
        (
            {"hash_routing": True, "score": ScoreFunction.SQRT_SOFTPLUS},
            "2 of 8 by token id, from a table, sqrt(softplus)",
        ),
        (
            {
                "logit_multiplier": 0.5,
                "logit_softcap": 5.0,
                "renormalize": Renormalize.P_NORM,
                "p_norm": 1.0,
                "scale": 2.0,
                "scale_on": ScaleOn.OUTPUT,
            },
            "logits times 0.5, logits soft-capped at 5, softmax, top 2 of 8, weights over their "
            "1-norm, times 2 on the layer's output",
        ),
    ],
)
def test_rules_in_words(rule: dict[str, Any], words: str) -> None:
    assert in_words(RoutingConfig(num_experts=8, top_k=2, **rule)) == words


def test_explain_says_of_a_path_where_nothing_is_that_there_is_no_directory():
    result = run("explain", "--model", "/none/such")
    assert result.exit_code == 1
    assert "the model (/none/such) must be a directory with config.json" in result.stderr
