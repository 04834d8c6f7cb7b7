"""Families that Transformers does not ship say what a second implementation of them says.

That one is plain float64 loops (`oracles/`), which knows a checkpoint's own names and keys alone.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from outside_cases import (
    BASES,
    IDS,
    NUM_ROUTED,
    NUM_TOKENS,
    NUM_ZERO,
    ORACLES,
    VARIANTS,
    Stored,
    oracle_logits,
    stored,
    write_longcat,
)
from safetensors.torch import load_file, save_file
from test_shard_load import assert_is_part
from tolerances import relative_error
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import mixtura
from mixtura.config import ParallelConfig
from mixtura.errors import CheckpointError, ConfigError
from mixtura.experts import PackedExperts
from mixtura.hf import families
from mixtura.hf.convert import moe_layers
from mixtura.hf.linears import PackedLinear
from mixtura.hf.load import empty_model
from mixtura.hf.packed_load import PackedLoad
from mixtura.hf.quantize_checkpoint import QuantizeOptions, quantize_checkpoint
from mixtura.hf.stored import SafetensorsCheckpoint, quantization_config
from mixtura.quant.formats import WeightFormat

ORACLE_TOLERANCE = 1e-4
CONVERTED_TOLERANCE = 1e-5
QUANTIZED_TOLERANCE = 0.1
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
SLOW = pytest.mark.slow
GROUPED = ("param2moe", *(pytest.param(name, marks=SLOW) for name in ("sarvam_moe", "step3p5")))
"""Families whose attention can be batched continuously; Transformers' latent attention cannot."""


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the checkpoints, by variant."""
    root = tmp_path_factory.mktemp("outside")
    return {
        variant: stored(variant).write(root / str(number))
        for number, variant in enumerate(VARIANTS)
    }


def load(directory: Path, **arguments: Any) -> PreTrainedModel:
    """Through Transformers alone, and whole."""
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", **arguments
    )
    assert {name: set(names) for name, names in found.items()} == {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": set(),
    }
    return model.eval()


@torch.no_grad()
def decoded(model: PreTrainedModel, cache: Any = None) -> Tensor:
    """Logits of a prompt and of the tokens after it, which come one by one. -> (B,T,V)."""
    num_prompt = 5
    out = model(IDS[:, :num_prompt], past_key_values=cache, use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for position in range(num_prompt, NUM_TOKENS):
        out = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_second_implementation(
    variant: str, written: dict[str, Path]
) -> None:
    expected = oracle_logits(variant)
    model = load(written[variant])
    eager = model(IDS).logits
    assert relative_error(eager, expected) <= ORACLE_TOLERANCE
    mixtura.convert(model, strict=True)
    assert {layer.kind for layer in moe_layers(model)} == {"block"}
    assert relative_error(model(IDS).logits, eager) <= CONVERTED_TOLERANCE
    assert relative_error(decoded(model), expected) <= ORACLE_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", BASES)
def test_decoding_in_transformers_alone_says_the_same(
    family: str, written: dict[str, Path]
) -> None:
    assert relative_error(decoded(load(written[family])), oracle_logits(family)) <= ORACLE_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", BASES)
def test_sdpa_and_our_own_load_say_the_same(family: str, written: dict[str, Path]) -> None:
    model = mixtura.from_pretrained(written[family], attn_implementation="sdpa")
    assert type(model) in families.MODELS.values()
    assert relative_error(decoded(model), oracle_logits(family)) <= ORACLE_TOLERANCE


# ------------------------------------------------------------------------------- names and values


@torch.no_grad()
@pytest.mark.parametrize("variant", [*BASES, "norms and biases", "deepseek_yarn"])
def test_what_is_written_is_what_was_read(
    variant: str, written: dict[str, Path], tmp_path: Path
) -> None:
    load(written[variant]).save_pretrained(tmp_path)
    read, again = stored(variant).tensors, load_file(tmp_path / "model.safetensors")
    assert again.keys() == read.keys()
    for name, tensor in read.items():
        if name.endswith((".gate.expert_bias", ".gate.e_score_correction_bias")):
            assert abs(float(again[name].double().mean())) < 1e-7
            tensor = tensor - tensor.mean()
            assert torch.allclose(again[name], tensor, atol=1e-6)
        else:
            assert again[name].equal(tensor), name
    model = load(tmp_path)
    assert relative_error(model(IDS).logits, oracle_logits(variant)) <= ORACLE_TOLERANCE
    model.save_pretrained(tmp_path / "twice")
    twice = load_file(tmp_path / "twice" / "model.safetensors")
    assert all(twice[name].equal(again[name]) for name in again)


@pytest.mark.parametrize("family", sorted(set(BASES) - {"step3p5"}))
def test_keys_are_written_as_they_were(
    family: str, written: dict[str, Path], tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(written[family])
    config.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    kept = dict(stored(family).config)
    if family == "sarvam_mla":
        assert kept.pop("head_dim") != again["head_dim"] == kept["qk_rope_head_dim"]
    assert {key: again[key] for key in kept} == kept


def test_a_bias_is_made_zero_mean_in_fp32_whatever_the_model_is_in(
    written: dict[str, Path],
) -> None:
    model: Any = load(written["sarvam_moe"], dtype=torch.bfloat16)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    raw = stored("sarvam_moe").tensors["model.layers.1.mlp.gate.expert_bias"]
    assert bias.dtype == torch.float32
    assert torch.allclose(bias, raw - raw.mean(), atol=1e-6)
    assert not torch.allclose(bias, raw, atol=1e-2)


def test_remote_code_is_not_run(written: dict[str, Path], tmp_path: Path) -> None:
    for family in BASES:
        checkpoint = stored(family)
        auto_map = {
            "AutoConfig": "configuration_x.XConfig",
            "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        }
        config = {**checkpoint.config, "auto_map": auto_map}
        directory = Stored(config, checkpoint.tensors).write(tmp_path / family)
        for name in ("configuration_x.py", "modeling_x.py"):
            (directory / name).write_text("raise RuntimeError('remote code has run')\n")
        for trust in (None, False, True):
            found = AutoConfig.from_pretrained(directory, trust_remote_code=trust)
            assert type(found) in families.MODELS
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        assert type(model) is families.MODELS[type(found)]


@pytest.mark.parametrize(("key", "value"), [("score_function", "tanh"), ("router_dtype", "fp64")])
def test_a_router_that_is_unknown_is_refused(key: str, value: str) -> None:
    config = AutoConfig.for_model(**{**BASES["sarvam_moe"], key: value})
    with pytest.raises(ConfigError, match=value):
        AutoModelForCausalLM.from_config(config)


@torch.no_grad()
@pytest.mark.parametrize("router_dtype", [None, "fp32", "bf16"])
def test_a_gate_computes_in_the_dtype_that_is_asked_for(router_dtype: str | None) -> None:
    config = AutoConfig.for_model(**{**BASES["sarvam_mla"], "router_dtype": router_dtype})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    gate = model.model.layers[1].mlp.gate
    rows = torch.randn(5, 32, dtype=torch.bfloat16)
    logits, weights, _ = gate(rows)
    exact = rows.float() @ gate.weight.float().T
    is_exact = torch.allclose(logits.float(), exact, atol=1e-6)
    assert is_exact is (router_dtype != "bf16")
    assert weights.dtype == torch.float32
    native = copy.deepcopy(model)
    mixtura.convert(native, gate="native")
    found, *_ = native.model.layers[1].mlp.gate(rows)
    assert found.dtype == logits.dtype and found.equal(logits)


# --------------------------------------------------------------------------------------- generation


@pytest.fixture(params=BASES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(family: str, written: dict[str, Path]) -> None:
    model = mixtura.from_pretrained(written[family])
    short = IDS[:1, :5]
    padded = torch.cat([torch.zeros(1, NUM_TOKENS - 5, dtype=torch.long), short], 1)
    mask = torch.stack([(padded[0] != 0).long(), torch.ones(NUM_TOKENS, dtype=torch.long)])
    batch = torch.cat([padded, IDS[1:]])
    tokens = model.generate(batch, attention_mask=mask, **GREEDY)
    alone = [model.generate(row, **GREEDY) for row in (short, IDS[1:])]
    assert tokens[0, -5:].equal(alone[0][0, -5:])
    assert tokens[1].equal(alone[1][0])


@torch.no_grad()
def test_a_static_cache_says_the_same(family: str, written: dict[str, Path]) -> None:
    model = mixtura.from_pretrained(written[family])
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert relative_error(decoded(model, cache), oracle_logits(family)) <= ORACLE_TOLERANCE


@pytest.mark.parametrize("family", GROUPED)
def test_continuous_batching_gives_the_tokens_of_generate(
    family: str, written: dict[str, Path]
) -> None:
    model = mixtura.from_pretrained(written[family], attn_implementation="sdpa")
    prompts = [IDS[0, :4].tolist(), IDS[1, :7].tolist()]
    expected = [
        model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    model.set_attn_implementation("sdpa")
    if (
        family == "step3p5"
    ):  # heads differ by layer, and the cache's estimate of memory asks for one
        model.config.allow_global_per_layer_attribute_access = True
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=16, max_batch_tokens=64
        ),
    )
    assert [result.error for result in results.values()] == [None, None]
    assert [result.generated_tokens for result in results.values()] == expected


@torch.no_grad()
@pytest.mark.parametrize("family", [pytest.param(name, marks=SLOW) for name in BASES])
def test_a_decode_step_is_one_graph(family: str, written: dict[str, Path]) -> None:
    model = mixtura.from_pretrained(written[family])
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    try:
        logits = [step(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(NUM_TOKENS)]
    finally:
        torch._dynamo.reset()
    assert relative_error(torch.cat(logits, 1), oracle_logits(family)) <= ORACLE_TOLERANCE


@pytest.mark.parametrize("family", GROUPED)
def test_checkpointed_gradients_are_the_gradients(family: str, written: dict[str, Path]) -> None:
    def gradients(*, is_checkpointed: bool) -> dict[str, Tensor]:
        model = load(written[family]).train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = (gradients(is_checkpointed=is_on) for is_on in (False, True))
    assert plain.keys() == checkpointed.keys()
    assert {name.rpartition(".mlp.")[2] for name in plain} >= {
        "experts.gate_up_proj",
        "gate.weight",
    }
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name


# ------------------------------------------------------------------------------------- packed files


QUANTIZED = (
    "sarvam_moe",
    *(pytest.param(name, marks=SLOW) for name in ("param2moe", "sarvam_mla")),
)
"""Families whose files name single experts; Step3.5's hold stacks."""


