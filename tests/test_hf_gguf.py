"""GGUF files as Transformers checkpoints: configuration, names, values, tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import converted, vocabulary, write_gguf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mixtura.errors import CheckpointError, UnsupportedModel
from mixtura.hf.gguf import GgufModel, load_gguf_tokenizer, read_gguf
from mixtura.hf.gguf_tensors import (
    AsStored,
    HalfOfRows,
    HeadRows,
    Rule,
    dense_tensors,
    layer_rules,
)
from mixtura.hf.headers import match_headers
from mixtura.hf.load import empty_model
from mixtura.quant.matrix import dequantize
from mixtura.quant.scheme import Code, GlobalScale

DEMO = Path(__file__).parent.parent / "mixtura" / "demo"
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 2,
    "rope_parameters": ROPE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KEYS: dict[str, Any] = {
    "embedding_length": 32,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "expert_used_count": 2,
    "feed_forward_length": 48,
    "rope.freq_base": 5000.0,
    ":tokenizer.ggml.bos_token_id": 1,
    ":tokenizer.ggml.eos_token_id": 2,
    ":tokenizer.ggml.padding_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
}
LATENT_KEYS = {
    **YARN_KEYS,
    "rope.scaling.yarn_log_multiplier": 0.07,
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 24,
    "attention.kv_lora_rank": 16,
    "attention.key_length": 24,
    "attention.value_length": 16,
    "attention.key_length_mla": 12,
    "attention.value_length_mla": 12,
    "rope.dimension_count": 8,
    "leading_dense_block_count": 1,
    "expert_count": 6,
    "expert_shared_count": 2,
    "expert_weights_scale": 1.5,
}

# name -> architecture, model type, what the configuration has beside SIZES, the file beside KEYS
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen2moe": (
        "qwen2moe",
        "qwen2_moe",
        {
            "num_experts": 6,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": False,
        },
        {"expert_count": 6},
    ),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        {
            "num_experts": 6,
            "head_dim": 16,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
        {"expert_count": 6, "attention.key_length": 16},
    ),
    "olmoe": (
        "olmoe",
        "olmoe",
        {"num_experts": 6, "intermediate_size": 16, "clip_qkv": 3.0},
        {"expert_count": 6, "attention.clamp_kqv": 3.0},
    ),
    "mixtral": (
        "llama",
        "mixtral",
        {"num_local_experts": 6, "intermediate_size": 16, "head_dim": 8, "sliding_window": None},
        {"expert_count": 6},
    ),
    "gpt-oss": (
        "gpt-oss",
        "gpt_oss",
        {
            "num_local_experts": 6,
            "intermediate_size": 16,
            "head_dim": 16,
            "sliding_window": 64,
            "rope_parameters": {**YARN, "truncate": False},
        },
        {
            **YARN_KEYS,
            "expert_count": 6,
            "attention.key_length": 16,
            "attention.sliding_window": 64,
        },
    ),
    "deepseek-v2": (
        "deepseek2",
        "deepseek_v2",
        {**LATENT, "topk_method": "greedy", "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        LATENT_KEYS,
    ),
    "deepseek-v3": (
        "deepseek2",
        "deepseek_v3",
        {**LATENT, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
        {
            **LATENT_KEYS,
            "expert_gating_func": 2,
            "expert_group_count": 2,
            "expert_group_used_count": 1,
            "expert_weights_norm": True,
        },
    ),
}


def make(name: str, directory: Path) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A family's configuration, a random checkpoint of it, and that in a file's names."""
    architecture, model_type, sizes, _ = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **(SIZES | sizes))
    model = AutoModelForCausalLM.from_config(config)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.data.normal_()
    model.save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    return config, state, converted(architecture, state, config)


def write(name: str, path: Path, tensors: dict[str, Tensor], **keys: Any) -> Path:
    architecture, _, _, more = FAMILIES[name]
    changed = {k.replace("__", "."): v for k, v in keys.items()}
    merged = {k: v for k, v in (KEYS | more | changed).items() if v is not None}
    return write_gguf(path, architecture, merged, tensors)


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Any:
    """A family's name, its configuration and checkpoint, and the file that holds the same."""
    torch.manual_seed(0)
    name = request.param
    directory = tmp_path_factory.mktemp(name)
    config, state, tensors = make(name, directory)
    path = write(name, directory / "model.gguf", tensors)
    return name, config, state, read_gguf(path)


