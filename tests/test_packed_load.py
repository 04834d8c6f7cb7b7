"""Quantized checkpoints into models: what stays packed gives what its dense weights would."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from packed_files import formats, write_packed, write_with
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import mixtura
from mixtura.config import GateUp
from mixtura.errors import CheckpointError, InputError
from mixtura.experts import PackedExperts
from mixtura.hf.linears import PackedLinear
from mixtura.hf.mapped import MappedFiles
from mixtura.quant.codecs.contract import Codec, Decoded, Header
from mixtura.quant.codecs.registry import codec_for
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

IDS = torch.arange(1, 9).unsqueeze(0)

CONFIGS: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=2,
        dtype="float32",
    ),
    "mixtral": MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        dtype="float32",
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's checkpoint."""
    directory = tmp_path_factory.mktemp("dense") / request.param
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    model.save_pretrained(directory)
    return directory


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def expected_logits(dense: Path, means: dict[str, Tensor]) -> Tensor:
    """Of the stock model with the weights that the packed ones stand for."""
    other = dense.parent / f"{dense.name}-means"
    AutoConfig.from_pretrained(dense).save_pretrained(other)
    save_file(means, other / "model.safetensors", metadata={"format": "pt"})
    return logits_of(AutoModelForCausalLM.from_pretrained(other))


def is_expert(name: str) -> bool:
    return ".experts." in name


def is_linear(name: str) -> bool:
    return is_expert(name) or ("self_attn" in name and name.endswith("proj.weight"))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", formats())
def test_packed_experts_are_what_the_files_say(name: str, dense: Path, tmp_path: Path) -> None:
    means = write_packed(dense, tmp_path / "packed", name, is_expert)
    expected = expected_logits(dense, means)
    model = mixtura.from_pretrained(tmp_path / "packed", kernel="torch", activation_dtype="bf16")
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert all(
        module.given is not None and module.given.gate_up_proj.is_quantized for module in experts
    )
    assert relative(logits_of(model), expected) < 1e-5
    assert relative(logits_of(mixtura.from_pretrained(tmp_path / "packed")), expected) < 2e-2


@pytest.mark.parametrize("name", ["gptq_v1_w4_g32_asym", "ct_nvfp4", "fp8_block128_exact"])
def test_linear_layers_stay_packed_too(name: str, dense: Path, tmp_path: Path) -> None:
    means = write_packed(dense, tmp_path / "packed", name, is_linear)
    model = mixtura.from_pretrained(tmp_path / "packed")
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert relative(logits_of(model), expected_logits(dense, means)) < 3e-2


def test_a_small_model_asks_for_its_mappings_twice(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_packed(dense, tmp_path / "packed", "ct_mxfp4", is_linear)
    calls: list[MappedFiles] = []
    release = MappedFiles.release
    monkeypatch.setattr(MappedFiles, "release", lambda self: (calls.append(self), release(self)))
    mixtura.from_pretrained(tmp_path / "packed")
    assert len(calls) == 2  # after what is dense, and at the end


def test_a_load_reports_nothing_missing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_packed(dense, tmp_path / "packed", "ct_mxfp4", is_linear)
    reported: list[Any] = []

    def report(loading_info: Any, **others: Any) -> None:
        reported.append(loading_info.to_dict())

    monkeypatch.setattr("transformers.modeling_utils.log_state_dict_report", report)
    mixtura.from_pretrained(tmp_path / "packed")
    assert len(reported) == 1
    assert not any(reported[0].values())


@pytest.mark.filterwarnings("ignore::mixtura.hf.ledger.CheckpointWarning")
@pytest.mark.parametrize("name", ["ct_pack_int4_channel_sym", "ct_nvfp4", "ct_fp8_channel"])
def test_llama_4_of_linear_layers(name: str, tmp_path: Path) -> None:
    case = tiny_model("llama4")
    case.model.save_pretrained(tmp_path / "dense")
    apart = {}
    for tensor, value in load_file(tmp_path / "dense" / "model.safetensors").items():
        module, _, role = tensor.rpartition(".")
        if not module.endswith(".experts"):
            apart[tensor] = value
            continue
        parts = ("gate_proj", "up_proj") if role == "gate_up_proj" else ("down_proj",)
        for part, stack in zip(parts, value.chunk(len(parts), 2), strict=True):
            for expert, matrix in enumerate(stack.mT):
                apart[f"{module}.{expert}.{part}.weight"] = matrix.contiguous()
    save_file(apart, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    means = write_packed(tmp_path / "dense", tmp_path / "packed", name, is_expert)
    model = mixtura.from_pretrained(tmp_path / "packed", kernel="torch")
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert experts
    assert all(one.given is not None and one.given.gate_up_proj.is_quantized for one in experts)
    stock: Any = case.model
    for module in case.experts_modules:
        found: Any = stock.get_submodule(module)
        for expert in range(found.num_experts):
            gate, up, down = (
                means[f"{module}.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")
            )
            found.gate_up_proj.data[expert] = torch.cat([gate, up]).T
            found.down_proj.data[expert] = down.T
    assert relative(logits_of(model), logits_of(stock)) < 1e-5


@pytest.mark.parametrize("scale", ["_scale", "_weight_scale"])
def test_a_quantized_stack_of_llama_4_is_told(scale: str, tmp_path: Path) -> None:
    case = tiny_model("llama4")
    case.model.save_pretrained(tmp_path / "dense")
    write_packed(tmp_path / "dense", tmp_path / "packed", "ct_fp8_channel", lambda name: False)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = f"{case.experts_modules[0]}.gate_up_proj"
    stack = tensors.pop(name)
    tensors[name] = stack.to(torch.float8_e4m3fn)
    tensors[f"{name}{scale}"] = torch.ones(len(stack), 1, stack.shape[2])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}.* must be written expert by expert"):
        mixtura.from_pretrained(tmp_path / "packed")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True}


