"""Attention projections and the output head in a weight format: `linears=`."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import TinyCase, tiny_model
from tolerances import relative_error
from torch import nn
from transformers import PreTrainedModel

from mixtura import from_pretrained
from mixtura.errors import ConfigError, GradientUnsupported, InputError, UnsupportedModel
from mixtura.hf.linears import PackedLinear, adopt_linear, find_linears
from mixtura.hf.load import empty_model, load_stock
from mixtura.kernels.cpu.extension import missing
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize

FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "qwen3_next", "qwen3_vl_moe", "zaya"]


def saved(case: TinyCase, directory: Path) -> Path:
    case.model.save_pretrained(directory)
    return directory


def load(directory: Path) -> PreTrainedModel:
    return from_pretrained(directory, linears="int8", kernel="torch", attn_implementation="eager")


def packed(num_in: int = 24, num_out: int = 10, *, bias: bool = True) -> PackedLinear:
    linear = nn.Linear(num_in, num_out, bias=bias).requires_grad_(False)
    adopt_linear(linear, quantize(linear.weight, WeightFormat.INT8_G32), torch.float32)
    assert isinstance(linear, PackedLinear)
    return linear


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


@pytest.fixture(autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact products in torch, so that results can be compared; unless a test asks for ours."""
    if "ours" not in request.keywords:
        monkeypatch.setattr("mixtura.hf.linears.cannot_pack", lambda scheme: "not in this test")


# ------------------------------------------------------------------------------------ one layer


