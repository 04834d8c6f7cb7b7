"""Faults of quantized checkpoints: what names, headers or counts show is refused with the name.

A damaged checkpoint either raises a `CheckpointError` that names the tensor, or loads what the
sound one loads. What can be seen by no reader is listed (`UNSEEN`, and in docs/formats.md).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import converted, write_gguf
from packed_files import formats, write_packed
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import mixtura
from mixtura.config import GateUp
from mixtura.errors import CheckpointError
from mixtura.hf.gguf_checkpoint import GgufCheckpoint
from mixtura.hf.ledger import CheckpointWarning, Use
from mixtura.hf.load import check_moe
from mixtura.hf.packed_load import PackedLoad
from mixtura.hf.stored import SafetensorsCheckpoint, StoredCheckpoint, quantization_config
from mixtura.quant.matrix import dequantize

STEM = "model.layers.0.mlp.experts.1.up_proj"
"""The matrix that is damaged."""

Tensors = dict[str, Tensor]

CONFIG = Qwen3MoeConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=3,
    num_experts_per_tok=2,
    dtype="float32",
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unquantized checkpoint."""
    directory = tmp_path_factory.mktemp("dense") / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=formats())
def sound(request: pytest.FixtureRequest, dense: Path) -> Path:
    """A checkpoint in one of the formats."""
    directory = dense.parent / request.param
    if not directory.exists():
        write_packed(dense, directory, request.param, is_expert)
    return directory


def is_expert(name: str) -> bool:
    return ".experts." in name


@cache
def empty() -> PreTrainedModel:
    return check_moe(CONFIG)


def checkpoint_of(path: Path) -> StoredCheckpoint:
    if path.suffix == ".gguf":
        return GgufCheckpoint(path)
    settings = quantization_config(path)
    assert settings is not None
    return SafetensorsCheckpoint(path, settings)


def loaded(path: Path) -> Tensors:
    """The experts' weights as a load makes them; no model is built, so that it is quick."""
    load = PackedLoad(empty(), checkpoint_of(path))
    found = {}
    for name, module in load.experts.items():
        config, matrices = load.reader.matrices(module, torch.float32)
        weights = {role: dequantize(matrix) for role, matrix in matrices.items()}
        if config.gate_up is GateUp.SEPARATE:
            parts = [weights["gate_up_proj"], weights.pop("up_proj")]
            weights["gate_up_proj"] = torch.cat(parts, 1)
        found |= {f"{name}.{role}": weight for role, weight in weights.items()}
    return found


@cache
def loaded_sound(directory: Path) -> Tensors:
    return loaded(directory)


def damaged(sound: Path, out: Path, tensors: Tensors, **settings: Any) -> Path:
    """A copy with other tensors, and with other settings in its quantization_config."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    config = json.loads((sound / "config.json").read_text())
    config["quantization_config"] |= settings
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def verdict(path: Path, sound: Path, *names: str) -> str:
    """What a fault comes to: "named", "harmless", "through", or an error that has no name."""
    try:
        found = loaded(path)
    except CheckpointError as error:
        return "named" if any(name in str(error) for name in names) else f"unnamed: {error}"
    expected = loaded_sound(sound)
    is_same = found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )
    return "harmless" if is_same else "through"


Damage = Callable[[Tensors], None]


def part_faults(name: str, value: Tensor) -> Iterator[tuple[str, Damage]]:
    """Every way to damage one stored tensor."""

    def put(changed: Tensor) -> Damage:
        return lambda tensors: tensors.update({name: changed.contiguous()})

    def move(other: str) -> Damage:
        return lambda tensors: tensors.update({other: tensors.pop(name)})

    def drop(tensors: Tensors) -> None:
        del tensors[name]

    yield "renamed", move(f"{name}x")
    yield "renumbered", move(name.replace("experts.1.", "experts.7."))
    yield "dropped", drop
    yield "duplicated", lambda tensors: tensors.update({name.removeprefix("model."): value.clone()})
    if value.dim() == 2 and value.shape[0] != value.shape[1]:
        yield "transposed", put(value.mT)
    if value.dim():
        yield "truncated", put(value[:-1])
    yield "zeroed", put(torch.zeros(value.shape).to(value.dtype))
    for fault, changed in bad_numbers(name, value):
        yield fault, put(changed)


def bad_numbers(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The last number of a tensor of floats as one that is none."""
    bad = [("nan", float("nan"))] if value.is_floating_point() else []
    if value.is_floating_point() and value.itemsize > 1:
        bad.append(("inf", float("inf")))
    if name.endswith("scale") and value.dtype is torch.uint8:
        bad.append(("nan", 255.0))
    for fault, number in bad:
        changed = value.float().flatten()
        changed[-1] = number
        yield fault, changed.reshape(value.shape).to(value.dtype)


