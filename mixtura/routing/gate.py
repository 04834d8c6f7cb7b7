"""The gate: hidden states -> router logits, in fp32 unless a family's own arithmetic is asked
for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.config import (
    GatePrecision,
    NoComputeKind,
    SelectionBias,
    Simulation,
)
from mixtura.errors import InputError
from mixtura.kernels.row_linear import row_invariant_linear
from mixtura.routing.routers import Router, RouterTensors
from mixtura.types import Routing, TokenInputs


def gate_logits(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    is_fp32: bool,
    is_row_invariant: bool = False,
) -> Tensor:
    """`hidden_states @ weight.T + bias`. (T,H), (E,H), (E,) -> (T,E).

    Args:
        is_fp32: in fp32, else in the dtype of the hidden states.
        is_row_invariant: a row's logits are bitwise the same in any batch and with any number of
            threads.
    """
    if is_fp32 and not is_row_invariant and _multiplies_exactly(hidden_states, weight):
        logits = torch.mm(hidden_states, weight.T, out_dtype=torch.float32)
        return logits if bias is None else logits + bias.float()
    if is_fp32:
        hidden_states, weight = hidden_states.float(), weight.float()
        bias = bias.float() if bias is not None else None
    else:
        weight = weight.to(hidden_states.dtype)
        bias = bias.to(hidden_states.dtype) if bias is not None else None
    if is_row_invariant:
        return row_invariant_linear(hidden_states, weight, bias)
    return F.linear(hidden_states, weight, bias)


def _multiplies_exactly(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether the device takes products of 16 bits as they are and adds them up in fp32.

    `torch.mm` with `out_dtype` has no gradient, and exists on CUDA devices for these dtypes alone.
    """
    return (
        hidden_states.is_cuda
        and weight.is_cuda
        and hidden_states.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == hidden_states.dtype
        and not (torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad))
    )


class Choice(NamedTuple):
    """What a gate and its router make of hidden states.

    Attributes:
        logits: (T, num_logits), fp32 or, native, the family's dtype.
        weights: (T, K). ids: (T, K) int64, or int32 from a GPU's kernel, no-compute experts
            included.
        routing: what `Router.finish` would make of it, where a kernel has done so along with the
            choice.
    """

    logits: Tensor
    weights: Tensor
    ids: Tensor
    routing: Routing | None = None


def open_to_hooks(gate: nn.Module, choice: Choice) -> Choice:
    """The choice alone where a forward hook may change it: all else is made of what that leaves."""
    return choice._replace(routing=None) if gate._forward_hooks else choice