@pytest.mark.ours
@pytest.mark.parametrize("format", list(WeightFormat), ids=lambda f: f.value)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_row_times_a_matrix_in_any_format(format: WeightFormat, has_bias: bool) -> None:
    linear = nn.Linear(70, 10, bias=has_bias).requires_grad_(False)
    matrix, bias = quantize(linear.weight, format), linear.bias
    adopt_linear(linear, matrix, torch.float32)
    for shape in ((70,), (3, 70), (2, 3, 70), (0, 70)):
        rows = torch.randn(shape)
        expected = F.linear(rows, dequantize(matrix), bias)
        error = (linear(rows) - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < 0.03, shape
    assert linear(torch.randn(2, 70, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert torch.equal(linear.weight, dequantize(matrix))  # brought back bit for bit
    rows = torch.randn(2, 70).double()
    if not has_bias:
        assert torch.allclose(linear(rows), F.linear(rows, dequantize(matrix, torch.float64)))


def test_an_adopted_layer_keeps_its_bias_hooks_and_class() -> None:
    linear = nn.Linear(24, 10).requires_grad_(False)
    calls: list[str] = []
    linear.register_forward_hook(lambda *_: calls.append("hook"))
    weight, bias = linear.weight.clone(), linear.bias
    adopt_linear(linear, quantize(weight, WeightFormat.INT8_G32), torch.float32)
    assert isinstance(linear, PackedLinear) and isinstance(linear, nn.Linear)
    assert [name for name, _ in linear.named_parameters()] == ["bias"] and linear.bias is bias
    assert relative_error(linear.weight, weight) < 0.01
    rows = torch.randn(3, 24)
    assert relative_error(linear(rows), F.linear(rows, linear.weight, bias)) < 0.02
    assert calls == ["hook"]


def test_copies_and_pickles_compute_the_same() -> None:
    linear, rows = packed(), torch.randn(3, 24)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert type(other) is type(linear)
        assert torch.equal(other(rows), linear(rows))


def test_a_change_of_dtype_leaves_the_packed_values_alone() -> None:
    linear = packed()
    before = {name: part.clone() for name, part in linear.matrix.tensors.items()}
    linear.to(torch.bfloat16)
    for name, part in linear.matrix.tensors.items():
        assert part.dtype is before[name].dtype and torch.equal(part, before[name])
    assert linear.weight.dtype is linear.bias.dtype is torch.bfloat16
    assert linear(torch.randn(2, 24, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_move_takes_the_packed_values_along() -> None:
    linear = packed().to("meta")
    assert linear.matrix.device.type == "meta"
    with pytest.raises(InputError, match=r"rows \(\(2, 24\) on cpu\) must be .* on meta"):
        linear(torch.randn(2, 24))


def test_gradients_raise() -> None:
    linear = packed()
    rows = torch.randn(2, 24, requires_grad=True)
    with pytest.raises(GradientUnsupported, match=r"\(int8, group 1x32.*linears="):
        linear(rows)
    with torch.no_grad():
        linear(rows)
    linear(rows.detach())  # nothing that needs a gradient
    linear.requires_grad_(True)
    with pytest.raises(GradientUnsupported):
        linear(rows.detach())


def test_a_state_dict_raises_instead_of_leaving_the_weight_out() -> None:
    linear = packed()
    with pytest.raises(InputError, match="must be a parameter to be written to a state_dict"):
        linear.state_dict()
    with pytest.raises(InputError, match="must be a parameter to be loaded from a state_dict"):
        linear.load_state_dict({})


def test_rows_of_another_width_raise() -> None:
    with pytest.raises(InputError, match=r"rows \(\(2, 25\) on cpu\) must be \(\.\.\., 24\)"):
        packed()(torch.randn(2, 25))


# --------------------------------------------------------------------------------------- a model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_with_the_quantized_matrices(family: str, tmp_path: Path) -> None:
    case = tiny_model(family)
    loaded = load(saved(case, tmp_path))
    found = packed_linears(loaded)
    expected = load_stock(tmp_path, attn_implementation="eager")
    for name, linear in found.items():
        weight = expected.get_submodule(name).weight
        weight.copy_(dequantize(quantize(weight, WeightFormat.INT8_G128)))
        assert torch.equal(linear.weight, weight)
    assert any("lm_head" not in name for name in found)
    assert relative_error(case.output(loaded), case.output(expected)) <= 1e-5


def tied(directory: Path) -> TinyCase:
    case = tiny_model("qwen3_moe")
    case.model.config.tie_word_embeddings = True
    case.model.tie_weights()
    case.model.save_pretrained(directory)
    return case


@pytest.mark.ours
@torch.no_grad()
def test_a_model_runs_on_packed_panels_and_gives_its_matrices_back(tmp_path: Path) -> None:
    case = tiny_model("qwen3_moe")
    loaded = load(saved(case, tmp_path))
    expected = load_stock(tmp_path, attn_implementation="eager")
    before = {name: linear.weight.clone() for name, linear in packed_linears(loaded).items()}
    for name, weight in before.items():
        expected.get_submodule(name).weight.copy_(weight)
    output = case.output(loaded)
    assert relative_error(output, case.output(expected)) <= 0.05  # int8 activations, layer by layer
    for name, linear in packed_linears(loaded).items():
        assert (linear.given is None) == (missing() is None), name
        assert torch.equal(linear.weight, before[name])
    for other in (copy.deepcopy(loaded), loaded.to(torch.float32)):
        assert torch.equal(case.output(other), output)


@torch.no_grad()
def test_a_tied_head_gets_a_copy_and_the_embedding_stays(tmp_path: Path) -> None:
    case = tied(tmp_path)
    loaded = load(tmp_path)
    embedding = loaded.get_input_embeddings().weight
    assert isinstance(embedding, nn.Parameter)
    assert torch.equal(embedding, case.model.get_input_embeddings().weight)
    head = loaded.get_output_embeddings()
    assert isinstance(head, PackedLinear)
    quantized = dequantize(quantize(embedding, WeightFormat.INT8_G128))
    assert torch.equal(head.weight, quantized)
    assert "lm_head.weight" not in loaded.all_tied_weights_keys
    assert relative_error(case.output(loaded), case.output(case.model)) < 0.1


def linears_of(model: PreTrainedModel, moe_layers: list[str]) -> set[str]:
    return set(find_linears(model, moe_layers))


def test_linears_are_attention_of_the_text_model_and_the_head() -> None:
    case = tiny_model("deepseek_v3")  # a dense layer, shared experts, latent attention
    found = linears_of(case.model, case.block_modules)
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    expected = {f"model.layers.{n}.self_attn.{name}" for n in range(3) for name in attention}
    assert found == expected | {"lm_head"}


@pytest.mark.parametrize("family", ["zaya", "gemma4", "nemotron_h"])
def test_linears_of_a_router_stay(family: str) -> None:
    model = tiny_model(family).model
    experts = tiny_model(family).experts_modules  # of an experts-only family, all that is ours
    names = linears_of(model, experts)
    assert len(names) > 1
    assert all(re.search("attn|mixer|lm_head", name) for name in names)


def test_linears_of_a_vision_tower_stay() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    model = copy.deepcopy(tiny_model("qwen3_moe").model)
    model.add_module("visual", Tower())
    names = linears_of(model, tiny_model("qwen3_moe").block_modules)
    assert "lm_head" in names and "visual.q_proj" not in names


def test_a_model_without_linear_layers_is_an_error() -> None:
    class Bare(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(UnsupportedModel, match=r"\(Bare\) must have attention projections"):
        find_linears(Bare(), [])  # type: ignore[arg-type]


def test_an_unknown_format_is_told_before_a_file_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weight format \(q8\) must be one of fp32, .*int8;"):
        from_pretrained(tmp_path / "nothing", linears="q8")


def test_linears_are_found_without_weights() -> None:
    case = tiny_model("qwen3_moe")
    empty = empty_model(case.model.config)
    assert linears_of(empty, case.block_modules) == linears_of(case.model, case.block_modules)