HARMLESS = {
    # Zero points of symmetric codes mean nothing.
    ("gptq", ".qzeros", "zeroed"),
    # Activations are never rounded to a stored scale; an expert that saw no data lacks it.
    ("", ".input_scale", "dropped"),
    ("", ".input_global_scale", "dropped"),
}
"""Beginning of a format, part and fault that change no weight."""


def test_a_fault_of_one_tensor_is_named(sound: Path, tmp_path: Path) -> None:
    stored = load_file(sound / "model.safetensors")
    of_matrix = [name for name in stored if name.startswith((f"{STEM}.", f"{STEM}_"))]
    wrong = []
    for name in of_matrix:
        part = name.removeprefix(STEM)
        for fault, damage in part_faults(name, stored[name]):
            tensors = dict(stored)
            damage(tensors)
            path = damaged(sound, tmp_path / "damaged", tensors)
            found = verdict(path, sound, STEM.removeprefix("model."), "experts.7.up_proj")
            may_be = any(
                sound.name.startswith(format) and [part, fault] == rest
                for format, *rest in HARMLESS
            )
            if found != "named" and not (found == "harmless" and may_be):
                wrong.append((part, fault, found))
    assert wrong == []


ONE_OF_A_FAMILY = [
    "gptq_v1_w4_g32_asym",
    "awq_gemm_w4_g32_sym",
    "ct_nvfp4",
    "fp8_block128_exact",
    "modelopt_fp8",
    "quark_int4_sym_order_g32",
    "bnb_int8",
]
"""Formats for faults of names alone, which are not the format's to see."""


@pytest.mark.parametrize("sound", ONE_OF_A_FAMILY, indirect=True)
def test_a_whole_matrix_that_is_missing_too_many_or_elsewhere(sound: Path, tmp_path: Path) -> None:
    stored = load_file(sound / "model.safetensors")
    own = {n: t for n, t in stored.items() if n.startswith(f"{STEM}.") or n.startswith(f"{STEM}_")}
    others = {n: t for n, t in stored.items() if n not in own}

    def moved(old: str, new: str, which: Tensors) -> Tensors:
        return {n.replace(old, new): t.clone() for n, t in which.items()}

    last = {n: t for n, t in stored.items() if ".experts.2." in n}
    without_last = {n: t for n, t in stored.items() if n not in last}
    faults = {
        "missing": (others, STEM),
        "renamed": (others | moved("up_proj", "upp_proj", own), "up"),
        "renumbered": (others | moved("experts.1.", "experts.7.", own), STEM),
        "expert renumbered": (without_last | moved("experts.2.", "experts.5.", last), "experts.2."),
        "expert missing": (without_last, "experts."),
        "expert too many": (stored | moved("experts.2.", "experts.3.", last), "experts.3."),
        "twice": (stored | moved("model.layers", "layers", own), STEM.removeprefix("model.")),
        "of a layer too many": (stored | moved("layers.0.", "layers.1.", own), "layers.1."),
    }
    found = {
        fault: verdict(damaged(sound, tmp_path / "damaged", tensors), sound, name)
        for fault, (tensors, name) in faults.items()
    }
    assert found == dict.fromkeys(faults, "named")


@pytest.mark.parametrize("sound", ONE_OF_A_FAMILY, indirect=True)
def test_a_second_file_with_the_same_tensor(sound: Path, tmp_path: Path) -> None:
    stored = load_file(sound / "model.safetensors")
    name = next(name for name in stored if name.startswith(STEM))
    path = damaged(sound, tmp_path / "damaged", stored)
    save_file({name: stored[name]}, path / "other.safetensors")
    weight_map = dict.fromkeys(stored, "model.safetensors") | {name: "other.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{name} must be stored once"):
        checkpoint_of(path)


