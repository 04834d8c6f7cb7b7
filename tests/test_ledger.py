"""The ledger of a checkpoint; `inspect --ledger`, `explain` and `generate` on quantized files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import converted, vocabulary, write_gguf
from packed_files import write_packed
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner, Result

import mixtura
from mixtura.cli import app
from mixtura.experts import PackedExperts
from mixtura.hf.audit import read_ledger
from mixtura.hf.explain import explain
from mixtura.hf.ledger import CheckpointWarning, Use
from mixtura.hf.linears import PackedLinear
from mixtura.kernels.cpu.extension import missing

DEMO = Path(mixtura.__file__).parent / "demo"
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
GGUF_KEYS: dict[str, Any] = {
    "embedding_length": 64,
    "block_count": 2,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "context_length": 64,
    "expert_count": 4,
    "expert_used_count": 2,
    "feed_forward_length": 64,
    "expert_feed_forward_length": 32,
}
EXPERTS = "model.layers.1.mlp.experts"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def is_packed(name: str) -> bool:
    return ".experts." in name or ("self_attn" in name and name.endswith("proj.weight"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "model"
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, directory)
    return directory


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    write_packed(dense, dense.parent / "packed", "ct_nvfp4", is_packed)
    return dense.parent / "packed"


@pytest.fixture(scope="module")
def gguf_file(dense: Path) -> Path:
    config = AutoConfig.from_pretrained(dense)
    tensors = converted("qwen3moe", load_file(dense / "model.safetensors"), config)
    return write_gguf(
        dense.parent / "model.gguf",
        "qwen3moe",
        GGUF_KEYS | vocabulary(DEMO / "tokenizer.json"),
        tensors,
        lambda name: Kind.Q4_1 if "_exps" in name else Kind.F32,
    )


def changed(packed: Path, out: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(packed, out)
    stored = load_file(packed / "model.safetensors") | tensors
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_every_tensor_and_every_byte_is_accounted_for(packed: Path) -> None:
    ledger = read_ledger(packed)
    stored = load_file(packed / "model.safetensors")
    assert {e.tensor: e.num_bytes for e in ledger.entries} == {
        n: t.nbytes for n, t in stored.items()
    }
    assert len(ledger.of(Use.PACKED_EXPERT)) == 2 * 4 * 3 * 4  # layers, experts, matrices, parts
    assert len(ledger.of(Use.PACKED_LINEAR)) == 2 * 4 * 4
    assert [layer.name for layer in ledger.layers] == ["model.layers.0.mlp.experts", EXPERTS]
    names = [p.name for p in ledger.layers[1].projections]
    assert names == ["gate_proj", "up_proj", "down_proj"]
    assert ledger.packed_share == ledger.layers[0].packed_share == 1.0
    assert ledger.asked(EXPERTS) == "e2m1 in groups of 16, static"
    assert ledger.has_contents and ledger.warnings() == []


def test_zero_scales_are_counted(packed: Path, tmp_path: Path) -> None:
    name = f"{EXPERTS}.2.up_proj.weight_scale"
    scales = load_file(packed / "model.safetensors")[name].float()
    scales[3, :2] = 0
    path = changed(packed, tmp_path / "x", **{name: scales.to(torch.float8_e4m3fn)})
    counts = [p.zero_scales for layer in read_ledger(path).layers for p in layer.projections]
    assert counts == [0, 0, 0, 0, 2, 0]


def test_layers_stored_in_several_ways_and_lists_that_disagree(dense: Path, tmp_path: Path) -> None:
    def is_stored(name: str) -> bool:
        return ".experts." in name and f"{EXPERTS}.2.down_proj" not in name

    write_packed(dense, tmp_path / "mixed", "ct_mxfp4", is_stored)
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["model.layers.0.mlp.experts.0.up_proj"]
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    ledger = read_ledger(tmp_path / "mixed")
    (mixed,) = [p for layer in ledger.layers for p in layer.projections if p.is_mixed]
    assert mixed.formats == {"e2m1, group 1x32, scale float8_e8m0fnu": (0, 1, 3), "F32": (2,)}
    assert 0.5 < ledger.packed_share < 0.9
    assert ledger.disagreements[0].startswith("model.layers.0.mlp.experts.0.up_proj.weight is quan")
    assert f"{EXPERTS}.2.down_proj.weight" in ledger.not_packed
    assert "model.layers.0.self_attn.q_proj.weight" in ledger.not_packed
    with pytest.warns(CheckpointWarning) as told:
        mixtura.from_pretrained(tmp_path / "mixed")
    messages = [str(warning.message) for warning in told]
    assert any(f"experts 2 of {EXPERTS} (down_proj) are stored as" in line for line in messages)
    assert any("the configuration says that it is not" in line for line in messages)
    shown = run("inspect", "--ledger", "--model", str(tmp_path / "mixed"))
    assert shown.exit_code == 0
    assert f"warning: experts of {EXPERTS} (down_proj) are stored in 2 ways" in shown.stdout


def test_inspect_prints_the_ledger(packed: Path, dense: Path, gguf_file: Path) -> None:
    shown = run("inspect", "--ledger", "--model", str(packed))
    assert shown.exit_code == 0, shown.stderr
    assert "100.0% of the experts' bytes are packed" in shown.stdout
    assert "packed linear" in shown.stdout and "global scale per matrix" in shown.stdout
    data = json.loads(run("inspect", "--ledger", "--json", "--model", str(packed)).stdout)
    assert data["packed_share"] == 1.0 and len(data["layers"]) == 2
    assert {entry["use"] for entry in data["entries"]} == {
        "packed expert",
        "packed linear",
        "dense",
    }
    plain = run("inspect", "--ledger", "--model", str(dense))
    assert "0.0% of the experts' bytes are packed" in plain.stdout and "F32" in plain.stdout
    shown = run("inspect", "--ledger", "--model", str(gguf_file))
    assert "GGUF" in shown.stdout and "int4, group 1x32" in shown.stdout
    assert run("inspect", "--json").exit_code == 2


def test_inspect_names_a_matrix_with_impossible_contents(packed: Path, tmp_path: Path) -> None:
    name = f"{EXPERTS}.0.down_proj.weight_global_scale"
    shown = run(
        "inspect",
        "--ledger",
        "--model",
        str(changed(packed, tmp_path / "x", **{name: torch.zeros(1)})),
    )
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert f"error: {EXPERTS}.0.down_proj.weight: weight_global_scale (0.0) must" in shown.stderr


def bytes_of(model: nn.Module) -> int:
    """Of all weights as they lie in memory, packed ones included."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers(recurse=True)]}
    kept = sum(t.nbytes for t in tensors.values() if t.dim() != 1 or t.numel() != 16)
    for module in model.modules():
        if isinstance(module, PackedExperts) and module.given is not None:
            kept += module.given.num_bytes
        if isinstance(module, PackedLinear):
            kept += module.matrix.num_bytes
    return kept


