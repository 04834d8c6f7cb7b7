"""What LoRA adapters add to a layer's experts: checked once, and laid out as every kernel reads it.

Weights are neither merged with adapters nor rebuilt: kernels add `B (A x)` beside their products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtura.config import ExpertsConfig
from mixtura.errors import InputError
from mixtura.kernels.lora import LORA_LANES
from mixtura.lora import Adapters, LoraWeights, LowRank

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What factors may be stored in."""


def kept(
    adapters: Sequence[LoraWeights | None], config: ExpertsConfig, device: torch.device
) -> Adapters:
    """Adapters as experts keep them: without gradients, every factor rank by rank.

    Args:
        adapters: by number; None where one adds nothing to these experts.
        config: of the experts. device: where their weights are.

    Raises:
        InputError: a factor has another shape, dtype or device than the experts ask for or is not
            finite, or ungated experts get a gate.
    """
    found: list[LoraWeights | None] = []
    for number, adapter in enumerate(adapters):
        if adapter is not None:
            _check(number, adapter, config, device)
        found.append(laid_out(adapter) if adapter is not None and adapter.parts() else None)
    return tuple(found)


def _check(number: int, adapter: LoraWeights, config: ExpertsConfig, device: torch.device) -> None:
    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    if adapter.gate is not None and not config.is_gated:
        raise InputError(
            f"adapter {number} must have no gate where experts are ungated; got one. Give what it "
            f"adds to their first projection as `up`."
        )
    sizes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    for name, part in adapter.parts().items():
        num_in, num_out = sizes[name]
        shapes = tuple(part.a.shape), tuple(part.b.shape)
        wanted = (count, part.rank, num_in), (count, num_out, part.rank)
        if shapes != wanted:
            raise InputError(
                f"A and B of {name} of adapter {number} ({shapes[0]}, {shapes[1]}) must fit these "
                f"experts; got {wanted[0]}, {wanted[1]} from their sizes. Use an adapter of this "
                f"model, cut for this rank."
            )
        for factor, tensor in (("A", part.a), ("B", part.b)):
            _check_factor(f"{factor} of {name} of adapter {number}", tensor, device)


def _check_factor(name: str, factor: Tensor, device: torch.device) -> None:
    if factor.dtype not in DTYPES:
        raise InputError(
            f"{name} ({factor.dtype}) must be fp32, bf16 or fp16; got another dtype. Convert it."
        )
    if factor.device != device:
        raise InputError(
            f"{name} ({factor.device}) must be where the experts are; got {device} there. Move it."
        )
    if not bool(torch.isfinite(factor).all()):
        raise InputError(
            f"{name} {tuple(factor.shape)} must be finite; got an infinity or a NaN. Repair the "
            f"adapter."
        )


def laid_out(adapter: LoraWeights) -> LoraWeights:
    """The same values, laid out for kernels (`LORA_LANES`); those that are stay."""
    of_a: dict[int, Tensor] = {}  # gate and up may share one

    def part(old: LowRank) -> LowRank:
        a = of_a.setdefault(id(old.a), _rank_by_rank(old.a))
        return LowRank(a, _rank_by_rank(old.b.mT).mT)

    return LoraWeights(**{name: part(old) for name, old in adapter.parts().items()})


def _rank_by_rank(factor: Tensor) -> Tensor:
    """(L, r, n) with rows that end in `LORA_LANES` zeros at least, at multiples of as many."""
    count, rank, size = factor.shape
    padded = (size // LORA_LANES + 1) * LORA_LANES
    if factor.stride() == (rank * padded, padded, 1) and not factor.requires_grad:
        return factor
    rows = factor.new_zeros((count, rank, padded))
    rows[..., :size] = factor.detach()
    return rows[..., :size]


def moved(adapters: Adapters, device: torch.device) -> Adapters:
    """The same adapters on a device."""
    there = (one and one.mapped(lambda factor: factor.to(device)) for one in adapters)
    return tuple(one and laid_out(one) for one in there)
