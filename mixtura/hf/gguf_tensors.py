"""Which tensors of a GGUF file make up which tensor of a Transformers checkpoint.

llama.cpp's converter renames a checkpoint's tensors, stacks experts, and moves some rows. Here that
is undone: a `Rule` says for one tensor of a checkpoint which stored tensors it comes from, and the
`Change` that makes it of them.

Source: the converters of llama.cpp, and `gguf.TensorNameMap`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixtura.errors import CheckpointError, UnsupportedModel

EXPERT = "*"
"""What stands for the number of an expert in a dense name: there is one tensor for each."""

LAYER = re.compile(r"^blk\.(\d+)\.(.+)$")
"""A stored tensor of a layer: its number, and the name in it."""

_NOT_NEEDED = ("rope_freqs.weight", "attn_rot_embd.weight")
"""Tables that a model computes from its configuration."""

COMPANIONS = (".scale", ".input_scale")
"""Ends of tensors that belong to the weight of the same name."""


class Change(ABC):
    """What makes a dense tensor of stored ones."""

    @abstractmethod
    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        """The dense tensor, with the experts in front where it is a stack."""

    def rows(self, num_rows: int) -> Tensor | None:
        """The stored row that each dense row is, of so many; None where more than rows change.

        What it gives is true of packed rows as well.
        """
        return None


@dataclass(frozen=True)
class AsStored(Change):
    """The same tensor."""

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def rows(self, num_rows: int) -> Tensor | None:
        return torch.arange(num_rows)


@dataclass(frozen=True)
class HeadRows(Change):
    """Queries or keys of Llama: stored with the two halves of a head's rotary pairs side by side.

    Row `(head, half, pair)` of the checkpoint is row `(head, pair, half)` of the file.
    """

    num_heads: int

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = self.rows(len(tensors[0]))
        assert rows is not None
        return tensors[0][rows.to(tensors[0].device)]

    def rows(self, num_rows: int) -> Tensor | None:
        if num_rows % (2 * self.num_heads):
            raise CheckpointError(
                f"the rows of queries or keys ({num_rows}) must be divisible by twice their heads; "
                f"got {self.num_heads} heads. Fetch the file again."
            )
        return torch.arange(num_rows).reshape(self.num_heads, -1, 2).transpose(1, 2).flatten()


@dataclass(frozen=True)
class HalfOfRows(Change):
    """The first or the second half of the rows of every expert: gates, then ups."""

    number: int

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].chunk(2, -2)[self.number]

    def rows(self, num_rows: int) -> Tensor | None:
        return torch.arange(num_rows // 2) + self.number * (num_rows // 2)


@dataclass(frozen=True)
class OneRow(Change):
    """A vector that is a matrix of one row."""

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].reshape(1, -1)


@dataclass(frozen=True)
class Transposed(Change):
    """Experts (E, N, K) that the checkpoint has as (E, K, N)."""

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].transpose(1, 2)


@dataclass(frozen=True)
class Interleaved(Change):
    """Gate and up, (E, I, H) or biases (E, I), as alternating columns (E, H, 2I) or (E, 2I)."""

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        gate, up = (t.transpose(1, 2) if t.dim() == 3 else t for t in tensors)
        return torch.stack([gate, up], -1).flatten(-2)


@dataclass(frozen=True)
class KeysAndValues(Change):
    """Latent attention: keys (heads, rank, keys) and values (heads, values, rank) as one matrix."""

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        keys, values = tensors
        return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


@dataclass(frozen=True)
class Rule:
    """One tensor of a checkpoint, in every layer that has it.

    Attributes:
        dense: its name; behind `model.layers.N.` in a layer.
        stored: the names it comes from; behind `blk.N.` in a layer.
        change: what makes it of them.
    """

    dense: str
    stored: tuple[str, ...]
    change: Change = AsStored()


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of a Transformers checkpoint, or one for each expert, and where it comes from.

    Attributes:
        name: in the checkpoint; `*` stands for the number of the expert, which is the first axis
            of what `change` gives.
        stored: names in the GGUF file. change: what makes it of them.
        layer: the decoder layer it belongs to.
    """

    name: str
    stored: tuple[str, ...]
    change: Change
    layer: int | None = None

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        """The dense tensor, with the experts in front where it is a stack.

        Args:
            tensors: the stored ones.

        Raises:
            CheckpointError: their shapes do not fit together.
        """
        try:
            return self.change.apply(tensors)
        except (RuntimeError, ValueError, IndexError):
            shapes = ", ".join(
                f"{n} {tuple(t.shape)}" for n, t in zip(self.stored, tensors, strict=True)
            )
            raise CheckpointError(
                f"{shapes} (stored tensors) must fit together as {self.name}; got other shapes. "
                f"Fetch the file again."
            ) from None

    @property
    def is_stack(self) -> bool:
        """Whether there is one tensor for each expert."""
        return EXPERT in self.name

    def expert(self, number: int) -> str:
        """The name of one expert's tensor."""
        return self.name.replace(EXPERT, str(number), 1)