@pytest.mark.parametrize("kind", ["packed", "gguf_file"])
def test_explain_counts_what_a_load_keeps(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    found = explain(path, device="cpu")
    model = mixtura.from_pretrained(path)
    experts = [m.given for m in model.modules() if isinstance(m, PackedExperts)]
    assert found.expert_bytes == sum(given.num_bytes for given in experts if given is not None)
    assert found.num_bytes == bytes_of(model)
    assert found.num_packed_linears == sum(isinstance(m, PackedLinear) for m in model.modules())


def test_explain_prints_formats_and_kernels(packed: Path, gguf_file: Path) -> None:
    shown = run("explain", "--device", "cpu", "--model", str(packed))
    assert shown.exit_code == 0, shown.stderr
    assert "stored as  compressed-tensors; 8 linear layers packed" in shown.stdout
    assert "weights    e2m1, group 1x16" in shown.stdout
    assert "asks for   e2m1 in groups of 16, static activations" in shown.stdout
    shown = run("explain", "--device", "cpu", "--model", str(gguf_file))
    assert shown.exit_code == 0, shown.stderr
    assert "int4, group 1x32, scale float16, zero point minimum" in shown.stdout


def test_text_from_a_gguf_file(gguf_file: Path) -> None:
    shown = run("generate", "Once", "--model", str(gguf_file), "--max-new-tokens", "3")
    assert shown.exit_code == 0, shown.stderr
    assert "generated    3 tokens" in shown.stderr
    shown = run("inspect", "--model", str(gguf_file), "--max-tokens", "5")
    assert shown.exit_code == 0, shown.stderr
    assert "5 tokens x 2 experts x 2 layers = 20 slots" in shown.stdout


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_activation_dtype_reaches_linear_layers(packed: Path) -> None:
    name, rows, errors = "model.layers.0.self_attn.q_proj", torch.randn(5, 64), {}
    for activation_dtype in ("bf16", "int8"):
        model = mixtura.from_pretrained(packed, activation_dtype=activation_dtype)
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        with torch.no_grad():
            out = layer(rows)
        exact = rows @ layer.weight.T
        errors[activation_dtype] = float((out - exact).norm() / exact.norm())
    assert errors["bf16"] < 0.6 * errors["int8"]
    assert errors["int8"] < 0.02
    mixtura.convert(model, activation_dtype="bf16")  # lays the matrix out anew
    with torch.no_grad():
        again = float((layer(rows) - exact).norm() / exact.norm())
    assert again == pytest.approx(errors["bf16"])
