"""Tensors of checkpoints that a model is whole without, each by a rule that has a name."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

RULES = (
    ("table of rotary angles", re.compile(r"rotary_emb\.inv_freq$")),
    (
        "scale of a quantized key-value cache",
        re.compile(r"(?<![^.])(k|v|q|kv|prob|attn|output)_(scale|zero_point)$"),
    ),
    ("bound of activations", re.compile(r"(?<![^.])input_scale_ub$")),
)
"""Whatever the family. A cache here is never quantized, and activations are measured."""

EXPERT = "expert"
"""A tensor of an expert is never a cache's."""

GGUF_RULE = "nothing of the architecture is made of it"
"""Tensors of GGUF files that are tables, or of layers that predict tokens ahead."""


def exclusion_rule(name: str, model: PreTrainedModel) -> str | None:
    """Which rule says that a stored tensor needs no place in a model; None where none does.

    Args:
        name: of the tensor. model: may be on the meta device.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(_keys_to_ignore_on_load_unexpected=[r"^mtp"])
    >>> exclusion_rule("model.layers.3.self_attn.k_proj.k_scale", model)
    'scale of a quantized key-value cache'
    >>> exclusion_rule("mtp.layers.0.fc.weight", model)
    "SimpleNamespace ignores '^mtp'"
    """
    for pattern in model._keys_to_ignore_on_load_unexpected or ():
        if re.search(pattern, name):
            return f"{type(model).__name__} ignores {str(pattern)!r}"
    if EXPERT in name:
        return None
    return next((rule for rule, pattern in RULES if pattern.search(name)), None)
