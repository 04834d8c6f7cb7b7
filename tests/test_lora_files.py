"""Adapter files: names, orientation and scaling are proven, and what has no place is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from lora_files import (
    CONFIG,
    FUSED,
    PREFIX,
    WEIGHTS,
    Trained,
    by_peft,
    changed,
    expert_factors,
    train,
    write,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import mixtura
from mixtura.errors import CheckpointError
from mixtura.hf.lora.config import CHANGES_THE_RESULT, AdapterConfig
from mixtura.hf.lora.places import AdapterPlaces
from mixtura.hf.lora.read import Adapter, read_adapter

ROUTER = "mlp.gate.weight"


@pytest.fixture(scope="module")
def places() -> AdapterPlaces:
    return AdapterPlaces(tiny_model("qwen3_moe").model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("adapter")
    return train(
        "qwen3_moe", directory, target_modules=["q_proj"], target_parameters=[*FUSED, ROUTER]
    )


@pytest.fixture(scope="module")
def by_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return write(tmp_path_factory.mktemp("experts"), v4_factors())


def v4_factors() -> dict[str, Tensor]:
    """Factors of every expert of the second and third layer, as models of Transformers 4 had."""
    names = [f"{e}.{m}" for e in range(8) for m in ("gate_proj", "up_proj", "down_proj")]
    sizes = {"gate_proj": (64, 24), "up_proj": (64, 24), "down_proj": (24, 64)}
    return expert_factors([f"model.layers.{n}.mlp.experts" for n in (1, 2)], names, sizes)


def products(adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter adds to every weight, by path and part."""
    found = {path: one.b @ one.a for path, one in adapter.linears.items()}
    for path, weights in adapter.experts.items():
        found |= {f"{path}.{name}": one.b @ one.a for name, one in weights.parts().items()}
    return found


def assert_same(found: Adapter, expected: Adapter) -> None:
    ours, theirs = products(found), products(expected)
    assert ours.keys() == theirs.keys()
    for name, product in ours.items():
        torch.testing.assert_close(product, theirs[name])


def read(source: Path, places: AdapterPlaces) -> Adapter:
    return read_adapter(source, places)


def test_gate_and_up_share_a_where_they_were_trained_as_one(trained, by_expert, places):
    (fused, *_) = read(trained.directory, places).experts.values()
    assert fused.gate is not None and fused.up is not None and fused.gate.a is fused.up.a
    (apart, *_) = read(by_expert, places).experts.values()
    assert apart.gate is not None and apart.up is not None
    assert not torch.equal(apart.gate.a, apart.up.a)


def test_names_of_single_experts_are_those_of_their_matrices(by_expert, places):
    stored = load_file(by_expert / WEIGHTS)
    found = products(read(by_expert, places))
    for layer in (1, 2):
        for part in ("gate", "up", "down"):
            path = f"model.layers.{layer}.mlp.experts"
            for expert, product in enumerate(found[f"{path}.{part}"]):
                name = f"{PREFIX}{path}.{expert}.{part}_proj.lora_"
                expected = 1.5 * stored[f"{name}B.weight"] @ stored[f"{name}A.weight"]
                torch.testing.assert_close(product, expected)


def test_the_model_with_single_experts_is_that_of_peft(by_expert, tmp_path):
    modules = ["gate_proj", "up_proj", "down_proj"]
    source = changed(by_expert, tmp_path, target_modules=modules)
    expected = by_peft(tiny_model("qwen3_moe"), source)
    case = tiny_model("qwen3_moe")
    model = mixtura.convert(case.model)
    with torch.no_grad():
        alone = case.output(model)
        mixtura.load_adapter(model, source, "v4")
        found = case.output(model)
    assert (found - alone).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_names_of_mixtral_are_followed_through_its_conversion(tmp_path):
    layer = "model.layers.0.block_sparse_moe.experts"
    case = tiny_model("mixtral")
    width = case.model.config.intermediate_size
    names = [f"{e}.{m}" for e in range(8) for m in ("w1", "w2", "w3")]
    tensors = expert_factors(
        [layer], names, {"w1": (64, width), "w3": (64, width), "w2": (width, 64)}
    )
    source = write(tmp_path, tensors, target_modules=["w1", "w2", "w3"])
    found = products(read_adapter(source, AdapterPlaces(case.model)))
    for part, name in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        key = f"{PREFIX}{layer}.5.{name}.lora_"
        expected = 1.5 * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
        torch.testing.assert_close(found[f"model.layers.0.mlp.experts.{part}"][5], expected)


def test_experts_without_factors_get_zeros(by_expert, places, tmp_path):
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "experts.3." in name]:
            del tensors[name]

    whole, part = read(by_expert, places), read(changed(by_expert, tmp_path, drop), places)
    for name, product in products(part).items():
        expected = products(whole)[name].clone()
        expected[3] = 0
        torch.testing.assert_close(product, expected)