@dataclass(frozen=True, slots=True)
class GatePlan:
    """How hidden states are scored and experts chosen; everything of a gate that holds no
    parameters.

    Attributes:
        router: chooses and weighs.
        precision: fp32, or the family's own arithmetic.
        deterministic: a row's logits do not depend on the batch.
        debug: NaN logits are an error.
    """

    router: Router
    precision: GatePrecision = GatePrecision.FP32
    deterministic: bool = False
    debug: bool = False

    def choose(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: RouterTensors,
        tokens: TokenInputs,
    ) -> Choice:
        """Score (T,H) rows with `weight` (num_logits, H) and choose K experts for each.

        Raises:
            InputError: with `debug`, NaN logits, or ids of tokens that are out of range.
        """
        if self.debug:
            self.router.check_tokens(tokens, tensors)
        is_native = self.precision is GatePrecision.NATIVE
        kernel, learned = self.router.kernel, (tensors.selection_bias, tensors.per_expert_scale)
        # A native gate is the family's to the bit, the order of its sums included.
        if not is_native and kernel and kernel.takes_rows(hidden_states, weight, bias, *learned):
            given = self.router.given_ids(tokens, tensors)
            choice = Choice(*kernel.choose(hidden_states, weight, bias, *learned, given))
            self._refuse_nan(choice.logits)
            return choice
        logits = self.logits(hidden_states, weight, bias)
        return self.choose_from(logits, hidden_states.dtype, tensors, tokens)

    def logits(self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(T,H) -> (T, num_logits), fp32 or as the family computes them."""
        return gate_logits(
            hidden_states,
            weight,
            bias,
            is_fp32=self.precision is not GatePrecision.NATIVE
            or self.router.config.native.fp32_logits,
            is_row_invariant=self.deterministic,
        )

    def choose_from(
        self, logits: Tensor, row_dtype: torch.dtype, tensors: RouterTensors, tokens: TokenInputs
    ) -> Choice:
        """Choose K experts for each row of (T, num_logits) logits, made of rows of a dtype."""
        is_native, native = self.precision is GatePrecision.NATIVE, self.router.config.native
        self._refuse_nan(logits)
        scored = logits if is_native and not native.fp32_scores else logits.float()
        choice = Choice(logits, *self.router.choose(scored, tokens, tensors))
        if is_native and not native.fp32_weights:
            choice = choice._replace(weights=choice.weights.to(row_dtype), routing=None)
        return choice

    def _refuse_nan(self, logits: Tensor) -> None:
        if self.debug and bool(logits.isnan().any()):
            rows = logits.isnan().any(-1).nonzero().flatten().tolist()
            raise InputError(
                f"router logits of tokens {rows[:8]} must be numbers; got NaN. Look at the layers "
                f"before this one."
            )


class Gate(nn.Module):
    """The gate's linear map, what the router has learned beside it, and the router.

    Parameters and buffers: `weight` (num_logits, H), `bias` (num_logits,), `selection_bias`,
    `per_expert_scale`, `hash_table`, `constants`, `replayed_ids`; those that the rule does not ask
    for are None.

    Args:
        plan: the router and its arithmetic.
        hidden_size: H.
        has_bias: the linear map has a bias.
        device, dtype: of new parameters. The weight is uninitialised, the rest neutral.
    """

    bias: Tensor | None
    selection_bias: Tensor | None
    per_expert_scale: Tensor | None
    hash_table: Tensor | None
    constants: Tensor | None
    replayed_ids: Tensor | None

    def __init__(
        self,
        plan: GatePlan,
        hidden_size: int,
        *,
        has_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        config = plan.router.config
        rows = config.num_logits
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.zeros(rows, device=device, dtype=dtype)) if has_bias else None,
        )
        kind = config.no_compute.kind if config.no_compute else None
        replays = config.simulation is not None and config.simulation.kind is Simulation.REPLAY
        neutral: dict[str, Tensor | None] = {
            "selection_bias": torch.zeros(config.num_choices, device=device)
            if config.selection_bias is not SelectionBias.NONE
            else None,
            "per_expert_scale": torch.ones(config.num_experts, device=device)
            if config.per_expert_scale
            else None,
            "constants": torch.zeros(
                config.no_compute.count, hidden_size, device=device, dtype=dtype
            )
            if config.no_compute and kind is NoComputeKind.CONSTANT
            else None,
            "hash_table": torch.zeros(1, config.top_k, dtype=torch.int32, device=device)
            if config.hash_routing
            else None,
            "replayed_ids": torch.zeros(1, config.top_k, dtype=torch.int32, device=device)
            if replays
            else None,
        }
        for name, value in neutral.items():
            self.register_buffer(name, value)

    def tensors(self) -> RouterTensors:
        """What the router needs besides the logits."""
        found = self._buffers  # looked up as attributes they took longer than the routing itself
        return RouterTensors(
            selection_bias=found["selection_bias"],
            per_expert_scale=found["per_expert_scale"],
            hash_table=found["hash_table"],
            constants=found["constants"],
            replayed_ids=found["replayed_ids"],
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Tables of ids take the number of rows that is loaded; it is in no configuration."""
        for name in ("hash_table", "replayed_ids"):
            own, loaded = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and loaded is not None and own.shape[1:] == loaded.shape[1:]:
                setattr(self, name, own.new_empty(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, hidden_states: Tensor, tokens: TokenInputs | None = None) -> Choice:
        """Choose experts for (T,H) rows."""
        choice = self.plan.choose(
            hidden_states, self.weight, self.bias, self.tensors(), tokens or TokenInputs()
        )
        return open_to_hooks(self, choice)
