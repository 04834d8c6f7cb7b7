"""PEFT adapters for tests: trained on tiny models, or by hand, and what PEFT makes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import TinyCase, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Trained:
    """An adapter of a tiny model, and what PEFT makes of it.

    Attributes:
        case: the model without it. directory: the adapter. output: logits with it, by PEFT.
    """

    case: TinyCase
    directory: Path
    output: Tensor


def train(family: str, directory: Path, *, seed: int = 1, rank: int = 2, **config: Any) -> Trained:
    """Write an adapter whose factors are all random, as PEFT does after a training."""
    case = tiny_model(family)
    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=3, init_lora_weights=False, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(case.model, settings).eval()
        model.save_pretrained(directory)
    with torch.no_grad():
        output = case.output(model)
    return Trained(tiny_model(family), directory, output)


def by_peft(case: TinyCase, directory: Path) -> Tensor:
    """The logits that PEFT gives with an adapter from its files."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return case.output(PeftModel.from_pretrained(case.model, directory).eval())


def write(directory: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter by hand."""
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "peft_version": "0.21.2"}
    (directory / CONFIG).write_text(json.dumps({**settings, **config}))
    return directory


def changed(
    source: Path,
    directory: Path,
    change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    **config: Any,
) -> Path:
    """A copy of an adapter with other tensors and settings; a setting of None goes."""
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    settings = json.loads((source / CONFIG).read_text()) | config
    kept = {name: value for name, value in settings.items() if value is not None}
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(kept))
    return directory


def expert_factors(
    layers: list[str], names: list[str], sizes: Mapping[str, tuple[int, int]], rank: int = 2
) -> dict[str, Tensor]:
    """Random factors under the names of single experts' maps.

    Args:
        layers: paths of the lists of experts. names: paths of the maps from there.
        sizes: (in, out) by the last part of a name.
    """
    found = {}
    for layer in layers:
        for name in names:
            num_in, num_out = sizes[name.rpartition(".")[2]]
            found[f"{PREFIX}{layer}.{name}.lora_A.weight"] = torch.randn(rank, num_in) / 4
            found[f"{PREFIX}{layer}.{name}.lora_B.weight"] = torch.randn(num_out, rank) / 4
    return found
