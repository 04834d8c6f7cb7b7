"""Make a random model of OLMoE-1B-7B's shape, and its GGUF twin, to measure whole models with.

python benchmarks/make_model.py /tmp/olmoe                     # 14 GB in bf16
python benchmarks/make_model.py /tmp/olmoe --gguf q4_0         # its twin, one format at a time
python benchmarks/make_model.py /tmp/small --layers 2          # enough to try things

A layer at a time is in memory. Every expert of a layer has the same rows in another order, which
is quick to make and just as slow to run. The twin is written with the gguf package. Nothing is
written where the disk has no room, and what to delete afterwards is printed.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtura.cli.options import DEMO
from mixtura.errors import InputError, MissingDependency, MixturaError

MARGIN_BYTES = 2**30
"""Left free on the disk."""

NORM_SCALE, WEIGHT_SCALE = 1.0, 0.02
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""Those of the model in the box; ids above its vocabulary stand for nothing."""

SIZES = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
"""Source: config.json of allenai/OLMoE-1B-7B-0924."""


class GgufFormat(StrEnum):
    """Formats of the twin that the gguf package can write."""

    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return {"bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}[self.value]


@dataclass(frozen=True)
class Sizes:
    """Shapes of all tensors of a model, by the names of its checkpoint."""

    config: dict[str, Any]

    def outside(self) -> dict[str, tuple[int, ...]]:
        """What belongs to no layer."""
        table = (self.config["vocab_size"], self.config["hidden_size"])
        return {
            "model.embed_tokens.weight": table,
            "model.norm.weight": table[1:],
            "lm_head.weight": table,
        }

    def layer(self, number: int) -> dict[str, tuple[int, ...]]:
        """One decoder layer, its experts last."""
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        found: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_norm.weight": (hidden,),
            "self_attn.k_norm.weight": (hidden,),
            **{f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"},
            "mlp.gate.weight": (self.config["num_experts"], hidden),
        }
        for expert in range(self.config["num_experts"]):
            prefix = f"mlp.experts.{expert}"
            found[f"{prefix}.gate_proj.weight"] = (inner, hidden)
            found[f"{prefix}.up_proj.weight"] = (inner, hidden)
            found[f"{prefix}.down_proj.weight"] = (hidden, inner)
        return {f"model.layers.{number}.{name}": shape for name, shape in found.items()}

    @property
    def num_weights(self) -> int:
        """Of the whole model."""
        shapes = [*self.outside().values(), *self.layer(0).values()]
        outside = sum(torch.Size(shape).numel() for shape in self.outside().values())
        total = sum(torch.Size(shape).numel() for shape in shapes)
        return outside + (total - outside) * int(self.config["num_hidden_layers"])


def main(
    directory: Annotated[Path, typer.Argument(help="The model's directory.")],
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 16,
    hidden: Annotated[int, typer.Option(min=64, help="Hidden size; 128 to a head.")] = 2048,
    gguf: Annotated[
        GgufFormat | None, typer.Option(help="Write the twin of the model that is there.")
    ] = None,
) -> None:
    try:
        if gguf is None:
            made = make_model(directory, layers, hidden)
            print(f"When done: rm -r {made}")
        else:
            made = make_twin(directory, gguf)
            print(f"When done: rm {made}")
    except MixturaError as error:
        raise SystemExit(f"error: {error}") from None


# ---------------------------------------------------------------------------------- safetensors


def make_model(directory: Path, num_layers: int, hidden_size: int = 2048) -> Path:
    """Write configuration, tokenizer and weights, a file for each layer."""
    config = {**SIZES, "num_hidden_layers": num_layers, "hidden_size": hidden_size}
    heads = max(1, hidden_size // 128)
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    sizes = Sizes(config)
    if (directory / "config.json").exists():
        raise InputError(
            f"the directory ({directory}) must hold no model yet; got one. Delete it, or choose "
            f"another."
        )
    check_disk(directory, 2 * sizes.num_weights)
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, directory / name)
    ends = json.loads((DEMO / "config.json").read_text())["eos_token_id"]
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["OlmoeForCausalLM"],
                "model_type": "olmoe",
                "dtype": "bfloat16",
                "hidden_act": "silu",
                "norm_topk_prob": False,
                "tie_word_embeddings": False,
                "bos_token_id": None,
                "eos_token_id": ends,
                "pad_token_id": None,
                **config,
            },
            indent=2,
        )
    )
    write_weights(directory, sizes, num_layers)
    return directory


