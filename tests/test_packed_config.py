"""Transformers' own `from_pretrained` with `packed_config` gives what mixtura's gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from packed_files import write_packed
from safetensors.torch import load_file, save_file
from test_packed_load import is_expert, is_linear, logits_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mixtura
from mixtura.errors import CheckpointError, InputError
from mixtura.experts import PackedExperts
from mixtura.hf import moe_layers
from mixtura.hf.ledger import CheckpointWarning
from mixtura.hf.linears import PackedLinear

pytestmark = pytest.mark.filterwarnings("ignore::mixtura.hf.ledger.CheckpointWarning")

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
NAMES = ("gptq_v1_w4_g32_sym", "ct_nvfp4", "fp8_block128_exact")
"""Parts under names of their own; and under the name of the dense weight."""


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's checkpoint."""
    directory = tmp_path_factory.mktemp("dense") / request.param
    tiny_model(request.param, dtype=torch.bfloat16).model.save_pretrained(directory)
    return directory


def is_matrix(name: str) -> bool:
    """Whatever could be packed: of these, embedding and router have no packed form in memory."""
    return is_linear(name) or name in ("lm_head.weight", "model.embed_tokens.weight")


def with_transformers(directory: Path, **arguments: Any) -> Any:
    config = mixtura.packed_config(directory)
    return AutoModelForCausalLM.from_pretrained(directory, config=config, **arguments)


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            assert module.given is not None
            matrices = {
                role: getattr(module.given, role)
                for role in ("gate_up_proj", "up_proj", "down_proj")
            }
        elif isinstance(module, PackedLinear):
            matrices = {"weight": module.matrix}
        else:
            continue
        for role, matrix in matrices.items():
            if matrix is not None:
                found |= {f"{name}.{role}.{part}": t for part, t in matrix.tensors.items()}
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def check_same(found: Any, expected: Any) -> None:
    """The same modules, packed tensors, parameters, buffers and logits, bit for bit."""
    assert [(x.name, x.kind) for x in moe_layers(found)] == [
        (x.name, x.kind) for x in moe_layers(expected)
    ]
    values: list[Callable[[Any], dict[str, Tensor]]] = [
        packed_tensors,
        lambda model: dict(model.named_parameters()),
        lambda model: dict(model.named_buffers()),
    ]
    for of in values:
        first, second = of(found), of(expected)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert tensor.dtype == second[name].dtype, name
            assert torch.equal(bits(tensor.detach()), bits(second[name].detach())), name
    assert packed_tensors(found)
    assert torch.equal(logits_of(found), logits_of(expected))


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_mixtura_loads(name: str, dense: Path, tmp_path: Path) -> None:
    write_packed(dense, tmp_path / "packed", name, is_matrix)
    expected = mixtura.from_pretrained(tmp_path / "packed")
    found, information = with_transformers(tmp_path / "packed", output_loading_info=True)
    assert not any(information.values())  # nothing is missing, unexpected or mismatched
    check_same(found, expected)
    assert not found.training
    assert not hasattr(found, "hf_quantizer")
    assert getattr(found.config, "quantization_config", None) is None
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()


def test_experts_that_are_stored_in_several_ways(dense: Path, tmp_path: Path) -> None:
    write_packed(dense, tmp_path / "packed", "ct_mxfp4", lambda n: is_expert(n) and ".1." not in n)
    with pytest.warns(CheckpointWarning, match="experts 1 of"):
        expected = mixtura.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    with pytest.warns(CheckpointWarning, match="experts 1 of"):
        found = with_transformers(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(logits_of(found), logits_of(expected))


def test_tied_embeddings_that_are_packed(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe").model
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "dense")
    write_packed(tmp_path / "dense", tmp_path / "packed", "ct_mxfp4", is_matrix)
    expected = mixtura.from_pretrained(tmp_path / "packed")
    found = with_transformers(tmp_path / "packed")
    check_same(found, expected)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_what_cannot_be_is_told(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be quantized, in safetensors files"):
        mixtura.packed_config(dense)
    with pytest.raises(InputError, match="must be quantized, in safetensors files"):
        mixtura.packed_config("some.gguf")
    write_packed(dense, tmp_path / "packed", "ct_mxfp4", is_expert)
    config = mixtura.packed_config(tmp_path / "packed")
    with pytest.raises(CheckpointError, match="must be quantized to be kept packed"):
        AutoModelForCausalLM.from_pretrained(dense, config=config)
    with pytest.raises(InputError, match="device_map must keep weights in memory"):
        with_transformers(tmp_path / "packed", device_map={"": "disk"})
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    last = next(name for name in tensors if is_expert(name) and name.endswith("weight_scale"))
    tensors[last] = torch.full_like(tensors[last], 255)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weight_scale"):
        with_transformers(tmp_path / "packed")
