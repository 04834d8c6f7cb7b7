"""Writes GGUF files as llama.cpp's converters do, with the gguf package: names from its map.

What the converters do to values (stacks, permuted heads, split latent projections) is written here
a second time, from the checkpoint's side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

Kind = Callable[[str], GGMLQuantizationType]
"""The ggml type of a stored tensor, by its name."""

F32 = GGMLQuantizationType.F32
_EXPERT = re.compile(r"^(.*experts)\.(\d+)\.(\w+)\.weight$")
ENDS = (".weight", ".bias")


def all_f32(name: str) -> GGMLQuantizationType:
    return F32


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind: Kind = all_f32,
) -> Path:
    """Write tensors by their names in the file; keys get the architecture in front, but for those
    with a colon, whose part behind it is the whole key."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        name = key.partition(":")[2] or f"{architecture}.{key}"
        if name == "general.alignment":
            writer.add_custom_alignment(value)
        else:
            add_value(writer, name, value)
    for name, tensor in tensors.items():
        type = kind(name)
        data = tensor.float().contiguous().numpy()
        if type == F32:
            writer.add_tensor(name, data)
        else:
            packed = gguf.quants.quantize(data, type)
            writer.add_tensor(name, packed, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def converted(architecture: str, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A checkpoint's tensors as llama.cpp's converter names and stacks them."""
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    for name, value in changed(architecture, stacked(state), config).items():
        end = next((end for end in ENDS if name.endswith(end)), "")
        stored = names.get_name(name.removesuffix(end))
        assert stored is not None, name
        found[stored + (end or ".weight")] = value
    return found


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts' tensors under one name without a number."""
    stacks: dict[str, dict[int, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, value in state.items():
        expert = _EXPERT.match(name)
        if expert is None:
            others[name] = value
        else:
            stacks.setdefault(f"{expert[1]}.{expert[3]}.weight", {})[int(expert[2])] = value
    return others | {n: torch.stack([s[e] for e in range(len(s))]) for n, s in stacks.items()}


def changed(architecture: str, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if architecture == "llama" and re.search(r"[qk]_proj", name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            found[name] = halves.swapaxes(1, 2).reshape(value.shape)
        elif name.endswith("shared_expert_gate.weight"):
            found[name] = value.flatten()
        elif name.endswith("e_score_correction_bias"):
            found[name.replace("_bias", ".bias")] = value
        elif name.endswith("kv_b_proj.weight"):
            sizes = [config.qk_nope_head_dim, config.v_head_dim]
            whole = value.reshape(config.num_attention_heads, sum(sizes), -1)
            keys, values = whole.split(sizes, 1)
            found[name.replace("kv_b", "k_b")] = keys.transpose(1, 2)
            found[name.replace("kv_b", "v_b")] = values
        elif name.endswith("gate_up_proj"):
            found[name.replace("gate_up_proj", "gate_proj.weight")] = value[..., ::2].mT
            found[name.replace("gate_up_proj", "up_proj.weight")] = value[..., 1::2].mT
        elif name.endswith("gate_up_proj_bias"):
            found[name.replace("gate_up_proj_bias", "gate_proj.bias")] = value[..., ::2]
            found[name.replace("gate_up_proj_bias", "up_proj.bias")] = value[..., 1::2]
        elif name.endswith("experts.down_proj"):
            found[f"{name}.weight"] = value.mT
        elif name.endswith("experts.down_proj_bias"):
            found[name.replace("_bias", ".bias")] = value
        else:
            found[name] = value
    return found


def random_blocks(type: Any, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes of whole blocks of a `GgmlType`; not all blocks have finite scales."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (rows, type.row_bytes(columns)), dtype=np.uint8)


def vocabulary(path: Path) -> dict[str, Any]:
    """The keys of a tokenizer, such as that of the model in the box."""
    stored = json.loads(path.read_text())
    by_id = {number: token for token, number in stored["model"]["vocab"].items()}
    special = {added["id"]: added["content"] for added in stored["added_tokens"]}
    size = max(*by_id, *special) + 1
    merges = stored["model"]["merges"]
    return {
        ":tokenizer.ggml.model": "gpt2",
        ":tokenizer.ggml.pre": "gpt-2",
        ":tokenizer.ggml.tokens": [special.get(n, by_id.get(n, f"<{n}>")) for n in range(size)],
        ":tokenizer.ggml.token_type": [3 if n in special else 1 for n in range(size)],
        ":tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        ":tokenizer.ggml.eos_token_id": min(special),
        ":tokenizer.ggml.bos_token_id": min(special),
    }