def test_ranks_and_scalings_are_resolved_as_peft_does(tmp_path):
    made = train(
        "qwen3_moe",
        tmp_path,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        target_parameters=FUSED,
        rank_pattern={r".*layers\.1\..*gate_up_proj": 5, "q_proj": 3},
        alpha_pattern={"layers.2.mlp.experts.down_proj": 7, "self_attn.v_proj": 11},
    )
    model = mixtura.convert(made.case.model)
    mixtura.load_adapter(model, tmp_path, "patterns")
    with torch.no_grad():
        found = made.case.output(model)
    torch.testing.assert_close(found, made.output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "path", "is_named"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "model.layers.0.self_attn.fq_proj", False),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        (r"layers\.[01]\..*", "model.layers.1.mlp.gate", True),
        ("^model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
    ],
)
def test_patterns_are_whole_names_or_ends_behind_a_dot(pattern, path, is_named, tmp_path):
    write(tmp_path, {}, rank_pattern={pattern: 9})
    assert AdapterConfig.read(tmp_path).rank_of(path) == (9 if is_named else 2)


def swapped(tensors: dict[str, Tensor]) -> None:
    """The same adapter as PEFT before 0.19 stored it, which took every stack for (E, in, out)."""
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        a, b = a.view(8, -1, a.shape[1]), b.view(b.shape[0], -1, 8)
        tensors[name] = b.permute(2, 1, 0).flatten(0, 1).contiguous()
        tensors[other] = a.permute(2, 1, 0).flatten(1).contiguous()


def test_factors_that_were_trained_the_other_way_around(trained, places, tmp_path):
    source = changed(trained.directory, tmp_path, swapped, peft_version="0.18.1")
    assert_same(read(source, places), read(trained.directory, places))


def test_target_parameters_need_not_be_there_where_shapes_tell(trained, places, tmp_path):
    source = changed(trained.directory, tmp_path, target_parameters=None, peft_version=None)
    assert_same(read(source, places), read(trained.directory, places))


