"""`SharedExperts`: the MLP that every token visits, and when it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.config import SharedExpertsConfig, SharedExpertsOrder
from mixtura.cuda import is_capturing
from mixtura.experts.row_activation import by_row
from mixtura.experts.row_linear import RowLinear
from mixtura.kernels.reference.activation import activate
from mixtura.types import even_bounds


def shared_experts_order(
    config: SharedExpertsConfig | None,
    *,
    device_type: str,
    num_tokens: int,
    is_remote: bool,
    is_summed: bool,
    is_tracing: bool,
    is_recorded: bool,
) -> SharedExpertsOrder:
    """When shared experts run in this call. Pure, so that every caller decides alike.

    `is_remote`: the dispatcher waits on other ranks, which is time to use. `is_summed`: each of
    them can run a part. The auxiliary stream is not used under tracing; nor where autograd records,
    as a backward pass would free rows that the stream still reads.
    """
    if config is None:
        return SharedExpertsOrder.NONE
    if config.is_external:
        return SharedExpertsOrder.EXTERNAL
    if is_summed:
        return SharedExpertsOrder.SUMMED
    if is_remote:
        return SharedExpertsOrder.MK_INTERNAL_OVERLAPPED
    if (
        config.uses_stream
        and not is_tracing
        and not is_recorded
        and device_type == "cuda"
        and num_tokens <= config.stream_max_tokens
    ):
        return SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
    return SharedExpertsOrder.NO_OVERLAP


@dataclass(frozen=True, slots=True)
class SharedTask:
    """Shared experts under way; `result` waits for them where their sum is needed.

    Attributes:
        output: (T,H), to be read by nobody before `result` has returned it.
        stream: that it is computed on, where that is not the calling one.
        rows: what is read there, kept until then.
    """

    output: Tensor
    stream: torch.cuda.Stream | None = None
    rows: Tensor | None = None

    def result(self) -> Tensor:
        """(T,H); the calling stream waits for the auxiliary one."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.output.device)
            current.wait_stream(self.stream)
            # In a graph it would keep the memory until the capture ends; see `_auxiliary_stream`.
            if not is_capturing(self.output.device):
                self.output.record_stream(current)
        return self.output


class SharedExperts(nn.Module):
    """`down(f(gate(x)) * up(x))`, times `sigmoid(x @ w.T)` where there is a sigmoid gate.

    Args:
        config: width, activation, order.
        hidden_size: H.
        is_row_invariant: a row is bitwise the same in any batch and with any number of threads;
            the maps are `RowLinear`.
        device, dtype: of new, uninitialised parameters.
    """

    shared_config: SharedExpertsConfig
    is_row_invariant: bool = False

    def __init__(
        self,
        config: SharedExpertsConfig,
        hidden_size: int,
        *,
        is_row_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shared_config = config
        self.is_row_invariant = is_row_invariant
        width = config.intermediate_size

        linear_class = RowLinear if is_row_invariant else nn.Linear

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return linear_class(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.gate_proj = linear(hidden_size, width, config.has_bias) if config.is_gated else None
        self.up_proj = linear(hidden_size, width, config.has_bias)
        self.down_proj = linear(width, hidden_size, config.has_bias)

    def forward(self, hidden_states: Tensor, gate: nn.Linear | None = None) -> Tensor:
        """Run on (T,H) rows -> (T,H).

        `gate` is the linear map (1,H) of the sigmoid gate, which the layer owns.
        """
        up = self.up_proj(hidden_states)
        first = None if self.gate_proj is None else self.gate_proj(hidden_states)
        out: Tensor = self.down_proj(self._activate(first, up))
        if gate is None:
            return out
        shares = gate(hidden_states)
        return (by_row(torch.sigmoid, shares) if self.is_row_invariant else shares.sigmoid()) * out

    def _activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """(T,I) -> (T,I); `gate` is None in ungated experts."""

        def run(*parts: Tensor) -> Tensor:
            gate, up = parts if len(parts) == 2 else (parts[0], None)
            return activate(gate, up, self.shared_config.activation)

        parts = (up,) if gate is None else (gate, up)
        return by_row(run, *parts) if self.is_row_invariant else run(*parts)

    @property
    def can_be_cut(self) -> bool:
        """Whether parts can be taken of the maps: plain ones, that nobody watches."""
        maps = [self.up_proj, self.down_proj, self.gate_proj]
        return not self.is_row_invariant and all(
            one is None
            or (type(one) is nn.Linear and not one._forward_hooks and not one._forward_pre_hooks)
            for one in maps
        )

    def run_part(
        self, hidden_states: Tensor, gate: nn.Linear | None, part: int, parts: int
    ) -> Tensor:
        """What one of `parts` cuts of the width adds to the output: (T,H) -> (T,H)."""
        bounds = even_bounds(self.shared_config.intermediate_size, parts)
        cut = slice(bounds[part], bounds[part + 1])

        def cut_rows(linear: nn.Linear) -> Tensor:
            bias = None if linear.bias is None else linear.bias[cut]
            return F.linear(hidden_states, linear.weight[cut], bias)

        first = None if self.gate_proj is None else cut_rows(self.gate_proj)
        hidden = self._activate(first, cut_rows(self.up_proj))
        bias = self.down_proj.bias if part == 0 else None
        out = F.linear(hidden, self.down_proj.weight[:, cut], bias)
        return out if gate is None else gate(hidden_states).sigmoid() * out

    def start(
        self,
        hidden_states: Tensor,
        gate: nn.Linear | None,
        order: SharedExpertsOrder,
        part: tuple[int, int] | None = None,
    ) -> SharedTask:
        """Begin; on an auxiliary stream for MULTI_STREAM_OVERLAPPED, else at once.

        `part` is this rank's, as (number, of how many), for SUMMED.
        """
        if order is SharedExpertsOrder.SUMMED:
            assert part is not None
            return SharedTask(self.run_part(hidden_states, gate, *part))
        if order is not SharedExpertsOrder.MULTI_STREAM_OVERLAPPED:
            return SharedTask(self(hidden_states, gate))
        current = torch.cuda.current_stream(hidden_states.device)
        stream = _auxiliary_stream(current)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            output = self(hidden_states, gate)
        return SharedTask(output, stream, hidden_states)


_STREAMS: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


def _auxiliary_stream(current: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream beside a stream, on its device; each has one of its own.

    Work on it starts behind all that was started on `current`, and on no other stream: in a graph
    that is what keeps memory which is free again from being written before `current` has read it.
    """
    key = (current.device, current.cuda_stream)
    if key not in _STREAMS:
        _STREAMS[key] = torch.cuda.Stream(device=current.device)  # type: ignore[no-untyped-call]
    return _STREAMS[key]
