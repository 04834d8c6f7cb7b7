"""Tiny random-weight models of every MoE family in the installed Transformers, and of ours.

`discover` reads the package's source and says which families exist, and `OUTSIDE` which mixtura
brings; `tiny_model` builds one, small
enough to run in milliseconds and random enough that a wrong expert, weight or scale shows in the
output.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

DECORATOR = "use_experts_implementation"
MAY_HAVE_EXPERTS = re.compile(rf"^@{DECORATOR}|^class \w+(Experts|MoE|Moe)\(", re.MULTILINE)
CONTAINER_BASES = {"Module", "ModuleList", "ModuleDict"}
BATCH_SIZE, NUM_TOKENS = 2, 9
WEIGHT_STD, NOISE_STD = 0.15, 0.1
ROUTER_GAIN = 2.0  # the std of router logits: few near ties, and sigmoid scores do not saturate
ROUTER_NAME = re.compile(r"\b(gate|router)\.")
FIRST_ORDINARY_TOKEN = 3  # ids below are padding, begin and end of text

# Families whose experts are no routed feed-forward over stacked weights, and so have no tiny model.
EXCEPTIONS: dict[str, str] = {
    "doge": "an expert is one neuron, two rows of embedding tables, and product keys choose it",
    "nllb_moe": "experts are a ModuleDict of dense blocks in an encoder-decoder, with capacity",
    "switch_transformers": "experts are a ModuleDict of dense blocks in an encoder-decoder",
    "vitpose_backbone": "experts are a ModuleList of nn.Linear chosen by dataset, not by a router",
}

# Config values by field name: a family gets those its config class declares.
NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 3
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # generate() then always reaches max_new_tokens
    "tie_word_embeddings": False,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 64,  # above the sequence length: no key is left out by a near tie
    "index_n_heads": 4,
    "index_head_dim": 16,
    # linear attention and state spaces
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    # feed-forward
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    # experts and routing
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_group": 4,
    "num_expert_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 1.5,
    "router_scaling_factor": 1.5,
    "route_scale": 1.5,
    "moe_routed_scaling_factor": 1.5,
    "moe_router_scaling_factor": 1.5,
    "swiglu_limit": 1.5,  # low enough to clamp
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    # which layers are dense
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "mlp_only_layers": [0],
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": NUM_LAYERS - 1,
}

# What one family needs besides: names of its own, sizes that must fit, layers of every kind.
GEMMA_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
MIXED_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
INKLING: dict[str, Any] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "d_rel": 8,
    "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
}
STEP3: dict[str, Any] = {
    "sliding_window": 4,
    "share_expert_dim": 40,
    "swiglu_limits": [0.0, 0.5, 1.0],
    "swiglu_limits_shared": [0.0, 0.0, 0.5],
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": MIXED_LAYERS},
    "cohere2_moe": {"logit_scale": 1.0},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": NUM_LAYERS,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 40,
            "moe_num_experts": NUM_EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "diffusion_gemma": {"layer_types": GEMMA_LAYERS, "global_head_dim": 32},
    "dots3_note": {
        "shared_experts_intermediate_size": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 2, 4],
        },
    },
    "gemma4": {
        "layer_types": GEMMA_LAYERS,
        "global_head_dim": 32,
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 16,
    },
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        }
    },
    "glm5_next": {
        "qk_rope_head_dim": 0,
        "index_kpool": 4,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    },
    "granitemoehybrid": {
        "layer_types": MIXED_LAYERS,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "inkling": {**INKLING, "logits_mup_width_multiplier": 1.0},
    "inkling2": {
        **INKLING,
        "n_layers_per_attn_res_block": 2,
        "mlp_gate_softcap": 1.5,
        "mlp_up_softcap": 2.5,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 8,
    },
    "jetmoe": {"kv_channels": 16, "num_experts_per_tok": 2},
    "kimi_linear": {"layer_types": MIXED_LAYERS},
    "laguna": {"moe_router_logit_softcapping": 5.0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4": {"intermediate_size_mlp": 40, "moe_layers": [1, 2]},
    "longcat_flash": {
        "num_layers": 2,
        "head_dim": 8,
        "ffn_hidden_size": 40,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 4,
    },
    "minimax_m3_vl": {"dense_intermediate_size": 40, "rotary_dim": 8},
    "muse_spark": {"moe_hidden_size": 32},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 40,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "phimoe": {"num_experts_per_tok": 2},  # sparsemixer picks two
    "qwen3_5_moe": {"layer_types": MIXED_LAYERS},
    "qwen3_next": {"layer_types": MIXED_LAYERS},
    "qwen4_exp": {
        "layer_types": MIXED_LAYERS,
        "hc_lowrank": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "sarvam_moe": {"moe_shared_expert_intermediate_size": 24},
    "step3p5": STEP3,
    "step3p7": STEP3,
    "unlimited_ocr": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


@dataclass(frozen=True)
class FamilySource:
    """Where the installed Transformers defines one family's experts."""

    directory: str
    module: str
    experts_classes: tuple[str, ...]
    is_decorated: bool