@pytest.mark.parametrize("sound", ONE_OF_A_FAMILY, indirect=True)
def test_gates_and_ups_of_other_sizes_whose_sum_fits(
    sound: Path, dense: Path, tmp_path: Path
) -> None:
    tensors = load_file(dense / "model.safetensors")
    for name in [name for name in tensors if "gate_proj" in name and is_expert(name)]:
        up = name.replace("gate_proj", "up_proj")
        both = torch.cat([tensors[name], tensors[up]])
        tensors[name], tensors[up] = (part.clone() for part in both.split([48, 16]))
    other = tmp_path / "dense"
    shutil.copytree(dense, other)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    write_packed(other, tmp_path / "packed", sound.name, is_expert)
    assert verdict(tmp_path / "packed", sound, "_proj") == "named"


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "gptq": [{"bits": 8}, {"bits": 2}, {"group_size": 16}, {"sym": True}, {"desc_act": True}],
    "awq": [{"group_size": 16}, {"group_size": -1}, {"zero_point": True}],
    "ct": [{"num_bits": 8}, {"num_bits": 4}, {"group_size": 16}, {"symmetric": False}],
    "quark": [{"group_size": 16}, {"symmetric": False}],
    "fp8": [{"weight_block_size": [16, 16]}],
    "mxfp8": [{"weight_block_size": [16, 16]}],
}
"""Settings that contradict the files, by the beginning of a format's name."""