def test_the_configuration_is_the_models(twin: Any) -> None:
    name, config, _, model = twin
    _, model_type, sizes, _ = FAMILIES[name]
    assert model.config.model_type == model_type
    for key in (SIZES | sizes).keys() - {"rope_parameters"}:
        assert getattr(model.config, key) == pytest.approx(getattr(config, key)), key
    for key, value in config.rope_parameters.items():
        assert model.config.rope_parameters[key] == pytest.approx(value), key
    assert model.config.tie_word_embeddings is (name == "qwen3moe")


def test_the_file_holds_the_checkpoint(twin: Any) -> None:
    _, _, state, model = twin
    weights = dict(model.weights())
    assert weights.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(weights[name], value), name


def test_headers_fit_the_model_without_reading(twin: Any) -> None:
    _, _, state, model = twin
    headers = model.headers()
    assert {n: h.shape for n, h in headers.items()} == {n: tuple(v.shape) for n, v in state.items()}
    stored = match_headers(empty_model(model.config), headers)
    assert stored.unused == ()


def test_a_stack_of_experts_says_where_it_is(tmp_path: Path) -> None:
    _, _, tensors = make("olmoe", tmp_path)
    model = read_gguf(write("olmoe", tmp_path / "m.gguf", tensors))
    dense = model.dense["model.layers.1.mlp.experts.*.up_proj.weight"]
    assert dense.stored == ("blk.1.ffn_up_exps.weight",)
    assert (dense.layer, dense.is_stack, dense.change) == (1, True, AsStored())
    assert dense.expert(3) == "model.layers.1.mlp.experts.3.up_proj.weight"
    decoded = model.matrix("blk.1.ffn_up_exps.weight")
    assert decoded.matrix.shape == (6, 16, 32)
    assert torch.equal(decoded.matrix.values, tensors["blk.1.ffn_up_exps.weight"])


def test_gate_and_up_in_one_stack(tmp_path: Path) -> None:
    _, state, tensors = make("qwen3moe", tmp_path)
    gate = tensors.pop("blk.1.ffn_gate_exps.weight")
    up = tensors.pop("blk.1.ffn_up_exps.weight")
    tensors["blk.1.ffn_gate_up_exps.weight"] = torch.cat([gate, up], 1)
    model = read_gguf(write("qwen3moe", tmp_path / "m.gguf", tensors))
    weights = dict(model.weights())
    assert all(torch.equal(weights[name], value) for name, value in state.items())
    rows = model.dense["model.layers.1.mlp.experts.*.up_proj.weight"].change.rows(32)
    assert rows is not None and rows.tolist() == list(range(16, 32))


