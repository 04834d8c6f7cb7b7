"""The weights of one rank: its experts out of all, and its cut of each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mixtura.config import ExpertsConfig, GateUp
from mixtura.errors import ConfigError
from mixtura.lora import LoraWeights, LowRank
from mixtura.parallel.ranks import Spread
from mixtura.quant.activations import StaticInputs
from mixtura.quant.cuts import cut_columns, cut_rows, take_experts
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.types import ExpertWeights


def shard_weights(weights: ExpertWeights, spread: Spread) -> ExpertWeights:
    """This rank's weights out of those of all experts.

    Args:
        weights: of the logical experts.
        spread: which are this rank's, and into how many parts each is cut.

    Raises:
        ConfigError: a group of quantized weights would be cut, or a rank has an empty slot.
    """
    experts = local_experts(spread)

    def taken(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[torch.tensor(experts, device=tensor.device)]

    def inputs_of(inputs: StaticInputs | None) -> StaticInputs | None:
        if inputs is None:
            return None
        return inputs.mapped(lambda scales: scales[torch.tensor(experts, device=scales.device)])

    def matrix(stack: QuantizedMatrix) -> QuantizedMatrix:
        return take_experts(stack, experts)

    mine = replace(
        weights,
        config=replace(weights.config, num_experts=len(experts)),
        gate_up_proj=matrix(weights.gate_up_proj),
        down_proj=matrix(weights.down_proj),
        up_proj=None if weights.up_proj is None else matrix(weights.up_proj),
        gate_up_bias=taken(weights.gate_up_bias),
        down_bias=taken(weights.down_bias),
        gate_up_inputs=inputs_of(weights.gate_up_inputs),
        down_inputs=inputs_of(weights.down_inputs),
    )
    return cut_weights(mine, spread.ranks.tp_rank, spread.ranks.config.tp_size)


def shard_lora(adapter: LoraWeights, spread: Spread) -> LoraWeights:
    """This rank's part of an adapter of all logical experts: its slots', its cut of each.

    B of gate and up loses outputs and A of down inputs, so that the ranks' parts of a sum have what
    the adapter adds once.

    Args:
        adapter: of the logical experts.
        spread: which are this rank's now; with the placement in force where experts have moved.

    Raises:
        ConfigError: the adapter has another number of experts, or a rank has an empty slot.
    """
    experts, placement = local_experts(spread), spread.placement
    part, parts = spread.ranks.tp_rank, spread.ranks.config.tp_size
    for name, factors in adapter.parts().items():
        if factors.num_experts != placement.num_experts:
            raise ConfigError(
                f"{name} of an adapter ({factors.num_experts} experts) must be of all experts to "
                f"be shared by ranks; got {placement.num_experts} in the model. Give it whole."
            )
    mine = adapter.mapped(lambda t: t[torch.tensor(experts, device=t.device)])

    def cut(factors: LowRank | None, *, is_down: bool = False) -> LowRank | None:
        if factors is None or parts == 1:
            return factors
        a, b = factors.a, factors.b
        width = (a.shape[2] if is_down else b.shape[1]) // parts
        mine = slice(part * width, (part + 1) * width)
        return LowRank(a[..., mine], b) if is_down else LowRank(a, b[:, mine])

    return LoraWeights(cut(mine.gate), cut(mine.up), cut(mine.down, is_down=True))


def local_experts(spread: Spread) -> list[int]:
    """The logical experts of this rank's slots, in their order.

    Raises:
        ConfigError: a slot is empty.
    """
    ids = spread.placement.expert_map(spread.ranks.ep_rank).local_to_logical.tolist()
    if -1 in ids:
        raise ConfigError(
            f"every slot of rank {spread.ranks.ep_rank} must hold an expert; got an empty one "
            f"({len(ids)} slots). Use fewer redundant experts."
        )
    return ids


def cut_weights(weights: ExpertWeights, part: int, parts: int) -> ExpertWeights:
    """Part `part` of experts whose intermediate size is cut in `parts`.

    Gate and up lose rows, down loses columns; the bias of down stays with part 0, so that the sum
    of the parts has it once.

    Raises:
        ConfigError: the size is not divisible, or a group of quantized weights would be cut.
    """
    if parts == 1:
        return weights
    config = weights.config
    width = config.intermediate_size // parts
    if width * parts != config.intermediate_size:
        raise ConfigError(
            f"intermediate_size ({config.intermediate_size}) must be divisible by tp_size; got "
            f"{parts}. Use fewer ranks to an expert."
        )
    start, stop = part * width, (part + 1) * width
    rows = up_rows(config, start, stop)
    bias, down_bias = weights.gate_up_bias, weights.down_bias
    return replace(
        weights,
        config=replace(config, intermediate_size=width),
        gate_up_proj=cut_rows(weights.gate_up_proj, rows),
        up_proj=None if weights.up_proj is None else cut_rows(weights.up_proj, rows),
        down_proj=cut_columns(weights.down_proj, start, stop),
        gate_up_bias=None if bias is None else torch.cat([bias[:, a:b] for a, b in rows], 1),
        down_bias=down_bias if part == 0 or down_bias is None else torch.zeros_like(down_bias),
    )


def up_rows(config: ExpertsConfig, start: int, stop: int) -> list[tuple[int, int]]:
    """The rows of gate and up that make intermediate features `start .. stop - 1`."""
    if config.gate_up is GateUp.STACKED:
        shift = config.intermediate_size
        return [(start, stop), (start + shift, stop + shift)]
    if config.gate_up is GateUp.INTERLEAVED:
        return [(2 * start, 2 * stop)]
    return [(start, stop)]