def _same(names: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(dense, (stored,)) for stored, dense in names.items())


_OUTSIDE = _same(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)

_PARTS = ("gate", "up", "down")
_ATTENTION = _same(
    {
        "attn_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "attn_output.bias": "self_attn.o_proj.bias",
        "attn_v.weight": "self_attn.v_proj.weight",
        "attn_v.bias": "self_attn.v_proj.bias",
    }
)
_QK_NORMS = _same(
    {
        "attn_q_norm.weight": "self_attn.q_norm.weight",
        "attn_k_norm.weight": "self_attn.k_norm.weight",
    }
)
_ROUTER = _same({"ffn_gate_inp.weight": "mlp.gate.weight"})
_DENSE_MLP = _same({f"ffn_{part}.weight": f"mlp.{part}_proj.weight" for part in _PARTS})
_SHARED = _same(
    {f"ffn_{part}_shexp.weight": f"mlp.shared_expert.{part}_proj.weight" for part in _PARTS}
)
_MANY_SHARED = _same(
    {f"ffn_{part}_shexp.weight": f"mlp.shared_experts.{part}_proj.weight" for part in _PARTS}
)


def _queries_and_keys(query: Change | None = None, key: Change | None = None) -> tuple[Rule, ...]:
    changes = {"q": query or AsStored(), "k": key or AsStored()}
    return tuple(
        Rule(f"self_attn.{part}_proj.{kind}", (f"attn_{part}.{kind}",), change)
        for part, change in changes.items()
        for kind in ("weight", "bias")
    )