def in_another_order(
    codec: Codec, value: Tensor, seed: int
) -> tuple[QuantizedMatrix, dict[str, Tensor]]:
    """A matrix whose columns are in groups by chance, and GPTQ's parts of it."""
    groups = torch.randperm(value.shape[1], generator=torch.Generator().manual_seed(seed)) // 16
    order = groups.argsort(stable=True)
    scheme = QuantScheme(Code.INT, 4, (1, 16), torch.float16, ZeroPoint.MID)
    plain = dataclasses.replace(WeightFormat.INT4_G32.scheme, group_shape=(1, 16))
    matrix = quantize(value[:, order], plain)
    assert matrix.scales is not None
    permuted = dataclasses.replace(
        matrix,
        scheme=dataclasses.replace(scheme, has_permutation=True),
        scales=matrix.scales.half(),
        permutation=order.int(),
    )
    names = ("qweight", "qzeros", "scales", "g_idx")
    sizes = {"qweight": (value.shape[1] // 8, value.shape[0]), "g_idx": (value.shape[1],)}
    grid = (value.shape[1] // 16, value.shape[0])
    sizes |= {"scales": grid, "qzeros": (grid[0], grid[1] // 8)}
    headers = {
        name: Header(torch.float16 if name == "scales" else torch.int32, sizes[name])
        for name in names
    }
    format = codec.format_of("w", headers)
    assert format is not None
    return permuted, format.encode(Decoded(permuted))


@pytest.mark.parametrize("has_one_order", [True, False])
def test_ordered_columns_stay_packed(has_one_order: bool, dense: Path, tmp_path: Path) -> None:
    """The C++ kernel runs them where gate and up are ordered alike, as files have them."""
    codec = codec_for(GPTQ)

    def packed(name: str, value: Tensor) -> tuple[QuantizedMatrix, dict[str, Tensor]]:
        expert = int(name.split(".experts.")[1].split(".")[0])
        is_up = name.endswith(("up_proj.weight", "w3.weight")) and not has_one_order
        return in_another_order(codec, value, 1000 * value.shape[1] + 2 * expert + is_up)

    means = write_with(dense, tmp_path / "packed", codec, GPTQ, packed, is_expert)
    expected = expected_logits(dense, means)
    model = mixtura.from_pretrained(tmp_path / "packed", kernel="cpu" if has_one_order else None)
    given = [module.given for module in model.modules() if isinstance(module, PackedExperts)]
    for weights in given:
        assert weights is not None and len(weights.schemes) == 1
        assert weights.gate_up_proj.scheme.has_permutation
        assert weights.config.gate_up is (GateUp.STACKED if has_one_order else GateUp.SEPARATE)
    assert relative(logits_of(model), expected) < 2e-2
    model = mixtura.from_pretrained(tmp_path / "packed", kernel="torch")
    assert relative(logits_of(model), expected) < 1e-5


def test_formats_are_not_asked_for_again(dense: Path, tmp_path: Path) -> None:
    write_packed(dense, tmp_path / "packed", "ct_mxfp4", is_expert)
    with pytest.raises(InputError, match="must be left out for a quantized checkpoint"):
        mixtura.from_pretrained(tmp_path / "packed", weights="int4")