def test_latent_attention_of_older_files(tmp_path: Path) -> None:
    """Before keys and values were split, and with the heads' lengths under the plain keys."""
    config, state, tensors = make("deepseek-v2", tmp_path)
    for layer in range(2):
        del tensors[f"blk.{layer}.attn_k_b.weight"], tensors[f"blk.{layer}.attn_v_b.weight"]
        whole = state[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
        tensors[f"blk.{layer}.attn_kv_b.weight"] = whole
    keys: dict[str, Any] = {
        "attention__key_length_mla": None,
        "attention__value_length_mla": None,
        "attention__key_length": 12,
        "attention__value_length": 12,
        "attention__head_count_kv": 4,
    }
    model = read_gguf(write("deepseek-v2", tmp_path / "m.gguf", tensors, **keys))
    assert model.config.qk_nope_head_dim == config.qk_nope_head_dim
    weights = dict(model.weights())
    assert all(torch.equal(weights[name], value) for name, value in state.items())


def test_groups_of_experts(tmp_path: Path) -> None:
    _, _, tensors = make("deepseek-v2", tmp_path)
    groups = {"expert_group_count": 2, "expert_group_used_count": 1}
    config = read_gguf(write("deepseek-v2", tmp_path / "m.gguf", tensors, **groups)).config
    assert (config.topk_method, config.n_group) == ("group_limited_greedy", 2)


def test_heads_that_are_nothing_but_rotary(tmp_path: Path) -> None:
    _, _, tensors = make("deepseek-v2", tmp_path)
    path = write("deepseek-v2", tmp_path / "m.gguf", tensors, rope__dimension_count=12)
    with pytest.raises(CheckpointError, match=r"rope.dimension_count \(12\) .* must be below"):
        read_gguf(path)


def test_prediction_layers_are_left_out(tmp_path: Path) -> None:
    _, state, tensors = make("deepseek-v3", tmp_path)
    tensors["blk.2.nextn.eh_proj.weight"] = torch.zeros(32, 64)
    keys = {"block_count": 3, "nextn_predict_layers": 1}
    model = read_gguf(write("deepseek-v3", tmp_path / "m.gguf", tensors, **keys))
    assert model.config.num_hidden_layers == 2
    assert dict(model.weights()).keys() == state.keys()


# --- against Transformers' loader ----------------------------------------------------------------

MIXED = {
    "token_embd.weight": Kind.Q8_0,
    "attn_q.weight": Kind.Q4_0,
    "attn_k.weight": Kind.Q5_1,
    "attn_v.weight": Kind.F16,
    "attn_output.weight": Kind.BF16,
    "ffn_gate_exps.weight": Kind.Q4_1,
    "ffn_up_exps.weight": Kind.Q4_1,
    "ffn_down_exps.weight": Kind.Q5_0,
}


def mixed_kind(name: str) -> Kind:
    return next((kind for end, kind in MIXED.items() if name.endswith(end)), Kind.F32)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: Any) -> Path:
    """A Qwen3-MoE of mixed types, with a tokenizer."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("mixed")
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4}
    keys = vocabulary(DEMO / "tokenizer.json")
    sizes["vocab_size"] = len(keys[":tokenizer.ggml.tokens"])
    more = {"num_experts": 4, "head_dim": 16, "norm_topk_prob": True, "intermediate_size": 32}
    config = AutoConfig.for_model("qwen3_moe", **(SIZES | more | sizes))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    names = {"embedding_length": 64, "expert_count": 4, "attention.key_length": 16}
    tensors = converted("qwen3moe", state, config)
    for file in directory.glob("*"):
        file.unlink()
    path = directory / "mixed.gguf"
    all_keys = {k: v for k, v in KEYS.items() if "padding" not in k} | names | keys
    return write_gguf(path, "qwen3moe", all_keys, tensors, mixed_kind)


def test_weights_are_those_of_transformers_loader(mixed: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        mixed.parent, gguf_file=mixed.name, dtype=torch.float32, config=read_gguf(mixed).config
    )
    expected = theirs.state_dict()
    experts = dict(read_gguf(mixed).weights())
    prefix = "model.layers.1.mlp.experts"
    for number in range(4):
        gate_up = [experts.pop(f"{prefix}.{number}.{part}_proj.weight") for part in ("gate", "up")]
        assert torch.equal(torch.cat(gate_up), expected[f"{prefix}.gate_up_proj"][number])
        down = experts.pop(f"{prefix}.{number}.down_proj.weight")
        assert torch.equal(down, expected[f"{prefix}.down_proj"][number])
    others = {name: value for name, value in experts.items() if ".experts." not in name}
    assert len(others) == len(expected) - 2 * 2
    for name, value in others.items():
        assert torch.equal(value.float(), expected[name]), name


def test_packed_experts_mean_the_same(mixed: Path) -> None:
    model = read_gguf(mixed)
    for part, bits in (("gate", 4), ("down", 5)):
        name = f"blk.0.ffn_{part}_exps.weight"
        decoded = model.matrix(name)
        assert (decoded.matrix.scheme.code, decoded.matrix.scheme.bits) == (Code.INT, bits)
        assert torch.equal(dequantize(decoded.matrix), model.values(name))


def test_a_configuration_as_transformers_reads_it(mixed: Path) -> None:
    theirs = AutoConfig.from_pretrained(mixed.parent, gguf_file=mixed.name)
    ours = read_gguf(mixed).config
    names = SIZES.keys() | {"num_local_experts", "head_dim", "norm_topk_prob", "attention_bias"}
    for name in names - {"rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id"}:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name)), name
    assert ours.rope_parameters == theirs.rope_parameters
    assert type(ours) is type(theirs)


def test_the_tokenizer_is_the_one_that_auto_tokenizer_makes(mixed: Path) -> None:
    tokenizer = load_gguf_tokenizer(mixed)
    through_auto = AutoTokenizer.from_pretrained(mixed.parent, gguf_file=mixed.name)
    for text in ("def f(x):\n    return x + 1\n", "naïve — 世界", "  spaces  and\ttabs", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids == through_auto(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    original = AutoTokenizer.from_pretrained(DEMO)
    words = "for value in range return None"  # the file does not hold how text is split
    assert tokenizer(words)["input_ids"] == original(words)["input_ids"]
    assert tokenizer.eos_token_id == original.eos_token_id


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "olmoe", {}, {"a.weight": torch.zeros(2, 32)})
    with pytest.raises(CheckpointError, match=r"tokenizer in .* must be readable"):
        load_gguf_tokenizer(path)


# --- changes -------------------------------------------------------------------------------------


def test_rows_of_llamas_heads_are_put_back() -> None:
    change = HeadRows(2)
    # (head, pair, half) -> (head, half, pair): heads of 4 rows
    assert change.rows(8) is not None
    rows = change.rows(8)
    assert rows is not None and rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    bias = torch.arange(8.0)
    assert change.apply([bias]).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(CheckpointError, match="twice their heads"):
        change.rows(6)


def test_rows_that_packed_matrices_can_take() -> None:
    stored = torch.arange(12).reshape(1, 4, 3)
    for change in (AsStored(), HalfOfRows(0), HalfOfRows(1), HeadRows(2)):
        rows = change.rows(4)
        assert rows is not None
        expected = stored[0, rows]
        found = change.apply([stored[0]])
        assert torch.equal(found, expected)


def test_companion_scales_of_nvfp4(tmp_path: Path) -> None:
    blocks = torch.full((2, 64, 36), 0x22, dtype=torch.uint8)
    blocks[..., :4] = 0x38
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "olmoe")
    writer.add_tensor("blk.0.ffn_down_exps.weight", blocks.numpy(), raw_dtype=Kind.NVFP4)
    writer.add_tensor("blk.0.ffn_down_exps.scale", torch.tensor([0.5, 2.0]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from mixtura.quant.gguf_file import open_gguf

    model = GgufModel(open_gguf(tmp_path / "m.gguf"), None, {})
    matrix = model.matrix("blk.0.ffn_down_exps.weight").matrix
    assert matrix.scheme.global_scale is GlobalScale.MATRIX
    weight = model.values("blk.0.ffn_down_exps.weight")
    assert weight.shape == (2, 64, 64)
    assert weight[0].unique().tolist() == [0.5]
    assert weight[1].unique().tolist() == [2.0]
    assert torch.equal(dequantize(matrix), weight)


# --- errors --------------------------------------------------------------------------------------


def broken(tmp_path: Path, name: str = "olmoe", **keys: Any) -> Path:
    _, _, tensors = make(name, tmp_path)
    return write(name, tmp_path / "m.gguf", tensors, **keys)


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        ({"expert_count": None}, UnsupportedModel, "must have an MoE layer; got no olmoe.expert"),
        ({"embedding_length": None}, CheckpointError, r"olmoe.embedding_length \(none\)"),
        ({"embedding_length": "x"}, CheckpointError, "must be a positive integer"),
        ({"block_count": 3}, CheckpointError, r"layer 2 \(of 3\) must be in the file"),
        ({"block_count": 10**6}, CheckpointError, "must count layers that are there"),
        ({"block_count": 1, "nextn_predict_layers": 1}, CheckpointError, "must count layers"),
        ({"rope__freq_base": -1.0}, CheckpointError, "must be a positive number"),
        ({"rope__scaling__type": "longrope"}, UnsupportedModel, "must be none, linear or yarn"),
        ({"attention__head_count": [2, 4]}, CheckpointError, "must be the same for all layers"),
        ({"expert_weights_norm": 1}, CheckpointError, "must be true or false"),
        ({"expert_used_count": True}, CheckpointError, "must be a positive integer"),
    ],
)
def test_impossible_keys(
    tmp_path: Path, keys: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        read_gguf(broken(tmp_path, **keys))


def test_one_value_for_all_layers(tmp_path: Path) -> None:
    model = read_gguf(broken(tmp_path, attention__head_count_kv=[2, 2]))
    assert model.config.num_key_value_heads == 2


def test_linear_rope(tmp_path: Path) -> None:
    keys = {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}
    rope = read_gguf(broken(tmp_path, **keys)).config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 5000.0)


def test_other_architectures(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": torch.zeros(4, 32)}
    path = write_gguf(tmp_path / "m.gguf", "grok", {"expert_count": 2}, tensors)
    with pytest.raises(UnsupportedModel, match=r"general.architecture \('grok'\)"):
        read_gguf(path)
    with pytest.raises(UnsupportedModel, match=r"architecture \('grok'\) must be one of llama"):
        layer_rules("grok", None)


def test_a_dense_llama_has_no_experts(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": torch.zeros(4, 32)}
    with pytest.raises(UnsupportedModel, match="must have an MoE layer"):
        read_gguf(write_gguf(tmp_path / "m.gguf", "llama", KEYS, tensors))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"blk.0.ffn_what.weight": torch.zeros(2, 32)}, "blk.0.ffn_what.weight"),
        ({"what.weight": torch.zeros(2, 32)}, "what.weight .* must be one that models of this"),
        ({"token_embd.weight": None}, "must hold token_embd.weight"),
        (
            {"blk.0.ffn_down_exps.weight": None, "blk.1.ffn_down_exps.weight": None},
            "blk.N.ffn_down",
        ),
        ({"blk.0.ffn_gate_up_exps.weight": torch.zeros(6, 32, 32)}, "must be stored once"),
    ],
)
def test_tensors_that_do_not_belong(
    tmp_path: Path, change: dict[str, Tensor | None], match: str
) -> None:
    _, _, tensors = make("olmoe", tmp_path)
    merged = {n: v for n, v in (tensors | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=match):
        read_gguf(write("olmoe", tmp_path / "m.gguf", merged))


def test_tables_of_frequencies_are_not_needed_except_by_mixtral(tmp_path: Path) -> None:
    _, _, tensors = make("olmoe", tmp_path)
    tensors["rope_freqs.weight"] = torch.ones(4)
    assert read_gguf(write("olmoe", tmp_path / "m.gguf", tensors)).dense
    _, _, tensors = make("mixtral", tmp_path)
    tensors["rope_freqs.weight"] = torch.ones(4)
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        read_gguf(write("mixtral", tmp_path / "n.gguf", tensors))


def test_half_of_a_pair(tmp_path: Path) -> None:
    _, _, tensors = make("gpt-oss", tmp_path)
    del tensors["blk.1.ffn_up_exps.bias"]
    with pytest.raises(CheckpointError, match=r"must come with blk.1.ffn_up_exps.bias; got none"):
        read_gguf(write("gpt-oss", tmp_path / "m.gguf", tensors))


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    _, _, tensors = make("gpt-oss", tmp_path)
    tensors["blk.1.ffn_up_exps.bias"] = torch.zeros(6, 17)
    model = read_gguf(write("gpt-oss", tmp_path / "m.gguf", tensors))
    with pytest.raises(CheckpointError, match=r"must fit together as model\.layers\.1\.mlp"):
        model.headers()


def test_a_broken_tensor_is_named(mixed: Path) -> None:
    model = read_gguf(mixed)
    name = "blk.0.attn_q.weight"
    tensor = model.file.tensors[name]
    bad = tensor.data.clone()
    bad[:2] = torch.tensor([0x00, 0x7C])
    tensors = {**model.file.tensors, name: replace(tensor, data=bad)}
    model = replace(model, file=replace(model.file, tensors=tensors))
    for read in (model.values, model.matrix):
        with pytest.raises(CheckpointError, match=rf"{name}: the scale .* must be finite; got inf"):
            read(name)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    _, _, tensors = make("olmoe", tmp_path)
    path = write("olmoe", tmp_path / "m.gguf", tensors)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    data[at : at + 4] = (26).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"attn_q.weight \(I32\) must be of a type of weights"
    ):
        read_gguf(path)


def test_rules_of_a_layer_apply_in_order() -> None:
    rules = [Rule("a.weight", ("x.weight",)), Rule("b.weight", ("y.weight",))]
    found = dense_tensors(["blk.0.y.weight", "blk.0.x.weight", "output.weight"], rules, 1)
    assert [t.name for t in found] == [
        "lm_head.weight",
        "model.layers.0.a.weight",
        "model.layers.0.b.weight",
    ]