def square_model() -> Qwen3MoeForCausalLM:
    """Experts whose gate_up stack is square: its factors' shapes do not say which reads what."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config).eval()


def test_square_stacks_are_read_as_their_version_of_peft_wrote_them(tmp_path):
    tensors = {}
    for depth, (num_in, num_out) in {"": (8, 16), ".base_layer": (16, 16)}.items():
        path = f"{PREFIX}model.layers.0.mlp.experts{depth}"
        tensors[f"{path}.lora_A.weight"] = torch.randn(16, num_in)
        tensors[f"{path}.lora_B.weight"] = torch.randn(num_out, 16)
    places = AdapterPlaces(square_model())
    now = write(tmp_path / "now", tensors, target_parameters=FUSED)
    # The sizes of down tell all of them apart; alone, gate and up are ambiguous.
    read_adapter(now, places)
    outer = f"{PREFIX}model.layers.0.mlp.experts.lora_"
    alone = {f"{outer}{s}.weight": torch.randn(16, 16) for s in "AB"}
    only = {"target_parameters": FUSED[:1]}
    ours = products(read_adapter(write(tmp_path / "a", alone, **only), places))
    swapped(alone)
    older = write(tmp_path / "b", alone, **only, peft_version="0.18.1")
    for name, product in products(read_adapter(older, places)).items():
        torch.testing.assert_close(product, ours[name])
    for unknown in ({"peft_version": ""}, {"target_parameters": []}):
        source = write(tmp_path / "c", alone, **{**only, **unknown})
        with pytest.raises(CheckpointError, match=rf"^{re.escape(outer)}A.weight .* ambiguous"):
            read_adapter(source, places)


def drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def rename(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)


def misspell(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name.replace("lora_", "lora_x")] = tensors.pop(name)


def double(tensors: dict[str, Tensor], name: str) -> None:
    """The same place under a second name that means it: that of the base model alone."""
    for side in "AB":
        one = re.sub("lora_[AB]", f"lora_{side}", name)
        tensors[one.replace("model.model.model", "model.model")] = tensors[one].clone()


def transpose(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].T.contiguous()


def change_rank(tensors: dict[str, Tensor], name: str) -> None:
    axis = 0 if "lora_A" in name else 1
    tensors[name] = torch.cat([tensors[name], tensors[name]], axis)


def change_size(tensors: dict[str, Tensor], name: str) -> None:
    axis = 1 if "lora_A" in name else 0
    tensors[name] = torch.cat([tensors[name], tensors[name][:1] if axis == 0 else
                               tensors[name][:, :1]], axis)  # fmt: skip


def add(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name.replace(".weight", ".bias")] = tensors[name][0].clone()


def add_dim(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].unsqueeze(0)


def spoil(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name][-1, -1] = float("nan")


def pack(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int8)


FAULTS = [drop, rename, misspell, double, transpose, change_rank, change_size]
FAULTS += [add, add_dim, spoil, pack]


def keep_two_experts(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if not re.search(r"layers\.1.*experts\.[67]", name)]:
        del tensors[name]


LAYOUTS = {
    "trained": r"layers\.1",
    "one expert": r"layers\.1.*experts\.7",
    "every expert": r"layers\.1",
}
"""Adapters, and the tensors of them that get a fault."""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "layout", ["trained", "one expert", pytest.param("every expert", marks=pytest.mark.slow)]
)
def test_a_fault_in_any_tensor_is_told_with_its_name(fault, layout, request, places, tmp_path):
    if layout == "trained":
        source = request.getfixturevalue("trained").directory
    elif layout == "one expert":
        source = changed(request.getfixturevalue("by_expert"), tmp_path / "few", keep_two_experts)
    else:
        source = request.getfixturevalue("by_expert")
    names = [name for name in load_file(source / WEIGHTS) if re.search(LAYOUTS[layout], name)]
    assert len(names) >= 6
    for name in names:
        broken = changed(source, tmp_path, lambda tensors, name=name: fault(tensors, name))
        with pytest.raises(CheckpointError) as caught:
            read(broken, places)
        # The tensor, or the one that it goes with, whichever wrapper it is of.
        module = re.sub(r"layers\.\d", "", name.removeprefix(PREFIX).partition(".lora_")[0])
        told = re.sub(r"layers\.\d", "", str(caught.value))
        assert module.removeprefix("model.").replace(".base_layer", "") in told.replace(
            ".base_layer", ""
        )


def test_a_pair_of_a_stack_that_is_missing_is_told(trained, places, tmp_path):
    for wrapper in ("", ".base_layer"):
        path = f"{PREFIX}model.layers.1.mlp.experts{wrapper}.lora_"

        def drop_both(tensors: dict[str, Tensor], path: str = path) -> None:
            for side in "AB":
                del tensors[f"{path}{side}.weight"]

        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts"):
            read(changed(trained.directory, tmp_path, drop_both), places)


def test_an_adapter_of_another_model_is_refused(trained):
    others = AdapterPlaces(tiny_model("mixtral").model)
    with pytest.raises(CheckpointError, match=r"^base_model.*must"):
        read(trained.directory, others)


VALUES: dict[str, Any] = {"bias": "lora_only", "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize("name", [*CHANGES_THE_RESULT, "a_setting_of_tomorrow"])
def test_settings_that_change_the_result_are_refused(name, tmp_path):
    write(tmp_path, {}, **{name: VALUES.get(name, True)})
    with pytest.raises(CheckpointError, match=rf"^{name} .* must be off"):
        AdapterConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type .'IA3'. .* must be 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "must leave the base weights"),
        ({"init_lora_weights": "olora"}, "must leave the base weights"),
        ({"r": 0}, "^r .0. .* whole number"),
        ({"r": True}, "^r .True. .* whole number"),
        ({"r": None}, "^r .None. .* whole number"),
        ({"lora_alpha": float("nan")}, "^lora_alpha .nan. .* must be a number"),
        ({"lora_alpha": "8"}, "^lora_alpha .'8'. .* must be a number"),
        ({"use_rslora": "yes"}, "^use_rslora .* true or false"),
        ({"rank_pattern": {"q": 2.5}}, r"^rank_pattern\['q'\] .* whole number"),
        ({"rank_pattern": {"(": 2}}, "must be a regular expression"),
        ({"rank_pattern": {"a" * 600: 2}}, "at most 512 characters"),
        ({"alpha_pattern": ["q"]}, "must map patterns"),
        ({"target_parameters": "experts"}, "must be a list of names"),
    ],
)
def test_wrong_settings_are_told(settings, message, tmp_path):
    write(tmp_path, {}, **settings)
    with pytest.raises(CheckpointError, match=message):
        AdapterConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "must hold adapter_config.json"), ("{", "readable JSON"), ("[]", "a JSON object")],
)
def test_a_settings_file_that_is_none_is_told(content, message, tmp_path):
    if content is not None:
        (tmp_path / CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        AdapterConfig.read(tmp_path)


def test_a_settings_file_without_end_is_not_read(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"task_type": "x" * 2**21}))
    with pytest.raises(CheckpointError, match="at most 1048576 bytes"):
        AdapterConfig.read(tmp_path)


def test_a_pickle_is_refused_with_what_to_do(trained, places, tmp_path):
    source = changed(trained.directory, tmp_path)
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle.*save_pretrained"):
        read(source, places)
    (source / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"must hold adapter_model\.safetensors; got none"):
        read(source, places)


def test_a_broken_file_and_one_without_tensors_are_told(trained, places, tmp_path):
    source = changed(trained.directory, tmp_path)
    content = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        read(source, places)
    save_file({}, source / WEIGHTS)
    with pytest.raises(CheckpointError, match="got no tensor"):
        read(source, places)


def test_adapters_of_embeddings_are_refused(trained, places, tmp_path):
    def add_embedding(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 96)

    source = changed(trained.directory, tmp_path, add_embedding)
    with pytest.raises(CheckpointError, match=r"lora_embedding_A must.*without the embeddings"):
        read(source, places)
