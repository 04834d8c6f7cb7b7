"""LoRA adapters beside the experts of one case: a kernel that adds them, against the reference."""

from __future__ import annotations

from dataclasses import replace

import torch

from mixtura.conformance.closeness import RTOL, relative_error
from mixtura.conformance.expert_cases import Case, widened
from mixtura.conformance.report import Refused, require
from mixtura.experts.lora import kept
from mixtura.kernels import ExpertsKernel
from mixtura.kernels.reference import ReferenceKernel
from mixtura.lora import LoraWeights, LowRank

RANKS = (1, 5)


def random_adapters(case: Case) -> list[LoraWeights | None]:
    """Two adapters of the case's experts, of other ranks and parts, and one of none of them."""
    config, device = case.config, case.device
    random = torch.Generator().manual_seed(case.seed)
    sizes = config.hidden_size, config.intermediate_size

    def part(rank: int, num_in: int, num_out: int) -> LowRank:
        a = torch.randn(config.num_experts, rank, num_in, generator=random)
        b = torch.randn(config.num_experts, num_out, rank, generator=random)
        return LowRank(*((f / f.shape[2] ** 0.5).to(device, case.dtype) for f in (a, b)))

    small, large = RANKS
    gate = part(large, *sizes) if config.is_gated else None
    whole = LoraWeights(gate, part(large, *sizes), part(small, *sizes[::-1]))
    return [whole, None, LoraWeights(down=part(large, *sizes[::-1]))]


def check_adapters(kernel: ExpertsKernel, case: Case) -> None:
    """Rows get what their adapters add, and rows without one what they got, to the bit."""
    reason = kernel.unsupported(replace(case.problem(), has_lora=True))
    if reason is not None:
        raise Refused(reason)
    weights, batch = case.expert_weights(), case.batch()
    adapters = kept(random_adapters(case), case.config, batch.hidden_states.device)
    numbers = torch.arange(len(batch.local_ids), device=batch.local_ids.device) % 4 - 1
    chosen = replace(batch, adapter_ids=numbers.int())
    nobody = replace(batch, adapter_ids=torch.full_like(numbers, -1).int())
    wide = torch.promote_types(case.dtype, torch.float32)
    with torch.no_grad():
        alone = kernel.run(kernel.pack(weights), batch)
        packed = kernel.with_lora(kernel.pack(weights), adapters)
        found, unasked = kernel.run(packed, chosen), kernel.run(packed, nobody)
        reference = ReferenceKernel()
        truth = reference.run(
            reference.with_lora(widened(weights, wide), adapters),
            replace(chosen, hidden_states=batch.hidden_states.to(wide)),
        )
    require(torch.equal(unasked, alone), "rows without an adapter must stay; got other results")
    error = relative_error(found, truth)
    bound = 2 * RTOL[case.dtype]
    require(error <= bound, f"the error must be at most {bound:.1e}; got {error:.1e}")