def _experts(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Experts whose checkpoint has a tensor for each: in one stack for each projection, or in one
    for gate and up."""
    names = {"gate": gate, "up": up, "down": down}
    dense = {part: f"{prefix}.{EXPERT}.{name}.weight" for part, name in names.items()}
    return (
        *(Rule(dense[part], (f"ffn_{part}_exps.weight",)) for part in _PARTS),
        Rule(dense["gate"], ("ffn_gate_up_exps.weight",), HalfOfRows(0)),
        Rule(dense["up"], ("ffn_gate_up_exps.weight",), HalfOfRows(1)),
    )


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_OWN_EXPERTS = _experts("mlp.experts", *_PROJECTIONS)
_PLAIN = (*_ATTENTION, *_queries_and_keys(), *_ROUTER, *_OWN_EXPERTS)

_GPT_OSS = (
    *_ATTENTION,
    *_queries_and_keys(),
    *_same(
        {
            "post_attention_norm.weight": "post_attention_layernorm.weight",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp.weight": "mlp.router.weight",
            "ffn_gate_inp.bias": "mlp.router.bias",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        }
    ),
    Rule("mlp.experts.down_proj", ("ffn_down_exps.weight",), Transposed()),
    Rule("mlp.experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), Interleaved()),
    Rule(
        "mlp.experts.gate_up_proj_bias", ("ffn_gate_exps.bias", "ffn_up_exps.bias"), Interleaved()
    ),
)

_DEEPSEEK = (
    *_PLAIN,
    *_DENSE_MLP,
    *_MANY_SHARED,
    *_same(
        {
            "attn_q_a.weight": "self_attn.q_a_proj.weight",
            "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
            "attn_q_b.weight": "self_attn.q_b_proj.weight",
            "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
            "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
            "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
            "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
        }
    ),
    Rule("self_attn.kv_b_proj.weight", ("attn_k_b.weight", "attn_v_b.weight"), KeysAndValues()),
)

_FIXED_RULES = {
    "qwen2moe": (
        *_PLAIN,
        *_SHARED,
        Rule("mlp.shared_expert_gate.weight", ("ffn_gate_inp_shexp.weight",), OneRow()),
    ),
    "qwen3moe": (*_PLAIN, *_QK_NORMS),
    "olmoe": (*_PLAIN, *_QK_NORMS),
    "deepseek2": _DEEPSEEK,
    "gpt-oss": _GPT_OSS,
}


def layer_rules(architecture: str, config: Any) -> tuple[Rule, ...]:
    """The rules for a layer of an architecture.

    Args:
        architecture: `general.architecture` of the file.
        config: the Transformers configuration, for the number of heads.

    Raises:
        UnsupportedModel: the architecture is not known.
    """
    if architecture == "llama":
        query, key = HeadRows(config.num_attention_heads), HeadRows(config.num_key_value_heads)
        return (
            *_ATTENTION,
            *_queries_and_keys(query, key),
            *_same({"ffn_gate_inp.weight": "block_sparse_moe.gate.weight"}),
            *_experts("block_sparse_moe.experts", "w1", "w3", "w2"),
        )
    if architecture not in _FIXED_RULES:
        raise UnsupportedModel(
            f"the architecture ({architecture!r}) must be one of llama (Mixtral), "
            f"{', '.join(_FIXED_RULES)}; got another. Use the model's safetensors checkpoint."
        )
    return _FIXED_RULES[architecture]


def dense_tensors(
    names: Collection[str], rules: Iterable[Rule], num_layers: int
) -> list[DenseTensor]:
    """The checkpoint tensors that a file holds, in the order of its layers.

    Args:
        names: the stored tensors.
        rules: for a layer, of `layer_rules`.
        num_layers: of the model; layers that follow (multi-token prediction) are left out.

    Raises:
        CheckpointError: a stored tensor is none of the architecture's, two are the same dense one,
            or a part of one is missing.
    """
    by_layer: dict[int | None, set[str]] = {None: set()}
    for name in names:
        found = LAYER.match(name)
        layer = None if found is None else int(found[1])
        by_layer.setdefault(layer, set()).add(name if found is None else found[2])
    made: dict[str, DenseTensor] = {}
    rules = tuple(rules)
    for layer in (None, *range(num_layers)):
        stored = by_layer.get(layer)
        if stored is None:
            raise CheckpointError(
                f"layer {layer} (of {num_layers}) must be in the file; got no tensor of it. Fetch "
                f"the file again."
            )
        used: set[str] = set()
        for rule in _OUTSIDE if layer is None else rules:
            tensor = _apply_rule(rule, layer, stored)
            if tensor is None:
                continue
            if tensor.name in made:
                raise CheckpointError(
                    f"{tensor.name} ({', '.join(tensor.stored)}) must be stored once; got "
                    f"{', '.join(made[tensor.name].stored)} besides. Use another file."
                )
            made[tensor.name] = tensor
            used.update(rule.stored)
        _check_used(layer, stored, used)
    return list(made.values())


def _apply_rule(rule: Rule, layer: int | None, stored: set[str]) -> DenseTensor | None:
    present = [name for name in rule.stored if name in stored]
    if not present:
        return None
    ours, theirs = ("", "") if layer is None else (f"model.layers.{layer}.", f"blk.{layer}.")
    if len(present) < len(rule.stored):
        missing = next(name for name in rule.stored if name not in stored)
        raise CheckpointError(
            f"{theirs}{present[0]} (part of {ours}{rule.dense}) must come with {theirs}{missing}; "
            f"got none. Fetch the file again."
        )
    names = tuple(theirs + name for name in rule.stored)
    return DenseTensor(ours + rule.dense, names, rule.change, layer)


def _check_used(layer: int | None, stored: set[str], used: set[str]) -> None:
    weights = {name.removesuffix(".weight") for name in used if name.endswith(".weight")}
    known = {weight + end for weight in weights for end in COMPANIONS}
    unknown = sorted(stored - used - known - set(_NOT_NEEDED))
    if unknown:
        prefix = "" if layer is None else f"blk.{layer}."
        raise CheckpointError(
            f"{prefix}{unknown[0]} (a stored tensor) must be one that models of this architecture "
            f"have; got {len(unknown)} unknown. Use a file that a current llama.cpp has written, "
            f"or the model's safetensors checkpoint."
        )
