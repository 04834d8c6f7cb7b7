"""How checkpoints of the families become their models' parameters, and back: names and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

BIAS = "mlp.gate.e_score_correction_bias"


class AsStored(ConversionOps):  # type: ignore[misc]
    """Changes nothing: parameters are written as they are."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """The same."""
        return input_dict


class ZeroMean(ConversionOps):  # type: ignore[misc]
    """Makes a selection bias zero-mean: `bias - mean(bias)`.

    A bias whose mean is zero but for rounding is left as it is, so that what has been loaded once
    is written and loaded again without a change.
    """

    def convert(
        self, input_dict: dict[str, Any], target_patterns: Sequence[str], **_: Any
    ) -> dict[str, Any]:
        """One tensor, under the name that it has in the model."""
        (stored,) = input_dict.values()
        bias: Tensor = stored[0] if isinstance(stored, list) else stored
        mean = bias.double().mean()
        rounding = torch.finfo(bias.dtype).eps * bias.abs().max()
        return {target_patterns[0]: torch.where(mean.abs() <= rounding, bias, bias - mean)}

    @property
    def reverse_op(self) -> ConversionOps:
        """What is written is the bias that is used."""
        return AsStored()


class ZeroExpertRows(ConversionOps):  # type: ignore[misc]
    """Fills LongCat-Flash's rows for zero experts, which no file need hold, with zeros.

    Transformers keeps such rows behind those of the routed experts, and never reads them.
    """

    def convert(self, input_dict: dict[str, Any], config: Any, **_: Any) -> dict[str, Any]:
        """(E, 2I, H) -> (E + zero experts, 2I, H); a stack that has them is left as it is."""
        num_zero = config.zero_expert_num or 0
        filled = {}
        for name, stack in input_dict.items():
            if len(stack) == config.n_routed_experts:
                stack = torch.cat([stack, stack.new_zeros(num_zero, *stack.shape[1:])])
            filled[name] = stack
        return filled

    @property
    def reverse_op(self) -> ConversionOps:
        """The rows are written, as Transformers alone asks for them."""
        return AsStored()


def sarvam_mla() -> list[WeightTransform]:
    """Experts become stacks, and the bias zero-mean."""
    return [*_stacked_experts(), WeightConverter(BIAS, BIAS, [ZeroMean()])]


def bailing_moe() -> list[WeightTransform]:
    """The names of Param2MoE and Sarvam-MoE become the usual ones."""
    return [
        WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"\.attention\.", ".self_attn."),
        WeightRenaming(r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.mlp\.gate\.expert_bias", f".{BIAS}"),
        *sarvam_mla(),
    ]


def step3p5() -> list[WeightTransform]:
    """Step3.7's, of its MoE layers alone: no model around the text model has to be named."""
    return [
        transform
        for transform in get_checkpoint_conversion_mapping("step3p7")
        if any("moe" in name or "share_expert" in name for name in transform.source_patterns)
    ]


def longcat_flash() -> list[WeightTransform]:
    """Transformers' own, and rows for zero experts."""
    found: list[WeightTransform] = get_checkpoint_conversion_mapping("longcat_flash")
    for transform in found:
        if transform.target_patterns == ["mlp.experts.gate_up_proj"]:
            transform.operations.append(ZeroExpertRows())
    return found


def _stacked_experts() -> list[WeightTransform]:
    found: list[WeightTransform] = get_checkpoint_conversion_mapping("qwen2_moe")
    return found