def write_weights(directory: Path, sizes: Sizes, num_layers: int) -> None:
    """A file for what belongs to no layer, one for each layer, and the index."""
    groups = [sizes.outside(), *(sizes.layer(number) for number in range(num_layers))]
    index: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(groups):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        tensors = random_tensors(shapes, seed=number)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        print(f"{number + 1}/{len(groups)}  {file}", flush=True)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    )


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random weights in bf16; experts are the first one's with their rows turned round."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensors[name] = torch.full(shape, NORM_SCALE, dtype=torch.bfloat16)
            continue
        expert, projection = expert_of(name)
        kind = projection or name
        if kind not in drawn:
            weight = torch.randn(shape, generator=generator).mul_(WEIGHT_SCALE)
            drawn[kind] = weight.to(torch.bfloat16)
        # Safetensors wants every tensor in memory of its own, which `roll` gives.
        tensors[name] = drawn[kind].roll(7 * expert, 0) if projection else drawn[kind]
    return tensors


def expert_of(name: str) -> tuple[int, str]:
    """(3, "up_proj") for an expert's weight; (0, "") for others."""
    _, found, rest = name.partition(".experts.")
    if not found:
        return 0, ""
    expert, projection, _ = rest.split(".")
    return int(expert), projection


def check_disk(directory: Path, num_bytes: int) -> None:
    """Raise `InputError` unless the disk has room for so many bytes."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if num_bytes + MARGIN_BYTES > free:
        raise InputError(
            f"the disk of {directory} ({free / 1e9:.1f} GB free) must have room for "
            f"{(num_bytes + MARGIN_BYTES) / 1e9:.1f} GB; got less. Delete something, take fewer "
            f"--layers or another disk."
        )


# ----------------------------------------------------------------------------------------- GGUF

Read = Callable[[str], Tensor]


def make_twin(directory: Path, format: GgufFormat) -> Path:
    """Write the model of a directory as a GGUF file, tensor by tensor."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:
        raise MissingDependency(
            "gguf (not installed) must be there to write a GGUF file; got none. pip install gguf."
        ) from None
    if not (directory / "model.safetensors.index.json").exists():
        raise InputError(
            f"the directory ({directory}) must hold a model; got none. Make it first, without "
            f"--gguf."
        )
    config = json.loads((directory / "config.json").read_text())
    check_disk(directory, int(Sizes(config).num_weights * max(format.bits, 8.5) / 8))
    path = directory / f"model-{format.value}.gguf"
    writer = gguf.GGUFWriter(path, "olmoe")
    describe(writer, config)
    write_vocabulary(gguf, writer, directory, config["vocab_size"])
    tensors = list(twin_tensors(gguf, config, format))
    for name, shape, kind, _ in tensors:
        add_tensor_info(gguf, writer, name, shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    read = reader(directory)
    for number, (name, _, kind, sources) in enumerate(tensors):
        writer.write_tensor_data(encode(gguf, [read(source) for source in sources], kind))
        if name.endswith("ffn_down_exps.weight"):
            print(f"{number + 1}/{len(tensors)}  {name}", flush=True)
    writer.close()
    return path


def describe(writer: Any, config: dict[str, Any]) -> None:
    """The hyperparameters, as llama.cpp reads them."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])


def write_vocabulary(gguf: Any, writer: Any, directory: Path, vocab_size: int) -> None:
    """The tokenizer's tokens and merges, filled up with unused tokens."""
    stored = json.loads((directory / "tokenizer.json").read_text())
    tokens = [f"<unused {number}>" for number in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for token, number in stored["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for added in stored["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = stored["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_eos_token_id(stored["added_tokens"][0]["id"] if stored["added_tokens"] else 0)


TwinTensor = tuple[str, tuple[int, ...], Any, list[str]]
"""Name in the GGUF file, shape, format, and the checkpoint's tensors that it stacks."""


def twin_tensors(gguf: Any, config: dict[str, Any], format: GgufFormat) -> Iterator[TwinTensor]:
    """Every tensor of the twin. Norms and router stay fp32; beside 4-bit experts the head and the
    embedding have 8 bits."""
    kinds = gguf.GGMLQuantizationType
    kind = {"bf16": kinds.BF16, "q8_0": kinds.Q8_0, "q4_0": kinds.Q4_0}[format.value]
    table_kind = kinds.Q8_0 if format is GgufFormat.Q4_0 else kind
    sizes = Sizes(config)
    outside = sizes.outside()
    yield from (
        ("token_embd.weight", outside["lm_head.weight"], table_kind, ["model.embed_tokens.weight"]),
        ("output_norm.weight", outside["model.norm.weight"], kinds.F32, ["model.norm.weight"]),
        ("output.weight", outside["lm_head.weight"], table_kind, ["lm_head.weight"]),
    )
    names = {
        "input_layernorm": ("attn_norm", kinds.F32),
        "post_attention_layernorm": ("ffn_norm", kinds.F32),
        "self_attn.q_norm": ("attn_q_norm", kinds.F32),
        "self_attn.k_norm": ("attn_k_norm", kinds.F32),
        "self_attn.q_proj": ("attn_q", kind),
        "self_attn.k_proj": ("attn_k", kind),
        "self_attn.v_proj": ("attn_v", kind),
        "self_attn.o_proj": ("attn_output", kind),
        "mlp.gate": ("ffn_gate_inp", kinds.F32),
    }
    for number in range(config["num_hidden_layers"]):
        prefix, shapes = f"model.layers.{number}", sizes.layer(number)
        for theirs, (ours, each) in names.items():
            source = f"{prefix}.{theirs}.weight"
            yield f"blk.{number}.{ours}.weight", shapes[source], each, [source]
        for part in ("gate", "up", "down"):
            experts = range(config["num_experts"])
            sources = [f"{prefix}.mlp.experts.{e}.{part}_proj.weight" for e in experts]
            shape = (len(sources), *shapes[sources[0]])
            yield f"blk.{number}.ffn_{part}_exps.weight", shape, kind, sources


def add_tensor_info(gguf: Any, writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    """Announce a tensor; its data follow later, in the same order."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = torch.Size(shape).numel() // block * size
    numpy: Any = importlib.import_module("numpy")
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor_info(name, shape, numpy.dtype("float32"), num_bytes)
        return
    stored = (*shape[:-1], shape[-1] // block * size)  # the writer turns bytes into elements
    writer.add_tensor_info(name, stored, numpy.dtype("uint8"), num_bytes, raw_dtype=kind)


def reader(directory: Path) -> Read:
    """A function that reads one tensor of the checkpoint; one file at a time is open."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    opened: dict[str, Any] = {}

    def read(name: str) -> Tensor:
        file = index[name]
        if file not in opened:
            opened.clear()
            opened[file] = safe_open(directory / file, framework="pt")
        tensor: Tensor = opened[file].get_tensor(name)
        return tensor

    return read


def encode(gguf: Any, tensors: list[Tensor], kind: Any) -> Any:
    """The bytes of one tensor of the twin, a stack where there are several."""
    numpy: Any = importlib.import_module("numpy")
    parts = [gguf.quants.quantize(tensor.float().numpy(), kind) for tensor in tensors]
    return parts[0] if len(parts) == 1 else numpy.stack(parts)


if __name__ == "__main__":
    typer.run(main)