def _is_decorated(node: ast.ClassDef) -> bool:
    names = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return any(isinstance(name, ast.Name) and name.id == DECORATOR for name in names)


def _is_container(node: ast.ClassDef) -> bool:
    return any(isinstance(b, ast.Attribute) and b.attr in CONTAINER_BASES for b in node.bases)


def _experts_classes(source: str) -> tuple[tuple[str, ...], bool]:
    """The experts classes a modeling file defines, and whether they carry the decorator.

    Where none does, they are the direct subclasses of nn.Module, nn.ModuleList and nn.ModuleDict
    named *Experts; where there is none either, those named *MoE or *Moe.
    """
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    if decorated := tuple(node.name for node in classes if _is_decorated(node)):
        return decorated, True
    plain = [node.name for node in classes if _is_container(node)]
    experts = tuple(name for name in plain if name.endswith("Experts"))
    return experts or tuple(name for name in plain if name.endswith(("MoE", "Moe"))), False


@functools.cache
def discover() -> dict[str, FamilySource]:
    """All families by model directory, read from the package's source without importing models."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    families: dict[str, FamilySource] = {}
    for path in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if not MAY_HAVE_EXPERTS.search(source):
            continue  # parsing every modeling file takes seconds
        classes, is_decorated = _experts_classes(source)
        if classes:
            directory = path.parent.name
            module = f"transformers.models.{directory}.{path.stem}"
            families[directory] = FamilySource(directory, module, classes, is_decorated)
    return families


OUTSIDE = {
    name: FamilySource(name, f"mixtura.hf.families.{name}", (experts,), experts != "Step3p7Experts")
    for name, experts in (
        ("param2moe", "Param2MoEExperts"),
        ("sarvam_mla", "SarvamMLAExperts"),
        ("sarvam_moe", "SarvamMoEExperts"),
        ("step3p5", "Step3p7Experts"),
    )
}
"""Families that the package brings; Step3.5's layers are those of Transformers' Step3.7."""


LOADED_AS = {"step3p7": "step3p5"}
"""A family whose text model is saved without a head, and loaded as another with one."""


@functools.cache
def all_families() -> dict[str, FamilySource]:
    """Those of Transformers, and ours."""
    return discover() | OUTSIDE


@dataclass(frozen=True)
class TinyCase:
    """One family's tiny model, in eval mode, with inputs for it."""

    family: str
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    can_generate: bool
    experts_modules: list[str]
    block_modules: list[str]

    def output(self, model: PreTrainedModel) -> Tensor:
        """Run `model` on the inputs: logits (B,T,V), or hidden states (B,T,H) if it has no head."""
        result = model(**self.inputs)
        output: Tensor = result.logits if "logits" in result else result.last_hidden_state
        return output


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> TinyCase:
    """Build the family's smallest text model with MoE layers, all weights drawn from `seed`.

    A model in another dtype holds the float32 model's weights, rounded.

    Raises:
        KeyError: the family is neither in the installed Transformers nor ours, or is one of
            EXCEPTIONS.
    """
    if family in EXCEPTIONS:
        raise KeyError(f"{family} has no tiny model: {EXCEPTIONS[family]}")
    source = all_families()[family]
    model_class = _text_model_class(source)
    config = _tiny_config(family, model_class)
    model = _build(model_class, config, torch.float32, seed)
    _randomize_(model, seed)
    if dtype != torch.float32:
        exact = dict(_stored_tensors(model))
        model = _build(model_class, config, dtype, seed)
        _copy_rounded_(model, exact, dtype)
    experts = [n for n, m in model.named_modules() if type(m).__name__ in source.experts_classes]
    tokens = torch.randint(
        FIRST_ORDINARY_TOKEN,
        SIZES["vocab_size"],
        (BATCH_SIZE, NUM_TOKENS),
        generator=torch.Generator().manual_seed(seed),
    )
    inputs = {"input_ids": tokens}
    if family == "ernie4_5_vl_moe":  # its second set of experts serves image tokens
        inputs["moe_mm_token_type_ids"] = tokens % 2
    return TinyCase(
        family=family,
        model=model,
        inputs=inputs,
        can_generate=model.can_generate(),
        experts_modules=experts,
        block_modules=list(dict.fromkeys(name.rpartition(".")[0] for name in experts)),
    )