def changed_settings(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration with settings of weights replaced where they are, at any depth."""
    found = {}
    for key, value in config.items():
        is_nested = isinstance(value, dict) and "activations" not in key and "tensors" not in key
        found[key] = changed_settings(value, settings) if is_nested else settings.get(key, value)
    return found


def test_a_configuration_that_contradicts_the_headers(sound: Path, tmp_path: Path) -> None:
    stored = load_file(sound / "model.safetensors")
    config = json.loads((sound / "config.json").read_text())["quantization_config"]
    found = {}
    for settings in SETTINGS.get(sound.name.partition("_")[0], []):
        changed = changed_settings(config, settings)
        if changed != config:
            path = damaged(sound, tmp_path / "damaged", stored, **changed)
            found[str(settings)] = verdict(path, sound, "_proj")
    assert set(found.values()) <= {"named", "harmless"}, found


OTHER_SIZES = [
    ("num_experts", 2),
    ("num_experts", 4),
    ("hidden_size", 128),
    ("moe_intermediate_size", 64),
    ("num_hidden_layers", 2),
]
"""Sizes in config.json that the files do not have."""


@pytest.mark.parametrize(("size", "value"), OTHER_SIZES)
@pytest.mark.parametrize("sound", ONE_OF_A_FAMILY, indirect=True)
def test_sizes_that_contradict_the_headers(sound: Path, size: str, value: int) -> None:
    other = copy.deepcopy(CONFIG)
    setattr(other, size, value)
    with pytest.raises(CheckpointError, match=r"(model\.layers\.|lm_head\.)\S+"):
        PackedLoad(check_moe(other), checkpoint_of(sound))


@pytest.mark.parametrize("sound", ONE_OF_A_FAMILY, indirect=True)
def test_a_dense_expert_among_packed_ones_is_told_and_right(sound: Path, tmp_path: Path) -> None:
    tensors = load_file(sound / "model.safetensors")
    for name in [name for name in tensors if name.startswith((f"{STEM}.", f"{STEM}_"))]:
        del tensors[name]
    torch.manual_seed(1)
    tensors[f"{STEM}.weight"] = torch.randn(32, 64).bfloat16()
    path = damaged(sound, tmp_path / "mixed", tensors)
    with pytest.warns(CheckpointWarning, match=r"experts 1 of \S*0.mlp.experts \(up_proj\)"):
        found = loaded(path)["model.layers.0.mlp.experts.gate_up_proj"]
    expected = loaded_sound(sound)["model.layers.0.mlp.experts.gate_up_proj"].clone()
    expected[1, 32:] = tensors[f"{STEM}.weight"].float()
    assert torch.equal(found, expected)
    tensors[f"{STEM}.weight"].zero_()
    assert verdict(damaged(sound, tmp_path / "mixed", tensors), sound, STEM) == "named"


# ------------------------------------------------------------------------------------------ GGUF


GGUF_KEYS: dict[str, Any] = {
    "embedding_length": 64,
    "block_count": 1,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "context_length": 64,
    "expert_count": 3,
    "expert_used_count": 2,
    "feed_forward_length": 64,
    "expert_feed_forward_length": 32,
}
UP = "blk.0.ffn_up_exps.weight"


def gguf_of(dense: Path, out: Path, type: Kind, change: Damage = lambda tensors: None) -> Path:
    tensors = converted("qwen3moe", load_file(dense / "model.safetensors"), CONFIG)
    change(tensors)
    return write_gguf(
        out, "qwen3moe", GGUF_KEYS, tensors, lambda n: type if "_exps" in n else Kind.F32
    )


def set_up(change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: tensors.update({UP: change(tensors[UP])})


def with_bad_expert(value: float) -> Damage:
    def change(stack: Tensor) -> Tensor:
        changed = stack.clone()
        changed[1] = value
        return changed

    return set_up(change)


GGUF_FAULTS: dict[str, Damage] = {
    "renamed": lambda tensors: tensors.update({UP.replace("up", "upp"): tensors.pop(UP)}),
    "of another layer": lambda tensors: tensors.update({UP.replace("0", "1"): tensors.pop(UP)}),
    "a layer too many": lambda tensors: tensors.update({UP.replace("0", "1"): tensors[UP]}),
    "dropped": lambda tensors: tensors.pop(UP) is None or None,
    "transposed": set_up(lambda stack: stack.mT),
    "truncated": set_up(lambda stack: stack[:, :-1]),
    "an expert too many": set_up(lambda stack: torch.cat([stack, stack[:1]])),
    "an expert missing": set_up(lambda stack: stack[:-1]),
    "zeroed": set_up(torch.zeros_like),
    "an expert zeroed": with_bad_expert(0.0),
    "not finite": with_bad_expert(float("nan")),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", GGUF_FAULTS)
@pytest.mark.parametrize("type", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1], ids=lambda kind: kind.name)
def test_a_fault_of_a_gguf_file_is_named(
    type: Kind, fault: str, dense: Path, tmp_path: Path
) -> None:
    sound = dense.parent / f"{type.name}.gguf"
    if not sound.exists():
        gguf_of(dense, sound, type)
    path = gguf_of(dense, tmp_path / "x.gguf", type, GGUF_FAULTS[fault])
    assert verdict(path, sound, "ffn_up", ".up_proj") == "named"


# --------------------------------------------------------------------------- the load as a whole


def test_a_fault_ends_from_pretrained(dense: Path, tmp_path: Path) -> None:
    write_packed(dense, tmp_path / "sound", "ct_nvfp4", is_expert)
    stored = load_file(tmp_path / "sound" / "model.safetensors")
    for part, value in (("weight_scale", float("nan")), ("weight_global_scale", 0.0)):
        bad = stored[f"{STEM}.{part}"].float() * value
        tensors = stored | {f"{STEM}.{part}": bad.to(stored[f"{STEM}.{part}"].dtype)}
        with pytest.raises(CheckpointError, match=f"{STEM}.weight: {part}"):
            mixtura.from_pretrained(damaged(tmp_path / "sound", tmp_path / "x", tensors))


def with_others(dense: Path, out: Path, **others: Tensor) -> Path:
    """A sound checkpoint with attention packed too, and more tensors."""
    out.mkdir(exist_ok=True)
    write_packed(dense, out / "sound", "ct_mxfp4", lambda n: is_expert(n) or "_proj" in n)
    stored = load_file(out / "sound" / "model.safetensors")
    return damaged(out / "sound", out / "more", stored | others)


def test_tensors_without_a_place(dense: Path, tmp_path: Path) -> None:
    attention = "model.layers.0.self_attn"
    path = with_others(dense, tmp_path, **{f"{attention}.k_proj.k_scale": torch.ones(1)})
    ledger = PackedLoad(empty(), checkpoint_of(path)).ledger
    (entry,) = ledger.of(Use.EXCLUDED)
    assert (entry.rule, ledger.of(Use.UNPLACED)) == ("scale of a quantized key-value cache", [])
    path = with_others(dense, tmp_path / "b", **{f"{attention}.extra": torch.ones(1)})
    with pytest.warns(CheckpointWarning, match=f"{attention}.extra of the checkpoint have no plac"):
        mixtura.from_pretrained(path)
    stored = load_file(path / "model.safetensors")
    moved = {n.replace("q_proj", "z_proj"): t.clone() for n, t in stored.items() if "q_proj" in n}
    path = damaged(path, tmp_path / "c", stored | moved)
    with pytest.raises(CheckpointError, match=f"{attention}.z_proj.* must have a place"):
        mixtura.from_pretrained(path)


def test_what_no_reader_can_see(dense: Path, tmp_path: Path) -> None:
    """Two tensors of one shape that are swapped: the list is in docs/formats.md."""
    write_packed(dense, tmp_path / "sound", "ct_mxfp4", is_expert)
    stored = load_file(tmp_path / "sound" / "model.safetensors")
    swapped = {
        name.replace(*pair): value.clone()
        for pair in (("up_proj", "gate_proj"), ("gate_proj", "up_proj"))
        for name, value in stored.items()
        if f"experts.1.{pair[0]}" in name
    }
    path = damaged(tmp_path / "sound", tmp_path / "x", stored | swapped)
    assert verdict(path, tmp_path / "sound", STEM) == "through"
