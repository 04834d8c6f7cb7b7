"""Faults of experts that are stored as one packed stack, as gpt-oss has them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.hf.load import check_moe, load_config
from mixtura.hf.packed_load import PackedLoad
from mixtura.hf.stored import SafetensorsCheckpoint, quantization_config

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))

from dense_models import read_index, write_checkpoint  # noqa: E402

NAME = "mxfp4-gpt_oss"
STEM = "model.layers.1.mlp.experts.down_proj"
Tensors = dict[str, Tensor]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """The fixture's whole checkpoint."""
    entry = read_index()[NAME]
    stored = load_file(FIXTURES / f"{NAME}.safetensors")
    write_checkpoint(tmp_path / "sound", entry["model"], stored, entry["quantization_config"])
    return tmp_path / "sound"


def read(directory: Path) -> None:
    """All that a load reads of the experts."""
    config = load_config(directory)
    settings = quantization_config(directory)
    assert settings is not None
    del config.quantization_config
    load = PackedLoad(check_moe(config), SafetensorsCheckpoint(directory, settings))
    for module in load.experts.values():
        load.reader.matrices(module, torch.float32)


def with_expert(stack: Tensor, value: int) -> Tensor:
    changed = stack.clone()
    changed[1] = value
    return changed


def faults(part: str, value: Tensor) -> Iterator[tuple[str, Tensors]]:
    """Every way to damage a part of a stack: what is there instead of it."""
    name = f"{STEM}_{part}"
    yield "renamed", {f"{STEM}s_{part}": value}
    yield "of another layer", {name.replace("layers.1.", "layers.2."): value}
    yield "dropped", {}
    yield "duplicated", {name: value, name.removeprefix("model."): value.clone()}
    yield "transposed", {name: value.transpose(1, 2).contiguous()}
    yield "an expert missing", {name: value[:-1].clone()}
    yield "an expert too many", {name: torch.cat([value, value[:1]])}
    yield "rows missing", {name: value[:, :-1].clone()}
    yield "columns missing", {name: value[:, :, :-1].clone()}
    yield "zeroed", {name: torch.zeros_like(value)}
    yield "an expert zeroed", {name: with_expert(value, 0)}
    if part == "scales":
        yield "a scale that is no number", {name: with_expert(value, 255)}


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_a_fault_of_a_stack_is_named(sound: Path, part: str) -> None:
    read(sound)
    stored = load_file(sound / "model.safetensors")
    name = f"{STEM}_{part}"
    wrong = {}
    for fault, instead in faults(part, stored[name]):
        others = {key: value for key, value in stored.items() if key != name}
        save_file(others | instead, sound / "model.safetensors", metadata={"format": "pt"})
        try:
            read(sound)
        except CheckpointError as error:
            if "experts.down_proj" not in str(error):
                wrong[fault] = str(error)
        else:
            wrong[fault] = "through"
    assert wrong == {}


@pytest.mark.parametrize(
    ("size", "value"),
    [("num_local_experts", 2), ("hidden_size", 96), ("intermediate_size", 64)],
)
def test_sizes_that_contradict_the_stacks(sound: Path, size: str, value: int) -> None:
    config = json.loads((sound / "config.json").read_text())
    (sound / "config.json").write_text(json.dumps({**config, size: value}))
    with pytest.raises(CheckpointError, match=r"(model\.layers\.0|lm_head)\S+"):
        read(sound)


def test_stacks_in_each_others_place(sound: Path) -> None:
    stored = load_file(sound / "model.safetensors")
    names = {"gate_up_proj_": "down_proj_", "down_proj_": "gate_up_proj_"}
    swapped = {
        key.replace(old, new): value.clone()
        for key, value in stored.items()
        for old, new in names.items()
        if f"experts.{old}" in key and "bias" not in key
    }
    save_file(stored | swapped, sound / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.\w+_proj"):
        read(sound)