def _text_model_class(source: FamilySource) -> type[PreTrainedModel]:
    """The causal language model, else the text model, else any model: the shortest such name."""
    module = importlib.import_module(source.module)
    models = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == source.module
        and value.__name__ == name  # not an alias
        and "PreTrained" not in name
    ]
    for ending in ("ForCausalLM", "TextModel", "Model"):
        if named := [value for value in models if value.__name__.endswith(ending)]:
            return min(named, key=lambda value: len(value.__name__))
    raise LookupError(
        f"{source.module} must define a text model; got {[m.__name__ for m in models]}."
    )


def _tiny_config(family: str, model_class: type[PreTrainedModel]) -> PretrainedConfig:
    config_class = model_class.config_class
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention has no grouped key/value heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    values.update(OVERRIDES.get(family, {}))
    return config_class(**copy.deepcopy(values))  # some configs edit the lists they are given


def _build(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(
            config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval()


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and those buffers that a checkpoint holds."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


@torch.no_grad()
def _randomize_(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in _stored_tensors(model):
        noise = torch.randn(tensor.shape, generator=generator)
        is_bias = "bias" in name.rpartition(".")[2]
        if not isinstance(tensor, nn.Parameter):
            if is_bias:  # added to scores to select experts
                tensor.copy_(noise * NOISE_STD)
            elif not tensor.is_floating_point():  # expert ids (V,K), K different ones in each row
                all_ids = torch.rand(len(tensor), NUM_EXPERTS, generator=generator).argsort(-1)
                tensor.copy_(all_ids[:, : tensor.shape[1]])
        elif tensor.ndim < 2 or is_bias:  # norms, scales, decays: near where the family starts them
            tensor.add_(noise, alpha=NOISE_STD)
        elif ROUTER_NAME.search(name):
            tensor.copy_(noise * ROUTER_GAIN / tensor.shape[-1] ** 0.5)
        else:
            tensor.copy_(noise * WEIGHT_STD)


@torch.no_grad()
def _copy_rounded_(model: PreTrainedModel, exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    kept = [re.compile(p.replace("*", ".*")) for p in model._get_dtype_plan(dtype)]
    for name, tensor in _stored_tensors(model):
        stays_exact = any(pattern.search(name) for pattern in kept)
        tensor.data = exact[name].to(torch.float32 if stays_exact else tensor.dtype)
