"""Checkpoints written by other packages: packed, they give those packages' own dense logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mixtura
from mixtura.experts import PackedExperts
from mixtura.hf.mapped import MappedFiles
from mixtura.quant.codecs.registry import _FAMILIES as FAMILIES

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))

from dense_models import IDS, read_index, sample, write_checkpoint  # noqa: E402

INDEX = read_index()
ONE_OF_EACH_FORMAT = list(
    {
        name.removesuffix(f"-{entry['model']}"): name for name, entry in reversed(INDEX.items())
    }.values()
)
"""Of DeepSeek-V3 where there is one, with linear layers packed, then of Mixtral."""

EXACT = 1e-5
"""What packed weights, with exact products, may differ from dense ones: the order of sums."""

DEFAULT_KERNEL = 3e-2
"""What the kernels of the CPU may add: activations in bf16 or int8."""


def checkpoint(name: str, directory: Path) -> Path:
    """The checkpoint that a fixture is of."""
    entry = INDEX[name]
    if "file" in entry:
        return FIXTURES / entry["file"]
    stored = load_file(FIXTURES / f"{name}.safetensors")
    write_checkpoint(directory / name, entry["model"], stored, entry["quantization_config"])
    return directory / name


def relative_error(model: Any, name: str) -> float:
    expected = torch.tensor(INDEX[name]["logits"])
    with torch.no_grad():
        found: Tensor = sample(model(IDS).logits)
    return float((found - expected).norm() / expected.norm())


def assert_experts_are_packed(model: Any) -> None:
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert experts
    for module in experts:
        assert module.given is not None
        assert module.given.gate_up_proj.is_quantized and module.given.down_proj.is_quantized


@pytest.fixture(autouse=True)
def _no_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files this small need not be given back page by page, which takes half of the time."""
    monkeypatch.setattr(MappedFiles, "release", lambda self: None)


@pytest.mark.parametrize("name", INDEX)
def test_packed_checkpoint_gives_its_producers_logits(name: str, tmp_path: Path) -> None:
    # With a device map linear layers are dense, and their products exact; with bf16 activations
    # stored scales of activations are left alone, as in the producers' dense logits.
    model = mixtura.from_pretrained(
        checkpoint(name, tmp_path),
        kernel="torch",
        device_map="cpu",
        dtype="float32",
        activation_dtype="bf16",
    )
    assert_experts_are_packed(model)
    assert relative_error(model, name) < EXACT


@pytest.mark.parametrize("name", ONE_OF_EACH_FORMAT)
def test_default_kernel_gives_nearly_these(name: str, tmp_path: Path) -> None:
    model = mixtura.from_pretrained(checkpoint(name, tmp_path), dtype="float32")
    assert_experts_are_packed(model)
    assert relative_error(model, name) < DEFAULT_KERNEL


def test_every_family_has_a_fixture_of_every_model() -> None:
    models: dict[str, set[str]] = {}
    for entry in INDEX.values():
        method = entry.get("quantization_config", {}).get("quant_method", "gguf")
        models.setdefault(method, set()).add(entry["model"])
    assert models.keys() == {names[0] for names in FAMILIES.values()}
    # gpt-oss files are of one model.
    assert models.pop("mxfp4") == {"gpt_oss"}
    assert all(found >= {"qwen3_moe", "mixtral", "deepseek_v3"} for found in models.values())


def test_fixtures_are_small() -> None:
    assert sum(file.stat().st_size for file in FIXTURES.iterdir() if file.is_file()) < 5_000_000
