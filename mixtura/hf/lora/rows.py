"""Low-rank products of linear maps beside the experts: attention, shared experts, head, router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixtura.hf.lora.selection import Selection
from mixtura.routing import RouterTensors
from mixtura.routing.gate import Choice, GatePlan, gate_logits
from mixtura.types import TokenInputs

CHILD = "mixtura_lora"
"""The child of an adapted module that holds its factors."""


class LowRankMap(nn.Module):
    """What adapters add to one linear map: `out[t] += B_n (A_n x[t])`, n the adapter of row t.

    The factors of all adapters lie below each other in two matrices, and a row's products with
    those of others are zeroed in between, so that rows with different adapters, of different ranks,
    take two products together. They are buffers: they move with the model, and are in no
    state_dict.

    Args:
        factors: (A (r, in), B (out, r)) of each adapter that adds something, by number.
        selection: whose rows have which.
        device: of the factors.
    """

    a: Tensor
    b: Tensor
    owners: Tensor
    handle: RemovableHandle | None = None
    """Of the hook by which a linear layer calls this."""

    def __init__(
        self,
        factors: Mapping[int, tuple[Tensor, Tensor]],
        selection: Selection,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.selection = selection
        self.spans: dict[int, tuple[int, int]] = {}
        owners: list[int] = []
        for number, (a, _) in factors.items():
            self.spans[number] = (len(owners), len(owners) + len(a))
            owners += [number] * len(a)
        a = torch.cat([a for a, _ in factors.values()])
        b = torch.cat([b for _, b in factors.values()], 1)
        table = torch.tensor(owners, dtype=torch.int32)
        for name, value in (("a", a), ("b", b), ("owners", table)):
            self.register_buffer(name, value.to(device), persistent=False)

    def factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """A and B of each adapter, by number; views."""
        spans = self.spans.items()
        return {n: (self.a[first:last], self.b[:, first:last]) for n, (first, last) in spans}

    def forward(self, rows: Tensor, ids: Tensor, *, is_row_invariant: bool = False) -> Tensor:
        """(T,in), (T,) -> (T,out) in fp32."""
        inner = gate_logits(rows, self.a, None, is_fp32=True, is_row_invariant=is_row_invariant)
        inner = torch.where(self.owners == ids.unsqueeze(1), inner, 0.0)
        return gate_logits(inner, self.b, None, is_fp32=True, is_row_invariant=is_row_invariant)

    def add(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> Tensor:
        """A forward hook of a linear layer: its output with what the rows' adapters add."""
        rows: Tensor = next(iter((*args, *kwargs.values())))
        chosen, is_row_invariant = self.selection.chosen, self.selection.is_row_invariant
        if isinstance(chosen, int) and chosen not in self.spans:
            return out
        if isinstance(chosen, int) and not is_row_invariant:
            first, last = self.spans[chosen]
            inner = F.linear(rows.float(), self.a[first:last].float())
            added = F.linear(inner, self.b[:, first:last].float())
        else:
            ids = self.selection.ids(rows.shape[:-1], rows.device)
            flat = rows.reshape(-1, rows.shape[-1])
            added = self(flat, ids, is_row_invariant=is_row_invariant).view(out.shape)
        return (out + added).to(out.dtype)


@dataclass(frozen=True, slots=True)
class AdaptedGatePlan(GatePlan):
    """A gate whose logits adapters add to."""

    lora: LowRankMap | None = None

    def choose(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: RouterTensors,
        tokens: TokenInputs,
    ) -> Choice:
        """As without adapters where no token has one, else with what they add to the logits."""
        ids = tokens.adapter_ids
        if ids is None or self.lora is None:
            return GatePlan.choose(self, hidden_states, weight, bias, tensors, tokens)
        if self.debug:
            self.router.check_tokens(tokens, tensors)
        logits = self.logits(hidden_states, weight, bias)
        added = self.lora(hidden_states, ids, is_row_invariant=self.deterministic)
        logits = (logits + added).to(logits.dtype)
        return self.choose_from(logits, hidden_states.dtype, tensors, tokens)


def with_lora(plan: GatePlan, lora: LowRankMap | None) -> GatePlan:
    """A gate's plan with what adapters add, or without."""
    settings = plan.router, plan.precision, plan.deterministic, plan.debug
    return GatePlan(*settings) if lora is None else AdaptedGatePlan(*settings, lora)