@torch.no_grad()
@pytest.mark.parametrize("family", QUANTIZED)
def test_a_quantized_checkpoint_keeps_its_names_and_is_read_whole(
    family: str, written: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "int4"
    options = QuantizeOptions(format=WeightFormat.INT4_G32, packs_linears=True)
    quantize_checkpoint(written[family], out, options)
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    dense = stored(family).tensors
    assert {name.rpartition(".")[0] for name in names} == {n.rpartition(".")[0] for n in dense}
    settings = quantization_config(out)
    assert settings is not None
    files = SafetensorsCheckpoint(out, settings)
    assert len(files.packed) > 3 * 8 * 2  # experts of two layers, and attention
    # With a device map linear layers are dense, and so are products with this kernel: as exact as
    # those of the second implementation with what the codes mean.
    arguments = {"kernel": "torch", "device_map": "cpu", "activation_dtype": "bf16"}
    model = mixtura.from_pretrained(out, dtype="float32", **arguments)
    assert not PackedLoad(empty_model(model.config), files).ledger.warnings()
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert len(packed) == 2
    assert all(experts.given and experts.given.down_proj.is_quantized for experts in packed)
    meant = {name: files.tensor(name).float() for name in dense}
    expected = [ORACLES[family].logits(stored(family).config, meant, ids) for ids in IDS]
    assert relative_error(model(IDS).logits, torch.stack(expected)) <= ORACLE_TOLERANCE
    linears = mixtura.from_pretrained(out).modules()
    assert any(isinstance(module, PackedLinear) for module in linears)


@torch.no_grad()
@pytest.mark.parametrize("family", BASES)
def test_experts_and_linear_layers_are_quantized_while_they_load(
    family: str, written: dict[str, Path]
) -> None:
    model = mixtura.from_pretrained(written[family], weights="int8", linears="int8")
    packed = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed >= ({"o_proj"} if family in ("sarvam_mla", "step3p5") else {"query_key_value"})
    expected = oracle_logits(family)
    by_token = (model(IDS).logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A near tie sends a token to another expert, and those after it see that.
    assert by_token.quantile(0.5) <= QUANTIZED_TOLERANCE


@pytest.mark.parametrize("family", sorted(set(BASES) - {"step3p5"}))
def test_a_missing_tensor_is_named(family: str, tmp_path: Path) -> None:
    checkpoint = stored(family)
    tensors = dict(checkpoint.tensors)
    lost = next(name for name in tensors if name.endswith("experts.3.up_proj.weight"))
    del tensors[lost]
    directory = Stored(checkpoint.config, tensors).write(tmp_path)
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj"):
        mixtura.from_pretrained(directory)


@pytest.mark.slow
def test_a_rank_reads_its_experts(family: str, written: dict[str, Path]) -> None:
    assert_is_part(written[family], ParallelConfig(ep_size=2))


# ------------------------------------------------------------------------------------ LongCat-Flash


@pytest.fixture(scope="module")
def longcat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A checkpoint without weights for zero experts, and the logits of the model it is of."""
    directory = tmp_path_factory.mktemp("longcat")
    return directory, write_longcat(directory)


@torch.no_grad()
def test_longcat_loads_without_weights_for_zero_experts(
    longcat: tuple[Path, Tensor], tmp_path: Path
) -> None:
    directory, expected = longcat
    model: Any = load(directory)
    assert model(IDS).logits.equal(expected)
    rows = model.model.layers[0].mlp.experts.gate_up_proj
    assert len(rows) == 8 + NUM_ZERO
    assert not rows[8:].any()
    model.save_pretrained(tmp_path)  # in Transformers' own form
    assert load(tmp_path)(IDS).logits.equal(expected)
    ours = mixtura.from_pretrained(directory, strict=True)
    assert relative_error(ours(IDS).logits, expected) <= CONVERTED_TOLERANCE


@torch.no_grad()
def test_longcat_is_packed_without_weights_for_zero_experts(
    longcat: tuple[Path, Tensor], tmp_path: Path
) -> None:
    directory, expected = longcat
    out = tmp_path / "int4"
    quantize_checkpoint(directory, out, QuantizeOptions(format=WeightFormat.INT4_G32))
    settings = quantization_config(out)
    assert settings is not None
    files = SafetensorsCheckpoint(out, settings)
    assert len(files.packed) == 2 * 3 * NUM_ROUTED
    meant = {name: files.tensor(name).float() for name in files.headers}
    config = json.loads((directory / "config.json").read_text())
    dense = load(Stored(config, meant).write(tmp_path / "dense"))
    arguments = {"kernel": "torch", "activation_dtype": "bf16"}
    model = mixtura.from_pretrained(out, dtype="float32", **arguments)
    assert relative_error(model(IDS).logits, dense(IDS).logits) <= CONVERTED_TOLERANCE
    streamed = mixtura.from_pretrained(directory, weights="int8")
    by_token = (streamed(IDS).logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert by_token.quantile(0.5) <= QUANTIZED_TOLERANCE


def test_a_rank_reads_its_experts_of_longcat(longcat: tuple[Path, Tensor]) -> None:
    directory, _ = longcat
    assert_is_part(directory, ParallelConfig(ep_size=2))


def test_longcat_without_a_routed_expert_is_refused(
    longcat: tuple[Path, Tensor], tmp_path: Path
) -> None:
    directory, _ = longcat
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts.7." not in name}
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="experts"):
        mixtura.from_pretrained(tmp_path)
